"""The loop of a run: probe, append, send batches within a window, commit about once a second, drain when asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from typing import Any

from distributed import Client, KilledWorker
from distributed.client import ClosedClientError

from pipeline.errors import FeaturemapsError
from pipeline.run import tasks
from pipeline.run.activity import ActivityPlugin
from pipeline.run.admission import all_have_kernel
from pipeline.run.batch_queue import BatchQueue
from pipeline.run.context import Context
from pipeline.run.crash_finder import CrashFinder
from pipeline.run.ending import Ending
from pipeline.run.failures import scheduler_lost
from pipeline.run.in_flight import BatchTask, Flight, ProbeTask, Sent, Task, TrialTask
from pipeline.run.ledger import Ledger
from pipeline.run.new_images import Intake
from pipeline.run.plan.memory import require_room
from pipeline.run.results import Outcomes, note_batch
from pipeline.run.summary import receipt
from pipeline.run.timer import Every
from pipeline.run.watch import Watch
from pipeline.run.workers import Fleet
from pipeline.source import fetch
from pipeline.source.health import SourceWatch
from pipeline.store.layout import BATCHES_IN_FLIGHT_PER_SLOT
from pipeline.store.lock import require_lock
from pipeline.store.schema import RUNS, Status
from pipeline.store.settings import extractor_spec, needed_size
from pipeline.text import count

COMMIT_S = 1.0
RECEIPT_S = 10.0
READY_BATCHES_PER_SLOT = 4
RESULT_S = 10.0
MAX_ACQUITTALS = 3


class Driver:
    """One run, from its first task to its last.

    Parameters
    ----------
    context : Context
    client : distributed.Client
    """

    def __init__(self, context: Context, client: Client) -> None:
        self.context, self.client = context, client
        self.store, self.summary = context.store, context.summary
        self.spec = extractor_spec(self.store.spec)
        self.ending = Ending(context.stop, self.store.path, lambda: client.status == "running")
        self.target, source = _target(context), fetch.Source(context.listing.root, context.job.decode)
        self.flight = Flight(client, source, self.target, needed_size(self.spec))
        self.ledger, health = Ledger(self.store, context.listing), SourceWatch(context.listing.root)
        self.intake = Intake(context, self.ledger, health)
        self.outcomes = Outcomes(context, self.ledger, health)
        self.crashes = CrashFinder(self.flight, self.intake, self._take_batch)
        self.is_taken_back = False

    def run(self) -> None:
        """Compute all that is to be done.

        Raises
        ------
        FeaturemapsError
            The reason why the run ended early; tasks in flight were waited for and committed.
        """
        began_s = time.monotonic()
        try:
            self._prepare()
            self.summary.start_s += time.monotonic() - began_s
            self._loop()
        except (OSError, CancelledError, ClosedClientError) as error:
            self.ending.fail_or_lose(error)
        self._end()

    def _prepare(self) -> None:
        """Count the workers, give them the extractor, and queue the rows that are in the store already."""
        self.fleet = Fleet(self.client)
        self.flight.is_whole, self.flight.is_plain = self.fleet.is_whole, self.fleet.is_plain
        self.watch = Watch(self.context, self.client, self.fleet, self.flight, self.ending)
        self.watch.count_workers()
        self.batches = BatchQueue(self.context, self.ledger, self.fleet, has_kernel=all_have_kernel(self.client))
        self.fleet.register(ActivityPlugin())
        extractor = tasks.ExtractorPlugin(self.target.extractor, self.spec, self.store.weights(), self.store.spec.layers)
        extractor.is_plain = self.fleet.is_plain
        self.fleet.register(extractor)
        self.context.progress.stage = "running"
        if not self.context.found.new:
            self.batches.plan(complete=True)

    def _loop(self) -> None:
        started = time.monotonic()
        # The first receipt comes soon, for those who ask for the status.
        commit, look = Every(COMMIT_S), Every(RECEIPT_S, COMMIT_S)
        try:
            while not self.ending.is_stuck:
                self._send()
                self._drain()
                if not len(self.flight):
                    break
                self._take_finished(commit.left_s)
                if self.ending.is_lost or self.client.status != "running":
                    self.ending.fail(scheduler_lost(None))
                    break
                self.summary.count_time(time.monotonic() - started)
                if commit.is_due:
                    self._commit()
                    self.watch.check_progress()
                    self.context.notify(self.context.progress)
                    commit.done()
                if look.is_due:
                    self._write_receipt()
                    look.done()
                    self.watch.check_workers()
                    self.watch.check_stalls()
        finally:
            self.flight.cancel()
            self.summary.count_time(time.monotonic() - started)

    def _take_finished(self, timeout_s: float) -> None:
        """Handle finished tasks, and drop their futures: Dask would recompute a lost result while a future asks for it."""
        for sent in self.flight.finished(timeout_s):
            self._take(sent)

    def _send(self) -> None:
        """Send what may be sent; while a crash is examined, send only its suspects."""
        if self.crashes and not self.ending.draining:
            self.crashes.try_next()
        if not self.crashes and not self.ending.draining:
            self._send_probes()
            self._append_probed()
            self._send_batches()

    def _drain(self) -> None:
        """Take back tasks that have not begun, and show how many images may still be finished."""
        if not self.ending.draining:
            return
        if not self.is_taken_back:
            self.is_taken_back = True
            self.flight.take_back()
        n = self.flight.n_images
        self.context.progress.stage = f"stopping (up to {count(n, 'image')} in flight)" if n else "stopping"

    def _send_probes(self) -> None:
        slots = max(1, self.fleet.slots)  # at least one: lost workers come back
        limit = BATCHES_IN_FLIGHT_PER_SLOT * slots
        while self.flight.count(ProbeTask) < limit and len(self.batches) < READY_BATCHES_PER_SLOT * slots:
            block = self.intake.next_block()
            if block is None:
                return
            self.flight.send(ProbeTask(block, self.intake.paths(block)))

    def _append_probed(self) -> None:
        if not self.intake.is_due():
            return
        try:
            appended = self.intake.append(self.batches.check_capacity)
        except (FeaturemapsError, OSError) as error:
            self.ending.fail_with(error)
        else:
            self.batches.add(appended)
            self.batches.plan(complete=self.intake.is_complete)

    def _send_batches(self) -> None:
        n_sent = self.flight.count(BatchTask)
        while self.batches and n_sent < self.fleet.window and self._has_room():
            self.flight.send(BatchTask(self.batches.take()))
            n_sent += 1

    def _has_room(self) -> bool:
        """Whether the disk has room for one more batch; others may have filled it since the run began."""
        try:
            require_room(self.store.path, self.flight.n_bytes + self.batches.next_bytes)
        except (FeaturemapsError, OSError) as error:
            self.ending.fail_with(error)
        return self.ending.failure is None

    def _take(self, sent: Sent) -> None:
        task, future = sent
        if future.status == "finished":
            try:
                result = future.result(timeout=RESULT_S)
            except TimeoutError:
                self.flight.follow(sent)  # its worker is gone: Dask computes the result again
            except (OSError, RuntimeError, CancelledError, KilledWorker, FeaturemapsError) as error:
                self.ending.fail_or_lose(error, _pieces(task))
            else:
                self._take_result(task, future.key, result)
        elif future.status == "error":
            self._take_error(task, future.exception())
        elif future.status == "cancelled":
            self.ending.fail(scheduler_lost(None))
            self.ending.is_lost = True
        else:
            self.flight.follow(sent)  # its worker has died since: Dask computes the result again

    def _take_result(self, task: Task, key: str, result: Any) -> None:
        match task:
            case ProbeTask():
                self.watch.note_read(anything=not all(probed.fault for probed in result))
                self.intake.take(task.block, result)
            case TrialTask():
                self.crashes.judge(result, survived=True)
            case BatchTask():
                note_batch(key, task.pieces, result)
                self.flight.watch.took(sum(result.stage_s.values()))
                self._take_batch(result)

    def _take_error(self, task: Task, error: BaseException | None) -> None:
        is_killed = isinstance(error, KilledWorker | MemoryError)  # one image may cause either
        match task:
            case TrialTask() if is_killed:
                self.crashes.judge(None, survived=False)
            case ProbeTask() if is_killed:
                self.crashes.suspect(task)
            case BatchTask() if is_killed and task.n_acquittals < MAX_ACQUITTALS:
                self.crashes.suspect(task)
            case _:
                self.ending.fail_with(error, _pieces(task))

    def _take_batch(self, result: tasks.BatchResult) -> None:
        self.watch.note_read(anything=any((piece.status != Status.PENDING).any() for piece in result.pieces))
        try:
            self.outcomes.take(result)
        except FeaturemapsError as failure:
            self.ending.fail(failure)

    def _commit(self, *, last: bool = False) -> None:
        try:
            self.outcomes.commit(last=last)
        except OSError as error:
            self.ending.fail_with(error)

    def _write_receipt(self) -> None:
        self.summary.touch(time.monotonic() - self.context.progress.began_s)
        self.store.write_receipt(self.summary.run_id, receipt(self.summary))

    def _end(self) -> None:
        """Commit the rest and set the outcome of the run."""
        self._commit(last=True)
        self.context.notify(self.context.progress)
        if self.ending.failure is not None:
            raise self.ending.failure
        if not self.ending.is_stuck and self.fleet.has_lost_workers():  # else this process might hang there too
            require_lock(self.store.path / RUNS, self.summary.run_id)
            self.store.repair()  # removes what lost workers left behind
        self.summary.n_pending += self.batches.n_images + self.crashes.n_images + self.intake.n_left + self.flight.n_images
        if self.context.stop.is_set() and self.summary.n_pending:
            self.summary.outcome = "stopped"
        else:
            self.summary.outcome = "incomplete" if self.summary.n_pending else "complete"


def _target(context: Context) -> tasks.Target:
    """Where the run writes its maps."""
    store, spec = context.store, context.store.spec
    extractor = f"extractor-{spec.extractor['sha256'][:16]}-{context.job.dtype}"
    return tasks.Target(str(store.path), context.summary.run_id, extractor, durable=store.durable)


def _pieces(task: Task) -> Sequence[tasks.WorkPiece]:
    """The pieces of a batch; none for other tasks."""
    return task.pieces if isinstance(task, BatchTask) else ()
