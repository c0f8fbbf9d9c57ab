"""Opens arrays of a store with zarr, and writes maps for tasks; the only module that imports zarr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pipeline.errors import FeaturemapsError, StaleWriterError
from pipeline.extract.layers import Array
from pipeline.source import urls
from pipeline.store.layout import ClassLayout, LayerLayout, class_name
from pipeline.store.lock import require_lock
from pipeline.store.objects import Place, condition_of, object_store, put_parts, read_json
from pipeline.store.schema import RUNS, encode_rows

if TYPE_CHECKING:
    import zarr

StoredArray: TypeAlias = "zarr.Array[Any]"


def open_array(folder: Place) -> StoredArray:
    """Open an array of a store for reading."""
    import zarr  # noqa: PLC0415 (a worker that writes whole shards never needs it, and it takes a fifth of a worker's imports)
    from zarr.storage import ObjectStore  # noqa: PLC0415 (as above)

    with urls.errors(str(folder)):
        remote = object_store(folder)
        where = str(folder) if remote is None else ObjectStore(remote, read_only=True)
        return zarr.open_array(where, mode="r", zarr_format=3)


def write_maps(
    path: Place,
    run_id: str,
    layout: ClassLayout,
    layer: LayerLayout,
    start: int,
    block: Array,
    fill: float,
    *,
    durable: bool = False,
) -> int:
    """Write the objects of one layer that hold rows ``[start, start + len(block))``; the caller must own these rows.

    Parameters
    ----------
    path : Path or Url
        The store.
    run_id : str
        The run that sent the task.
    layout, layer
        Layout of the class and of the layer.
    start : int
        First row; a multiple of the class's ``shard_rows``.
    block : (n, channel, y, x)
        All rows of the shard, up to its end or the class's length, as stored.
    fill : float
        Fill value of the array.
    durable : bool
        Same as for `Store`.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    FeaturemapsError
        When the rows are not exactly one shard: another task would own part of the same object.
    StaleWriterError
        When the array's length differs from the plan, or the run no longer holds the store.
    """
    folder = path / class_name(layout.size) / layer.name
    length = int(read_json(folder / "zarr.json")["shape"][0])
    if start % layout.shard_rows or len(block) > layout.shard_rows:
        raise FeaturemapsError(
            f"rows {start} to {start + len(block)} of {folder} do not lie in one shard of {layout.shard_rows} rows: two tasks would "
            "write one object; this is an error of the plan, please report it"
        )
    if start + len(block) != min(start + layout.shard_rows, length):
        raise StaleWriterError(
            f"{folder} has {length} rows, but a task was about to write rows {start} to {start + len(block)} as a whole shard: the "
            "store has changed since the task was sent; it writes nothing, and the next run does its rows"
        )
    sizes: list[int] = []
    check = partial(require_lock, path / RUNS, run_id)
    for key, parts in encode_rows(layout, layer, start, block, fill):
        condition = condition_of(folder / key)  # read before the lock is checked
        put_parts(folder / key, _noted(parts, sizes), durable=durable, only=condition, check=check)
    return sum(sizes)


def _noted(parts: Iterable[bytes], sizes: list[int]) -> Iterator[bytes]:
    """The parts of an object, whose sizes are noted."""
    for part in parts:
        sizes.append(len(part))
        yield part


def read_maps(path: Place, layout: ClassLayout, layer: str, start: int, stop: int) -> Array:
    """Rows of one layer as stored, (n, channel, y, x), for a writer that must keep them.

    Raises
    ------
    FeaturemapsError
        When the rows are damaged.
    """
    folder = path / class_name(layout.size) / layer
    try:
        with urls.errors(str(folder)):
            return np.asarray(open_array(folder)[start:stop])
    except (ValueError, RuntimeError) as error:
        raise FeaturemapsError(
            f"rows {start} to {stop} of {folder} are damaged ({error}), and their shard cannot be rewritten without them: nothing was "
            f"changed; run `featuremaps verify {path} --repair`, which has them computed again, then the same command"
        ) from error
