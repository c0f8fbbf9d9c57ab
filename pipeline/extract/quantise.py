"""How values are stored: the dtypes, and the scale and offset of integers; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from pipeline.errors import UsageError
from pipeline.extract.layers import Array

if TYPE_CHECKING:
    from pipeline.config import Dtype

TF32_MARGIN = 1 / 256  # where weights and inputs are rounded to 11 bits
RANGE_MARGIN = 1 / 4096  # of the range of quantised values, each side: far above the float32 rounding of a convolution


class StoredDtype(NamedTuple):
    """What is particular to a dtype that maps are stored in."""

    largest: float
    """Largest value that it holds."""
    is_integer: bool
    """Whether values are quantised."""
    copied_as: str
    """Torch's dtype of the same size that every device can copy."""
    compiled: int | None
    """What compiled code calls it, as in kernel.c; None where it does not know it."""


DTYPES: dict[Dtype, StoredDtype] = {
    "float32": StoredDtype(float(np.finfo(np.float32).max), False, "float32", 0),
    "float16": StoredDtype(65504.0, False, "float16", None),
    "uint16": StoredDtype(65535, True, "int16", 2),
    "uint8": StoredDtype(255, True, "uint8", 1),
}
"""The one table of dtypes; a new one is a line here and a word in `config.Dtype`."""
INTEGER_MAX: dict[str, int] = {name: int(dtype.largest) for name, dtype in DTYPES.items() if dtype.is_integer}
FLOAT_MAX: dict[str, float] = {name: dtype.largest for name, dtype in DTYPES.items() if not dtype.is_integer}


class StoredAs(Protocol):
    """How values are stored: ``value = stored * scale_factor + add_offset``."""

    @property
    def dtype(self) -> str:
        """float32, float16, uint16 or uint8."""

    @property
    def scale_factor(self) -> float:
        """1 for floats."""

    @property
    def add_offset(self) -> float:
        """0 for floats."""


class StoredOutput(StoredAs, Protocol):
    """How a layer, by name, is stored."""

    @property
    def name(self) -> str:
        """One of the spec's ``output_names``."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """How the values of one layer are stored: ``value = stored * scale_factor + add_offset``."""

    dtype: str
    """float32, float16, uint16 or uint8."""
    scale_factor: float
    """1 for floats."""
    add_offset: float
    """0 for floats."""
    fill_value: float
    """NaN for floats; 0 for integers, whose data are 1 and up."""
    error_bound: float
    """Largest difference between a decoded value and the float32 value that was computed."""


def quantisation(bounds: tuple[float, float], dtype: str, margin: float = RANGE_MARGIN) -> Quantisation:
    """Choose how values within bounds are stored.

    Integers 1 ... max span the bounds, widened by ``margin`` of their range on both sides, and to at least 1/16 of the largest magnitude:
    float32 arithmetic could not tell the levels of a narrower range apart.

    Parameters
    ----------
    bounds : tuple of float
        Smallest and largest value, as `output_bounds` gives them; they may be equal.
    dtype : str
        float32, float16, uint16 or uint8.
    margin : float
        More than computing may stray from exact values, as a share of the range.

    Raises
    ------
    UsageError
        When the bounds exceed what the dtype, or float32, can hold.

    Examples
    --------
    >>> q = quantisation((0.0, 1.0), "uint8")
    >>> round(1 / q.scale_factor, 2), round(q.add_offset, 6), round(q.error_bound / q.scale_factor, 3)
    (253.88, -0.004183, 0.5)
    """
    low, high = bounds
    largest = max(abs(low), abs(high))
    limit = FLOAT_MAX.get(dtype, FLOAT_MAX["float32"])
    if not largest <= limit:  # also when it is NaN
        raise UsageError(
            f"maps may lie anywhere in [{low:g}, {high:g}], but {dtype} is stored within {limit:g}, so some would be lost; "
            "use a wider dtype, an activation that has bounds (sigmoid, tanh) or smaller weights"
        )
    if dtype == "float32":
        return Quantisation(dtype, 1.0, 0.0, math.nan, 0.0)
    if dtype == "float16":  # half a unit in the last of 11 bits, or of the subnormal numbers
        return Quantisation(dtype, 1.0, 0.0, math.nan, math.ldexp(1.0, max(math.frexp(largest)[1] - 1, -14) - 11))
    centre = low / 2 + high / 2
    half = max((high / 2 - low / 2) * (1 + 2 * margin), largest / 32, 2.0**-64)
    scale = 2 * half / (INTEGER_MAX[dtype] - 1)
    slack = 2.0**-21 * (largest + 2 * half)  # eight roundings in float32 while encoding and decoding
    return Quantisation(dtype, scale, centre - half - scale, 0, scale / 2 + slack)


def dequantise(stored: Array, q: StoredAs) -> Array:
    """Decode stored values to float32 of the same shape; an integer's fill becomes NaN."""
    values: Array = stored.astype(np.float32, copy=False)
    if q.dtype in INTEGER_MAX:
        values *= np.float32(q.scale_factor)
        values += np.float32(q.add_offset)
        values[stored == 0] = np.nan
    return values


def storable_range(q: StoredAs) -> tuple[float, float]:
    """Smallest and largest value that ``q`` can store."""
    if q.dtype in INTEGER_MAX:
        return q.add_offset + q.scale_factor, q.add_offset + q.scale_factor * INTEGER_MAX[q.dtype]
    return -FLOAT_MAX[q.dtype], FLOAT_MAX[q.dtype]
