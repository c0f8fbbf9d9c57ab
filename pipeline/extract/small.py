"""A stack of layers on small images, by compiled code alone: images of one size are computed together. See kernel_stack.h."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING

import numpy as np

from pipeline.extract import kernel
from pipeline.extract.activations import ACTIVATIONS
from pipeline.extract.layers import output_sizes
from pipeline.extract.stack import Pooled, Stack, check_range

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.config import LayerSpec
    from pipeline.extract.layers import Array

LARGEST_IMAGE, LARGEST_LAYER = 96 * 96, 1 << 19
"""Pixels of an image, and values of a layer before its pool, up to which an image is small.

For layers of two filters of 9 x 9, torch is as fast from some 100 x 100 pixels on; for other layers only from larger images on.
"""


class SmallLayer(ctypes.Structure):
    """A layer as compiled code takes it: `struct small_layer` of kernel_stack.h. A change here needs a new ABI number."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int32) for name in ("filters", "kh", "kw", "py", "px", "activation", "kind")),
        *((name, ctypes.c_float) for name in ("levels", "constant")),
        *((name, ctypes.c_int64) for name in ("filter_stride", "row_stride")),
        *((name, ctypes.c_void_p) for name in ("out", "statistics")),
    ]


class SmallStack:
    """All layers of a stack, for images that are small.

    Parameters
    ----------
    stack : Stack
    weights : dict of str to (filters, channel, y, x) and (filters,)
        Cross-correlation orientation.
    """

    def __init__(self, stack: Stack, weights: Mapping[str, Array]) -> None:
        self.stack, self.weights = stack, weights
        self._packed: dict[int, list[tuple[Array, Array]]] = {}

    def can_store(self) -> bool:
        """Whether compiled code has these layers, and knows how their maps are stored."""
        is_known = all(ACTIVATIONS[layer.activation].compiled is not None for layer in self.stack.layers)
        return is_known and all(kernel.is_available(stored) for stored in self.stack.stored.values())

    def takes(self, height: int, width: int) -> bool:
        """Whether an image of a size, or of a smaller one, is small."""
        sizes = output_sizes(self.stack.layers, height, width)
        layers = zip(self.stack.layers, sizes, strict=True)
        values = (layer.filters * math.prod(layer.pool) * math.prod(size) for layer, size in layers)
        return height * width <= LARGEST_IMAGE and max(values) <= LARGEST_LAYER

    def n_values(self, height: int, width: int) -> int:
        """Values of all layers' maps of an image."""
        sizes = output_sizes(self.stack.layers, height, width)
        return sum(layer.filters * math.prod(size) for layer, size in zip(self.stack.layers, sizes, strict=True))

    def packed(self, lanes: int) -> list[tuple[Array, Array]]:
        """Weights and biases of the layers in vectors of filters, the last one filled with zeros."""
        if lanes not in self._packed:
            self._packed.setdefault(lanes, self._pack(lanes))  # never replaced: another thread's call may point to it
        return self._packed[lanes]

    def _pack(self, lanes: int) -> list[tuple[Array, Array]]:
        found = []
        for name, layer in zip(self.stack.names, self.stack.layers, strict=True):
            weight, bias = (np.asarray(self.weights[f"{name}_{part}"], np.float32) for part in ("weight", "bias"))
            if name == "conv1":
                weight = weight / np.float32(256)  # for pixels of 0 ... 255; exact, because it is a power of two
            groups = -(-layer.filters // lanes)
            padded, biases = np.zeros((groups * lanes, *weight.shape[1:]), np.float32), np.zeros(groups * lanes, np.float32)
            padded[: layer.filters], biases[: layer.filters] = weight, bias
            vectors = padded.reshape(groups, lanes, *weight.shape[1:]).transpose(0, 3, 4, 2, 1)  # (group, ky, kx, channel, lane)
            found.append((np.ascontiguousarray(vectors), biases))
        return found

    def compute(self, images: Sequence[Array], out: Sequence[Mapping[str, Array]]) -> list[dict[str, Pooled]]:
        """Compute the maps of images of one size and store them; what becomes of each does not depend on the others.

        Parameters
        ----------
        images : sequence of (y, x, channel) uint8, contiguous
        out : sequence of mapping of str to (channel, y, x)
            For each image its outputs whose maps are kept, of the same strides for all images.
        """
        code, held = kernel.library(), []
        if code is None:
            raise ValueError("the compiled layers need their library; use torch's")
        layers, statistics = (SmallLayer * len(self.stack.layers))(), {}
        copies: list[tuple[str, list[Array]]] = []
        for to, name, spec, packed in zip(layers, self.stack.names, self.stack.layers, self.packed(kernel.lanes()), strict=True):
            _describe(to, spec, packed)
            if name not in self.stack.stored:
                continue
            stored = self.stack.stored[name]
            statistics[name] = np.empty((len(images), spec.filters, 4))
            to.statistics, to.kind = statistics[name].ctypes.data, kernel.DTYPES[stored.dtype]
            to.levels, to.constant = kernel.levels(stored)
            if name in out[0]:
                maps = [wanted[name] for wanted in out]
                if maps[0].strides[2] != maps[0].itemsize:
                    maps = list(np.empty((len(maps), *maps[0].shape), maps[0].dtype))
                    copies.append((name, maps))
                held.append(kernel.pointers(maps))
                to.out, (to.filter_stride, to.row_stride, _) = held[-1].ctypes.data, maps[0].strides
        pixels = kernel.pointers(images)
        if code.featuremaps_stack(pixels.ctypes.data, len(images), *images[0].shape, layers, len(layers), kernel.MAX_LANES):
            raise MemoryError("the compiled layers found no memory for their maps")
        for name, maps in copies:
            for wanted, found in zip(out, maps, strict=True):
                wanted[name][...] = found
        return self._pooled(statistics, images[0].shape[:2])

    def _pooled(self, statistics: Mapping[str, Array], size: tuple[int, int]) -> list[dict[str, Pooled]]:
        areas = dict(zip(self.stack.names, map(math.prod, output_sizes(self.stack.layers, *size)), strict=True))
        pooled = {name: kernel.as_pooled(found, areas[name]).astype(np.float32) for name, found in statistics.items()}
        for name, found in pooled.items():
            check_range(name, Pooled(*found.transpose(1, 0, 2)), self.stack.stored[name])
        return [dict(zip(pooled, map(Pooled._make, each), strict=True)) for each in zip(*pooled.values(), strict=True)]


def _describe(to: SmallLayer, spec: LayerSpec, packed: tuple[Array, Array]) -> None:
    weight, bias = packed
    to.weight, to.bias, to.filters = weight.ctypes.data, bias.ctypes.data, spec.filters
    (to.kh, to.kw), (to.py, to.px), to.activation = spec.kernel, spec.pool, ACTIVATIONS[spec.activation].compiled
