"""The tasks of a run on its cluster, from sending to finishing."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from distributed import Client, Future
from distributed.client import ClosedClientError

from pipeline.errors import FeaturemapsError
from pipeline.run import tasks
from pipeline.run.activity import DrainPlugin
from pipeline.run.hangs import Stall, replace_worker
from pipeline.run.progress_watch import Departures, ProgressWatch
from pipeline.run.slots import ROLES, needs
from pipeline.source import fetch


@dataclass(frozen=True, slots=True)
class ProbeTask:
    """Reads the headers of a block of new images."""

    block: int
    """Its number."""
    paths: Sequence[str]


@dataclass(frozen=True, slots=True)
class BatchTask:
    """Reads, extracts and writes a batch."""

    pieces: Sequence[tasks.WorkPiece]
    n_acquittals: int = 0
    """Earlier trials of the same batch that found no guilty image."""


@dataclass(frozen=True, slots=True)
class TrialTask:
    """Reads one header, or computes one image, alone, because it may have killed its worker."""

    suspect: str | tasks.WorkPiece


Task = ProbeTask | BatchTask | TrialTask


class Sent(NamedTuple):
    """A task that was sent, and its future."""

    task: Task
    future: Future


class Flight:
    """Sends tasks and tells which have finished.

    Parameters
    ----------
    client : distributed.Client
    source : reading.Source
    target : tasks.Target
    needed : (int, int)
        Smallest input height and width that leave at least one position of a map.
    """

    def __init__(self, client: Client, source: fetch.Source, target: tasks.Target, needed: tuple[int, int]) -> None:
        self.client, self.source, self.target, self.needed = client, source, target, needed
        self.is_whole = True
        """Whether one task reads, extracts and writes a batch."""
        self.is_plain = False
        """Whether the workers name no roles, so that no task may ask for one."""
        self._sent: dict[str, Sent] = {}
        self._finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._n_sent = 0
        self.watch = ProgressWatch(target.run_id)
        self._departures = Departures(client, self.watch)

    def __len__(self) -> int:
        return len(self._sent)

    def count(self, kind: type[Task]) -> int:
        """Number of tasks of a kind in flight."""
        return sum(isinstance(sent.task, kind) for sent in self._sent.values())

    def _pieces(self) -> Iterator[tasks.WorkPiece]:
        """The pieces of the batches in flight."""
        return (piece for sent in self._sent.values() if isinstance(sent.task, BatchTask) for piece in sent.task.pieces)

    @property
    def n_bytes(self) -> int:
        """The most bytes that the batches in flight write, before compression."""
        return sum((piece.stop - piece.start) * piece.layout.row_bytes for piece in self._pieces())

    @property
    def n_images(self) -> int:
        """Images of the batches in flight."""
        return sum(len(piece.rows) for piece in self._pieces())

    def send(self, task: Task) -> None:
        """Send a task."""
        name = f"{self.target.run_id}-{self._n_sent}"
        self._n_sent += 1
        match task:
            case ProbeTask():
                future = self._probe(f"probe-{name}", task.paths)
            case BatchTask():
                future = self._batch(name, task.pieces)
            case TrialTask():
                future = self._trial(name, task.suspect)
        self.follow(Sent(task, future))

    def _probe(self, key: str, paths: Sequence[str]) -> Future:
        # A partial, because Dask looks at each item of a list that it is given, for other tasks.
        probe = partial(fetch.probe_block, self.source, paths, self.needed)
        return self._submit("read", probe, key=key, priority=10)

    def _batch(self, name: str, pieces: Sequence[tasks.WorkPiece]) -> Future:
        """Submit the stages of a batch; only the last one's result, a few kB, comes back."""
        if self.is_whole:
            return self._submit(ROLES, tasks.process, self.source, self.target, pieces, key=f"process-{name}")
        decoded = self._submit("read", tasks.read, self.source, self.target.run_id, pieces, key=f"read-{name}")
        extracted = self._submit("extract", tasks.extract, self.target, decoded, key=f"extract-{name}")
        return self._submit("write", tasks.write, self.target, extracted, key=f"write-{name}")

    def _trial(self, name: str, suspect: str | tasks.WorkPiece) -> Future:
        if isinstance(suspect, str):
            return self._probe(f"trial-{name}", [suspect])
        decoded = self._submit("read", tasks.read, self.source, self.target.run_id, [suspect], key=f"suspect-{name}")
        return self._submit("extract", tasks.attempt, self.target, decoded, key=f"trial-{name}")

    def _submit(
        self, roles: str | Sequence[str], function: Callable[..., Any], *arguments: Any, key: str, priority: int = 0
    ) -> Future:
        """Submit a function that takes one slot of each of some roles."""
        asked = needs(*([roles] if isinstance(roles, str) else roles), is_plain=self.is_plain)
        return self.client.submit(function, *arguments, key=key, resources=asked, priority=priority, pure=False)

    def follow(self, sent: Sent) -> None:
        """Register a task, to hear when it finishes."""
        self._sent[sent.future.key] = sent
        sent.future.add_done_callback(lambda done: self._finished.put(done.key))

    def finished(self, timeout_s: float) -> Iterator[Sent]:
        """Yield finished tasks; wait for the first at most ``timeout_s``."""
        with contextlib.suppress(queue.Empty):
            key = self._finished.get(timeout=max(0.01, timeout_s))
            while True:
                if key in self._sent:  # else it was given up meanwhile
                    sent = self._sent.pop(key)
                    if sent.future.status in {"finished", "error"}:
                        self._departures.read()
                        self.watch.finished()
                    yield sent
                key = self._finished.get_nowait()

    def find(self, key: str) -> Sent | None:
        """The task to which a key, or that of an earlier stage, belongs; None if it has finished or is of another run."""
        _, _, name = key.partition("-")
        return next((sent for known, sent in self._sent.items() if known.partition("-")[2] == name), None)

    def give_up(self, sent: Sent) -> None:
        """Forget a task; its result is ignored if it still ends."""
        del self._sent[sent.future.key]
        self.client.cancel([sent.future], force=True)

    def check_progress(self) -> None:
        """Check that workers do not retire again and again before they finish anything.

        Raises
        ------
        FeaturemapsError
            When they do: the tasks in flight would never finish.
        """
        self._departures.read()
        if self.watch.is_in_vain(self._sent):
            raise FeaturemapsError(self.watch.describe())

    def begin_anew(self, stall: Stall) -> None:
        """Replace the worker that waits for a storage, and send its task again without the image that it waits for.

        Raises as `replace_worker` does.
        """
        sent = self.find(stall.key)
        if sent is not None:
            self.give_up(sent)
        replace_worker(self.client, stall.worker)
        if stall.what:
            self.leave_out(stall.what)
        if sent is not None:
            self.send(sent.task)

    def take_back(self) -> None:
        """Tell workers to begin no further image. Batches return what was begun; nothing waits for headers."""
        for sent in [sent for sent in self._sent.values() if isinstance(sent.task, ProbeTask)]:
            self.give_up(sent)
        plugin = DrainPlugin(self.target.run_id)

        async def tell() -> None:
            with contextlib.suppress(OSError, CancelledError, ClosedClientError):  # then they finish what they have
                await self.client.register_plugin(plugin)

        self.client.loop.add_callback(tell)  # not waited for: a worker that hangs must not delay the others

    def leave_out(self, path: str) -> None:
        """Leave an image to the next run, in all tasks sent from now on."""
        self.source = replace(self.source, hung=self.source.hung | {path})

    def cancel(self) -> None:
        """Give up all tasks in flight."""
        self._departures.close()
        with contextlib.suppress(OSError, CancelledError, ClosedClientError):
            self.client.cancel([sent.future for sent in self._sent.values()], force=True)
