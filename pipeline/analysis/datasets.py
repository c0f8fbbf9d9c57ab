"""Xarray views of a shape class and of one image: decoded to float32, with coordinates in input pixels; and an image's own pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import dask.array as da
import numpy as np
import xarray as xr

from pipeline.errors import ImageError, UsageError
from pipeline.extract.layers import Array, receptive_field
from pipeline.extract.quantise import dequantise
from pipeline.source.decoding import decode
from pipeline.source.fetch import Source, read_current
from pipeline.store.image_maps import image_maps, map_sizes
from pipeline.store.layout import Size
from pipeline.store.schema import LEDGER_COLUMNS, STATISTICS, ShapeClass, Status, StoredLayer
from pipeline.store.settings import decode_spec, extractor_spec
from pipeline.store.store import Store


def class_dataset(store: Store, shape_class: ShapeClass, layers: Sequence[StoredLayer]) -> xr.Dataset:
    """All rows of a class, lazy; NaN where a row is padded or not done."""
    name = shape_class.name
    is_done = store.column(name, "status") == Status.DONE  # rows that are not may hold maps of former images
    variables: dict[str, Any] = {}
    for layer in layers:
        dims = ("image", *(f"{layer.name}_{axis}" for axis in ("channel", "y", "x")))
        if layer.has_maps:
            variables[layer.name] = (dims, _where(_maps(store, shape_class, layer), is_done), {"error_bound": layer.error_bound})
        for statistic in STATISTICS:
            column = f"{layer.name}_{statistic}"
            variables[column] = (dims[:2], _where(_lazy(store, name, column), is_done))
    for column in LEDGER_COLUMNS:
        variables[column] = (("image",), _lazy(store, name, column), dict(store.array(name, column).attrs))
    dataset = xr.Dataset(variables, coordinates(store, shape_class, layers), {"class": name, "kind": shape_class.kind})
    return dataset.set_coords("path")


def image_dataset(store: Store, shape_class: ShapeClass, row: int, size: Size, layers: Sequence[StoredLayer]) -> xr.Dataset:
    """One row in memory, cropped to what an image of ``size`` (input height and width) gives.

    Raises
    ------
    ValueError
        When there are no values where some must be.
    """
    named = map_sizes(store.spec, *size)
    found: dict[str, Any] = {}
    for name, (dimension, values, attributes) in coordinates(store, shape_class, layers).items():
        layer_name, axis = name.rsplit("_", 1)
        found[name] = (dimension, values[: named[layer_name]["yx".index(axis)]], attributes)
    variables = {k: v for layer in layers for k, v in _row(store, shape_class.name, layer, row, named[layer.name])}
    return xr.Dataset(variables, found, {"class": shape_class.name, "kind": shape_class.kind})


def _row(store: Store, group: str, layer: StoredLayer, row: int, size: Size) -> Iterator[tuple[str, Any]]:
    """One image's maps and pooled values of a layer, read without the rest of their shard."""
    dims = tuple(f"{layer.name}_{axis}" for axis in ("channel", "y", "x"))
    if layer.has_maps:
        maps = image_maps(store, group, layer, row, size)
        yield layer.name, (dims, maps, {"error_bound": layer.error_bound})
    for statistic in STATISTICS:
        name = f"{layer.name}_{statistic}"
        yield name, (dims[:1], store.cell(group, name, row))


def _maps(store: Store, shape_class: ShapeClass, layer: StoredLayer) -> da.Array:
    """Decoded maps in chunks of whole objects along the image axis."""
    array = store.array(shape_class.name, layer.name)
    chunks = array.shards or array.chunks
    stored = da.from_array(array, chunks=chunks, name=False, asarray=True)[: shape_class.length]
    return stored.map_blocks(dequantise, layer, dtype=np.float32)


def _lazy(store: Store, group: str, column: str) -> da.Array:
    array = store.array(group, column)
    return da.from_array(array, chunks=array.chunks, name=False, asarray=True)[: store.length(group)]


def coordinates(store: Store, shape_class: ShapeClass, layers: Sequence[StoredLayer]) -> dict[str, Any]:
    """Centre of each value's receptive field, input pixels, for the layers that have maps."""
    found: dict[str, Any] = {}
    specs = extractor_spec(store.spec).layers
    sizes = map_sizes(store.spec, *shape_class.size)
    for layer in layers:
        if not layer.has_maps:
            continue
        field = receptive_field(specs, int(layer.name.removeprefix("conv")))
        height, width = sizes[layer.name]
        for axis, n, offset, stride in (
            ("y", height, field.offset_y, field.stride_y),
            ("x", width, field.offset_x, field.stride_x),
        ):
            name = f"{layer.name}_{axis}"
            found[name] = (name, offset + stride * np.arange(n), {"units": "input pixel"})
    return found


def _where(values: da.Array, is_done: Array) -> da.Array:
    """Values of rows that are done, NaN for the others."""
    if is_done.all():
        return values
    mask = da.from_array(is_done, chunks=(values.chunks[0],), name=False).reshape((-1, *[1] * (values.ndim - 1)))
    return da.where(mask, values, np.float32(np.nan))


def source_pixels(store: Store, path: str, group: str, row: int, *, is_done: bool) -> Array | None:
    """See `FeatureStore.pixels`."""
    if str(store.cell(group, "error", row)).startswith("crashed"):  # it took its worker along, and would take this process
        return None
    spec = decode_spec(store.spec)
    try:
        data = read_current(Source(store.spec.source_root, spec), path)
        if is_done and hashlib.sha256(data).hexdigest() != store.cell(group, "digest", row):
            raise UsageError(
                f"{path!r} has changed since its maps were computed, so it is another picture than theirs and was not "
                f"taken for it: nothing was drawn; bring {store.path} up to date with `featuremaps run` first"
            )
        return decode(data, spec)
    except (ImageError, OSError):
        return None
