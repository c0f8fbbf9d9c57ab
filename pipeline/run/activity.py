"""What each thread of a worker is at, and since when: by this the driver tells a task that hangs from one that works."""

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
"""Under which a worker's heartbeat carries `report`."""
LEASE_S = 30.0
"""How long a worker may have been silent and still write; half of what it takes to be given up by its scheduler."""
_reports: dict[int, deque[float]] = {}  # id of a worker, of which a process may have several -> when it reported last


class ActivityPlugin(WorkerPlugin):  # type: ignore[misc]
    """Has a worker say with each heartbeat what it is at."""

    name = "featuremaps-activity"

    def setup(self, worker: Any) -> None:
        """Begin."""
        _reports[id(worker)] = deque(maxlen=2)
        worker.metrics[METRIC] = report


class DrainPlugin(WorkerPlugin):  # type: ignore[misc]
    """Has a worker, and those that join later, begin no further image of a run."""

    def __init__(self, run_id: str) -> None:
        self.name = _drain_name(run_id)


def is_draining(worker: Any, run_id: str) -> bool:
    """Whether a worker is to begin no further image of a run."""
    return _drain_name(run_id) in worker.plugins


def _drain_name(run_id: str) -> str:
    return f"featuremaps-drain-{run_id}"


def require_lease(worker: Any) -> None:
    """Wait, after a silence, until the scheduler has answered a heartbeat: it may have given this worker up, and its tasks to others.

    The answer to one heartbeat is known when the next one is made.

    Raises
    ------
    StaleWriterError
        When it has.
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
        f"worker {worker.address} was silent for so long that its tasks are others' now: it writes nothing; nothing is to be done"
    )


def report(worker: Any) -> list[tuple[str, str, float]]:
    """Task, what it is at and for how many seconds, for each task at work; a metric that goes with every heartbeat."""
    now, at_work = time.monotonic(), dict(worker.active_threads)
    _reports.setdefault(id(worker), deque(maxlen=2)).append(now)
    return [(key, what, now - since) for thread, (key, what, since) in list(marks.items()) if at_work.get(thread) == key]


name_tasks_by(lambda: getattr(thread_state, "key", ""))
