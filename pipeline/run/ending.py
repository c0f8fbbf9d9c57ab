"""Whether a run ends before its work is done, and why."""

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
    """The first failure of a run, and what it leaves to wait for.

    Parameters
    ----------
    stop : threading.Event
        Asks for a drain.
    store : Path or Url
    is_connected : callable
        Whether the scheduler is still there.
    """

    def __init__(self, stop: threading.Event, store: Place, is_connected: Callable[[], bool]) -> None:
        self.stop, self.store, self.is_connected = stop, store, is_connected
        self.failure: FeaturemapsError | None = None
        """What ended the run early; it is raised when what is in flight has come back."""
        self.is_lost = False
        """Whether nothing that is in flight will come back."""
        self.is_stuck = False
        """Whether nothing that is in flight is worth waiting for."""

    @property
    def draining(self) -> bool:
        """Whether nothing new is sent any more."""
        return self.stop.is_set() or self.failure is not None

    def fail(self, failure: FeaturemapsError) -> None:
        """Note a failure; only the first one counts."""
        if self.failure is None:
            logger.info("stopping: %s", failure)
            self.failure = failure

    def fail_with(self, error: BaseException | None, pieces: Sequence[WorkPiece] = ()) -> None:
        """Note what an error of the store, or of a batch of these pieces, means for the run."""
        self.fail(explain(error, pieces, self.store))

    def fail_or_lose(self, error: BaseException, pieces: Sequence[WorkPiece] = ()) -> None:
        """Note the same of an error that may as well come from a lost scheduler."""
        self.fail(why(error, pieces, self.store, is_connected=self.is_connected()))
