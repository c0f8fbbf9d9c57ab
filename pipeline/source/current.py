"""What each thread of this process is at, and since when: by this a task that hangs is told from one that works."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

STORE = ""
"""What a task is at that reads or writes the store."""

marks: dict[int, tuple[str, str, float]] = {}
"""Of each thread the task, what it is at, and since when."""
_find_task: list[Callable[[], str]] = []


def name_tasks_by(find_task: Callable[[], str]) -> None:
    """Have `note` ask for the task of the calling thread: a name, empty in a thread that a task waits for."""
    _find_task[:] = [find_task]


def note(what: str) -> None:
    """Take down what this thread begins: an image's path, or `STORE`."""
    key = _find_task[0]() if _find_task else ""
    if key:
        marks[threading.get_ident()] = (key, what, time.monotonic())
