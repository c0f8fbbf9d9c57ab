"""What is done from time to time while tasks are on their way."""

from __future__ import annotations

import time


class Every:
    """Says when something is due that is done every few seconds.

    Parameters
    ----------
    seconds : float
    first_s : float, optional
        Seconds until it is due for the first time; as long as between two times where not given.
    """

    def __init__(self, seconds: float, first_s: float | None = None) -> None:
        self.seconds = seconds
        self._due_s = time.monotonic() + (seconds if first_s is None else first_s)

    @property
    def left_s(self) -> float:
        """Seconds until it is due; negative where it is overdue."""
        return self._due_s - time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is to be done now."""
        return self.left_s <= 0

    def done(self) -> None:
        """Note that it was done, from when on time counts again."""
        self._due_s = time.monotonic() + self.seconds
