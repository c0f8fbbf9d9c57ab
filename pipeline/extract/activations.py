"""The one table of activations: in numpy, in torch and in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from pipeline.config import Activation


class Function(NamedTuple):
    """One monotone function, three times."""

    of_array: Callable[[Any], Any]
    """Of an array of floats, in numpy."""
    in_place: str | None
    """Name of the method of a torch tensor that applies it in place (``atan_``); None where nothing is to be done."""
    compiled: int | None
    """What kernel.c calls it; None where kernel.c does not have it, so that torch computes the layer."""


def _sigmoid(values: Any) -> Any:
    return 0.5 + 0.5 * np.tanh(0.5 * values)  # never overflows


ACTIVATIONS: dict[Activation, Function] = {
    "none": Function(lambda values: values, None, 0),
    "sigmoid": Function(_sigmoid, "sigmoid_", 1),
    "tanh": Function(np.tanh, "tanh_", 2),
    "relu": Function(lambda values: np.maximum(values, 0), "relu_", 3),
}
"""By the names that `config.Activation` allows."""
