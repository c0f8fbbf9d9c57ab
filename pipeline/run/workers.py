"""The workers of a run: what they can do together, and whether anybody is left."""

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
    """What starts the workers of a run, and others where some are lost."""

    patience_s: float
    """How long it may take until a worker is there."""

    def wanted(self) -> list[WorkerSlots]:
        """What each of the wanted workers offers, whether it is there or not."""

    def describe(self) -> str:
        """What is known of the workers that are not there, for an error."""


class Needs(NamedTuple):
    """What follows from what workers offer."""

    memory_limit_bytes: int
    """Of the smallest worker; 0 for none."""
    is_whole: bool
    """Whether one task may do all of a batch."""
    read_ahead: int
    """Batches that others read for each worker that extracts."""
    kind: WorkerKind
    """What the memory of a worker that extracts is judged by."""


def judge(present: list[WorkerSlots], wanted: list[WorkerSlots] | None = None) -> Needs:
    """Judge the workers that are there together with those that are to come."""
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
        """What starts the workers; None where others do."""
        workers = worker_slots(client)
        self.is_plain = all(worker.is_plain for worker in workers.values())
        """Whether the workers name no roles, so that no task may ask for one."""
        needs = judge(list(workers.values()), None if self.cluster is None else self.cluster.wanted())
        self.memory_limit_bytes, self.is_whole, self.kind = needs.memory_limit_bytes, needs.is_whole, needs.kind
        self._read_ahead = needs.read_ahead
        self._alone_since: float | None = None
        self._known = self._present = set(workers)  # those that ever were, and that are there
        self.n_lost = 0
        """Workers that went, as far as was seen; others may have taken their places."""
        self._count(workers)

    def _count(self, workers: Mapping[str, WorkerSlots]) -> None:
        self.n_workers = len(workers)
        self.slots = sum(worker.extract for worker in workers.values())
        """Batches that are extracted at once."""
        self._n_extractors = sum(worker.extract > 0 for worker in workers.values())

    @property
    def window(self) -> int:
        """Batches in flight: enough that nobody waits for the driver, and where others read, enough for all of them."""
        wanted = BATCHES_IN_FLIGHT_PER_SLOT * self.slots + self._read_ahead * self._n_extractors
        return max(1, wanted)  # also while nobody is there: those who are lost are replaced

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
            return "those that are there share the roles among them, and batches were sent to workers that have all"
        return ""

    def _compare(self, present: set[str]) -> None:
        """Count those that went; whether those that joined fit is for `admission.VersionsPlugin`, before they work."""
        self.n_lost += len(self._present - present)
        self._known, self._present = self._known | present, present

    def has_lost_workers(self) -> bool:
        """Whether a worker that was seen is gone."""
        try:
            return not self._known <= set(worker_slots(self.client))
        except (OSError, FeaturemapsError):
            return True
