"""Calls a function with the maps of every image, in Dask tasks of bounded memory, and makes a table of what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import dask
import numpy as np
import pandas as pd

from pipeline.analysis.tables import Table, rows_by_class
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.extract.layers import Array
from pipeline.source import urls
from pipeline.store.image_maps import decoded, map_sizes
from pipeline.store.layout import Size
from pipeline.store.objects import Place
from pipeline.store.schema import ShapeClass, StoredLayer
from pipeline.store.store import Store, open_array

TASK_BYTES = 64 * 1024**2
"""Bytes of float32 maps that a task holds at most, beside the same maps as stored; one image may be more."""
Function: TypeAlias = Callable[[Array], Any]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of one shard of one layer, and the images that they are of."""

    store: Place
    group: str
    layer: StoredLayer
    rows: tuple[int, ...]
    paths: tuple[str, ...]
    sizes: tuple[Size, ...]
    """Height and width of each image's maps."""


@dataclass(frozen=True, slots=True)
class Results:
    """Results of the function for the images of a piece."""

    kind: tuple[Any, ...]
    """("number",), ("array", length) or ("dict", *keys): the same for all images."""
    values: list[Any]


def split(rows: Array, shard_rows: int, row_bytes: int) -> list[Array]:
    """Positions in ``rows`` in groups that lie in one shard each and hold at most `TASK_BYTES` of maps, or one row.

    Examples
    --------
    >>> [part.tolist() for part in split(np.array([0, 1, 5, 8, 9]), 4, TASK_BYTES // 2)]
    [[0, 1], [2], [3, 4]]
    >>> [part.tolist() for part in split(np.array([0, 1, 2, 3]), 4, 2 * TASK_BYTES)]
    [[0], [1], [2], [3]]
    """
    most = max(1, TASK_BYTES // row_bytes)
    shards = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows // shard_rows)) + 1) if len(rows) else []
    return [part for shard in shards for part in np.split(shard, range(most, len(shard), most))]


def map_images(store: Store, table: Table, layer: StoredLayer, function: Function) -> pd.DataFrame | pd.Series:
    """What ``function`` gives for the maps of each entry; see `FeatureStore.map_images`."""
    positions, pieces = [], []
    for chosen, piece in _pieces(store, table, layer):
        positions.append(chosen)
        pieces.append(piece)
    shared: Any = dask.delayed(function, pure=False, traverse=False)  # in the graph once, however many pieces there are
    run: Any = dask.delayed(_run, pure=False)
    parts: Sequence[Results] = dask.compute(*(run(piece, shared) for piece in pieces))
    for piece, part in zip(pieces, parts, strict=True):
        _check_kinds(parts[0].kind, pieces[0].paths[0], part.kind, piece.paths[0])
    index = pd.Index(table["path"], name="path")
    if not parts:
        return pd.Series(np.empty(0), index)
    order = np.argsort(np.concatenate(positions), kind="stable")
    values = [value for part in parts for value in part.values]
    return _tabulate(parts[0].kind, [values[i] for i in order], index)


def _pieces(store: Store, table: Table, layer: StoredLayer) -> Iterator[tuple[Array, Piece]]:
    """The work, and at which positions of ``table`` its images are."""
    paths = table["path"].to_numpy(object)
    inputs = table[["input_height", "input_width"]].to_numpy()
    classes = {c.name: c for c in store.classes.values()}
    known: dict[Size, Size] = {}
    for group, positions, rows in rows_by_class(table):
        for part in split(rows, classes[group].layout.shard_rows, _row_bytes(store, classes[group], layer)):
            chosen = positions[part]
            for size in {*map(tuple, inputs[chosen].tolist())} - known.keys():
                known[size] = map_sizes(store.spec, *size)[layer.name]
            sizes = tuple(known[height, width] for height, width in inputs[chosen].tolist())
            yield chosen, Piece(store.path, group, layer, tuple(rows[part].tolist()), tuple(paths[chosen]), sizes)


def _row_bytes(store: Store, shape_class: ShapeClass, layer: StoredLayer) -> int:
    height, width = map_sizes(store.spec, *shape_class.size)[layer.name]
    return 4 * layer.channels * height * width


def _run(piece: Piece, function: Function) -> Results:
    """A Dask task: read a piece's maps and call the function for one image after the other."""
    kind: tuple[Any, ...] = ()
    values = []
    for path, maps in zip(piece.paths, _read(piece), strict=True):
        try:
            result = function(maps)
        except Exception as error:
            error.add_note(f"map_images: the function was at image {path!r}, maps of {maps.shape} (channel, y, x)")
            raise
        found, value = _understand(result, path)
        _check_kinds(kind or found, piece.paths[0], found, path)
        kind = kind or found
        values.append(value)
    return Results(kind, values)


def _read(piece: Piece) -> list[Array]:
    """Decoded maps of a piece's images, each cropped to its valid extent."""
    rows = np.array(piece.rows)
    try:
        with urls.errors(str(piece.store)):
            array = open_array(piece.store / piece.group / piece.layer.name)
            is_run = rows[-1] - rows[0] == len(rows) - 1
            block = np.asarray(array[rows[0] : rows[-1] + 1] if is_run else array.oindex[rows])
        found = [decoded(maps[:, :height, :width], piece.layer) for maps, (height, width) in zip(block, piece.sizes, strict=True)]
    except (OSError, ValueError, RuntimeError) as error:
        raise FeaturemapsError(
            f"maps of {piece.paths[0]!r} to {piece.paths[-1]!r} in {piece.store} cannot be read ({error}): an object of class "
            f"{piece.group} is damaged or out of reach, or its images have left since the store was opened; open it again, or have "
            "`featuremaps verify` look at it"
        ) from error
    return found


def _understand(result: Any, path: str) -> tuple[tuple[Any, ...], Any]:
    """The kind of a result, and the result in a plain form."""
    if isinstance(result, Mapping):
        return ("dict", *result), {key: _own(value) for key, value in result.items()}
    try:
        values = np.asarray(result)
    except ValueError:  # lists of several lengths
        values = np.empty((), object)
    if values.dtype.kind in "biufc" and values.ndim < 2:
        return (("array", len(values)), _own(values)) if values.ndim else (("number",), values[()])
    what = type(result).__name__ if values.dtype.kind not in "biufc" else f"an array of {values.ndim} dimensions {values.shape}"
    raise UsageError(
        f"the function gave {what} for {path!r}, where it is to give a number, a 1-D array of numbers or a dict, which become one line "
        "of a table: reduce the maps further, for instance with maps.mean((1, 2)), and return the result"
    )


def _own(value: Any) -> Any:
    """A value that keeps no maps in memory, as one that is part of them would: all of its block."""
    if isinstance(value, np.ndarray):
        return value if value.base is None else value.copy()
    return type(value)(map(_own, value)) if type(value) in {list, tuple} else value


def _check_kinds(kind: tuple[Any, ...], path: str, other: tuple[Any, ...], other_path: str) -> None:
    if kind != other and (kind[0] != "dict" or other[0] != "dict" or set(kind) != set(other)):
        raise UsageError(
            f"the function gave {_in_words(kind)} for {path!r} and {_in_words(other)} for {other_path!r}, which do not make one table: "
            "give the same for all images, whatever the size of their maps, NaN where there is nothing"
        )


def _in_words(kind: tuple[Any, ...]) -> str:
    if kind[0] == "array":
        return f"an array of {kind[1]}"
    return "a number" if kind[0] == "number" else f"a dict of {list(kind[1:])}"


def _tabulate(kind: tuple[Any, ...], values: list[Any], index: pd.Index) -> pd.DataFrame | pd.Series:
    if kind[0] == "number":
        return pd.Series(np.array(values), index)
    if kind[0] == "array":
        return pd.DataFrame(np.stack(values), index)
    keys = list(kind[1:])
    return pd.DataFrame([[value[key] for key in keys] for value in values], index, keys)
