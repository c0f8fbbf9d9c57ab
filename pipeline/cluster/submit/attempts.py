"""Counts attempts in a row without progress. The count is in the store, because each attempt is another process."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pipeline.cluster.submit.clock import Clock
from pipeline.cluster.submit.hand_in import adopt, n_settled, new_submission
from pipeline.cluster.submit.record import Submission, last_submission
from pipeline.cluster.submit.script import Order
from pipeline.errors import FeaturemapsError
from pipeline.store.objects import place
from pipeline.store.run_ids import next_number
from pipeline.store.store import Store, is_store, receipt_ids

logger = logging.getLogger(__name__)

COUNT_S = 60.0
"""The longest time to count the ledger, in case the storage hangs."""


class Attempts:
    """What is known about this attempt and the earlier ones.

    Parameters
    ----------
    order : Order
    clock : Clock
    report : callable
        Called with text for the user.
    """

    def __init__(self, order: Order, clock: Clock, report: Callable[[Any], None]) -> None:
        self.order, self.clock, self.report = order, clock, report
        self.known: Submission | None = None
        self._number = sys.maxsize  # lowest number that a run of this attempt can have

    def begin(self, job_id: str) -> None:
        """Read the record of this job."""
        adopt(self.order, job_id)
        self.known = last_submission(place(self.order.job.store))
        self._number = next_number(receipt_ids(place(self.order.job.store)))

    @property
    def n_vain(self) -> int:
        """Attempts in a row without progress, as far as known."""
        return self.known.n_vain if self.known is not None else 0

    def lead_nowhere(self) -> bool:
        """Count this attempt; report and return True if it is the last of too many."""
        n, spec = self._count_in_time(), self.order.spec
        if n < self.order.attempts:
            return False
        self.report(
            f"{n} attempts in a row ended without one more image, so there is no further one: what was committed stands; see why in "
            f"`featuremaps status {self.order.job.store}` and in {spec.log_folder}, then submit again"
        )
        return True

    def _count_in_time(self) -> int:
        """Attempts without progress. If a hanging storage took all the time of this attempt, it does not count."""
        errors: list[Exception] = []

        def count() -> None:
            try:
                self.clock.patiently(self._count)
            except (FeaturemapsError, OSError) as error:
                errors.append(error)

        thread = threading.Thread(target=count, name="count-attempts", daemon=True)
        thread.start()
        thread.join(min(COUNT_S + self.clock.patience_s, max(1.0, self.clock.left_s / 2)))
        if not errors:
            return self.n_vain
        logger.warning("the attempts cannot be counted in the store: %s", errors[0])
        if self.order.spec.kind == "slurm":
            return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
        raise errors[0]  # without a count, jobs could follow each other for ever

    def _count(self) -> None:
        store = place(self.order.job.store)
        before = last_submission(store) or self.known or new_submission(self.order)
        n, n_checked = n_settled(store), self._n_checked()
        has_progress = n > before.n_settled or n_checked > before.n_checked
        known = replace(
            before,
            n_vain=0 if has_progress else before.n_vain + 1,
            n_settled=max(n, before.n_settled),
            n_checked=max(n_checked, before.n_checked),
        )
        known.write(store)
        self.known = known

    def _n_checked(self) -> int:
        """Images that this attempt compared with their digests, from its receipt; 0 without a receipt."""
        store = place(self.order.job.store)
        receipt = Store(store).last_receipt() if is_store(store) else None
        return int(receipt["n_checked"]) if receipt is not None and receipt.get("number", 0) >= self._number else 0
