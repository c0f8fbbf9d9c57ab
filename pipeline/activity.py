"""What each thread of a worker is at, and since when: by this the driver tells a task that hangs from one that works."""

from __future__ import annotations

import threading
import time
from typing import Any

from distributed.worker import thread_state

METRIC = "featuremaps"
"""Under which a worker's heartbeat carries `report`."""
STORE = ""
"""What a task is at that reads or writes the store."""
_marks: dict[int, tuple[str, str, float]] = {}  # thread -> task, what, when


def note(what: str) -> None:
    """Take down what this thread begins: an image's path, or `STORE`."""
    key = getattr(thread_state, "key", "")
    if key:  # else it is a thread that a task waits for
        _marks[threading.get_ident()] = (key, what, time.monotonic())


def report(worker: Any) -> list[tuple[str, str, float]]:
    """Task, what it is at and for how many seconds, for each task at work; a metric that goes with every heartbeat."""
    now, at_work = time.monotonic(), dict(worker.active_threads)
    return [(key, what, now - since) for thread, (key, what, since) in list(_marks.items()) if at_work.get(thread) == key]
