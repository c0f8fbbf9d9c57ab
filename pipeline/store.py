"""Store format 1: a Zarr v3 group with one group per shape class; the only home of zarr. See docs/store-format.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import zarr

from pipeline.chunks import Array, array_document, compress, decompress, encode_shard, pad
from pipeline.errors import FeaturemapsError, StaleWriterError, UsageError
from pipeline.lock import require_lock
from pipeline.plan import ClassLayout, LayerLayout, Size, class_name

FORMAT = 1
COLUMN_ROWS = 16_384
MAX_COLUMN_BYTES = 4 * 1024**2
REJECTED = "rejected"
RUNS = "runs"
EXTRACTOR = "extractor"
STATISTICS = ("mean", "std", "min", "max")
Columns: TypeAlias = Mapping[str, Array]

_LEDGER = {
    "path": "string",
    "source_height": "int32",
    "source_width": "int32",
    "input_height": "int32",
    "input_width": "int32",
    "size_bytes": "int64",
    "fingerprint": "string",
    "digest": "string",
    "maps_digest": "string",
    "error": "string",
    "status": "uint8",
}
_CLASS_NAME = re.compile(r"\d+x\d+")
_REJECTED = {"path": "string", "size_bytes": "int64", "fingerprint": "string", "error": "string", "status": "uint8"}


class Status(IntEnum):
    """What the ledger says of a row; what it says is true, what it does not say is done again."""

    PENDING = 0
    DONE = 1
    QUARANTINED = 2
    REMOVED = 3
    SUPERSEDED = 4

    @property
    def is_live(self) -> bool:
        """Whether the row stands for an image of the collection."""
        return self < Status.REMOVED


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer whose maps are stored: ``value = stored * scale_factor + add_offset``."""

    name: str
    channels: int
    dtype: str
    scale_factor: float
    add_offset: float
    fill_value: float
    """NaN for floats, 0 for integers; data never take it."""
    error_bound: float
    """Largest difference between a decoded value and the float32 value that was computed."""

    def attributes(self) -> dict[str, Any]:
        """CF attributes of the array."""
        common = {"error_bound": self.error_bound}
        if self.dtype.startswith("float"):
            return common
        return common | {"scale_factor": self.scale_factor, "add_offset": self.add_offset, "_FillValue": 0}


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What a store was made with; a later run must agree, but for the versions."""

    source: str
    """What was listed: a folder, a pattern or a list, absolute."""
    source_root: str
    """The folder that stored paths are relative to, absolute."""
    dtype: str
    extractor: dict[str, Any]
    """Layers, outputs, input channels, where the weights came from, and ``sha256`` over all but the latter."""
    decode: dict[str, Any]
    """The decode rules and their ``sha256``."""
    layers: tuple[StoredLayer, ...]
    created_version: str
    written_version: str
    format: int = FORMAT


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """One group of the store."""

    size: Size
    """Input height and width, pixels."""
    length: int
    """Rows, as ``len(status)`` says."""
    layout: ClassLayout
    kind: str = "exact"
    """``exact``: every image has just this size; ``padded``: some are smaller."""
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Name of the group."""
        return class_name(self.size)


