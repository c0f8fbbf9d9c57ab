"""What a run looks at from time to time: whether its workers are there, get answers from the storage, and finish anything."""

from __future__ import annotations

import logging

from distributed import Client

from pipeline.errors import FeaturemapsError
from pipeline.run.context import Context
from pipeline.run.ending import Ending
from pipeline.run.hangs import Stall, find_stalls
from pipeline.run.in_flight import Flight
from pipeline.run.workers import Fleet

logger = logging.getLogger(__name__)

MAX_STALLS = 3
"""Tasks in a row that wait for a storage, after which the run does not wait for the others."""


class Watch:
    """Looks at the workers of a run, and says through ``ending`` when it is not worth waiting any longer.

    Parameters
    ----------
    context : Context
    client : distributed.Client
    fleet, flight
        The workers, and what they have.
    ending : Ending
    """

    def __init__(self, context: Context, client: Client, fleet: Fleet, flight: Flight, ending: Ending) -> None:
        self.context, self.client, self.fleet, self.flight, self.ending = context, client, fleet, flight, ending
        self._n_stalls = 0  # since something was read

    def note_read(self, *, anything: bool) -> None:
        """Note that a task came back, and whether it read anything: the storage answers, then."""
        self._n_stalls *= not anything

    def check_workers(self) -> None:
        """Count the workers, and give up when nobody is left to do the work."""
        try:
            self.fleet.check()
        except FeaturemapsError as failure:
            self.ending.fail(failure)
            self.ending.is_lost = True
        self.count_workers()

    def count_workers(self) -> None:
        """Note in the summary what workers there are."""
        summary, fleet = self.context.summary, self.fleet
        summary.slots, summary.workers, summary.n_workers_lost = fleet.slots, fleet.n_workers, fleet.n_lost

    def check_stalls(self) -> None:
        """Replace workers that wait for a storage that does not answer, and send what they had without the image; but not for ever."""
        for stall in find_stalls(self.client, self.context.summary.run_id, self.context.job.deadline_s):
            fault = f"{stall.what or self.context.store.path}: the storage did not answer for {stall.since_s:.0f} s"
            if not self._replace(stall, fault):
                return
            self._n_stalls += 1
            if self.ending.draining or self._n_stalls >= MAX_STALLS:
                self.ending.is_stuck = True
                self.context.summary.faults.insert(
                    0, f"{fault}, as for {self._n_stalls} tasks in a row: the run did not wait for the others"
                )

    def _replace(self, stall: Stall, fault: str) -> bool:
        """Whether the scheduler could replace the worker."""
        logger.warning("%s; replacing the worker that waits for it, %s", fault, stall.worker)
        try:
            self.flight.begin_anew(stall)
        except FeaturemapsError as failure:
            self.ending.fail(failure)
            self.ending.is_stuck = True
            return False
        return True

    def check_progress(self) -> None:
        """End a run whose workers retire before they finish anything; one that was asked to stop leaves the rest to the next."""
        try:
            self.flight.check_progress()
        except FeaturemapsError as failure:
            self.ending.is_stuck = True
            if self.context.stop.is_set():
                self.context.summary.faults.insert(0, str(failure))
            else:
                self.ending.fail(failure)
