"""Arithmetic of the stack of layers: names, sizes, receptive field, shapes of the weights, bounds of the values. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from pipeline.extract.activations import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipeline.config import LayerSpec

Array: TypeAlias = np.ndarray[Any, Any]

ROUNDING = 1e-5
"""Float32 maps agree with exact ones to this, on whatever kind of processor."""
TF32_ROUNDING = 2e-3


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """What one output of a layer sees of the input image, in pixels."""

    height: int
    width: int
    stride_y: int
    """Input rows between neighbouring outputs."""
    stride_x: int
    offset_y: float
    """Input row of the centre of output 0 (0 is the centre of the first pixel)."""
    offset_x: float


def layer_names(layers: Sequence[LayerSpec]) -> tuple[str, ...]:
    """Names of the layers: ``("conv1", "conv2", ...)``."""
    return tuple(f"conv{i + 1}" for i in range(len(layers)))


def output_sizes(layers: Sequence[LayerSpec], height: int, width: int) -> list[tuple[int, int]]:
    """Height and width of every layer's maps: a valid convolution, then a pool that drops an incomplete last window.

    A 0 means that the image is too small for that layer.

    Examples
    --------
    >>> from pipeline.config import LayerSpec
    >>> output_sizes([LayerSpec(filters=20, kernel=(5, 5), pool=(2, 2)), LayerSpec(filters=50, kernel=(9, 9))], 28, 31)
    [(12, 13), (4, 5)]
    """
    sizes = []
    for layer in layers:
        height = max(0, height - layer.kernel[0] + 1) // layer.pool[0]
        width = max(0, width - layer.kernel[1] + 1) // layer.pool[1]
        sizes.append((height, width))
    return sizes


def receptive_field(layers: Sequence[LayerSpec], upto: int | None = None) -> ReceptiveField:
    """Receptive field of one output of the first ``upto`` layers (default: of all).

    With steps of kernel ``k`` and stride ``s`` (a convolution has stride 1, a pool a kernel equal to its stride), each step adds
    ``(k - 1) * jump`` to the field and half of that to the offset, and multiplies the jump by ``s``: Araujo, Norris and Sim,
    "Computing Receptive Fields of Convolutional Neural Networks", Distill 2019, equations 2 and 6, without padding.

    Examples
    --------
    A 5x5 kernel with a 2x2 pool, twice: 1 + 4 + 1 = 6, then 6 + 4*2 + 1*2 = 16 pixels, 4 apart.

    >>> from pipeline.config import LayerSpec
    >>> layer = LayerSpec(kernel=(5, 5), pool=(2, 2))
    >>> receptive_field([layer])
    ReceptiveField(height=6, width=6, stride_y=2, stride_x=2, offset_y=2.5, offset_x=2.5)
    >>> receptive_field([layer, layer])
    ReceptiveField(height=16, width=16, stride_y=4, stride_x=4, offset_y=7.5, offset_x=7.5)
    """
    chosen = layers[:upto]
    height, stride_y = _field([(layer.kernel[0], layer.pool[0]) for layer in chosen])
    width, stride_x = _field([(layer.kernel[1], layer.pool[1]) for layer in chosen])
    return ReceptiveField(height, width, stride_y, stride_x, (height - 1) / 2, (width - 1) / 2)


def _field(steps: list[tuple[int, int]]) -> tuple[int, int]:
    """Field and stride of one axis; without padding the centre of the first field is the middle of its pixels."""
    size, stride = 1, 1
    for kernel, pool in steps:
        size += (kernel - 1 + pool - 1) * stride
        stride *= pool
    return size, stride


def weight_shapes(layers: Sequence[LayerSpec], channels: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, by name, for images of ``channels`` channels.

    Examples
    --------
    >>> from pipeline.config import LayerSpec
    >>> weight_shapes([LayerSpec()], 3)
    {'conv1_weight': (2, 3, 9, 9), 'conv1_bias': (2,)}
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in zip(layer_names(layers), layers, strict=True):
        shapes[f"{name}_weight"] = (layer.filters, channels, *layer.kernel)
        shapes[f"{name}_bias"] = (layer.filters,)
        channels = layer.filters
    return shapes


def output_bounds(layers: Sequence[LayerSpec], weights: Mapping[str, Array]) -> list[tuple[float, float]]:
    """Smallest and largest value that each layer can give, over all its channels, for pixels in [0, 255/256].

    Interval arithmetic in float64, channel by channel: positive weights meet the upper end of their channel's interval and
    negative ones the lower end. A max-pool keeps the interval and an activation, being monotone, maps its ends. A first layer
    attains its bounds; further layers may not, because their inputs depend on each other.

    Parameters
    ----------
    layers : sequence of LayerSpec
    weights : mapping of str to (filters, channel, y, x) and (filters,)
        As `weight_shapes` names them.
    """
    bounds = []
    low, high = np.float64(0.0), np.float64(255 / 256)
    for name, layer in zip(layer_names(layers), layers, strict=True):
        weight = np.asarray(weights[f"{name}_weight"], np.float64)
        bias = np.asarray(weights[f"{name}_bias"], np.float64)
        positive, negative = (part.sum((2, 3)) for part in (np.maximum(weight, 0), np.minimum(weight, 0)))  # (filters, channel)
        activate = ACTIVATIONS[layer.activation].of_array
        low, high = (
            activate(bias + (positive * low + negative * high).sum(1)),
            activate(bias + (positive * high + negative * low).sum(1)),
        )
        bounds.append((float(low.min()), float(high.max())))
    return bounds


def block_shape(filters: int, kernel: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the block of outputs that one position of the blocked convolution computes.

    Convolutions run on vectors of 16 output channels, so few filters leave most of a vector idle. The block is the largest power
    of two that keeps filters x block within 16, at most 4 wide, which measured as the best or within 10 % of it for kernels of
    3x3 to 9x9: (4, 4) for 1 filter, (2, 4) for 2, (1, 4) for 3 and 4, (1, 2) for 5 to 8. From 9 filters on, and for a 1x1
    kernel, it is (1, 1): a plain convolution.

    Examples
    --------
    >>> from pipeline.config import LayerSpec
    >>> [block_shape(filters, (9, 9)) for filters in (1, 2, 4, 8, 20)]
    [(4, 4), (2, 4), (1, 4), (1, 2), (1, 1)]
    """
    if kernel == (1, 1) or filters > 16:
        return 1, 1
    size = 1 << ((16 // filters).bit_length() - 1)
    block_x = min(4, size)
    return size // block_x, block_x


def padded_extent(extent: int, block: int) -> int:
    """Round one side of a convolution's output up to a step of 1/16 to 1/8 of it, at most 16, and to whole blocks.

    The convolution library compiles a kernel for every new shape, at 0.2 to 0.6 ms; this leaves few shapes, whatever the sizes
    of the images. It depends on the image's own size alone, so that results do too.

    Examples
    --------
    >>> from pipeline.config import LayerSpec
    >>> [padded_extent(extent, 4) for extent in (21, 56, 93, 508, 631)]
    [24, 56, 96, 512, 640]
    """
    step = max(block, min(16, (1 << extent.bit_length()) // 16))
    return -(-extent // step) * step
