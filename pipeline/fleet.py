"""The workers of a run: what they can do together, and whether anybody is left."""

from __future__ import annotations

import logging
import time
from typing import Any

from distributed import Client

from pipeline.capacity import WorkerKind
from pipeline.cluster import worker_slots
from pipeline.errors import FeaturemapsError
from pipeline.plan import BATCHES_IN_FLIGHT_PER_SLOT

logger = logging.getLogger(__name__)

NO_WORKERS_S = 120.0
REGISTER_TRIES = 5


class Fleet:
    """The workers that a client's scheduler knows at the start of a run.

    Parameters
    ----------
    client : distributed.Client

    Raises as `worker_slots` does.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        workers = worker_slots(client)
        self.addresses = set(workers)
        self.n_workers = len(workers)
        self.slots = sum(worker.extract for worker in workers.values())
        """Batches that are extracted at once."""
        self.threads = max(worker.extract for worker in workers.values())
        """Of one worker that extracts."""
        self.memory_limit_bytes = min((w.memory_limit_bytes for w in workers.values() if w.memory_limit_bytes), default=0)
        """Of the smallest worker; 0 for none."""
        self.is_whole = all(worker.is_whole for worker in workers.values() if worker.extract)
        """Whether one task may do all of a batch."""
        self._n_readers = 0 if self.is_whole else sum(worker.read for worker in workers.values())
        n_extractors = sum(worker.extract > 0 for worker in workers.values())
        waiting = 0 if self.is_whole else BATCHES_IN_FLIGHT_PER_SLOT * self.threads + -(-self._n_readers // n_extractors)
        self.kind = WorkerKind(self.threads, waiting, any(worker.has_gpu for worker in workers.values()))
        """What the memory of a worker that extracts is judged by."""
        self._alone_since: float | None = None

    @property
    def window(self) -> int:
        """Batches in flight: enough that nobody waits for the driver, and where others read, enough for all of them."""
        return BATCHES_IN_FLIGHT_PER_SLOT * self.slots + self._n_readers

    def register(self, plugin: Any) -> None:
        """Give every worker a plugin; a worker that dies meanwhile makes the whole call fail, and gets it when it is back."""
        for left in reversed(range(REGISTER_TRIES)):
            try:
                self.client.register_plugin(plugin)
                return
            except OSError as error:
                if not left or self.client.status != "running":
                    raise
                logger.info("giving the extractor to the workers once more: %s", error)
                time.sleep(1.0)

    def check(self) -> None:
        """Give up when nobody is left to do the work: a scheduler that was started by hand would wait for ever.

        Raises
        ------
        FeaturemapsError
            When there has been nobody for some time, or only workers that cannot do what was sent.
        """
        reason = self._what_is_missing()
        now = time.monotonic()
        self._alone_since = (self._alone_since or now) if reason else None
        if self._alone_since is not None and now - self._alone_since >= NO_WORKERS_S:
            raise FeaturemapsError(
                f"workers were lost and none has come for {NO_WORKERS_S:.0f} s: the run stopped, and what was committed stands; "
                f"start workers and run the same command again to go on from there ({reason})"
            )

    def _what_is_missing(self) -> str:
        try:
            workers = worker_slots(self.client)
        except FeaturemapsError as error:
            return str(error)
        self.slots, self.n_workers = sum(worker.extract for worker in workers.values()), len(workers)
        if self.is_whole and not any(worker.extract and worker.is_whole for worker in workers.values()):
            return "those that are there share the roles among them, and batches were sent to workers that have all"
        return ""

    def has_lost_workers(self) -> bool:
        """Whether a worker of the start is gone."""
        try:
            return not self.addresses <= set(worker_slots(self.client))
        except (OSError, FeaturemapsError):
            return True
