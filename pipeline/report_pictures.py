"""What a report shows of a store: some images with their maps, and how far what is stored is from what is computed today."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipeline import remote
from pipeline.chunks import Array
from pipeline.decode import decode
from pipeline.errors import FeaturemapsError, ImageError
from pipeline.layers import layer_names, output_sizes
from pipeline.paths import absolute_path, absolute_url
from pipeline.pictures import bin_edges
from pipeline.plan import Size
from pipeline.reading import Source, read_current
from pipeline.remote import Url, is_url
from pipeline.schema import ShapeClass, Status, StoredLayer
from pipeline.settings import decode_spec, extractor_spec
from pipeline.store import Store
from pipeline.thumbnails import Embedded, encode
from pipeline.weights import dequantise

MAX_VALUES = 1 << 24
"""Values of all maps of one image, and of its pixels, beyond which it is no sample: 64 MiB as float32, a few times over."""
MAPS_PER_LAYER = 5
MAPS_PER_IMAGE = 8
HISTOGRAM_CHANNELS = 16
PHOTOGRAPH_PX = 720
MAP_PX = 600


class Chosen(NamedTuple):
    """A row that is shown."""

    shape_class: ShapeClass
    row: int


@dataclass(slots=True)
class MapPicture:
    """One map, drawn from its smallest value (black) to its largest (white)."""

    layer: str
    channel: int
    picture: Embedded
    low: float
    high: float


@dataclass(slots=True)
class Sample:
    """One image and some of its maps."""

    path: str
    size: Size
    """Of what the extractor saw, pixels."""
    photograph: Embedded | None = None
    trouble: str = ""
    """Why there is no photograph."""
    maps: list[MapPicture] = field(default_factory=list)
    n_maps: int = 0
    """All maps of the image that are stored."""
    differences: dict[str, float] = field(default_factory=dict)
    """Per layer, the largest difference between stored values and those that are computed today; only with a photograph."""

    @property
    def bytes(self) -> int:
        """What its pictures take in a page."""
        return sum(len(p.uri) for p in [m.picture for m in self.maps] + ([self.photograph] if self.photograph else []))


def choose(store: Store, n: int, seed: int) -> tuple[list[Chosen], list[str]]:
    """Some images that are done, spread over the classes, the largest first; the same ones for the same store and seed.

    Returns
    -------
    list of Chosen
    list of str
        Classes of images that are too large to be shown.
    """
    rng = random.Random(seed)  # noqa: S311 (which rows, not a secret)
    candidates: list[tuple[ShapeClass, list[int]]] = []
    too_large = []
    for shape_class in store.classes.values():
        rows = np.flatnonzero(store.column(shape_class.name, "status") == Status.DONE)
        if not len(rows):
            continue
        if _n_values(shape_class) > MAX_VALUES:
            too_large.append(shape_class.name)
        else:
            picked = rng.sample(range(len(rows)), min(n, len(rows)))
            candidates.append((shape_class, [int(rows[i]) for i in picked]))
    candidates.sort(key=lambda c: (-c[0].length, c[0].name))
    turns = ((shape_class, rows[turn]) for turn in range(n) for shape_class, rows in candidates if turn < len(rows))
    return [Chosen(*next(turns)) for _ in range(min(n, sum(len(rows) for _, rows in candidates)))], too_large


def _n_values(shape_class: ShapeClass) -> int:
    """The larger of the pixels and the stored values of a class's images."""
    height, width = shape_class.size
    values = sum(x.channels * x.height * x.width for x in shape_class.layout.layers)
    return max(3 * height * width, values)


@dataclass(slots=True)
class Histogram:
    """How often each value occurs in the maps of a layer, channel by channel."""

    layer: StoredLayer
    edges: Array
    """(bin + 1,) float64."""
    counts: Array
    """(channel, bin) int64, of the first channels."""
    n_images: int = 0

    def add(self, maps: Array) -> None:
        """Count the values (channel, y, x) of one image."""
        for channel in range(len(self.counts)):
            values = maps[channel].clip(self.edges[0], self.edges[-1])
            self.counts[channel] += np.histogram(values, self.edges)[0]
        self.n_images += 1


