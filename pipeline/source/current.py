"""Records what each thread of this process does, and since when, so that a hanging task can be told from a working one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

STORE = ""
"""Activity of a task that reads or writes the store."""

marks: dict[int, tuple[str, str, float]] = {}
"""Thread -> its task, the task's activity, and when the activity began."""
_find_task: list[Callable[[], str]] = []


def name_tasks_by(find_task: Callable[[], str]) -> None:
    """Set how `note` finds the task of the calling thread; ``find_task`` returns "" in helper threads of a task."""
    _find_task[:] = [find_task]


def note(what: str) -> None:
    """Record what this thread begins: an image's path, or `STORE`."""
    key = _find_task[0]() if _find_task else ""
    if key:
        marks[threading.get_ident()] = (key, what, time.monotonic())
