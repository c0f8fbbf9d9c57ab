"""Read-only, lazy views of a store for notebooks: pandas for the images, Xarray and Dask for the maps."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

from pipeline import remote
from pipeline.chunks import Array
from pipeline.config import ExtractorSpec
from pipeline.decode import decode
from pipeline.errors import FeaturemapsError, ImageError, UsageError
from pipeline.layers import layer_names, output_sizes, receptive_field
from pipeline.objects import Place, place
from pipeline.paths import encode_path
from pipeline.plan import Size
from pipeline.reading import Source, read_current
from pipeline.schema import REJECTED, STATISTICS, ShapeClass, Status, StoredLayer, StoreSpec
from pipeline.settings import decode_spec, extractor_spec
from pipeline.store import Store
from pipeline.weights import dequantise

_SIZES = ("source_height", "source_width", "input_height", "input_width")
_COLUMNS = ("path", *_SIZES, "size_bytes", "fingerprint", "digest", "maps_digest", "status", "error")


def open_store(path: str | Place) -> FeatureStore:
    """Open a store for analysis; nothing is read until it is asked for.

    Parameters
    ----------
    path : str or Path
        The store's folder, or s3://, gs:// or az://BUCKET/NAME.

    Returns
    -------
    FeatureStore

    Raises
    ------
    UsageError
        When there is no store, or one of another format.

    Examples
    --------
    >>> import pipeline
    >>> store = pipeline.open_store("features.zarr")  # doctest: +SKIP
    >>> store.image("photos/cat.jpg")["conv1"].plot.imshow(col="conv1_channel")  # doctest: +SKIP
    """
    return FeatureStore(place(path))


class FeatureStore:
    """A store as it was when it was opened; rows that a run appends later are not seen.

    Parameters
    ----------
    path : Path or Url
    """

    def __init__(self, path: Place) -> None:
        self._store = Store(path)
        self.path = path

    def __repr__(self) -> str:
        spec = self._store.spec
        rows = sum(c.length for c in self._store.classes.values())
        return f"<FeatureStore {self.path}: {rows} rows of {spec.dtype} maps in {len(self._store.classes)} shape classes>"

    @property
    def source_root(self) -> str:
        """Folder that the paths are relative to."""
        return self._store.spec.source_root

    @property
    def spec(self) -> StoreSpec:
        """What the store was made with: source, dtype, extractor, decode rules, versions."""
        return self._store.spec

    @cached_property
    def extractor(self) -> ExtractorSpec:
        """The extractor's layers, in order, and which of them are stored."""
        return extractor_spec(self._store.spec)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the stored layers: of all there are pooled values."""
        return tuple(layer.name for layer in self._store.spec.layers)

    @property
    def map_layers(self) -> tuple[str, ...]:
        """Names of the stored layers of which there are maps, too."""
        return tuple(layer.name for layer in self._store.spec.layers if layer.has_maps)

    @cached_property
    def weights(self) -> dict[str, Array]:
        """The weights as used: ``conv1_weight`` (filter, channel, y, x), ``conv1_bias`` (filter,), ...; float32.

        They are for a cross-correlation over ``pixel / 256``.
        """
        return self._store.weights()

    @property
    def receipts(self) -> list[dict[str, Any]]:
        """What each run left of itself in ``runs/``, oldest first."""
        return self._store.receipts()[::-1]

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of images per status: pending, done, quarantined and rejected."""
        total = np.zeros(256, np.int64)
        for shape_class in self._store.classes.values():
            total += np.bincount(self._store.column(shape_class.name, "status"), minlength=256)
        live = {status.name.lower(): int(total[status]) for status in Status if status.is_live}
        return live | {"rejected": int((self._store.column(REJECTED, "status") < Status.REMOVED).sum())}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the shape classes, ``heightxwidth`` in input pixels."""
        return tuple(c.name for c in self._store.classes.values())

    @cached_property
    def images(self) -> pd.DataFrame:
        """Table of the live rows and rejected images, one line per image.

        Columns: path, class, row, source_height, source_width, input_height, input_width (pixels; 0 where rejected), status
        (pending, done, quarantined or rejected) and error.
        """
        parts = [self._table(c) for c in self._store.classes.values()]
        rejected = pd.DataFrame({name: self._store.column(REJECTED, name) for name in ("path", "error", "status")})
        rejected["row"] = np.arange(len(rejected))
        live = rejected[rejected["status"] < Status.REMOVED].assign(
            status="rejected", **dict.fromkeys(_SIZES, np.int32(0)), **{"class": ""}
        )
        order = ["path", "class", "row", *_SIZES, "status", "error"]
        return pd.concat([*parts, live[order]], ignore_index=True)

    def _table(self, shape_class: ShapeClass) -> pd.DataFrame:
        columns = {name: self._store.column(shape_class.name, name) for name in ("path", *_SIZES, "status", "error")}
        table = pd.DataFrame(columns).assign(row=np.arange(shape_class.length), **{"class": shape_class.name})
        table = table[table["status"] < Status.REMOVED]
        names = {int(status): status.name.lower() for status in Status}
        return table.assign(status=table["status"].map(names))[["path", "class", "row", *_SIZES, "status", "error"]]

    @cached_property
    def _by_path(self) -> pd.DataFrame:
        ranked = self.images.assign(is_done=self.images["status"] == "done").sort_values("is_done", kind="stable")
        return ranked.drop_duplicates("path", keep="last").set_index("path")  # after a crash an image may have two rows

    def dataset(self, name: str) -> xr.Dataset:
        """All rows of one shape class, lazy.

        Parameters
        ----------
        name : str
            A class, for instance ``516x639``; see `classes`.

        Returns
        -------
        xarray.Dataset
            Per stored layer its maps (image, channel, y, x) float32, decoded, in Dask chunks of whole shards, NaN where a row is
            padded or not done; the pooled values (image, channel) float32; the ledger's columns (image,). ``path`` is a coordinate,
            and so are y and x: the centre of each value's receptive field in input pixels.

        Raises
        ------
        UsageError
            When there is no such class.
        """
        shape_class = self._class(name)
        is_done = self._store.column(name, "status") == Status.DONE  # rows that are not may hold maps of former images
        variables: dict[str, Any] = {}
        for layer in self._store.spec.layers:
            dims = ("image", *(f"{layer.name}_{axis}" for axis in ("channel", "y", "x")))
            variables[layer.name] = (dims, _where(self._maps(shape_class, layer), is_done), {"error_bound": layer.error_bound})
            for statistic in STATISTICS:
                variables[f"{layer.name}_{statistic}"] = (
                    dims[:2],
                    _where(self._lazy(name, f"{layer.name}_{statistic}"), is_done),
                )
        for column in _COLUMNS:
            variables[column] = (("image",), self._lazy(name, column), dict(self._store.array(name, column).attrs))
        dataset = xr.Dataset(variables, self._coordinates(shape_class), {"class": name, "kind": shape_class.kind})
        return dataset.set_coords("path")

    def image(self, path: str) -> xr.Dataset:
        """One image's maps, cropped to its valid extent and decoded to float32.

        Parameters
        ----------
        path : str
            As in `images`: relative to the source root.

        Returns
        -------
        xarray.Dataset
            Per stored layer (channel, y, x) float32 and the pooled values (channel,) float32, in memory; y and x are coordinates
            in input pixels.

        Raises
        ------
        UsageError
            When the path is unknown, or its maps are not there: with the reason.
        """
        entry = self._entry(path)
        shape_class, row = self._class(entry["class"]), int(entry["row"])
        sizes = output_sizes(extractor_spec(self._store.spec).layers, int(entry["input_height"]), int(entry["input_width"]))
        named = dict(zip(self._layer_names(), sizes, strict=True))
        coordinates: dict[str, Any] = {"path": entry.name}
        for name, (dimension, values, attributes) in self._coordinates(shape_class).items():
            layer, axis = name.rsplit("_", 1)
            coordinates[name] = (dimension, values[: named[layer]["yx".index(axis)]], attributes)
        try:
            with remote.errors(str(self.path)):
                if self._store.array(shape_class.name, "status")[row] != Status.DONE:
                    raise UsageError(f"{path!r} has been replaced or removed since {self.path} was opened: open the store again")
                variables = {
                    k: v for layer in self._store.spec.layers for k, v in self._row(shape_class, layer, row, named[layer.name])
                }
        except (OSError, ValueError, RuntimeError) as error:
            raise FeaturemapsError(
                f"maps of {path!r} in {self.path} cannot be read ({error}): an object of class {entry['class']} is damaged or out of "
                "reach; check the disk, or restore it from a copy"
            ) from error
        return xr.Dataset(variables, coordinates, {"class": shape_class.name, "kind": shape_class.kind})

    def pixels(self, path: str) -> Array | None:
        """The source image as the extractor saw it.

        Parameters
        ----------
        path : str
            As in `images`; whatever its status.

        Returns
        -------
        (y, x, channel) uint8 or None
            Three channels or one; None where the source is out of reach, or cannot be decoded.

        Raises
        ------
        UsageError
            When the path is unknown, or the image has changed since its maps were computed.
        """
        entry = self._known(path)
        if str(entry["error"]).startswith("crashed"):  # it took its worker along, and would take this process
            return None
        spec = decode_spec(self._store.spec)
        try:
            data = read_current(Source(self.source_root, spec), str(entry.name))
            if entry["status"] == "done" and hashlib.sha256(data).hexdigest() != self._digest(entry):
                raise UsageError(
                    f"{path!r} has changed since its maps were computed, so it is another picture than theirs and was not "
                    f"taken for it: nothing was drawn; bring {self.path} up to date with `featuremaps run` first"
                )
            return decode(data, spec)
        except (ImageError, OSError):
            return None

    def _digest(self, entry: Any) -> str:
        return str(self._store.array(str(entry["class"]), "digest")[int(entry["row"])])

    def _row(self, shape_class: ShapeClass, layer: StoredLayer, row: int, size: Size) -> Iterator[tuple[str, Any]]:
        """One image's maps and pooled values of a layer, read without the rest of their shard."""
        dims = tuple(f"{layer.name}_{axis}" for axis in ("channel", "y", "x"))
        maps = dequantise(np.asarray(self._store.array(shape_class.name, layer.name)[row, :, : size[0], : size[1]]), layer)
        if np.isnan(maps).any():  # which data never are
            raise ValueError("the ledger says done, and there are no values: an object is missing")
        yield layer.name, (dims, maps, {"error_bound": layer.error_bound})
        for statistic in STATISTICS:
            name = f"{layer.name}_{statistic}"
            yield name, (dims[:1], np.asarray(self._store.array(shape_class.name, name)[row]))

    def _entry(self, path: str) -> Any:
        entry = self._known(path)
        if entry["status"] != "done":
            reason = entry["error"] or "its turn has not come: run again to go on"
            raise UsageError(f"{path!r} has no maps in {self.path}: it is {entry['status']} ({reason})")
        return entry

    def _known(self, path: str) -> Any:
        table = self._by_path
        encoded = encode_path(os.fsencode(path))  # as a shell completes it
        if path not in table.index and encoded in table.index:
            path = encoded
        if path not in table.index:
            near = difflib.get_close_matches(path, table.index, n=3, cutoff=0.3) if len(table) <= 100_000 else []
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise UsageError(
                f"{path!r} is not an image of {self.path}: paths are relative to {self.source_root}, as in `.images`{hint}"
            )
        return table.loc[path]

    def _class(self, name: str) -> ShapeClass:
        for shape_class in self._store.classes.values():
            if shape_class.name == name:
                return shape_class
        known = ", ".join(self.classes[:10]) or "none yet"
        raise UsageError(f"{self.path} has no shape class {name!r}; it has {known}")

    def _layer_names(self) -> tuple[str, ...]:
        return layer_names(extractor_spec(self._store.spec).layers)

    def _maps(self, shape_class: ShapeClass, layer: StoredLayer) -> da.Array:
        """Decoded maps in chunks of whole objects along the image axis."""
        array = self._store.array(shape_class.name, layer.name)
        chunks = array.shards or array.chunks
        stored = da.from_array(array, chunks=chunks, name=False, asarray=True)[: shape_class.length]
        return stored.map_blocks(dequantise, layer, dtype=np.float32)

    def _lazy(self, group: str, column: str) -> da.Array:
        array = self._store.array(group, column)
        return da.from_array(array, chunks=array.chunks, name=False, asarray=True)[: self._store.length(group)]

    def _coordinates(self, shape_class: ShapeClass) -> dict[str, Any]:
        coordinates: dict[str, Any] = {}
        layers = extractor_spec(self._store.spec).layers
        for layer in shape_class.layout.layers:
            field = receptive_field(layers, int(layer.name.removeprefix("conv")))
            for axis, n, offset, stride in (
                ("y", layer.height, field.offset_y, field.stride_y),
                ("x", layer.width, field.offset_x, field.stride_x),
            ):
                name = f"{layer.name}_{axis}"
                coordinates[name] = (name, offset + stride * np.arange(n), {"units": "input pixel"})
        return coordinates


def _where(values: da.Array, is_done: Array) -> da.Array:
    """Values of rows that are done, NaN for the others."""
    if is_done.all():
        return values
    mask = da.from_array(is_done, chunks=(values.chunks[0],), name=False).reshape((-1, *[1] * (values.ndim - 1)))
    return da.where(mask, values, np.float32(np.nan))
