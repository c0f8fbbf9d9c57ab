"""The checks of the audit: metadata, columns, ledger, maps, and rows that are computed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import FeaturemapsError, ImageError
from pipeline.extract.layers import ROUNDING, TF32_ROUNDING, Array
from pipeline.source.fetch import Source, digest_block, read_current
from pipeline.store.codecs import maps_digest
from pipeline.store.image_maps import image_maps, map_sizes
from pipeline.store.layout import ClassLayout, class_name, group_by_shard
from pipeline.store.objects import Place, read_json
from pipeline.store.schema import (
    EXTRACTOR,
    LEDGER_COLUMNS,
    REJECTED,
    REJECTED_COLUMNS,
    RUNS,
    STATISTICS,
    ShapeClass,
    Status,
    StoredLayer,
    StoreSpec,
    column_document,
    group_document,
    maps_document,
    pooled_document,
    root_document,
    weights_document,
)
from pipeline.store.settings import check_spec, decode_spec, extractor_spec
from pipeline.store.store import Store, read_maps

ORIGINALS = 256
"""Images that one process reads before it reports."""


class Finding(NamedTuple):
    """A contradiction in a store, or between a store and its source."""

    kind: str
    """metadata, column, ledger, maps, source, recomputation or weights."""
    group: str
    """Shape class, or another group of the store."""
    row: int
    """-1 if it is about more than one row."""
    path: str
    """Path of the image, or of the object."""
    text: str


# -- metadata, columns and ledger ------------------------------------------------------------------------------------------------


def check_root(store: Store) -> Iterator[Finding]:
    """Check that weights, layers and storage match the digests of the root's metadata."""
    found, expected = read_json(store.path / "zarr.json"), json.loads(json.dumps(root_document(store.spec)))
    digest = found["attributes"]["featuremaps"].get("sha256")
    if digest is None:  # an older store, without a digest
        del expected["attributes"]["featuremaps"]["sha256"]
    elif digest != expected["attributes"]["featuremaps"]["sha256"]:
        yield Finding(
            "metadata", "", -1, "zarr.json", "its texts (source, source root, versions, settings) do not match their sha256"
        )
        found["attributes"]["featuremaps"]["sha256"] = expected["attributes"]["featuremaps"]["sha256"]
    if found != expected:
        yield Finding("metadata", "", -1, "zarr.json", "it has keys that format 1 does not have, or lacks some")
    try:
        weights = store.weights()
    except FeaturemapsError as error:
        yield Finding("weights", EXTRACTOR, -1, EXTRACTOR, str(error))
        return
    for text in check_spec(store.spec, weights):
        is_weights = "weights" in text
        yield Finding("weights" if is_weights else "metadata", EXTRACTOR if is_weights else "", -1, "zarr.json", text)
    for name, values in weights.items():
        yield from _compare_documents(store, EXTRACTOR, name, values.shape[0], weights_document(name, values))


def check_documents(store: Store) -> Iterator[Finding]:
    """Check that all metadata follow from format 1 and the store's settings, and that arrays are as long as the ledger."""
    groups = {REJECTED: {}, RUNS: {}, EXTRACTOR: {"sha256": store.spec.extractor["sha256"]}}
    for c in store.classes.values():
        height, width = c.size
        kind = c.kind if c.kind in {"exact", "padded"} else "exact or padded"
        groups[c.name] = {"shape_class": {"height": height, "width": width, "kind": kind, "shard_rows": c.layout.shard_rows}}
    for group, attributes in groups.items():
        yield from _compare_documents(store, group, "", None, group_document(attributes))
    for name, dtype in REJECTED_COLUMNS.items():
        yield from _compare_documents(store, REJECTED, name, store.n_rejected, column_document(name, dtype, 0))
    for c in store.classes.values():
        for name, dtype in LEDGER_COLUMNS.items():
            yield from _compare_documents(store, c.name, name, c.length, column_document(name, dtype, 0))
        for layer, stored in zip(c.layout.layers, store.spec.map_layers, strict=True):
            yield from _compare_documents(store, c.name, layer.name, c.length, maps_document(c.layout, layer, stored, 0))
        for stored in store.spec.layers:
            for statistic in STATISTICS:
                yield from _compare_documents(store, c.name, f"{stored.name}_{statistic}", c.length, pooled_document(stored, 0))


