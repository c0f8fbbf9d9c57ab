"""What each thread of a worker is at, and since when: by this the driver tells a task that hangs from one that works."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from distributed import WorkerPlugin
from distributed.core import Status
from distributed.worker import thread_state

from pipeline.errors import StaleWriterError

METRIC = "featuremaps"
"""Under which a worker's heartbeat carries `report`."""
STORE = ""
"""What a task is at that reads or writes the store."""
LEASE_S = 30.0
"""How long a worker may have been silent and still write; half of what it takes to be given up by its scheduler."""
_marks: dict[int, tuple[str, str, float]] = {}  # thread -> task, what, when
_reports: dict[int, deque[float]] = {}  # id of a worker, of which a process may have several -> when it reported last


class ActivityPlugin(WorkerPlugin):  # type: ignore[misc]
    """Has a worker say with each heartbeat what it is at."""

    name = "featuremaps-activity"

    def setup(self, worker: Any) -> None:
        """Begin."""
        _reports[id(worker)] = deque(maxlen=2)
        worker.metrics[METRIC] = report


def note(what: str) -> None:
    """Take down what this thread begins: an image's path, or `STORE`."""
    key = getattr(thread_state, "key", "")
    if key:  # else it is a thread that a task waits for
        _marks[threading.get_ident()] = (key, what, time.monotonic())


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
    return [(key, what, now - since) for thread, (key, what, since) in list(_marks.items()) if at_work.get(thread) == key]
