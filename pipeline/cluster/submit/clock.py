"""The time of the driver's job: what to do before it ends, and how long to retry."""

from __future__ import annotations

import logging
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.cluster import batch_commands
from pipeline.cluster.batch_workers import margin_s
from pipeline.errors import FeaturemapsError

logger = logging.getLogger(__name__)
T = TypeVar("T")

PATIENCE_S = 300.0
"""How long a batch system or a storage may fail to answer, for instance while its server restarts."""
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0


class Clock:
    """Counts the time of a job, from now on.

    Parameters
    ----------
    walltime_s : int
        Time limit that the batch system gives the job.
    signalled : threading.Event
        Set by a signal; it ends every `wait`.
    """

    def __init__(self, walltime_s: int, signalled: threading.Event) -> None:
        self.signalled = signalled
        self.quarter_s = margin_s(walltime_s) / 4
        self.end_s = time.monotonic() + walltime_s

    @property
    def left_s(self) -> float:
        """Seconds until the batch system ends the job."""
        return self.end_s - time.monotonic()

    @property
    def patience_s(self) -> float:
        """The longest time that `patiently` takes, in seconds."""
        return PATIENCE_S

    def timer(self, n_quarters: int, function: Callable[[], Any]) -> threading.Timer:
        """Start a timer that fires this many quarters of the margin before the walltime."""
        timer = threading.Timer(max(0.0, self.left_s - n_quarters * self.quarter_s), function)
        timer.daemon = True
        timer.start()
        return timer

    def wait(self, seconds: float) -> None:
        """Wait until a signal comes or the time has passed.

        It polls, because a handler must not set an event that its own thread waits for.
        """
        until_s = time.monotonic() + seconds
        while not self.signalled.is_set() and time.monotonic() < until_s:
            time.sleep(0.1)

    def patiently(self, action: Callable[[], T], *, unless: Callable[[Exception], bool] = lambda _: False) -> T:
        """Retry with growing pauses while patience and time last; raise at once an error for which ``unless`` returns true."""
        until_s = min(time.monotonic() + self.patience_s, self.end_s - 5)
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return action()
            except (FeaturemapsError, OSError, subprocess.SubprocessError) as error:
                if unless(error) or time.monotonic() + pause_s > until_s:
                    raise
                logger.warning("trying again in %.0f s: %s", pause_s, batch_commands.said(error))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
