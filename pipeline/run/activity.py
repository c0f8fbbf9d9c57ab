"""Reports what each thread of a worker does, and since when. The driver uses it to tell a hanging task from a working one."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from distributed import WorkerPlugin
from distributed.core import Status
from distributed.worker import thread_state

from pipeline.errors import StaleWriterError
from pipeline.source.current import marks, name_tasks_by

METRIC = "featuremaps"
"""Key of `report` in a worker's heartbeat."""
LEASE_S = 30.0
"""A worker silent for longer must not write. The scheduler gives a worker up after twice this time."""
# id of a worker -> times of its last two reports; a process may have several workers
_reports: dict[int, deque[float]] = {}


class ActivityPlugin(WorkerPlugin):  # type: ignore[misc]
    """Adds to each heartbeat of a worker what its tasks are doing."""

    name = "featuremaps-activity"

    def setup(self, worker: Any) -> None:
        """Start to report."""
        _reports[id(worker)] = deque(maxlen=2)
        worker.metrics[METRIC] = report


class DrainPlugin(WorkerPlugin):  # type: ignore[misc]
    """Tells all workers, also those that join later, to begin no further image of a run."""

    def __init__(self, run_id: str) -> None:
        self.name = _drain_name(run_id)


def is_draining(worker: Any, run_id: str) -> bool:
    """Whether the worker was told to begin no further image of a run."""
    return _drain_name(run_id) in worker.plugins


def _drain_name(run_id: str) -> str:
    return f"featuremaps-drain-{run_id}"


def require_lease(worker: Any) -> None:
    """Before a write after a silence, wait until the scheduler has answered a heartbeat.

    The scheduler may have given this worker up and its tasks to others. Only when the next heartbeat is made is the last one
    known to be answered.

    Raises
    ------
    StaleWriterError
        When no answer comes within twice `LEASE_S`, or the worker is closing.
    """
    began = time.monotonic()
    while worker.status == Status.running:
        reports = _reports.get(id(worker))
        if not reports or reports[0] > began - LEASE_S:
            return
        if time.monotonic() > began + 2 * LEASE_S:
            break
        time.sleep(0.2)
    raise StaleWriterError(
        f"worker {worker.address} was silent for so long that its tasks were given to others: it writes nothing; nothing is to be done"
    )


def report(worker: Any) -> list[tuple[str, str, float]]:
    """Key, current activity and its seconds so far, for each running task; sent with every heartbeat."""
    now, at_work = time.monotonic(), dict(worker.active_threads)
    _reports.setdefault(id(worker), deque(maxlen=2)).append(now)
    return [(key, what, now - since) for thread, (key, what, since) in list(marks.items()) if at_work.get(thread) == key]


name_tasks_by(lambda: getattr(thread_state, "key", ""))
