"""Calls of compiled code: uint8 pixels in, stored values and statistics out, in one pass over each image. See kernel.c."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.extract import quantise
from pipeline.extract.activations import ACTIVATIONS
from pipeline.extract.layers import Array
from pipeline.extract.quantise import INTEGER_MAX, StoredAs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.config import Activation, LayerSpec

DTYPES: dict[str, int] = {name: dtype.compiled for name, dtype in quantise.DTYPES.items() if dtype.compiled is not None}
"""How maps may be stored that compiled code computes, and what it calls that."""
_NAMES = {32: "amx", 16: "avx512", 8: "avx2", 4: "plain"}
_ABI = 5  # as in kernel.c
MAX_LANES = 32
"""Widest vectors to use, in float32 values, or 32 for matrix tiles; 0 is none at all, and leaves the work to torch."""


LARGE_KERNEL = 49
"""Weights of a kernel from which on the compiled first layer is faster than torch's and turning its maps together."""


@cache
def library() -> ctypes.CDLL | None:
    """The compiled code, where the installation has it: without a C compiler there is none, and torch does the work."""
    for path in sorted(Path(__file__).parent.glob("_kernel*.so")):
        try:
            code = ctypes.CDLL(str(path))
            if code.featuremaps_abi() != _ABI:
                continue
        except (OSError, AttributeError):  # another platform's, or of other sources
            continue
        pointer, integer, real, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
        code.featuremaps_layer.argtypes = [
            *(pointer, integer, integer, integer, integer),  # images
            *(pointer, pointer, integer, integer, integer, integer),  # layer
            *(integer, real, real, pointer, stride, stride),  # output
            *(pointer, integer),
        ]
        code.featuremaps_stack.argtypes = [pointer, *[integer] * 4, pointer, integer, integer]
        return code
    return None


def version(channels: int = 3, kernel: tuple[int, int] = (9, 9), filters: int = 2) -> str:
    """What computes a first layer on this machine: ``torch``, ``plain``, ``avx2``, ``avx512`` or ``amx``.

    ``avx2-winograd``, and so on, where the layer is computed by Winograd's convolution.
    """
    code = library()
    if code is None or not MAX_LANES:
        return "torch"
    lanes, is_winograd = divmod(code.featuremaps_version(MAX_LANES, channels, filters, *kernel), 2)
    return _NAMES[2 * lanes] + ("-winograd" if is_winograd else "")


def lanes() -> int:
    """Floats of the vectors that compiled code uses but for a first layer, at most `MAX_LANES`; 0 where there is no such code."""
    code = library()
    return int(code.featuremaps_lanes(MAX_LANES)) if code and MAX_LANES else 0


def name_of(lanes: int) -> str:
    """What `version` calls vectors of so many floats."""
    return _NAMES[lanes]


def is_available(stored: StoredAs) -> bool:
    """Whether the compiled layer can be used, and knows how its maps are to be stored."""
    return stored.dtype in DTYPES and version() != "torch"


def has(layer: LayerSpec) -> bool:
    """Whether the compiled code has such a first layer: without a pool, and with an activation of kernel.c."""
    return layer.pool == (1, 1) and ACTIVATIONS[layer.activation].compiled is not None


def is_fast(layer: LayerSpec) -> bool:
    """Whether the compiled first layer is so fast that it pays to turn its maps for the next layer: that of a large kernel."""
    return has(layer) and math.prod(layer.kernel) >= LARGE_KERNEL


def first_layer(image: Array, weight: Array, bias: Array, activation: Activation, stored: StoredAs, out: Array) -> Array:
    """`first_layers` of one image: (4, filters) float64."""
    found: Array = first_layers([image], weight, bias, activation, stored, [out])[0]
    return found


def first_layers(
    images: Sequence[Array], weight: Array, bias: Array, activation: Activation, stored: StoredAs, out: Sequence[Array]
) -> Array:
    """Valid convolution, bias and activation of images of one size; what becomes of each does not depend on the others.

    Parameters
    ----------
    images : sequence of (y, x, channel) uint8, contiguous
    weight : (filters, channel, ky, kx) float32, contiguous
        Cross-correlation orientation, for pixels of 0 ... 255.
    bias : (filters,) float32
    activation : str
    stored : StoredAs
        float32, uint8 or uint16; the values must lie within the bounds that it was made for.
    out : sequence of (filters, y, x) of that type
        One for each image, contiguous along x, all of the same strides.

    Returns
    -------
    (image, 4, filters) float64
        Mean, population standard deviation, minimum and maximum of the float32 values before they are rounded for storage.
    """
    code = library()
    height, width, channels = images[0].shape
    filters, _, kh, kw = weight.shape
    strides = out[0].strides
    is_as_needed = weight.flags.c_contiguous and strides[2] == out[0].itemsize and all(maps.strides == strides for maps in out)
    if (
        code is None
        or not is_as_needed
        or not all(image.flags.c_contiguous and image.shape == images[0].shape for image in images)
    ):
        raise ValueError("the compiled layer needs its library and contiguous arrays; use torch's")
    statistics, pixels, maps = np.empty((len(images), filters, 4)), pointers(images), pointers(out)
    failed = code.featuremaps_layer(
        *(pixels.ctypes.data, len(images), height, width, channels),
        *(weight.ctypes.data, bias.ctypes.data, filters, kh, kw, ACTIVATIONS[activation].compiled),
        *(DTYPES[stored.dtype], *levels(stored), maps.ctypes.data, strides[0], strides[1]),
        *(statistics.ctypes.data, MAX_LANES),
    )
    if failed:
        raise MemoryError("the compiled layer found no memory for its rows")
    return as_pooled(statistics, out[0].shape[1] * out[0].shape[2])


def levels(stored: StoredAs) -> tuple[float, float]:
    """Factor and constant by which a value becomes an integer."""
    if stored.dtype not in INTEGER_MAX:
        return 0, 0
    return 1 / stored.scale_factor, 0.5 - stored.add_offset / stored.scale_factor


def as_pooled(statistics: Array, size: int) -> Array:
    """From (image, filter, (mean, sum of squares about it, low, high)) to (image, (mean, deviation, low, high), filter)."""
    found: Array = statistics.transpose(0, 2, 1)
    found[:, 1] = np.sqrt(found[:, 1] / size)
    return found


def pointers(arrays: Sequence[Array]) -> Array:
    """Where some arrays begin: (n,) of addresses."""
    return np.array([array.__array_interface__["data"][0] for array in arrays], np.uintp)
