"""Reads and writes stores, each object whole; the only home of zarr."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import ObjectStore

from pipeline import urls
from pipeline.errors import FeaturemapsError, StaleWriterError, UsageError
from pipeline.store.codecs import Array, compress, decompress
from pipeline.store.layout import ClassLayout, LayerLayout, Size, class_name
from pipeline.store.lock import LOCK_TTL_S, require_lock
from pipeline.store.objects import (
    Place,
    children,
    condition_of,
    delete,
    each,
    exists,
    fetch,
    make_folder,
    modified_s,
    parse_json,
    put,
    put_json,
    read_json,
    remove_folder,
)
from pipeline.store.run_ids import run_order
from pipeline.store.schema import (
    CLASS_NAME,
    EXTRACTOR,
    FORMAT,
    LEDGER_COLUMNS,
    REJECTED,
    RUNS,
    STATISTICS,
    Columns,
    ShapeClass,
    StoredLayer,
    StoreSpec,
    column_document,
    column_type,
    encode_rows,
    group_document,
    maps_document,
    object_key,
    pooled_document,
    root_document,
)


class Store:
    """A store: the driver writes through it, everybody may read.

    Parameters
    ----------
    path : Path or Url
        An existing store; see `create_store`.
    durable : bool
        Whether what is written is on the disk before anything follows that relies on it; see `Job.durability`.

    Raises
    ------
    UsageError
        When there is no store, or one of another format.
    """

    def __init__(self, path: Place, *, durable: bool = False) -> None:
        self.path = path
        self.durable = durable
        self.fence: Callable[[], None] = lambda: None
        """Called before columns or lengths of a group are written; raises when this process may no longer."""
        self.spec = _read_spec(path)
        self.classes: dict[Size, ShapeClass] = {}
        self.reload()

    def reload(self) -> None:
        """Look at the classes anew."""
        names = [name for name in children(self.path) if CLASS_NAME.fullmatch(name)]
        found = each(self._read_class, [self.path / name for name in names], self.path)
        self.classes = {c.size: c for c in found if c is not None}
        with _understood(self.path / REJECTED):
            self.n_rejected = int(read_json(self.path / REJECTED / "status" / "zarr.json")["shape"][0])

    def _read_class(self, folder: Place) -> ShapeClass | None:
        if not exists(folder / "zarr.json"):
            return None  # what a crash left of a class that was being created
        with _understood(folder):
            attributes = read_json(folder / "zarr.json")["attributes"]
            shape = attributes["shape_class"]
            size = (int(shape["height"]), int(shape["width"]))
            length = int(read_json(folder / "status" / "zarr.json")["shape"][0])
            layers = tuple(_read_layout(folder, layer) for layer in self.spec.map_layers)
            shard_rows = int(shape["shard_rows"])
            return ShapeClass(size, length, ClassLayout(size, shard_rows, layers), str(shape["kind"]), attributes)

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def length(self, group: str) -> int:
        """Rows of a class's group, or of ``rejected``."""
        return self.n_rejected if group == REJECTED else self.classes[_size(group)].length

    def column(self, group: str, name: str) -> Array:
        """One column of the ledger, whole: (image,) or, for pooled values, (image, channel)."""
        length = self.length(group)
        dtype, chunk = column_type(self.spec.layers, group, name)
        parts = each(partial(self._read_chunk, group, name, dtype, chunk), range(-(-length // chunk[0])), self.path)
        return np.concatenate(parts)[:length] if parts else np.empty((0, *chunk[1:]), object if dtype == "string" else dtype)

    def cell(self, group: str, name: str, row: int) -> Any:
        """One value of a column as it is now, of which one chunk is read."""
        dtype, chunk = column_type(self.spec.layers, group, name)
        return self._read_chunk(group, name, dtype, chunk, row // chunk[0])[row % chunk[0]]

    def array(self, group: str, name: str) -> zarr.Array[Any]:
        """Any array of a group, as stored; it may be longer than `length` after a crash."""
        return open_array(self.path / group / name)

    def weights(self) -> dict[str, Array]:
        """The weights as used, cross-correlation orientation, float32."""
        names = [name for name in children(self.path / EXTRACTOR) if name != "zarr.json"]
        return {name: np.asarray(open_array(self.path / EXTRACTOR / name)[...]) for name in names}

    def receipts(self, n: int | None = None) -> list[dict[str, Any]]:
        """The receipts of the last ``n`` runs, or of all, newest first; but for those that a power cut left empty."""
        found = []
        for run_id in self.run_ids()[::-1][:n]:
            with contextlib.suppress(FeaturemapsError):
                found.append(read_json(self.path / RUNS / f"{run_id}.json"))
        return found

    def last_receipt(self) -> dict[str, Any] | None:
        """The newest run's receipt; None where there is none that can be read."""
        return next(iter(self.receipts(1)), None)

    def run_ids(self) -> list[str]:
        """Names of the runs that left a receipt, oldest first; no clock decides the order."""
        return receipt_ids(self.path)

    def _read_chunk(self, group: str, name: str, dtype: str, chunk: tuple[int, ...], i: int) -> Array:
        path = self.path / group / name / object_key(i, len(chunk))
        return _decode_chunk(path, fetch(path)[0], dtype, chunk)

    # -- the driver's writing ----------------------------------------------------------------------------------------------------

    def create_class(self, layout: ClassLayout, kind: str, columns: Columns) -> None:
        """Create a class with its first rows, all pending; it exists from the moment its group's metadata does.

        Raises
        ------
        FeaturemapsError
            When there is such a class: its rows would be lost.
        """
        group = self.path / class_name(layout.size)
        if exists(group / "zarr.json"):
            raise FeaturemapsError(
                f"class {group} exists already: making it anew would lose its rows, so nothing was touched; this is an error of "
                "the program, please report it"
            )
        _remove_unfinished(group)
        length = len(columns["path"])
        documents = {name: column_document(name, dtype, length) for name, dtype in LEDGER_COLUMNS.items()}
        for layer, stored in zip(layout.layers, self.spec.map_layers, strict=True):
            documents[layer.name] = maps_document(layout, layer, stored, length)
        for stored in self.spec.layers:
            documents |= {f"{stored.name}_{statistic}": pooled_document(stored, length) for statistic in STATISTICS}
        each(lambda item: self._create_array(group / item[0], item[1]), documents.items(), group)
        self._write_columns(group.name, np.arange(length), columns)
        height, width = layout.size
        attributes = {"shape_class": {"height": height, "width": width, "kind": kind, "shard_rows": layout.shard_rows}}
        put_json(group / "zarr.json", group_document(attributes), durable=self.durable)
        self.classes[layout.size] = ShapeClass(layout.size, length, layout, kind, attributes)

    def _create_array(self, folder: Place, document: dict[str, Any]) -> None:
        make_folder(folder, durable=self.durable)
        put_json(folder / "zarr.json", document, durable=self.durable, only="create")

    def append(self, group: str, columns: Columns) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Append rows to a class or to ``rejected``; ``status`` grows last, so a crash before that leaves them unseen.

        Every append to a group must give the same columns: what a crashed one left behind the end is overwritten, not cleared.

        Returns
        -------
        (n,) int64
            The new rows.
        """
        old = self.length(group)
        new = old + len(columns["path"])
        rows = np.arange(old, new)
        self._write_columns(group, rows, columns)
        self._resize(group, new)
        if group == REJECTED:
            self.n_rejected = new
        else:
            size = _size(group)
            self.classes[size] = replace(self.classes[size], length=new)
        return rows

    def mark_padded(self, size: Size) -> None:
        """Note that a class now holds images smaller than itself."""
        shape_class = self.classes[size]
        attributes = dict(shape_class.attributes)
        attributes["shape_class"] = {**attributes["shape_class"], "kind": "padded"}
        put_json(self.path / shape_class.name / "zarr.json", group_document(attributes), durable=self.durable)
        self.classes[size] = replace(shape_class, kind="padded", attributes=attributes)

    def commit(self, group: str, rows: Array, columns: Columns) -> None:
        """Write columns of some rows, ``status`` last: the row's maps must be in the store already.

        ``maps_digest`` is the last but one: by it a removed row whose image returns is known to be done.
        """
        self._write_columns(group, rows, columns)

    def _write_columns(self, group: str, rows: Array, columns: Columns) -> None:
        self.fence()
        last = [name for name in ("maps_digest", "status") if name in columns]
        first = [name for name in columns if name not in last]
        each(lambda name: self._write_column(group, name, rows, columns[name]), first, self.path)
        for name in last:
            self._write_column(group, name, rows, columns[name])

    def _write_column(self, group: str, name: str, rows: Array, values: Array) -> None:
        dtype, chunk = column_type(self.spec.layers, group, name)
        for i in np.unique(rows // chunk[0]):
            inside = rows // chunk[0] == i
            path = self.path / group / name / object_key(int(i), len(chunk))
            data, condition = fetch(path)
            content = _decode_chunk(path, data, dtype, chunk)
            content[rows[inside] - i * chunk[0]] = values[inside]
            put(path, compress(content), durable=self.durable, only=condition)

    def _resize(self, group: str, length: int) -> None:
        self.fence()
        names = [name for name in children(self.path / group) if name not in {"zarr.json", "status"}]
        each(lambda name: self._resize_array(self.path / group / name, length), names, self.path)
        self._resize_array(self.path / group / "status", length)

    def _resize_array(self, folder: Place, length: int) -> None:
        path = folder / "zarr.json"
        content, condition = fetch(path)
        if content is None:
            return
        document = parse_json(path, content)
        if document["shape"][0] != length:
            document["shape"][0] = length
            put_json(path, document, durable=self.durable, only=condition)

    def repair(self) -> None:
        """Undo what a crash left: arrays longer than ``status``, unfinished classes, temporary files; only under the lock."""
        for group in [*(c.name for c in self.classes.values()), REJECTED]:
            self._resize(group, self.length(group))
        for name in children(self.path):
            if CLASS_NAME.fullmatch(name) and not exists(self.path / name / "zarr.json"):
                _remove_unfinished(self.path / name)
        if isinstance(self.path, Path):
            litter: list[Place] = [*self.path.rglob("*.partial")]
        else:  # where only tries of the lock leave any
            litter = [self.path / RUNS / name for name in children(self.path / RUNS) if name.endswith(".partial")]
        for path in litter:
            if not (path.name.startswith("lock.json") and _is_fresh(path)):
                delete(path)

    def write_receipt(self, run_id: str, receipt: Mapping[str, Any]) -> None:
        """Leave a run's receipt in ``runs/``."""
        put_json(self.path / RUNS / f"{run_id}.json", receipt, indent=1, durable=self.durable)

    def touch_version(self, version: str) -> None:
        """Note which version wrote last."""
        if version != self.spec.written_version:
            self.spec = replace(self.spec, written_version=version)
            put_json(self.path / "zarr.json", root_document(self.spec), durable=self.durable)


def _is_fresh(litter: Place) -> bool:
    """Whether a temporary file of the lock may be that of a run that waits for it just now, by the clock of the file server."""
    try:
        return abs(modified_s(litter.parent / "lock.json") - modified_s(litter)) < LOCK_TTL_S  # a clock may have been ahead
    except FileNotFoundError:
        return True


def _remove_unfinished(group: Place) -> None:
    """Clear away what a crash left of a class that was being created, and which therefore never had a status."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = children(group / "status")
    if any(name.startswith("c.") for name in names):
        raise FeaturemapsError(
            f"class {group} has rows but no zarr.json, so it was damaged after it was made: clearing it away would lose its maps, so "
            "nothing was touched; restore that file from a copy, or move the folder away to compute its images again"
        )
    remove_folder(group)


def _decode_chunk(path: Place, data: bytes | None, dtype: str, chunk: tuple[int, ...]) -> Array:
    if data is None:
        return (
            np.full(chunk, "", object) if dtype == "string" else np.full(chunk, np.nan if dtype.startswith("float") else 0, dtype)
        )
    try:
        return decompress(data, dtype, chunk)
    except FeaturemapsError as error:
        raise FeaturemapsError(f"{path}: {error}") from error


@contextlib.contextmanager
def _understood(path: Place) -> Iterator[None]:
    """Metadata that says something else than format 1 does is an error for people."""
    try:
        yield
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise FeaturemapsError(
            f"metadata of {path} does not say what a store of format {FORMAT} says ({type(error).__name__}: {error}), so nobody knows "
            "what its maps mean; restore its zarr.json files from a copy"
        ) from error


def receipt_ids(path: Place) -> list[str]:
    """As `Store.run_ids`, also of a folder that is no store yet."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = children(path / RUNS)
    return sorted((name.removesuffix(".json") for name in names if fnmatch(name, "*Z-*.json")), key=run_order)


def is_store(path: Place) -> bool:
    """Whether ``path`` holds a finished creation of a store of any format."""
    try:
        (path / "zarr.json").stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"store {path} cannot be looked at ({error}): check its permissions; nothing was started") from error
    return True


def _read_spec(path: Place) -> StoreSpec:
    if not is_store(path):
        raise UsageError(f"there is no store at {path}: check the path, or make one with `featuremaps run SOURCE {path}`")
    with _understood(path):
        content = (read_json(path / "zarr.json").get("attributes") or {}).get("featuremaps")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UsageError(
            f"{path} is {'a store of format ' + repr(found) if found is not None else 'a Zarr group but no featuremaps store'}, and "
            f"this version reads and writes format {FORMAT} only: nothing was touched; give another folder or use the version that "
            "made it"
        )
    with _understood(path):
        layers = tuple(
            StoredLayer(**{**layer, "fill_value": float("nan") if layer["fill_value"] is None else layer["fill_value"]})
            for layer in content["layers"]
        )
        for part, key in ((content["extractor"], "layers"), (content["decode"], "sha256")):
            part[key]  # must be there
        content.pop("sha256", None)  # which older stores have not
        return StoreSpec(**{**content, "layers": layers})


def _read_layout(folder: Place, layer: StoredLayer) -> LayerLayout:
    document = read_json(folder / layer.name / "zarr.json")
    _, channels, height, width = document["shape"]
    codec = document["codecs"][0]
    grid = codec["configuration"] if codec["name"] == "sharding_indexed" else document["chunk_grid"]["configuration"]
    rows, _, chunk_height, chunk_width = grid["chunk_shape"]
    return LayerLayout(layer.name, channels, height, width, np.dtype(layer.dtype).itemsize, rows, chunk_height, chunk_width)


def _size(group: str) -> Size:
    height, width = group.split("x")
    return int(height), int(width)


def open_array(folder: Place) -> zarr.Array[Any]:
    """An array of a store, for reading."""
    with urls.errors(str(folder)):
        where = ObjectStore(urls.connect(str(folder)), read_only=True) if isinstance(folder, urls.Url) else str(folder)
        return zarr.open_array(where, mode="r", zarr_format=3)


# -- what tasks write ------------------------------------------------------------------------------------------------------------


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
    """Write the objects of one layer that hold rows ``[start, start + len(block))``; the caller owns them.

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
        All rows of the shard up to its end or the class's length, as stored.
    fill : float
        Fill value of the array.
    durable : bool
        As of `Store`.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    FeaturemapsError
        When the rows are not one whole shard: another task would own a part of the same object.
    StaleWriterError
        When the array has another length than the plan, or the run no longer holds the store.
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
    objects = encode_rows(layout, layer, start, block, fill)
    conditions = {key: condition_of(folder / key) for key in objects}  # before the look at the lock
    require_lock(path / RUNS, run_id)
    for key, parts in objects.items():
        put(folder / key, *parts, durable=durable, only=conditions[key])
    return sum(len(part) for parts in objects.values() for part in parts)


def read_maps(path: Place, layout: ClassLayout, layer: str, start: int, stop: int) -> Array:
    """Rows of one layer as stored, for a writer that must keep them: (n, channel, y, x).

    Raises
    ------
    FeaturemapsError
        When they are damaged.
    """
    folder = path / class_name(layout.size) / layer
    try:
        with urls.errors(str(folder)):
            return np.asarray(open_array(folder)[start:stop])
    except (ValueError, RuntimeError) as error:
        raise FeaturemapsError(
            f"rows {start} to {stop} of {folder} are damaged ({error}), and their shard cannot be written anew without them: nothing was "
            f"changed; run `featuremaps verify {path} --repair`, which has them computed again, then the same command"
        ) from error
