"""Whether a run ends early, and why."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

from pipeline.errors import FeaturemapsError
from pipeline.run.failures import explain, why
from pipeline.run.tasks import WorkPiece
from pipeline.store.objects import Place

logger = logging.getLogger(__name__)


class Ending:
    """The first failure of a run, and whether tasks in flight are still worth waiting for.

    Parameters
    ----------
    stop : threading.Event
        Once set, the run drains.
    store : Path or Url
    is_connected : callable
        Whether the scheduler is still there.
    """

    def __init__(self, stop: threading.Event, store: Place, is_connected: Callable[[], bool]) -> None:
        self.stop, self.store, self.is_connected = stop, store, is_connected
        self.failure: FeaturemapsError | None = None
        """Why the run ends early; raised when the tasks in flight have come back."""
        self.is_lost = False
        """Whether no task in flight will come back."""
        self.is_stuck = False
        """Whether no task in flight is worth waiting for."""

    @property
    def draining(self) -> bool:
        """Whether nothing new is sent."""
        return self.stop.is_set() or self.failure is not None

    def fail(self, failure: FeaturemapsError) -> None:
        """Note a failure; only the first one counts."""
        if self.failure is None:
            logger.info("stopping: %s", failure)
            self.failure = failure

    def fail_with(self, error: BaseException | None, pieces: Sequence[WorkPiece] = ()) -> None:
        """Note what an error means for the run: an error of the store, or of a batch of these pieces."""
        self.fail(explain(error, pieces, self.store))

    def fail_or_lose(self, error: BaseException, pieces: Sequence[WorkPiece] = ()) -> None:
        """Same as `fail_with`, for an error that a lost scheduler may have caused."""
        self.fail(why(error, pieces, self.store, is_connected=self.is_connected()))
