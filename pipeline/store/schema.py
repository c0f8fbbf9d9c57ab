"""Store format 1: names, documents and objects, without any I/O. See docs/store-format.md."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np

from pipeline.extract.layers import Array
from pipeline.store.codecs import array_document, compress, encode_shard, pad
from pipeline.store.layout import ClassLayout, LayerLayout, Size, class_name

FORMAT = 1
COLUMN_ROWS = 16_384
MAX_COLUMN_BYTES = 4 * 1024**2
REJECTED = "rejected"
RUNS = "runs"
EXTRACTOR = "extractor"
STATISTICS = ("mean", "std", "min", "max")
Columns: TypeAlias = Mapping[str, Array]

LEDGER_COLUMNS = {
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
CLASS_NAME = re.compile(r"\d+x\d+")
ADMISSION = ("pixel_limit", "formats")
"""Settings of decoding that decide which images are read; they do not affect the maps of the images that are."""
REJECTED_COLUMNS = {"path": "string", "size_bytes": "int64", "fingerprint": "string", "error": "string", "status": "uint8"}


class Status(IntEnum):
    """Status of a row in the ledger. A status is always true; work that it does not record is done again."""

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
    """One layer with stored values: ``value = stored * scale_factor + add_offset``."""

    name: str
    channels: int
    dtype: str
    scale_factor: float
    add_offset: float
    fill_value: float
    """NaN for floats, 0 for integers; data never have this value."""
    error_bound: float
    """Largest difference between a decoded value and the computed float32 value."""
    has_maps: bool = True
    """False if only the layer's pooled values are kept."""

    def attributes(self) -> dict[str, Any]:
        """CF attributes of the array."""
        common = {"error_bound": self.error_bound}
        if self.dtype.startswith("float"):
            return common
        return common | {"scale_factor": self.scale_factor, "add_offset": self.add_offset, "_FillValue": 0}


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """The settings of a store; later runs must agree with them, except for the versions."""

    source: str
    """The listed source: a folder, a pattern or a list, absolute."""
    source_root: str
    """The folder to which stored paths are relative, absolute."""
    dtype: str
    extractor: dict[str, Any]
    """Layers, outputs, input channels, origin of the weights, and a ``sha256`` over all but the origin."""
    decode: dict[str, Any]
    """The decode rules and their ``sha256``."""
    layers: tuple[StoredLayer, ...]
    created_version: str
    written_version: str
    format: int = FORMAT
    excluded: tuple[str, ...] = ()
    """What listings leave out unless the job says otherwise; older stores have none, and keep their rows."""

    @property
    def map_layers(self) -> tuple[StoredLayer, ...]:
        """The layers with stored maps, in the order of `ClassLayout.layers`."""
        return tuple(layer for layer in self.layers if layer.has_maps)


@dataclass(frozen=True, slots=True)
class ShapeClass:
    """One group of the store."""

    size: Size
    """Input height and width, pixels."""
    length: int
    """Number of rows, from ``len(status)``."""
    layout: ClassLayout
    kind: str = "exact"
    """``exact``: every image has exactly this size; ``padded``: some are smaller."""
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Name of the group."""
        return class_name(self.size)


def group_document(attributes: dict[str, Any]) -> dict[str, Any]:
    """Metadata of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


def root_document(spec: StoreSpec) -> dict[str, Any]:
    """Metadata of a store's root."""
    content = asdict(spec)
    for layer in content["layers"]:
        layer["fill_value"] = None if np.isnan(layer["fill_value"]) else layer["fill_value"]
        if layer["has_maps"]:
            # Written only if False, so that stores with all maps are the same as those of earlier versions.
            del layer["has_maps"]
    if not spec.excluded:
        del content["excluded"]  # as in older stores
    return group_document({"featuremaps": with_digest(content)})


def with_digest(content: dict[str, Any]) -> dict[str, Any]:
    """JSON values with their ``sha256`` added."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return content | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


def pooled_chunk(channels: int) -> tuple[int, int]:
    """Chunk of a pooled column: many thousands of rows, at most 4 MiB."""
    return max(1, min(COLUMN_ROWS, MAX_COLUMN_BYTES // (4 * channels))), channels


def column_type(layers: Sequence[StoredLayer], group: str, name: str) -> tuple[str, tuple[int, ...]]:
    """Type and chunk of a column."""
    types = REJECTED_COLUMNS if group == REJECTED else LEDGER_COLUMNS
    if name in types:
        return types[name], (COLUMN_ROWS,)
    layer = next(layer for layer in layers if name.rsplit("_", 1)[0] == layer.name)
    return "float32", pooled_chunk(layer.channels)


def column_document(name: str, dtype: str, length: int) -> dict[str, Any]:
    """Metadata of a ledger column."""
    attributes: dict[str, Any] = {}
    if name == "status":
        attributes = {"flag_values": [int(s) for s in Status], "flag_meanings": " ".join(s.name.lower() for s in Status)}
    fill = "" if dtype == "string" else 0
    return array_document((length,), dtype, ("image",), chunk=(COLUMN_ROWS,), fill=fill, attributes=attributes)


def pooled_document(layer: StoredLayer, length: int) -> dict[str, Any]:
    """Metadata of a pooled column (image, channel)."""
    dimensions = ("image", f"{layer.name}_channel")
    chunk = pooled_chunk(layer.channels)
    return array_document((length, layer.channels), "float32", dimensions, chunk=chunk, fill=float("nan"))


def maps_document(layout: ClassLayout, layer: LayerLayout, stored: StoredLayer, length: int) -> dict[str, Any]:
    """Metadata of a layer's maps (image, channel, y, x)."""
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


