"""Arrays made ready to be drawn: smaller, at their place in the input image, with ranges and bins that fit them. No matplotlib."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from pipeline.extract.layers import Array
from pipeline.extract.quantise import INTEGER_MAX, StoredAs
from pipeline.store.schema import StoredLayer

Extent: TypeAlias = tuple[float, float, float, float]

MAX_SIDE = 1600
"""Pixels that a side of a drawn array has at most; a figure has fewer."""
N_BINS = 100
OUTLIERS_PERCENT = 0.5
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Picture:
    """Something to draw, and where it lies."""

    title: str
    values: Array
    """(y, x) or (y, x, 3)."""
    extent: Extent
    """Left, right, bottom and top edge in input pixels; the centre of the first pixel is at 0, and y grows downwards."""

    @property
    def ratio(self) -> float:
        """Width by height, in input pixels."""
        left, right, bottom, top = self.extent
        return (right - left) / (bottom - top)


def of_pixels(title: str, pixels: Array, max_side: int = MAX_SIDE, origin: tuple[int, int] = (0, 0)) -> Picture:
    """An image as it is drawn.

    Parameters
    ----------
    title : str
    pixels : (y, x, channel) uint8
        Of three channels or one.
    max_side : int
        Pixels of the longer side at most.
    origin : (int, int)
        Left and top pixel, where it is a part of the image.
    """
    values = pixels if pixels.shape[2] == 3 else pixels[:, :, 0]
    height, width = values.shape[:2]
    return _picture(title, values, origin[1] + np.arange(height), origin[0] + np.arange(width), (1.0, 1.0), max_side)


def of_map(title: str, values: Array, y: Array, x: Array, strides: tuple[float, float], max_side: int = MAX_SIDE) -> Picture:
    """A map as it is drawn: each value covers one stride about the centre of its receptive field.

    Parameters
    ----------
    title : str
    values : (y, x) float32
    y, x : (y,) and (x,) float64
        Centres of the receptive fields, in input pixels.
    strides : tuple of float
        Between neighbours in y and in x, input pixels; of no use to a map of one row, which has no neighbours.
    max_side : int
        Values of the longer side at most.

    Examples
    --------
    A 9 x 9 kernel on an image of 20 x 30 pixels leaves a border of 4 on each side:

    >>> of_map("", np.zeros((12, 22)), np.arange(12) + 4.0, np.arange(22) + 4.0, (1, 1)).extent
    (3.5, 25.5, 15.5, 3.5)
    """
    return _picture(title, values, y, x, strides, max_side)


def _picture(title: str, values: Array, y: Array, x: Array, strides: tuple[float, float], max_side: int) -> Picture:
    height, width = values.shape[:2]
    factor = math.ceil(max(height, width) / max_side)
    fy, fx = min(factor, height), min(factor, width)
    small = shrink(values, fy, fx)
    top, left = float(y[0]) - strides[0] / 2, float(x[0]) - strides[1] / 2
    bottom, right = top + small.shape[0] * fy * strides[0], left + small.shape[1] * fx * strides[1]
    return Picture(title, small, (left, right, bottom, top))


def shrink(values: Array, fy: int, fx: int) -> Array:
    """Means of blocks of ``fy`` x ``fx`` values, of the same dtype; an incomplete last block is dropped.

    Examples
    --------
    >>> shrink(np.arange(10, dtype=np.uint8).reshape(2, 5), 2, 2)
    array([[3, 5]], dtype=uint8)
    """
    if fy == fx == 1:
        return values
    height, width = values.shape[0] // fy, values.shape[1] // fx
    blocks = values[: height * fy, : width * fx].reshape(height, fy, width, fx, *values.shape[2:])
    means: Array = blocks.mean((1, 3), dtype=np.float32)
    return means.astype(values.dtype)


def value_limits(values: Array) -> tuple[float, float]:
    """Range of colours for some values: without the outermost half percent on each side, that a few extremes do not grey the rest.

    Examples
    --------
    >>> value_limits(np.array([0.0, *np.linspace(0.4, 0.6, 998), 1.0]))
    (0.4..., 0.599...)
    >>> value_limits(np.full(9, 0.5))
    (0.0, 1.0)
    """
    low, high = (float(v) for v in np.percentile(values, [OUTLIERS_PERCENT, 100 - OUTLIERS_PERCENT]))
    if low == high:
        low, high = float(values.min()), float(values.max())
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def bin_edges(low: float, high: float, stored: StoredAs, n_bins: int = N_BINS) -> Array:
    """Edges of about ``n_bins`` equal bins over a range, each with the same number of the levels that a dtype can hold.

    A bin of 3 levels beside one of 4 would look like a dent in the data. Edges lie halfway between two levels. For float16 a level is
    its spacing at the largest value; nearer to 0 it is finer by powers of 2, which divide it.

    Parameters
    ----------
    low, high : float
        Smallest and largest value.
    stored : StoredLayer
        How they are stored.
    n_bins : int
        More than this there are never.

    Returns
    -------
    (bin + 1,) float64

    Examples
    --------
    >>> from pipeline.extract.quantise import quantisation
    >>> q = quantisation((0.0, 1.0), "uint8")
    >>> edges = bin_edges(0.25, 0.75, q)
    >>> len(edges) - 1, round(float(edges[1] - edges[0]) / q.scale_factor, 6)
    (64, 2.0)
    """
    if stored.dtype in INTEGER_MAX:
        level, offset = stored.scale_factor, stored.add_offset
    elif stored.dtype == "float16":
        largest = float(np.float16(min(max(abs(low), abs(high)), _FLOAT16_MAX)))
        level, offset = (
            math.ldexp(1.0, math.frexp(max(largest, 2.0**-14))[1] - 11),
            0.0,
        )  # numpy.spacing of the last one is infinite
    elif low < high:
        return np.linspace(low, high, n_bins + 1)
    else:
        level, offset = max(abs(low), 1.0) / n_bins, low
    first, last = math.floor((low - offset) / level + 0.5), math.floor((high - offset) / level + 0.5)
    per_bin = math.ceil((last - first + 1) / n_bins)
    n = math.ceil((last - first + 1) / per_bin)
    edges: Array = offset + level * (first - 0.5 + per_bin * np.arange(n + 1))
    return edges


@dataclass(slots=True)
class Histogram:
    """How often each value occurs in the maps of a layer, channel by channel, of the first channels."""

    layer: StoredLayer
    edges: Array
    """(bin + 1,) float64."""
    counts: Array
    """(channel, bin) int64."""
    totals: Array
    """Sums of values, (channel,) float64."""
    squares: Array
    """Sums of their squares, (channel,) float64."""
    n_images: int = 0

    @classmethod
    def over(cls, layer: StoredLayer, low: float, high: float, n_channels: int) -> Histogram:
        """An empty one over a range of values."""
        edges = bin_edges(low, high, layer)
        n = min(layer.channels, n_channels)
        return cls(layer, edges, np.zeros((n, len(edges) - 1), np.int64), np.zeros(n), np.zeros(n))

    def add(self, maps: Array) -> None:
        """Count the values (channel, y, x) of one image; those outside the range are in the outermost bins."""
        for channel, values in enumerate(maps[: len(self.counts)]):
            flat = values.ravel()
            self.counts[channel] += np.histogram(flat.clip(self.edges[0], self.edges[-1]), self.edges)[0]
            self.totals[channel] += flat.sum(dtype=np.float64)
            self.squares[channel] += np.einsum("i,i->", flat, flat, dtype=np.float64)
        self.n_images += 1

    @property
    def shares(self) -> Array:
        """Share of each bin in the values of its channel, (channel, bin) float64."""
        shares: Array = self.counts / self.counts.sum(1, keepdims=True)
        return shares

    @property
    def mean(self) -> Array:
        """(channel,) float64."""
        mean: Array = self.totals / self.counts.sum(1)
        return mean

    @property
    def std(self) -> Array:
        """Standard deviations, (channel,) float64."""
        std: Array = np.sqrt(np.maximum(self.squares / self.counts.sum(1) - self.mean**2, 0))
        return std