def put(path: Path, data: bytes) -> None:
    """Write one object whole: a reader sees the old bytes or the new ones, also after a kill."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_json(path: Path, document: Mapping[str, Any]) -> None:
    """`put` a JSON document."""
    put(path, json.dumps(document, indent=1, ensure_ascii=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a metadata document.

    Raises
    ------
    FeaturemapsError
        When it cannot be read or understood.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FeaturemapsError(
            f"metadata {path} cannot be read ({error}), so this store cannot be trusted as it is; check the disk and the "
            "permissions, or restore that file from a copy"
        ) from error
    if not isinstance(document, dict):
        raise FeaturemapsError(f"metadata {path} holds {type(document).__name__}, not an object; restore it from a copy")
    return document


def _group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


class Store:
    """A store on a file system: the driver writes through it, everybody may read.

    Parameters
    ----------
    path : Path
        An existing store; see `create_store`.

    Raises
    ------
    UsageError
        When there is no store, or one of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.spec = _read_spec(path)
        self.classes: dict[Size, ShapeClass] = {}
        self.reload()

    def reload(self) -> None:
        """Look at the classes anew."""
        found = (self._read_class(folder) for folder in sorted(self.path.iterdir()) if (folder / "status").is_dir())
        self.classes = {c.size: c for c in found if c is not None}
        self.n_rejected = int(read_json(self.path / REJECTED / "status" / "zarr.json")["shape"][0])

    def _read_class(self, folder: Path) -> ShapeClass | None:
        if folder.name == REJECTED or not (folder / "zarr.json").exists():
            return None  # what a crash left of a class that was being created
        attributes = read_json(folder / "zarr.json")["attributes"]
        shape = attributes["shape_class"]
        size = (int(shape["height"]), int(shape["width"]))
        length = int(read_json(folder / "status" / "zarr.json")["shape"][0])
        layers = tuple(_read_layout(folder, layer) for layer in self.spec.layers)
        shard_rows = int(shape["shard_rows"])
        return ShapeClass(size, length, ClassLayout(size, shard_rows, layers), str(shape["kind"]), attributes)

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def length(self, group: str) -> int:
        """Rows of a class's group, or of ``rejected``."""
        return self.n_rejected if group == REJECTED else self.classes[_size(group)].length

    def column(self, group: str, name: str) -> Array:
        """One column of the ledger, whole: (image,) or, for pooled values, (image, channel)."""
        length = self.length(group)
        dtype, chunk = self._column_type(group, name)
        parts = [self._read_chunk(group, name, dtype, chunk, i) for i in range(-(-length // chunk[0]))]
        return np.concatenate(parts)[:length] if parts else np.empty((0, *chunk[1:]), object if dtype == "string" else dtype)

    def array(self, group: str, name: str) -> zarr.Array[Any]:
        """Any array of a group, as stored; it may be longer than `length` after a crash."""
        return zarr.open_array(str(self.path / group / name), mode="r", zarr_format=3)

    def weights(self) -> dict[str, Array]:
        """The weights as used, cross-correlation orientation, float32."""
        group = zarr.open_group(str(self.path / EXTRACTOR), mode="r", zarr_format=3)
        return {name: np.asarray(array[...]) for name, array in sorted(group.arrays())}

    def receipts(self) -> list[dict[str, Any]]:
        """The receipts of all runs, oldest first."""
        return [read_json(path) for path in sorted((self.path / RUNS).glob("*Z-*.json"))]

    def last_receipt(self) -> dict[str, Any] | None:
        """The newest run's receipt."""
        newest = max((self.path / RUNS).glob("*Z-*.json"), default=None)
        return None if newest is None else read_json(newest)

    def _column_type(self, group: str, name: str) -> tuple[str, tuple[int, ...]]:
        types = _REJECTED if group == REJECTED else _LEDGER
        if name in types:
            return types[name], (COLUMN_ROWS,)
        layer = next(layer for layer in self.spec.layers if name.rsplit("_", 1)[0] == layer.name)
        return "float32", pooled_chunk(layer.channels)

    def _read_chunk(self, group: str, name: str, dtype: str, chunk: tuple[int, ...], i: int) -> Array:
        path = self.path / group / name / _key(i, len(chunk))
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            if dtype == "string":
                return np.full(chunk, "", object)
            return np.full(chunk, np.nan if dtype.startswith("float") else 0, dtype)
        try:
            return decompress(data, dtype, chunk)
        except FeaturemapsError as error:
            raise FeaturemapsError(f"{path}: {error}") from error

    # -- the driver's writing ----------------------------------------------------------------------------------------------------

    def create_class(self, layout: ClassLayout, kind: str, columns: Columns) -> None:
        """Create a class with its first rows, all pending; it exists from the moment its group's metadata does.

        Raises
        ------
        FeaturemapsError
            When there is such a class: its rows would be lost.
        """
        group = self.path / class_name(layout.size)
        if (group / "zarr.json").exists():
            raise FeaturemapsError(
                f"class {group} exists already: making it anew would lose its rows, so nothing was touched; this is an error of "
                "the program, please report it"
            )
        shutil.rmtree(group, ignore_errors=True)  # what a crash left
        length = len(columns["path"])
        documents = {name: _column_document(name, dtype, length) for name, dtype in _LEDGER.items()}
        for layer, stored in zip(layout.layers, self.spec.layers, strict=True):
            documents[layer.name] = _maps_document(layout, layer, stored, length)
            for statistic in STATISTICS:
                documents[f"{layer.name}_{statistic}"] = _pooled_document(stored, length)
        for name, document in documents.items():
            (group / name).mkdir(parents=True)
            put_json(group / name / "zarr.json", document)
        self._write_columns(group.name, np.arange(length), columns)
        height, width = layout.size
        attributes = {"shape_class": {"height": height, "width": width, "kind": kind, "shard_rows": layout.shard_rows}}
        put_json(group / "zarr.json", _group_document(attributes))
        self.classes[layout.size] = ShapeClass(layout.size, length, layout, kind, attributes)

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
        put_json(self.path / shape_class.name / "zarr.json", _group_document(attributes))
        self.classes[size] = replace(shape_class, kind="padded", attributes=attributes)

    def commit(self, group: str, rows: Array, columns: Columns) -> None:
        """Write columns of some rows, ``status`` last: the row's maps must be in the store already.

        ``maps_digest`` is the last but one: by it a removed row whose image returns is known to be done.
        """
        last = ("maps_digest", "status")
        order = sorted(columns, key=lambda name: last.index(name) if name in last else -1)
        self._write_columns(group, rows, {name: columns[name] for name in order})

    def _write_columns(self, group: str, rows: Array, columns: Columns) -> None:
        for name, values in columns.items():
            dtype, chunk = self._column_type(group, name)
            for i in np.unique(rows // chunk[0]):
                inside = rows // chunk[0] == i
                content = self._read_chunk(group, name, dtype, chunk, int(i))
                content[rows[inside] - i * chunk[0]] = values[inside]
                put(self.path / group / name / _key(int(i), len(chunk)), compress(content))

    def _resize(self, group: str, length: int) -> None:
        arrays = [folder for folder in (self.path / group).iterdir() if (folder / "zarr.json").exists()]
        for folder in sorted(arrays, key=lambda folder: folder.name == "status"):
            document = read_json(folder / "zarr.json")
            if document["shape"][0] != length:
                document["shape"][0] = length
                put_json(folder / "zarr.json", document)

    def repair(self) -> None:
        """Undo what a crash left: arrays longer than ``status``, unfinished classes, temporary files; only under the lock."""
        for group in [*(c.name for c in self.classes.values()), REJECTED]:
            self._resize(group, self.length(group))
        for folder in self.path.iterdir():
            if _CLASS_NAME.fullmatch(folder.name) and not (folder / "zarr.json").exists():
                shutil.rmtree(folder)
        for litter in self.path.rglob("*.partial"):
            if not litter.name.startswith("lock.json"):  # may belong to a run that is waiting for the lock just now
                litter.unlink(missing_ok=True)

    def write_receipt(self, run_id: str, receipt: Mapping[str, Any]) -> None:
        """Leave a run's receipt in ``runs/``."""
        put_json(self.path / RUNS / f"{run_id}.json", receipt)

    def touch_version(self, version: str) -> None:
        """Note which version wrote last."""
        if version != self.spec.written_version:
            self.spec = replace(self.spec, written_version=version)
            put_json(self.path / "zarr.json", _root_document(self.spec))


def is_store(path: Path) -> bool:
    """Whether ``path`` holds a finished creation of a store of any format."""
    try:
        (path / "zarr.json").stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"store {path} cannot be looked at ({error}): check its permissions; nothing was started") from error
    return True


def prepare_folder(path: Path) -> None:
    """Make the folder of a new store with its ``runs``, so that it can be locked.

    Raises
    ------
    UsageError
        When the folder holds something else, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        others = [] if is_store(path) else sorted(p.name for p in path.iterdir() if not _is_unfinished(p))
        if others:
            raise UsageError(
                f"{path} holds {others[0]!r} and is no store, so writing there could overwrite somebody's files; give a folder "
                "that does not exist yet, or an existing store"
            )
        (path / RUNS).mkdir(exist_ok=True)
        if not (path / RUNS / "zarr.json").exists():
            put_json(path / RUNS / "zarr.json", _group_document({}))
    except OSError as error:
        raise UsageError(
            f"store {path} cannot be written ({error.strerror}): nothing was started; check its permissions and the space, or give "
            "another folder"
        ) from error


def _is_unfinished(entry: Path) -> bool:
    """Whether an entry of a folder without a store is what a crash in the middle of its creation left."""
    begun = (entry.parent / RUNS / "zarr.json").exists()  # which is written first
    litter = entry.name.startswith("zarr.json.") and entry.name.endswith(".partial")
    return litter or entry.name in ((RUNS, EXTRACTOR, REJECTED) if begun else (RUNS,))


def create_store(path: Path, spec: StoreSpec, weights: Mapping[str, Array]) -> Store:
    """Create an empty store in a folder from `prepare_folder`; it exists from the moment its root metadata does."""
    shutil.rmtree(path / EXTRACTOR, ignore_errors=True)  # what a crash left, maybe of other layers
    (path / EXTRACTOR).mkdir()
    for name, values in weights.items():
        (path / EXTRACTOR / name).mkdir()
        dimensions = [f"{name}_{i}" for i in range(values.ndim)]
        document = array_document(values.shape, "float32", dimensions, chunk=values.shape, fill=float("nan"))
        put(path / EXTRACTOR / name / _key(0, values.ndim), compress(np.ascontiguousarray(values, "float32")))
        put_json(path / EXTRACTOR / name / "zarr.json", document)
    put_json(path / EXTRACTOR / "zarr.json", _group_document({"sha256": spec.extractor["sha256"]}))
    for name, dtype in _REJECTED.items():
        (path / REJECTED / name).mkdir(parents=True, exist_ok=True)
        put_json(path / REJECTED / name / "zarr.json", _column_document(name, dtype, 0))
    put_json(path / REJECTED / "zarr.json", _group_document({}))
    put_json(path / "zarr.json", _root_document(spec))
    return Store(path)


def _root_document(spec: StoreSpec) -> dict[str, Any]:
    content = asdict(spec)
    for layer in content["layers"]:
        layer["fill_value"] = None if np.isnan(layer["fill_value"]) else layer["fill_value"]
    return _group_document({"featuremaps": content})


def _read_spec(path: Path) -> StoreSpec:
    if not is_store(path):
        raise UsageError(f"there is no store at {path}: check the path, or make one with `featuremaps run SOURCE {path}`")
    content = (read_json(path / "zarr.json").get("attributes") or {}).get("featuremaps")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UsageError(
            f"{path} is {'a store of format ' + repr(found) if found is not None else 'a Zarr group but no featuremaps store'}, and "
            f"this version reads and writes format {FORMAT} only: nothing was touched; give another folder or use the version that "
            "made it"
        )
    try:
        layers = tuple(
            StoredLayer(**{**layer, "fill_value": float("nan") if layer["fill_value"] is None else layer["fill_value"]})
            for layer in content["layers"]
        )
        return StoreSpec(**{**content, "layers": layers})
    except (KeyError, TypeError) as error:
        raise FeaturemapsError(
            f"metadata {path / 'zarr.json'} does not say what a store of format {FORMAT} says ({error}), so nobody knows what its maps "
            "mean; restore that file from a copy"
        ) from error


def _read_layout(folder: Path, layer: StoredLayer) -> LayerLayout:
    document = read_json(folder / layer.name / "zarr.json")
    _, channels, height, width = document["shape"]
    codec = document["codecs"][0]
    grid = codec["configuration"] if codec["name"] == "sharding_indexed" else document["chunk_grid"]["configuration"]
    rows, _, chunk_height, chunk_width = grid["chunk_shape"]
    return LayerLayout(layer.name, channels, height, width, np.dtype(layer.dtype).itemsize, rows, chunk_height, chunk_width)


def pooled_chunk(channels: int) -> tuple[int, int]:
    """Chunk of a pooled column: many thousand rows, at most 4 MiB."""
    return max(1, min(COLUMN_ROWS, MAX_COLUMN_BYTES // (4 * channels))), channels


def _column_document(name: str, dtype: str, length: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    if name == "status":
        attributes = {"flag_values": [int(s) for s in Status], "flag_meanings": " ".join(s.name.lower() for s in Status)}
    fill = "" if dtype == "string" else 0
    return array_document((length,), dtype, ("image",), chunk=(COLUMN_ROWS,), fill=fill, attributes=attributes)


def _pooled_document(layer: StoredLayer, length: int) -> dict[str, Any]:
    dimensions = ("image", f"{layer.name}_channel")
    chunk = pooled_chunk(layer.channels)
    return array_document((length, layer.channels), "float32", dimensions, chunk=chunk, fill=float("nan"))


def _maps_document(layout: ClassLayout, layer: LayerLayout, stored: StoredLayer, length: int) -> dict[str, Any]:
    maps = (layer.channels, layer.height, layer.width)
    sharded = layout.is_sharded(layer)
    return array_document(
        (length, *maps),
        stored.dtype,
        ("image", *(f"{layer.name}_{axis}" for axis in ("channel", "y", "x"))),
        chunk=(layer.chunk_rows, layer.channels, layer.chunk_height, layer.chunk_width),
        shard=(layout.shard_rows, *maps) if sharded else None,
        fill=stored.fill_value,
        attributes=stored.attributes(),
    )


def _key(first: int, n_dimensions: int) -> str:
    """Key of the object at ``first`` along the first axis, whole along the others."""
    return ".".join(["c", str(first), *["0"] * (n_dimensions - 1)])


def _size(group: str) -> Size:
    height, width = group.split("x")
    return int(height), int(width)


# -- what tasks write ------------------------------------------------------------------------------------------------------------


def write_maps(path: Path, run_id: str, layout: ClassLayout, layer: LayerLayout, start: int, block: Array, fill: float) -> int:
    """Write the objects of one layer that hold rows ``[start, start + len(block))``; the caller owns them.

    Parameters
    ----------
    path : Path
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
    objects = _encode(layout, layer, start, block, fill)
    require_lock(path / RUNS, run_id)
    for key, data in objects.items():
        put(folder / key, data)
    return sum(map(len, objects.values()))


def _encode(layout: ClassLayout, layer: LayerLayout, start: int, block: Array, fill: float) -> dict[str, bytes]:
    """The objects that hold the rows of one shard: the shard, or the plain chunks of a shard's rows."""
    if layout.is_sharded(layer):
        return {_key(start // layout.shard_rows, 4): encode_shard(block, layer.chunk_rows, layout.shard_rows, fill)}
    shape = (layer.chunk_rows, layer.channels, layer.chunk_height, layer.chunk_width)
    cuts = [
        (iy, ix) for iy in range(-(-layer.height // layer.chunk_height)) for ix in range(-(-layer.width // layer.chunk_width))
    ]
    return {
        f"c.{start // layer.chunk_rows}.0.{iy}.{ix}": compress(pad(_cut(block, layer, iy, ix), shape, fill)) for iy, ix in cuts
    }


def _cut(block: Array, layer: LayerLayout, iy: int, ix: int) -> Array:
    h, w = layer.chunk_height, layer.chunk_width
    cut: Array = block[:, :, iy * h : (iy + 1) * h, ix * w : (ix + 1) * w]
    return cut


def read_maps(path: Path, layout: ClassLayout, layer: str, start: int, stop: int) -> Array:
    """Rows of one layer as stored, for a writer that must keep them: (n, channel, y, x)."""
    array = zarr.open_array(str(path / class_name(layout.size) / layer), mode="r", zarr_format=3)
    return np.asarray(array[start:stop])


def difference(old: StoreSpec, new: StoreSpec) -> list[str]:
    """What two specs disagree about, a line each: ``key: store has x, the command asks for y``."""
    lines: list[str] = []
    for key in ("source_root", "dtype"):
        lines += _differ(key, getattr(old, key), getattr(new, key))
    for part in ("extractor", "decode"):
        a, b = getattr(old, part), getattr(new, part)
        if a["sha256"] != b["sha256"]:
            keys = sorted((a.keys() | b.keys()) - {"sha256"})
            lines += [line for key in keys for line in _differ(f"{part}.{key}", a.get(key), b.get(key))]
    return lines


def _differ(key: str, old: Any, new: Any) -> list[str]:
    a, b = json.dumps(old, default=list), json.dumps(new, default=list)
    return [] if a == b else [f"{key}: the store has {a}, this run asks for {b}"]


def stack(names: Sequence[str]) -> Array:
    """Strings as a column."""
    column = np.empty(len(names), object)
    column[:] = names
    return column


def free_bytes(path: Path) -> int:
    """Free space of the file system that a store is or will be on."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