def weights_document(name: str, values: Array) -> dict[str, Any]:
    """Metadata of an array of weights."""
    dimensions = [f"{name}_{i}" for i in range(values.ndim)]
    return array_document(values.shape, "float32", dimensions, chunk=values.shape, fill=float("nan"))


def object_key(first: int, n_dimensions: int) -> str:
    """Key of the object with index ``first`` on the first axis and index 0 on the others."""
    return ".".join(["c", str(first), *["0"] * (n_dimensions - 1)])


def encode_rows(
    layout: ClassLayout, layer: LayerLayout, start: int, block: Array, fill: float
) -> Iterator[tuple[str, Iterable[bytes]]]:
    """Keys and parts of the objects that hold the rows of one shard: the shard, or its plain chunks; encoded as they are asked for."""
    if layout.is_sharded(layer):
        yield object_key(start // layout.shard_rows, 4), encode_shard(block, layer.chunk_rows, layout.shard_rows, fill)
        return
    shape = (layer.chunk_rows, layer.channels, layer.chunk_height, layer.chunk_width)
    for key, cut in zip(object_keys(layout, layer, start), _cuts(layer), strict=True):
        yield key, [compress(pad(_cut(block, layer, *cut), shape, fill))]


def object_keys(layout: ClassLayout, layer: LayerLayout, start: int) -> list[str]:
    """Keys of the objects that `encode_rows` makes for the shard that starts at a row."""
    if layout.is_sharded(layer):
        return [object_key(start // layout.shard_rows, 4)]
    return [f"c.{start // layer.chunk_rows}.0.{iy}.{ix}" for iy, ix in _cuts(layer)]


def _cuts(layer: LayerLayout) -> list[tuple[int, int]]:
    """Indices (iy, ix) of the chunks of one map."""
    n_y, n_x = -(-layer.height // layer.chunk_height), -(-layer.width // layer.chunk_width)
    return [(iy, ix) for iy in range(n_y) for ix in range(n_x)]


def _cut(block: Array, layer: LayerLayout, iy: int, ix: int) -> Array:
    h, w = layer.chunk_height, layer.chunk_width
    cut: Array = block[:, :, iy * h : (iy + 1) * h, ix * w : (ix + 1) * w]
    return cut


def difference(old: StoreSpec, new: StoreSpec) -> list[str]:
    """Differences between two specs, one line each: ``key: store has x, the command asks for y``."""
    lines: list[str] = []
    for key in ("source_root", "dtype"):
        lines += _differ(key, getattr(old, key), getattr(new, key))
    for part in ("extractor", "decode"):
        a, b = getattr(old, part), getattr(new, part)
        if a["sha256"] != b["sha256"]:
            keys = sorted((a.keys() | b.keys()) - {"sha256"} - _without_effect(part, a, b))
            lines += [line for key in keys for line in _differ(f"{part}.{key}", a.get(key), b.get(key))]
    return lines


def _without_effect(part: str, old: dict[str, Any], new: dict[str, Any]) -> set[str]:
    """Settings that change no maps: which images are read, and the resize filter if no image is resized."""
    if part != "decode":
        return set()
    return {
        *(key for key in ADMISSION if key in old and key in new),
        *(() if old.get("resize") or new.get("resize") else ("resize_filter",)),
    }


def widened(old: StoreSpec, new: StoreSpec) -> StoreSpec:
    """A store's spec, widened to read also what a run's spec reads, with the same maps: so all done images can be recomputed."""
    limit = max(old.decode["pixel_limit"], new.decode["pixel_limit"])
    formats = [*old.decode["formats"], *(name for name in new.decode["formats"] if name not in old.decode["formats"])]
    if (limit, formats) == (old.decode["pixel_limit"], old.decode["formats"]):
        return old
    content = {key: value for key, value in old.decode.items() if key != "sha256"}
    return replace(old, decode=with_digest(content | {"pixel_limit": limit, "formats": formats}))


def narrowed(old: StoreSpec, new: StoreSpec) -> list[str]:
    """Images that a run rejects although earlier runs read them, one line per setting."""
    lines = []
    limit, found = new.decode["pixel_limit"], old.decode["pixel_limit"]
    if limit < found:
        lines.append(f"new images above {limit} pixels are rejected (pixel_limit; it was {found} before)")
    missing = [name for name in old.decode["formats"] if name not in new.decode["formats"]]
    if missing:
        lines.append(f"new images of the formats {', '.join(missing)} are rejected (formats), which were read before")
    return lines


def _differ(key: str, old: Any, new: Any) -> list[str]:
    a, b = (json.dumps(value, default=list) for value in (old, new))
    if key.endswith("sha256"):
        a, b = f'{a[:13]}..."', f'{b[:13]}..."'
    return [] if a == b else [f"{key}: the store has {a}, this run asks for {b}"]


def stack(names: Sequence[str]) -> Array:
    """Strings as a column."""
    column = np.empty(len(names), object)
    column[:] = names
    return column
