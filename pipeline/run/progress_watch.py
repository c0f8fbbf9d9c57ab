"""Detects workers that retire before they finish anything, by the tasks that leave with them, not by a clock."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterable, Mapping
from typing import Any

from distributed import Client

TOPIC = "all"
MAX_LOSSES = 3
"""The run ends when a retiring worker has taken every task in flight with it this many times."""


def task_name(key: str) -> str:
    """The part of the key that all stages of one task share.

    Examples
    --------
    >>> task_name("extract-RUN-7") == task_name("write-RUN-7") == "RUN-7"
    True
    """
    return key.partition("-")[2]


class ProgressWatch:
    """Counts how often tasks leave with retiring workers, since a task was last finished.

    Dask counts a worker's death against its tasks, and gives them up after a few. It never counts a retirement, so without
    this class a task could be started again for ever. If many workers are preempted at once, each task is lost once. The run
    waits for a worker that keeps its task, whatever happens to the others.

    Parameters
    ----------
    run_id : str
        Part of the keys of the run's tasks; the scheduler may hold tasks of other runs.

    Examples
    --------
    >>> watch = ProgressWatch("RUN")
    >>> for i in range(MAX_LOSSES):
    ...     watch.joined(f"worker {i}", 100.0 * i)
    ...     watch.left(f"worker {i}", 100.0 * i + 12, ["process-RUN-0"], is_expected=True)
    >>> watch.is_in_vain(["process-RUN-0"])
    True
    >>> watch.is_in_vain(["process-RUN-0", "process-RUN-1"])  # the other may still come to its end
    False
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._joined_s: dict[str, float] = {}
        self._losses: dict[str, int] = {}
        self._had_since_s: dict[str, float] = {}  # task -> when its last worker left
        self._lives_s: list[float] = []  # lifetimes of the workers that retired since a task was finished
        self._longest_s = 0.0
        self._n_batches, self._batches_s = 0, 0.0

    def joined(self, worker: str, at_s: float) -> None:
        """Note that a worker joined, at a time of the scheduler's clock in seconds."""
        self._joined_s[worker] = at_s

    def left(self, worker: str, at_s: float, keys: Iterable[str], *, is_expected: bool) -> None:
        """Note that a worker left with these tasks; it counts only if the scheduler expected it (a retirement)."""
        joined_s = self._joined_s.pop(worker, None)
        names = {task_name(key) for key in keys if self.run_id in key}
        if not is_expected or not names:
            return
        if joined_s is not None:
            self._lives_s.append(at_s - joined_s)
        for name in names:
            self._losses[name] = self._losses.get(name, 0) + 1
            since = [when for when in (joined_s, self._had_since_s.get(name)) if when is not None]
            if since:
                self._longest_s = max(self._longest_s, at_s - max(since))
            self._had_since_s[name] = at_s

    def finished(self) -> None:
        """Note that a task ended, with any result: the run goes on, so counting starts anew."""
        self._losses.clear()
        self._had_since_s.clear()
        self._lives_s.clear()
        self._longest_s = 0.0

    def took(self, batch_s: float) -> None:
        """Note how long a finished batch took."""
        self._n_batches += 1
        self._batches_s += batch_s

    def is_in_vain(self, keys: Iterable[str]) -> bool:
        """Whether each task in flight was lost too often since a task was last finished."""
        losses = [self._losses.get(task_name(key), 0) for key in keys]
        return bool(losses) and min(losses) >= MAX_LOSSES

    def describe(self) -> str:
        """What was seen, what it means and what to do."""
        lived = needed = ""
        if self._lives_s:
            lived = f" They lived {sum(self._lives_s) / len(self._lives_s):.0f} s on average"
            lived += f", and no task was done within the {self._longest_s:.0f} s that a worker had it at the longest."
        if self._n_batches:
            needed = (
                f" The {self._n_batches} batches that were done before took {self._batches_s / self._n_batches:.0f} s on average."
            )
        return (
            f"workers retire before they finish anything: {MAX_LOSSES} times in a row every task went back with a retiring worker, and "
            f"none was finished in between.{lived}{needed} Their lifetime is too short for their start and one task, so the run stopped; "
            "what was committed stands. Give the workers more time (`walltime` in cluster.yaml; `--lifetime` of workers that were "
            "started by hand), or a partition where they are not taken away, and run the same command again to go on from there"
        )


class Departures:
    """Passes the scheduler's reports of joining and leaving workers on to a `ProgressWatch`, from now on.

    Parameters
    ----------
    client : distributed.Client
    watch : ProgressWatch
    """

    def __init__(self, client: Client, watch: ProgressWatch) -> None:
        self._client, self._watch = client, watch
        self._events: queue.SimpleQueue[tuple[float, Mapping[str, Any]]] = queue.SimpleQueue()
        client.subscribe_topic(TOPIC, self._events.put)  # called in the client's own thread

    def read(self) -> None:
        """Pass on the events since the last call."""
        with contextlib.suppress(queue.Empty):
            while True:
                at_s, event = self._events.get_nowait()
                action = event.get("action") if isinstance(event, Mapping) else None
                if action == "add-worker":
                    self._watch.joined(event["worker"], at_s)
                elif action == "remove-worker":
                    keys = map(str, event.get("processing-tasks", ()))
                    self._watch.left(event["worker"], at_s, keys, is_expected=event.get("expected", False))

    def close(self) -> None:
        """Ask for no more of it."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._client.unsubscribe_topic(TOPIC)
