"""A stack of layers by compiled code alone; small images of one size are computed together. See kernel_stack.h."""

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
_OUTPUTS, _MOST_LANES = 512, 16  # as in kernel_stack.h, and of the widest vectors
LANES = 8
"""Filters of a vector, for the choice of what computes a stack. It is the same on every processor, so that maps are, too."""
MOST_PADDING = 1.6
"""Products with the filters that fill up vectors, divided by all others, up to which compiled code is faster than torch.

Measured with AVX2 on images of 639 x 516: 1.0 to 2.1 times as fast up to here, except where `kernel.is_fast`; 0.7 times at 2.0.
"""


def has_activations(layers: Sequence[LayerSpec]) -> bool:
    """Whether compiled code has the activations of all layers."""
    return all(ACTIVATIONS[layer.activation].compiled is not None for layer in layers)


def pays(layers: Sequence[LayerSpec], channels: int) -> bool:
    """Whether compiled code computes a stack faster than torch for images of any size, in `channels` of pixels.

    It does not say whether there is compiled code.
    """
    if kernel.is_fast(layers[0]) or not has_activations(layers):
        return False
    products = padded = 0.0
    inputs, area = channels, 1.0
    for layer in layers:
        each = area * inputs * math.prod(layer.kernel)
        products += each * layer.filters
        padded += each * math.ceil(layer.filters / LANES) * LANES
        inputs, area = layer.filters, area / math.prod(layer.pool)
    return padded <= MOST_PADDING * products


def is_small(layers: Sequence[LayerSpec], height: int, width: int) -> bool:
    """Whether an image of a size, or of a smaller one, is so small that compiled code pays for any layers."""
    sizes = output_sizes(layers, height, width)
    values = (layer.filters * math.prod(layer.pool) * math.prod(size) for layer, size in zip(layers, sizes, strict=True))
    return height * width <= LARGEST_IMAGE and max(values) <= LARGEST_LAYER


def scratch_bytes(layers: Sequence[LayerSpec], height: int, width: int, channels: int) -> int:
    """Bytes that compiled code takes for one image on any processor: pixels and layers in two buffers, and outputs of a few rows."""
    sizes = output_sizes(layers, height, width)
    maps = [channels * height * width, *(layer.filters * math.prod(size) for layer, size in zip(layers, sizes, strict=True))]
    outputs = (
        max(_OUTPUTS, size[1] * math.prod(layer.pool))
        * (math.ceil(layer.filters / _MOST_LANES) * _MOST_LANES + 2)  # 2: a pointer each
        for layer, size in zip(layers, sizes, strict=True)
    )
    return 4 * (max(maps[::2]) + max(maps[1::2]) + max(outputs))


class StackLayer(ctypes.Structure):
    """A layer as compiled code takes it: `struct stack_layer` of kernel_stack.h. A change here needs a new ABI number."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int32) for name in ("filters", "kh", "kw", "py", "px", "activation", "kind")),
        *((name, ctypes.c_float) for name in ("levels", "constant")),
        *((name, ctypes.c_int64) for name in ("filter_stride", "row_stride")),
        *((name, ctypes.c_void_p) for name in ("out", "statistics")),
    ]


class CompiledStack:
    """All layers of a stack.

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
        return has_activations(self.stack.layers) and all(kernel.is_available(stored) for stored in self.stack.stored.values())

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
        layers, statistics = (StackLayer * len(self.stack.layers))(), {}
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


def _describe(to: StackLayer, spec: LayerSpec, packed: tuple[Array, Array]) -> None:
    weight, bias = packed
    to.weight, to.bias, to.filters = weight.ctypes.data, bias.ctypes.data, spec.filters
    (to.kh, to.kw), (to.py, to.px), to.activation = spec.kernel, spec.pool, ACTIVATIONS[spec.activation].compiled
