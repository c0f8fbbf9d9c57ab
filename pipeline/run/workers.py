"""The workers of a run: what they can do together, and whether any are left."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from distributed import Client

from pipeline.errors import FeaturemapsError
from pipeline.run.plan.memory import WorkerKind
from pipeline.run.slots import WorkerSlots, worker_slots
from pipeline.store.layout import BATCHES_IN_FLIGHT_PER_SLOT

logger = logging.getLogger(__name__)

NO_WORKERS_S = 120.0
REGISTER_TRIES = 5


@runtime_checkable
class Workforce(Protocol):
    """Starts the workers of a run, and replaces lost ones."""

    patience_s: float
    """How long a worker may take to start."""

    def wanted(self) -> list[WorkerSlots]:
        """What each wanted worker offers, started or not."""

    def describe(self) -> str:
        """What is known about workers that are missing, for an error message."""


class Needs(NamedTuple):
    """What the run derives from the workers' offers."""

    memory_limit_bytes: int
    """Of the smallest worker; 0 for no limit."""
    is_whole: bool
    """Whether one task may do all stages of a batch."""
    read_ahead: int
    """Batches that other workers read ahead for each worker that extracts."""
    kind: WorkerKind
    """What the memory need of an extracting worker depends on."""


def judge(present: list[WorkerSlots], wanted: list[WorkerSlots] | None = None) -> Needs:
    """Derive `Needs` from the workers that are there and those that are still to come."""
    everybody = present + (wanted or [])
    threads = max(worker.extract for worker in everybody)
    memory_limit_bytes = min((worker.memory_limit_bytes for worker in everybody if worker.memory_limit_bytes), default=0)
    has_readers = any(worker.read and not worker.extract for worker in everybody)
    is_whole = not has_readers and all(worker.is_whole for worker in everybody if worker.extract)
    share = wanted or present
    n_readers = 0 if is_whole else sum(worker.read for worker in share)
    read_ahead = -(-n_readers // sum(worker.extract > 0 for worker in share))
    waiting = 0 if is_whole else BATCHES_IN_FLIGHT_PER_SLOT * threads + read_ahead
    return Needs(memory_limit_bytes, is_whole, read_ahead, WorkerKind(threads, waiting, any(w.has_gpu for w in everybody)))


class Fleet:
    """The workers that a client's scheduler knows at the start of a run.

    Parameters
    ----------
    client : distributed.Client

    Raises as `worker_slots` does.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        cluster = getattr(client, "cluster", None)
        self.cluster = cluster if isinstance(cluster, Workforce) else None
        """What starts the workers; None if someone else does."""
        workers = worker_slots(client)
        self.is_plain = all(worker.is_plain for worker in workers.values())
        """Whether the workers name no roles, so that no task may ask for one."""
        needs = judge(list(workers.values()), None if self.cluster is None else self.cluster.wanted())
        self.memory_limit_bytes, self.is_whole, self.kind = needs.memory_limit_bytes, needs.is_whole, needs.kind
        self._read_ahead = needs.read_ahead
        self._alone_since: float | None = None
        self._known = self._present = set(workers)  # all that ever joined, and those that are there
        self.n_lost = 0
        """Workers that left, as far as the run noticed; others may have taken their places."""
        self._count(workers)

    def _count(self, workers: Mapping[str, WorkerSlots]) -> None:
        self.n_workers = len(workers)
        self.slots = sum(worker.extract for worker in workers.values())
        """Batches that the workers extract at once."""
        self._n_extractors = sum(worker.extract > 0 for worker in workers.values())

    @property
    def window(self) -> int:
        """Batches in flight: enough that no worker waits for the driver, and that separate readers have work."""
        wanted = BATCHES_IN_FLIGHT_PER_SLOT * self.slots + self._read_ahead * self._n_extractors
        return max(1, wanted)  # at least one, also without workers: lost ones are replaced

    def register(self, plugin: Any) -> None:
        """Give every worker a plugin. A worker that dies meanwhile makes the call fail, so it is repeated."""
        for left in reversed(range(REGISTER_TRIES)):
            try:
                self.client.register_plugin(plugin)
                return
            except OSError as error:
                if not left or self.client.status != "running":
                    raise
                logger.info("giving the plugin to the workers again: %s", error)
                time.sleep(1.0)

    def check(self) -> None:
        """Give up if no worker is left that can do the work: with a scheduler started by hand, the run would wait for ever.

        Raises
        ------
        FeaturemapsError
            When there has been no worker for some time, or only workers that cannot do the tasks that were sent.
        """
        reason = self._what_is_missing()
        now = time.monotonic()
        self._alone_since = (self._alone_since or now) if reason else None
        patience_s = NO_WORKERS_S if self.cluster is None else self.cluster.patience_s
        if self._alone_since is not None and now - self._alone_since >= patience_s:
            known = "" if self.cluster is None else f"; {self.cluster.describe()}"
            raise FeaturemapsError(
                f"workers were lost and none has come for {patience_s:.0f} s: the run stopped, and what was committed stands; "
                f"start workers and run the same command again to go on from there ({reason}{known})"
            )

    def _what_is_missing(self) -> str:
        try:
            workers = worker_slots(self.client)
        except FeaturemapsError as error:
            self._count({})
            self._compare(set())
            return str(error)
        self._count(workers)
        self._compare(set(workers))
        if self.is_whole and not any(worker.extract and worker.is_whole for worker in workers.values()):
            return "each worker that is left has only some of the roles, and the batches that were sent need one that has all"
        return ""

    def _compare(self, present: set[str]) -> None:
        """Count the workers that left. `admission.VersionsPlugin` checks those that join, before they work."""
        self.n_lost += len(self._present - present)
        self._known, self._present = self._known | present, present

    def has_lost_workers(self) -> bool:
        """Whether a worker that was once there is gone."""
        try:
            return not self._known <= set(worker_slots(self.client))
        except (OSError, FeaturemapsError):
            return True