def _compare_documents(store: Store, group: str, name: str, length: int | None, document: dict[str, Any]) -> Iterator[Finding]:
    """Check the metadata of a group or of an array, which must have at least ``length`` rows."""
    where = str(PurePosixPath(group, name, "zarr.json"))
    try:
        found = read_json(store.path / where)
    except FeaturemapsError as error:
        yield Finding("metadata", group, -1, where, str(error))
        return
    if length is not None:
        shape = found.get("shape") or [None]
        if not isinstance(shape[0], int) or shape[0] < length:
            yield Finding("metadata", group, -1, where, f"it has {shape[0]} rows, but the ledger has {length}")
            return
        found, document = found | {"shape": shape[1:]}, document | {"shape": document["shape"][1:]}
    document = json.loads(json.dumps(document))
    if found != document:
        keys = sorted(key for key in found.keys() | document.keys() if found.get(key) != document.get(key))
        yield Finding("metadata", group, -1, where, f"it differs from what this store's settings require: {', '.join(keys)}")


def read_columns(store: Store, group: str, findings: list[Finding]) -> dict[str, Array]:
    """The readable columns of a group, by name; others are added to ``findings``."""
    names = [*(REJECTED_COLUMNS if group == REJECTED else LEDGER_COLUMNS)]
    if group != REJECTED:
        names += [f"{layer.name}_{name}" for layer in store.spec.layers for name in STATISTICS]
    columns: dict[str, Array] = {}
    for name in names:
        try:
            columns[name] = store.column(group, name)
        except (FeaturemapsError, OSError, ValueError, RuntimeError) as error:
            findings.append(Finding("column", group, -1, f"{group}/{name}", str(error)))
    return columns


def check_ledger(store: Store, columns: dict[str, dict[str, Array]]) -> Iterator[Finding]:
    """Check that each row's columns match its status, and that each image has one live row at most."""
    alive: Counter[str] = Counter()
    for c in store.classes.values():
        found = columns[c.name]
        if not LEDGER_COLUMNS.keys() <= found.keys():
            continue
        is_done = found["status"] == Status.DONE
        sizes_fit = (found["input_height"] <= c.size[0]) & (found["input_width"] <= c.size[1])
        if c.kind == "exact":
            sizes_fit &= (found["input_height"] == c.size[0]) & (found["input_width"] == c.size[1])
        claims = {
            "unknown status": found["status"] > max(Status),
            "the size does not fit the class": ~sizes_fit,
            "done without a digest": is_done & ((found["digest"] == "") | (found["maps_digest"] == "")),
            "quarantined without a reason": (found["status"] == Status.QUARANTINED) & (found["error"] == ""),
        }
        for text, wrong in claims.items():
            for row in np.flatnonzero(wrong).tolist():
                yield Finding("ledger", c.name, row, str(found["path"][row]), text)
        alive.update(found["path"][found["status"] < Status.REMOVED].tolist())
    rejected = columns[REJECTED]
    if {"path", "status"} <= rejected.keys():
        alive.update(rejected["path"][rejected["status"] < Status.REMOVED].tolist())
    for path, n in alive.items():
        if n > 1:
            yield Finding("ledger", "", -1, path, f"the image has {n} live rows or entries")


# -- maps ------------------------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """Some rows of one shard, and what the ledger says about them."""

    store: Place
    spec: StoreSpec
    layout: ClassLayout
    rows: tuple[int, ...]
    paths: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    digests: tuple[str, ...]
    pooled: dict[str, Array]
    """Pooled values of the layers without stored maps: (row, statistic, channel) float32."""


def shards(store: Store, shape_class: ShapeClass, rows: Array, digests: Array, columns: dict[str, Array]) -> Iterator[Shard]:
    """The shards of some rows of a class, ascending. An empty digest means that the row's maps only have to be readable."""
    layout = shape_class.layout
    for _, members in group_by_shard(rows.tolist(), layout.shard_rows):
        paths, expected = (tuple(str(column[row]) for row in members) for column in (columns["path"], digests))
        sizes = tuple((int(columns["input_height"][row]), int(columns["input_width"][row])) for row in members)
        pooled = {layer.name: _pooled(layer, members, columns) for layer in store.spec.layers if not layer.has_maps}
        yield Shard(store.path, store.spec, layout, tuple(members), paths, sizes, expected, pooled)


