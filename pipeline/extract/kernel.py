"""The compiled first layer: uint8 pixels in, stored values and statistics out, in one pass over the image. See kernel.c."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.extract import quantise
from pipeline.extract.activations import ACTIVATIONS
from pipeline.extract.layers import Array
from pipeline.extract.quantise import INTEGER_MAX, StoredAs

if TYPE_CHECKING:
    from pipeline.config import Activation, LayerSpec

DTYPES: dict[str, int] = {name: dtype.compiled for name, dtype in quantise.DTYPES.items() if dtype.compiled is not None}
"""How maps may be stored that compiled code computes, and what it calls that."""
_NAMES = {32: "amx", 16: "avx512", 8: "avx2", 4: "plain"}
_ABI = 3  # as in kernel.c
MAX_LANES = 32
"""Widest vectors to use, in float32 values, or 32 for matrix tiles; 0 is none at all, and leaves the work to torch."""


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled code, where the installation has it: without a C compiler there is none, and torch does the work."""
    for path in sorted(Path(__file__).parent.glob("_kernel*.so")):
        try:
            library = ctypes.CDLL(str(path))
            if library.featuremaps_abi() != _ABI:
                continue
        except (OSError, AttributeError):  # another platform's, or of other sources
            continue
        pointer, integer, real, stride = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_int64
        library.featuremaps_layer.argtypes = [
            *(pointer, integer, integer, integer),  # image
            *(pointer, pointer, integer, integer, integer, integer),  # layer
            *(integer, real, real, pointer, stride, stride),  # output
            *(pointer, integer),
        ]
        return library
    return None


def version(channels: int = 3, kernel: tuple[int, int] = (9, 9), filters: int = 2) -> str:
    """What computes a first layer on this machine: ``torch``, ``plain``, ``avx2``, ``avx512`` or ``amx``.

    ``avx2-winograd``, and so on, where the layer is computed by Winograd's convolution.
    """
    library = _library()
    if library is None or not MAX_LANES:
        return "torch"
    lanes, is_winograd = divmod(library.featuremaps_version(MAX_LANES, channels, filters, *kernel), 2)
    return _NAMES[2 * lanes] + ("-winograd" if is_winograd else "")


def is_available(stored: StoredAs) -> bool:
    """Whether the compiled layer can be used, and knows how its maps are to be stored."""
    return stored.dtype in DTYPES and version() != "torch"


def has(layer: LayerSpec) -> bool:
    """Whether the compiled code has such a layer: without a pool, and with an activation of kernel.c."""
    return layer.pool == (1, 1) and ACTIVATIONS[layer.activation].compiled is not None


def first_layer(image: Array, weight: Array, bias: Array, activation: Activation, stored: StoredAs, out: Array) -> Array:
    """Valid convolution, bias and activation of one image.

    Parameters
    ----------
    image : (y, x, channel) uint8, contiguous
    weight : (filters, channel, ky, kx) float32, contiguous
        Cross-correlation orientation, for pixels of 0 ... 255.
    bias : (filters,) float32
    activation : str
    stored : StoredAs
        float32, uint8 or uint16; the values must lie within the bounds that it was made for.
    out : (filters, y, x) of that type
        Contiguous along x.

    Returns
    -------
    (4, filters) float64
        Mean, population standard deviation, minimum and maximum of the float32 values before they are rounded for storage.
    """
    library = _library()
    height, width, channels = image.shape
    filters, _, kh, kw = weight.shape
    if library is None or out.strides[2] != out.itemsize or not (image.flags.c_contiguous and weight.flags.c_contiguous):
        raise ValueError("the compiled layer needs its library and contiguous arrays; use torch's")
    levels, constant = (
        (1 / stored.scale_factor, 0.5 - stored.add_offset / stored.scale_factor) if stored.dtype in INTEGER_MAX else (0, 0)
    )
    statistics = np.empty((filters, 4))
    failed = library.featuremaps_layer(
        *(image.ctypes.data, height, width, channels),
        *(weight.ctypes.data, bias.ctypes.data, filters, kh, kw, ACTIVATIONS[activation].compiled),
        *(DTYPES[stored.dtype], levels, constant, out.ctypes.data, out.strides[0], out.strides[1]),
        *(statistics.ctypes.data, MAX_LANES),
    )
    if failed:
        raise MemoryError("the compiled layer found no memory for its rows")
    mean, squares, low, high = statistics.T
    return np.stack([mean, np.sqrt(squares / out[0].size), low, high])
