"""What a report shows of a store: some images with their maps, and how far what is stored is from what is computed today."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import FeaturemapsError
from pipeline.extract.layers import Array
from pipeline.report.arrays import Histogram
from pipeline.report.sandbox import PIXEL_LIMIT, Embedded, Photograph, encode, photographs
from pipeline.store.image_maps import image_maps, map_sizes
from pipeline.store.layout import Size
from pipeline.store.schema import ShapeClass, Status
from pipeline.store.settings import decode_spec, extractor_spec
from pipeline.store.store import Store

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
    """Height and width that the extractor saw, pixels."""
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


def histograms(store: Store, chosen: Sequence[Chosen]) -> list[Histogram]:
    """An empty histogram for each layer with maps, over the range that the chosen images' pooled values say."""
    found = []
    for layer in store.spec.layers if chosen else ():
        ends = {}
        for statistic in ("min", "max"):
            values = [store.cell(c.shape_class.name, f"{layer.name}_{statistic}", c.row) for c in chosen]
            ends[statistic] = getattr(np, statistic)(np.nan_to_num(np.array(values)))
        if layer.has_maps:
            found.append(Histogram.over(layer, float(ends["min"]), float(ends["max"]), HISTOGRAM_CHANNELS))
    return found


def samples(store: Store, chosen: Sequence[Chosen], counted: Sequence[Histogram], n_shown: int) -> Iterator[Sample]:
    """Read the chosen images one after another, count their values, and draw and recompute the first ``n_shown``.

    A sample whose maps cannot be read, or whose photograph is gone, has changed or does not come, says so. Photographs are read and decoded
    in a process of its own, as a source may hang, or be large where the store's images are resized.
    """
    computer = _Computer(store)
    found = _photographs(store, chosen[:n_shown])
    for turn, (shape_class, row) in enumerate(chosen):
        path, height, width = (store.cell(shape_class.name, name, row) for name in ("path", "input_height", "input_width"))
        sample = Sample(str(path), (int(height), int(width)))
        sizes = map_sizes(store.spec, *sample.size)
        is_shown = turn < n_shown
        pixels, sample.trouble = next(found) if is_shown else Photograph(None)
        if pixels is not None:
            sample.photograph = encode(pixels, PHOTOGRAPH_PX)
        computed = {} if pixels is None else computer.maps(pixels)
        for histogram in counted:
            name = histogram.layer.name
            try:
                maps = image_maps(store, shape_class.name, histogram.layer, row, sizes[name])
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


class _Computer:
    """An extractor that is there once something is to be computed: torch takes a second and some 300 MB."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.extractor: Any = None

    def maps(self, pixels: Array) -> dict[str, Array]:
        """Float32 maps (channel, y, x) of each layer."""
        if self.extractor is None:
            from pipeline.extract.cpu import Extractor  # noqa: PLC0415 (see above)

            self.extractor = Extractor(
                extractor_spec(self.store.spec), self.store.weights()
            )  # which keeps its values as they are
        found: dict[str, Array] = self.extractor.extract(pixels)
        return found


def _photographs(store: Store, chosen: Sequence[Chosen]) -> Iterator[Photograph]:
    """The image of each row, in order; images that are too large are not decoded."""
    names = ("path", "size_bytes", "digest", "source_height", "source_width")
    rows = [[store.cell(c.shape_class.name, name, c.row) for name in names] for c in chosen]
    n_pixels = [int(height) * int(width) for *_, height, width in rows]
    wanted = [(str(row[0]), int(row[1]), str(row[2])) for row, n in zip(rows, n_pixels, strict=True) if n <= PIXEL_LIMIT]
    found = photographs(store.spec.source_root, decode_spec(store.spec), wanted)
    for n in n_pixels:
        if n > PIXEL_LIMIT:
            yield Photograph(None, f"the source image has {n:,} pixels, and at most {PIXEL_LIMIT:,} are decoded for this page")
        else:
            yield next(found)


def _draw(layer: str, maps: Array, n: int) -> Iterator[MapPicture]:
    for channel, values in enumerate(maps[: max(0, min(n, MAPS_PER_LAYER))]):
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255 / (high - low)) if high > low else np.full_like(values, 128)
        yield MapPicture(layer, channel, encode(scaled.round().astype(np.uint8), MAP_PX), low, high)
