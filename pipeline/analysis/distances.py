"""Which vectors are near each other: z-scores, Euclidean distances, closest pairs. No I/O; scipy only where a tree is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain, combinations, combinations_with_replacement, islice, product
from typing import Any

import numpy as np

from pipeline.errors import needs_extra
from pipeline.extract.layers import Array

ROUNDING = 4 * float(np.finfo(np.float32).eps)  # a column varies only if its range is above this share of its largest magnitude
_BLOCK_ROWS = 1 << 16
_BLOCK_ANSWERS = 1 << 22
TREE_COLUMNS = 16
"""Up to so many columns a tree is used. With more it looks at nearly all pairs, which matrix products do many times faster."""
_PRODUCT_ROWS = 1 << 10
"""8 MiB of distances at once."""
_BLOCK_VALUES = 1 << 20


def standardise(values: Array) -> Array:
    """Z-scores of the columns that have a spread.

    Each column is moved to mean 0 and scaled to standard deviation 1, so that a channel of large values counts as much as one of
    small ones. Columns whose range is within float32 rounding are dropped: scaled up, their noise would count as much as the rest.

    Parameters
    ----------
    values : (n, column) float32
        Rows that are not finite have no part in means and deviations, and stay NaN.

    Returns
    -------
    (n, kept column) float32

    Examples
    --------
    >>> standardise(np.array([[1, 7, 10], [3, 7, 30]], np.float32))
    array([[-1., -1.],
           [ 1.,  1.]], dtype=float32)
    """
    is_finite = np.isfinite(values).all(1)
    kept = []
    for column in values.T:
        finite = column[is_finite].astype(np.float64)
        if len(finite) and np.ptp(finite) > ROUNDING * np.abs(finite).max():
            scaled = np.where(is_finite, (column - finite.mean()) / finite.std(), np.nan)
            kept.append(scaled.astype(np.float32) + np.float32(0))  # no negative zeros, which equal others but differ in bits
    if kept:
        return np.stack(kept, 1)
    return np.where(is_finite, 0, np.nan).astype(np.float32).reshape(-1, 1)  # all alike


def nearest(vectors: Array, i: int, n: int) -> tuple[Array, Array]:
    """The ``n`` rows nearest to row ``i``, nearest first; the first of those that are as near.

    Parameters
    ----------
    vectors : (n_rows, column) float32
        NaN rows are nobody's neighbours.
    i : int
        Is not its own neighbour.
    n : int
        Fewer are found where there are fewer.

    Returns
    -------
    (rows, distances)
        (m,) int64 and (m,) float64, Euclidean.

    Examples
    --------
    >>> rows, distances = nearest(np.array([[0, 0], [3, 4], [1, 0]], np.float32), 0, 5)
    >>> rows.tolist(), distances.tolist()
    ([2, 1], [1.0, 5.0])
    """
    distances = np.empty(len(vectors))
    for start in range(0, len(vectors), _BLOCK_ROWS):
        difference = (vectors[start : start + _BLOCK_ROWS] - vectors[i]).astype(np.float64)
        distances[start : start + _BLOCK_ROWS] = np.sqrt(np.einsum("ij,ij->i", difference, difference))
    candidates = np.flatnonzero(np.isfinite(distances))
    candidates = candidates[candidates != i]
    if n < len(candidates):
        limit = np.partition(distances[candidates], n - 1)[n - 1]
        candidates = candidates[distances[candidates] <= limit]
    chosen = candidates[np.argsort(distances[candidates], kind="stable")][:n]
    return chosen, distances[chosen]


def closest_pairs(vectors: Array, n: int) -> list[tuple[int, int, float]]:
    """The ``n`` pairs of rows that are closest to each other, closest first.

    Equal rows are found by sorting. For the others, of up to `TREE_COLUMNS` columns, a KD-tree gives each row's nearest neighbour; the
    n-th smallest of these distances bounds the answer, so only rows with a neighbour within it are asked for their n nearest ones. That
    takes about ``n_rows * log(n_rows)`` steps of few columns, and up to ``n_rows**2`` of many. Of more columns all pairs are looked at,
    as products of blocks: ``n_rows**2 * n_columns`` multiplications (8,000 rows of 280 columns: about a second; ten times the rows take
    a hundred times as long) in some 30 MiB of memory beside the vectors and the answer.

    Parameters
    ----------
    vectors : (n_rows, column) float32
        NaN rows have no part.
    n : int
        Fewer are found where there are fewer.

    Returns
    -------
    list of (int, int, float)
        Rows (the first is the smaller) and Euclidean distance.

    Raises
    ------
    UsageError
        When scipy is not installed, and there are few columns.

    Examples
    --------
    >>> closest_pairs(np.array([[0.0], [5.0], [6.5], [0.0]], np.float32), 2)
    [(0, 3, 0.0), (1, 2, 1.5)]
    """
    pairs_of = _tree_pairs(_kd_tree()) if vectors.shape[1] <= TREE_COLUMNS else _product_pairs
    rows = np.flatnonzero(np.isfinite(vectors).all(1))
    groups = _equal_rows(vectors, rows)
    found = [(a, b, 0.0) for a, b in islice(chain.from_iterable(combinations(group, 2) for group in groups), n)]
    if len(found) < n and len(groups) > 1:
        firsts = vectors[[group[0] for group in groups]]
        for u, v, distance in pairs_of(firsts, n - len(found)):
            pairs = sorted((min(a, b), max(a, b)) for a, b in islice(product(groups[u], groups[v]), n))
            found += [(a, b, distance) for a, b in pairs]
            if len(found) >= n:
                break
    return found[:n]


def _kd_tree() -> Any:
    with needs_extra("analysis", "the search for the closest pairs of images"):
        from scipy.spatial import KDTree  # noqa: PLC0415 (an extra)
    return KDTree


def _equal_rows(vectors: Array, rows: Array) -> list[list[int]]:
    """The given rows in groups of equal ones: a tree takes the square of their number in time."""
    if not len(rows):
        return []
    chosen = np.ascontiguousarray(vectors[rows])
    keys = chosen.view(np.dtype((np.void, chosen.dtype.itemsize * chosen.shape[1]))).ravel()
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]]))
    groups = [part.tolist() for part in np.split(rows[order], starts[1:])]
    return sorted(groups)


def _tree_pairs(tree_of: Any) -> Callable[[Array, int], Iterator[tuple[int, int, float]]]:
    return lambda points, n: _distinct_pairs(tree_of(points), points, n)


def _distinct_pairs(tree: Any, points: Array, n: int) -> Iterator[tuple[int, int, float]]:
    """The ``n`` closest pairs of points of which no two are equal, closest first."""
    first, neighbour = tree.query(points, k=2, workers=-1)
    nearest_distance, nearest_row = first[:, 1], neighbour[:, 1]
    index = np.arange(len(points))
    ordered = np.stack([np.minimum(index, nearest_row), np.maximum(index, nearest_row)], 1)
    _, kept = np.unique(ordered, axis=0, return_index=True)
    bound = np.sort(nearest_distance[kept])[:n][-1] if len(kept) >= n else np.inf
    candidates = np.flatnonzero(nearest_distance <= bound)
    k = min(n + 1, len(points))
    best: dict[tuple[int, int], float] = {}
    for part in np.array_split(candidates, -(-len(candidates) * k // _BLOCK_ANSWERS)):
        distances, rows = tree.query(points[part], k=k, workers=-1)
        for i, near, far in zip(part.tolist(), rows.tolist(), distances.tolist(), strict=True):
            best |= {(min(i, j), max(i, j)): d for j, d in zip(near, far, strict=True) if j != i and d <= bound}
        best = dict(sorted(best.items(), key=lambda item: (item[1], item[0]))[:n])
    for (u, v), distance in best.items():
        yield u, v, distance


def _product_pairs(points: Array, n: int) -> Iterator[tuple[int, int, float]]:
    """Same as `_distinct_pairs`, by looking at all pairs.

    |a - b|^2 = |a|^2 + |b|^2 - 2 ab loses the digits of small distances, so what may be among the closest within the rounding of that
    is computed again from the differences.
    """
    squares = np.einsum("ij,ij->i", points, points, dtype=np.float64)
    rounding = 4 * (points.shape[1] + 4) * float(np.finfo(np.float64).eps) * float(squares.max())
    pairs, best = np.empty((0, 2), np.int64), np.empty(0)
    starts = range(0, len(points), _PRODUCT_ROWS)
    for i, j in combinations_with_replacement(starts, 2):
        a, b = (points[start : start + _PRODUCT_ROWS].astype(np.float64) for start in (i, j))
        about = a @ (-2 * b.T)
        about += squares[i : i + len(a), None]
        about += squares[j : j + len(b)]
        if i == j:
            about[np.tril_indices(len(a))] = np.inf
        limit = best[-1] if len(best) == n else np.inf
        candidates = np.argwhere(about < limit + rounding)
        if len(candidates) > n:  # the first blocks: those that are not among the n closest of the block
            values = about[tuple(candidates.T)]
            candidates = candidates[values < np.partition(values, n - 1)[n - 1] + 2 * rounding]
        if len(candidates):
            found = candidates + np.array([i, j])
            pairs, best = np.concatenate([pairs, found]), np.concatenate([best, _squared_distances(points, found)])
            order = np.lexsort((pairs[:, 1], pairs[:, 0], best))[:n]
            pairs, best = pairs[order], best[order]
    for (u, v), squared in zip(pairs.tolist(), best.tolist(), strict=True):
        yield u, v, math.sqrt(squared)


def _squared_distances(points: Array, pairs: Array) -> Array:
    """Distances of some pairs of rows, from their differences: (pair,) float64."""
    found = np.empty(len(pairs))
    step = max(1, _BLOCK_VALUES // points.shape[1])
    for start in range(0, len(pairs), step):
        u, v = pairs[start : start + step].T
        difference = points[u].astype(np.float64) - points[v]
        found[start : start + step] = np.einsum("ij,ij->i", difference, difference)
    return found
