"""Memory of batches on a GPU: how much of the device they take together, and where their maps go. No torch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.extract.layers import Array


class Room:
    """Memory of the device that all batches of a process share; thread-safe.

    Parameters
    ----------
    n_bytes : int
        What batches may take together. A single one may take more, while no other is under way.
    """

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self._taken: list[int] = []
        self._waiting: deque[object] = deque()
        self._change = threading.Condition()

    def take(self, n_bytes: int, *, wait: bool) -> bool:
        """Take some, or say that there is no room now; whoever holds some must not wait."""
        with self._change:
            if wait:
                self._wait_in_turn(n_bytes)
            elif self._waiting or not self._fits(n_bytes):
                return False
            self._taken.append(n_bytes)
            return True

    def give(self, n_bytes: int) -> None:
        """Give back what was taken."""
        with self._change:
            self._taken.remove(n_bytes)
            self._change.notify_all()

    def _wait_in_turn(self, n_bytes: int) -> None:
        """First come, first served: else small batches would overtake a large one for ever."""
        self._waiting.append(turn := object())
        try:
            self._change.wait_for(lambda: self._waiting[0] is turn and self._fits(n_bytes))
        finally:
            self._waiting.remove(turn)
            self._change.notify_all()  # the next one may fit, too

    def _fits(self, n_bytes: int) -> bool:
        return not self._taken or sum(self._taken) + n_bytes <= self.n_bytes


def adjoining(arrays: Sequence[Array]) -> Iterator[tuple[int, Array]]:
    """Arrays as few larger ones: those that follow one another in memory are one, with a new first axis.

    Yields
    ------
    (int, (n, ...))
        Number of the first array, and ``n`` of them from there on.

    Examples
    --------
    >>> rows = np.zeros((5, 2, 3))
    >>> [(first, len(run)) for first, run in adjoining([rows[0], rows[1], rows[3], rows[4]])]
    [(0, 2), (2, 2)]
    """
    first = 0
    for i in range(1, len(arrays) + 1):
        if i < len(arrays) and _follows(arrays[i - 1], arrays[i]):
            continue
        found = arrays[first]
        shape, strides = (i - first, *found.shape), (found.nbytes, *found.strides)
        yield first, np.lib.stride_tricks.as_strided(found, shape, strides)
        first = i


def _follows(before: Array, after: Array) -> bool:
    return (
        before.flags.c_contiguous
        and after.flags.c_contiguous
        and (before.shape, before.dtype) == (after.shape, after.dtype)
        and before.ctypes.data + before.nbytes == after.ctypes.data
    )
