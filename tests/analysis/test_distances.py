from __future__ import annotations

import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.analysis import distances as similarity
from pipeline.analysis.distances import TREE_COLUMNS, closest_pairs, nearest, standardise
from pipeline.errors import UsageError

SMALL = st.integers(0, 4).map(float) | st.just(float("nan"))
VECTORS = st.tuples(st.integers(1, 12), st.integers(1, 3)).flatmap(lambda shape: arrays(np.float32, shape, elements=SMALL))


def all_pairs(vectors):
    rows = [i for i in range(len(vectors)) if np.isfinite(vectors[i]).all()]
    return {(i, j): float(np.linalg.norm(vectors[i].astype(float) - vectors[j])) for i in rows for j in rows if i < j}


@settings(deadline=None)
@given(VECTORS, st.integers(1, 70))
def test_the_closest_pairs_are_those_of_all_pairs(vectors, n):
    expected = all_pairs(vectors)
    found = closest_pairs(vectors, n)
    assert len({(a, b) for a, b, _ in found}) == len(found) == min(n, len(expected))
    assert [distance for _, _, distance in found] == pytest.approx(sorted(expected.values())[:n], abs=1e-6)
    assert all(expected[a, b] == pytest.approx(distance, abs=1e-6) for a, b, distance in found)


@settings(deadline=None)
@given(VECTORS, st.integers(1, 12), st.data())
def test_neighbours_are_sorted_by_distance_then_by_order(vectors, n, data):
    i = data.draw(st.integers(0, len(vectors) - 1))
    rows, distances = nearest(vectors, i, n)
    expected = all_pairs(vectors)
    others = sorted((expected[min(i, j), max(i, j)], j) for j in range(len(vectors)) if (min(i, j), max(i, j)) in expected)[:n]
    assert list(zip(distances.tolist(), rows.tolist(), strict=True)) == [(pytest.approx(d, abs=1e-6), j) for d, j in others]


@settings(deadline=None)
@given(arrays(np.float32, (7, 4), elements=st.floats(-100, 100, width=32)))
def test_standardised_columns_have_mean_0_and_deviation_1(values):
    found = standardise(values)
    assert np.isfinite(found).all()
    spread = np.ptp(values.astype(float), axis=0) > 1e-3
    assert found.shape[1] >= max(1, spread.sum())
    if spread.all():
        np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(found.std(0), 1, atol=1e-4)


def test_a_column_whose_spread_is_rounding_has_no_say():
    values = np.array([[1, 0.1], [2, np.nextafter(np.float32(0.1), np.float32(1))], [3, 0.1]], np.float32)
    assert standardise(values).shape == (3, 1)


def test_where_all_are_alike_all_distances_are_0():
    vectors = standardise(np.full((3, 2), 7, np.float32))
    assert closest_pairs(vectors, 2) == [(0, 1, 0.0), (0, 2, 0.0)]
    assert nearest(vectors, 1, 9)[1].tolist() == [0.0, 0.0]


def test_a_row_that_is_not_finite_counts_nowhere():
    values = np.array([[1, 5], [np.nan, 5], [3, 6], [2, 8]], np.float32)
    vectors = standardise(values)
    assert np.isnan(vectors[1]).all()
    np.testing.assert_allclose(vectors[[0, 2, 3]].mean(0), 0, atol=1e-6)
    assert 1 not in nearest(vectors, 0, 4)[0]
    assert nearest(vectors, 1, 4)[0].tolist() == []


def test_one_row_has_no_neighbour_and_none_have_no_pair():
    assert nearest(np.zeros((1, 2), np.float32), 0, 3)[0].tolist() == []
    assert closest_pairs(np.zeros((1, 2), np.float32), 3) == []
    assert closest_pairs(standardise(np.zeros((0, 2), np.float32)), 3) == []


def test_thousands_of_equal_rows_do_not_make_the_tree_slow():
    """One leaf of a tree would hold them all, and each would look at all others: 10,000,000,000 distances."""
    vectors = np.zeros((100_000, 2), np.float32)
    vectors[-2:] = [[5, 5], [5, 6]]
    assert closest_pairs(vectors, 3) == [(0, 1, 0.0), (0, 2, 0.0), (0, 3, 0.0)]
    assert closest_pairs(np.concatenate([vectors[-2:], vectors[:1]]), 2)[0] == (0, 1, 1.0)


WIDE = st.tuples(st.integers(1, 12), st.integers(TREE_COLUMNS + 1, TREE_COLUMNS + 3)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.integers(0, 1).map(float) | st.just(float("nan")), fill=st.just(0.0))
)


@settings(deadline=None)
@given(WIDE, st.integers(1, 70))
def test_the_closest_pairs_of_many_columns_are_those_of_all_pairs(vectors, n):
    expected = all_pairs(vectors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(similarity, "_PRODUCT_ROWS", 3)
        found = closest_pairs(vectors, n)
    assert len({(a, b) for a, b, _ in found}) == len(found) == min(n, len(expected))
    assert [distance for _, _, distance in found] == pytest.approx(sorted(expected.values())[:n], abs=1e-6)
    assert all(expected[a, b] == pytest.approx(distance, abs=1e-6) for a, b, distance in found)


def test_products_and_the_tree_find_the_same_also_where_points_are_very_close(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = 20 * rng.standard_normal((2500, 30)).astype(np.float32)
    vectors[700] = vectors[2400]
    for row in range(12):  # nearer to each other than the products can tell
        vectors[1500 + row] = vectors[3]
        vectors[1500 + row, row] = np.nextafter(vectors[3, row], np.float32(np.inf))
    by_products = closest_pairs(vectors, 40)
    monkeypatch.setattr(similarity, "TREE_COLUMNS", 30)
    by_tree = closest_pairs(vectors, 40)
    assert by_products[0] == (700, 2400, 0.0)
    assert [distance for _, _, distance in by_products] == pytest.approx([distance for _, _, distance in by_tree], rel=1e-12)
    assert by_products[:30] == [(a, b, pytest.approx(distance, rel=1e-12)) for a, b, distance in by_tree[:30]]


def test_products_hold_no_more_than_some_blocks():
    vectors = np.random.default_rng(0).standard_normal((4000, 40)).astype(np.float32)
    tracemalloc.start()
    assert len(closest_pairs(vectors, 5)) == 5
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60e6  # all distances at once would be 128 MB


def test_many_columns_need_no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    assert closest_pairs(np.eye(3, TREE_COLUMNS + 1, dtype=np.float32), 1) == [(0, 1, pytest.approx(2**0.5))]


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.spatial", None)
    with pytest.raises(UsageError, match=r"scipy, which is not installed \(.*pip install 'featuremaps\[analysis\]'"):
        closest_pairs(np.zeros((2, 1), np.float32), 1)