def histograms(store: Store, chosen: Sequence[Chosen]) -> list[Histogram]:
    """An empty histogram for each layer with maps, over the range that the chosen images' pooled values say."""
    found = []
    for layer in store.spec.layers if chosen else ():
        ends = {}
        for statistic in ("min", "max"):
            values = [store.cell(c.shape_class.name, f"{layer.name}_{statistic}", c.row) for c in chosen]
            ends[statistic] = getattr(np, statistic)(np.nan_to_num(np.array(values)))
        edges = bin_edges(float(ends["min"]), float(ends["max"]), layer)
        counts = np.zeros((min(layer.channels, HISTOGRAM_CHANNELS), len(edges) - 1), np.int64)
        if layer.has_maps:
            found.append(Histogram(layer, edges, counts))
    return found


def samples(store: Store, chosen: Sequence[Chosen], counted: Sequence[Histogram], n_shown: int) -> Iterator[Sample]:
    """Read the chosen images one after another, count their values, and draw and compute anew the first ``n_shown``.

    A sample whose maps cannot be read, or whose photograph is gone or has changed, says so.
    """
    from pipeline.extractor import Extractor  # noqa: PLC0415 (torch takes a second, and an empty store needs none)

    if not chosen:
        return
    spec = extractor_spec(store.spec)
    source = Source(store.spec.source_root, decode_spec(store.spec))
    extractor = Extractor(spec, store.weights())  # which keeps its float32 values as they are
    names = layer_names(spec.layers)
    for turn, (shape_class, row) in enumerate(chosen):
        path, height, width, size_bytes, digest = (
            store.cell(shape_class.name, name, row) for name in ("path", "input_height", "input_width", "size_bytes", "digest")
        )
        sample = Sample(str(path), (int(height), int(width)))
        sizes = dict(zip(names, output_sizes(spec.layers, *sample.size), strict=True))
        is_shown = turn < n_shown
        pixels = _photograph(source, sample, int(size_bytes), str(digest)) if is_shown else None
        computed = {} if pixels is None else extractor.extract(pixels)
        if pixels is not None:
            sample.photograph = encode(pixels, PHOTOGRAPH_PX)
        for histogram in counted:
            name = histogram.layer.name
            try:
                maps = _maps(store, shape_class, histogram.layer, row, sizes[name])
            except (FeaturemapsError, OSError, ValueError, RuntimeError) as error:
                sample.trouble = f"its maps of {name} cannot be read ({error}): run featuremaps verify"
                continue
            histogram.add(maps)
            sample.n_maps += len(maps)
            if is_shown:
                sample.maps += _draw(name, maps, MAPS_PER_IMAGE - len(sample.maps))
            if computed:
                sample.differences[name] = float(np.abs(maps - computed[name]).max())
        if is_shown:
            yield sample


def _photograph(source: Source, sample: Sample, size_bytes: int, digest: str) -> Array | None:
    """The image as the extractor saw it; the sample says why where it cannot be had."""
    try:
        is_same = _size_bytes(source, sample.path) == size_bytes  # asked first, because a file may have grown without end
        data = read_current(source, sample.path) if is_same else b""
        if not is_same or hashlib.sha256(data).hexdigest() != digest:
            sample.trouble = "the file has changed since its maps were computed, so it is not shown beside them"
            return None
        return decode(data, source.decode)
    except (ImageError, FeaturemapsError, OSError):
        sample.trouble = "the source image cannot be read any more"
        return None


def _size_bytes(source: Source, path: str) -> int:
    if is_url(source.root):
        return Url.parse(absolute_url(source.root, path)).stat().size_bytes
    return Path(os.fsdecode(absolute_path(source.root, path))).stat().st_size


def _maps(store: Store, shape_class: ShapeClass, layer: StoredLayer, row: int, size: Size) -> Array:
    with remote.errors(str(store.path)):
        stored = np.asarray(store.array(shape_class.name, layer.name)[row, :, : size[0], : size[1]])
    maps = dequantise(stored, layer)
    if np.isnan(maps).any():  # which data never are
        raise ValueError("an object is missing")
    return maps


def _draw(layer: str, maps: Array, n: int) -> Iterator[MapPicture]:
    for channel, values in enumerate(maps[: max(0, min(n, MAPS_PER_LAYER))]):
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255 / (high - low)) if high > low else np.full_like(values, 128)
        yield MapPicture(layer, channel, encode(scaled.round().astype(np.uint8), MAP_PX), low, high)