def _pooled(layer: StoredLayer, rows: list[int], columns: dict[str, Array]) -> Array:
    """Pooled values of some rows; NaN if a column cannot be read, which is reported elsewhere."""
    missing = np.full((len(rows), layer.channels), np.nan, np.float32)
    found = (columns.get(f"{layer.name}_{statistic}") for statistic in STATISTICS)
    return np.stack([missing if values is None else values[rows] for values in found], axis=1)


def check_shard(shard: Shard) -> list[Finding]:
    """Compare the digest of each row's maps with the ledger's; reading them checks every chunk's checksum."""
    group = class_name(shard.layout.size)
    start, stop = shard.rows[0], shard.rows[-1] + 1
    blocks: list[Array] | None = None  # None if a chunk is bad: then each row is read alone
    with contextlib.suppress(FeaturemapsError, OSError):
        blocks = _read(shard, start, stop)
    findings = []
    for i, (row, path, size, expected) in enumerate(zip(shard.rows, shard.paths, shard.sizes, shard.digests, strict=True)):
        try:
            maps = [b[row - start] for b in blocks] if blocks else [b[0] for b in _read(shard, row, row + 1)]
        except (FeaturemapsError, OSError) as error:
            text = f"cannot be read: {error.__cause__ or error}"
            if not expected:
                text += "; no image needs them, but a read of the whole class fails: featuremaps vacuum frees them"
        else:
            pooled = {name: values[i] for name, values in shard.pooled.items()}
            text = expected and _what_is_wrong(maps, pooled, shard.spec, map_sizes(shard.spec, *size), expected)
        if text:
            parts = [f"maps in {_objects(shard, row)}"] if shard.layout.layers else []
            parts += [f"pooled values of {', '.join(shard.pooled)}"] if shard.pooled else []
            findings.append(Finding("maps", group, row, path, f"the {' or the '.join(parts)} {text}"))
    return findings


def _read(shard: Shard, start: int, stop: int) -> list[Array]:
    return [read_maps(shard.store, shard.layout, layer.name, start, stop) for layer in shard.layout.layers]


def _what_is_wrong(
    maps: Sequence[Array], pooled: dict[str, Array], spec: StoreSpec, extents: dict[str, tuple[int, int]], expected: str
) -> str:
    """What is wrong with one row's maps and pooled values; empty if nothing. ``extents`` are the sizes of the image's maps."""
    valid = dict(pooled)
    for layer, values in zip(spec.map_layers, maps, strict=True):
        height, width = extents[layer.name]
        valid[layer.name] = values[:, :height, :width]
    if maps_digest(valid[layer.name] for layer in spec.layers) == expected:
        return ""
    is_missing = any(
        np.array_equal(v, np.full_like(v, layer.fill_value), equal_nan=True)
        for layer, v in ((layer, valid[layer.name]) for layer in spec.layers)
    )
    return "are missing" if is_missing else "do not match the digest in the ledger"


def _objects(shard: Shard, row: int) -> str:
    """The objects that hold a row's maps, in words."""
    layout, name = shard.layout, class_name(shard.layout.size)
    rows = {layer.name: layout.shard_rows if layout.is_sharded(layer) else layer.chunk_rows for layer in layout.layers}
    return ", ".join(f"{name}/{layer}/c.{row // n}.*" for layer, n in rows.items())


# -- the source ------------------------------------------------------------------------------------------------------------------


class Originals(NamedTuple):
    """Some done rows whose images are to be read."""

    root: str
    group: str
    rows: tuple[int, ...]
    images: tuple[tuple[str, str], ...]
    """Path and fingerprint."""
    digests: tuple[str, ...]


@dataclass(slots=True)
class Compared:
    """Result of comparing them."""

    n_compared: int = 0
    reasons: list[str] = field(default_factory=list)
    """Why others were not."""
    n_faults: int = 0
    """How many of these could not be read because the storage failed."""
    findings: list[Finding] = field(default_factory=list)


