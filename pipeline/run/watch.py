"""Checks now and then that workers are there, get answers from the storage, and finish tasks."""

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
"""After this many tasks in a row that wait for a storage, the run stops waiting for the others."""


class Watch:
    """Watches the workers of a run, and reports to ``ending`` when waiting makes no sense any more.

    Parameters
    ----------
    context : Context
    client : distributed.Client
    fleet, flight
        The workers, and the tasks that they have.
    ending : Ending
    """

    def __init__(self, context: Context, client: Client, fleet: Fleet, flight: Flight, ending: Ending) -> None:
        self.context, self.client, self.fleet, self.flight, self.ending = context, client, fleet, flight, ending
        self._n_stalls = 0  # since a task read anything

    def note_read(self, *, anything: bool) -> None:
        """Note that a task came back; if it read anything, the storage answers."""
        self._n_stalls *= not anything

    def check_workers(self) -> None:
        """Count the workers, and give up if none is left that can do the work."""
        try:
            self.fleet.check()
        except FeaturemapsError as failure:
            self.ending.fail(failure)
            self.ending.is_lost = True
        self.count_workers()

    def count_workers(self) -> None:
        """Copy the numbers of workers and slots to the summary."""
        summary, fleet = self.context.summary, self.fleet
        summary.slots, summary.workers, summary.n_workers_lost = fleet.slots, fleet.n_workers, fleet.n_lost

    def check_stalls(self) -> None:
        """Replace workers that wait for a storage that does not answer, and send their tasks again without the image.

        After `MAX_STALLS` in a row, or during a drain, the run does not wait for the others.
        """
        for stall in find_stalls(self.client, self.context.summary.run_id, self.context.job.deadline_s):
            fault = f"{stall.what or self.context.store.path}: the storage did not answer for {stall.since_s:.0f} s"
            if not self._replace(stall, fault):
                return
            self._n_stalls += 1
            if self.ending.draining or self._n_stalls >= MAX_STALLS:
                self.ending.is_stuck = True
                self.context.summary.faults.insert(
                    0, f"{fault}, for {self._n_stalls} tasks in a row: the run did not wait for the others"
                )

    def _replace(self, stall: Stall, fault: str) -> bool:
        """Replace the worker; return whether the scheduler could."""
        logger.warning("%s; replacing the worker that waits for it, %s", fault, stall.worker)
        try:
            self.flight.begin_anew(stall)
        except FeaturemapsError as failure:
            self.ending.fail(failure)
            self.ending.is_stuck = True
            return False
        return True

    def check_progress(self) -> None:
        """End the run if workers retire before they finish anything; a run that is already stopping leaves the rest to the next."""
        try:
            self.flight.check_progress()
        except FeaturemapsError as failure:
            self.ending.is_stuck = True
            if self.context.stop.is_set():
                self.context.summary.faults.insert(0, str(failure))
            else:
                self.ending.fail(failure)
