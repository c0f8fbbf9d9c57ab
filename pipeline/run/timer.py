"""A timer for what the driver does every few seconds."""

from __future__ import annotations

import time


class Every:
    """Tells when a periodic action is due.

    Parameters
    ----------
    seconds : float
    first_s : float, optional
        Seconds until it is due for the first time; by default the same as ``seconds``.
    """

    def __init__(self, seconds: float, first_s: float | None = None) -> None:
        self.seconds = seconds
        self._due_s = time.monotonic() + (seconds if first_s is None else first_s)

    @property
    def left_s(self) -> float:
        """Seconds until it is due; negative if overdue."""
        return self._due_s - time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether to do it now."""
        return self.left_s <= 0

    def done(self) -> None:
        """Note that it was done, and start to count again."""
        self._due_s = time.monotonic() + self.seconds