def originals(root: str, group: str, rows: Array, columns: dict[str, Array]) -> Iterator[Originals]:
    """The done rows of a class, in parts of `ORIGINALS` images."""
    for start in range(0, len(rows), ORIGINALS):
        members = rows[start : start + ORIGINALS]
        paths, fingerprints, digests = (columns[name][members].tolist() for name in ("path", "fingerprint", "digest"))
        yield Originals(root, group, tuple(members.tolist()), tuple(zip(paths, fingerprints, strict=True)), tuple(digests))


def check_originals(part: Originals) -> Compared:
    """Compare the bytes of images with the ledger's digests, if their fingerprints are unchanged."""
    result = Compared()
    found = digest_block(part.root, part.images)
    for row, (path, _), expected, image in zip(part.rows, part.images, part.digests, found, strict=True):
        if image.digest:
            result.n_compared += 1
            if image.digest != expected:
                text = "the content of the image has changed since its maps were computed, though its size and time are the same"
                result.findings.append(Finding("source", part.group, row, path, text))
        else:
            result.reasons.append(image.error.split(":", 1)[0] or "storage_fault")
            result.n_faults += bool(image.fault)
    return result


class SampledRow(NamedTuple):
    """A row to compute again."""

    group: str
    row: int
    path: str
    digest: str


@dataclass(slots=True)
class Recomputed:
    """Result of computing some rows again."""

    n_done: int = 0
    n_not_reachable: int = 0
    largest_difference: float = 0.0
    findings: list[Finding] = field(default_factory=list)


def recompute(job: tuple[Place, Sequence[SampledRow]]) -> Recomputed:
    """Read, decode and extract in float64 with the stored weights; compare with the stored values."""
    from pipeline.extract.cpu import Extractor, use_one_thread  # noqa: PLC0415 (as above)
    from pipeline.source.decoding import decode  # noqa: PLC0415 (only where something is recomputed)

    use_one_thread()
    path, samples = job
    store, result = Store(path), Recomputed()
    source = Source(store.spec.source_root, decode_spec(store.spec))
    extractor = Extractor(extractor_spec(store.spec), store.weights(), store.spec.layers)
    for sample in samples:
        try:
            data = read_current(source, sample.path)
        except (OSError, ImageError):
            result.n_not_reachable += 1
            continue
        if hashlib.sha256(data).hexdigest() != sample.digest:
            result.n_not_reachable += 1  # it has changed since, so it cannot be recomputed
            continue
        expected = extractor.reference(decode(data, source.decode))
        result.n_done += 1
        shape_class = next(c for c in store.classes.values() if c.name == sample.group)
        for stored in store.spec.layers:
            text, difference = _compare(store, shape_class, sample.row, stored, expected[stored.name])
            result.largest_difference = max(result.largest_difference, difference)
            if text:
                result.findings.append(Finding("recomputation", sample.group, sample.row, sample.path, f"{stored.name}: {text}"))
    return result


def _compare(store: Store, shape_class: ShapeClass, row: int, stored: StoredLayer, expected: Array) -> tuple[str, float]:
    """What is wrong with a row's maps or pooled values, and the largest difference beyond rounding for storage."""
    is_tf32 = extractor_spec(store.spec).tf32
    bound = (TF32_ROUNDING if is_tf32 else ROUNDING) * max(1.0, float(np.abs(expected).max()))
    difference = -np.inf
    if stored.has_maps:
        _, height, width = expected.shape
        try:
            maps = image_maps(store, shape_class.name, stored, row, (height, width))
        except (OSError, ValueError, RuntimeError) as error:
            return f"the maps cannot be read: {error}", 0.0
        off = np.abs(maps.astype(np.float64) - expected)
        difference = float(off.max()) - stored.error_bound
        if difference > bound:
            return f"stored and recomputed maps differ by {off.max():.3g}, more than {stored.error_bound + bound:.3g}", difference
    pooled = [store.array(shape_class.name, f"{stored.name}_{statistic}")[row] for statistic in STATISTICS]
    exact = [expected.mean((1, 2)), expected.std((1, 2)), expected.min((1, 2)), expected.max((1, 2))]
    for statistic, a, b in zip(STATISTICS, pooled, exact, strict=True):
        off_by = float(np.abs(np.asarray(a) - b).max())
        if not off_by <= bound:
            return f"the pooled {statistic} is {np.asarray(a)}, and recomputed {b}", max(0.0, difference)
        difference = max(difference, off_by if not stored.has_maps else difference)
    return "", max(0.0, difference)
