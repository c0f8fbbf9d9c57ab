"""The loop of a run: probe, append, send batches within a window, commit about once a second, drain when asked."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
from distributed import Client, KilledWorker
from distributed.client import ClosedClientError

from pipeline.config import Job
from pipeline.errors import FeaturemapsError
from pipeline.run import tasks
from pipeline.run.activity import ActivityPlugin
from pipeline.run.crash_finder import HeaderTrial, Trial
from pipeline.run.failures import explain, scheduler_lost, why
from pipeline.run.hangs import find_stalls
from pipeline.run.in_flight import Flight, Sent
from pipeline.run.ledger import Ledger
from pipeline.run.new_images import Intake, work_piece
from pipeline.run.plan.changes import Changes
from pipeline.run.plan.memory import bucket_bytes, guess_decode_bytes, require_memory, require_room, require_space
from pipeline.run.results import Outcomes, note_batch
from pipeline.run.summary import Progress, Summary, receipt
from pipeline.run.workers import Fleet
from pipeline.source import fetch
from pipeline.source.fingerprints import Listing
from pipeline.source.health import SourceWatch
from pipeline.store.layout import (
    BATCHES_IN_FLIGHT_PER_SLOT,
    Batch,
    ClassLayout,
    Piece,
    Size,
    class_name,
    cut_pieces,
    pack_batches,
)
from pipeline.store.lock import require_lock
from pipeline.store.schema import RUNS, Status
from pipeline.store.settings import cost_s, extractor_spec, needed_size, scratch_bytes
from pipeline.store.store import Store

logger = logging.getLogger(__name__)

COMMIT_S = 1.0
RECEIPT_S = 10.0
READY_BATCHES_PER_SLOT = 4
RESULT_S = 10.0
MAX_ACQUITTALS = 3
MAX_STALLS = 3


class Driver:
    """One run between its first task and its last.

    Parameters
    ----------
    job, store, listing, found
        What is to be done.
    client : distributed.Client
    summary, progress
        Filled as the run goes on.
    notify : callable
        Called with ``progress`` about every second.
    stop : threading.Event
        Asks for a drain.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        listing: Listing,
        found: Changes,
        client: Client,
        summary: Summary,
        progress: Progress,
        notify: Callable[[Progress], None],
        stop: threading.Event,
    ) -> None:
        self.job, self.store, self.listing, self.found = job, store, listing, found
        self.client, self.summary, self.progress, self.notify, self.stop = client, summary, progress, notify, stop
        self.spec = extractor_spec(store.spec)
        self.channels = job.decode.channels
        self.extractor = f"extractor-{store.spec.extractor['sha256'][:16]}-{job.dtype}"
        target = tasks.Target(str(store.path), summary.run_id, self.extractor, durable=store.durable)
        self.flight = Flight(client, fetch.Source(listing.root, job.decode), target, needed_size(self.spec))
        self.ready: deque[Batch] = deque()
        self.image_of: dict[Size, dict[int, int]] = {}  # rows of the store that are not sent yet -> image of the listing
        self.waiting: dict[Size, list[int]] = {}  # those of them that are in no batch
        self.kept: dict[Size, np.ndarray[Any, np.dtype[np.int64]]] = {}  # rows of former runs whose maps must not be lost
        watch, self.ledger = SourceWatch(listing.root), Ledger(store, listing)
        self.intake = Intake(listing, found, self.ledger, watch, self.channels, summary, progress)
        self.outcomes = Outcomes(found, self.ledger, watch, summary, progress)
        self.trials: deque[Trial | HeaderTrial] = deque()  # the first of them is going on, and nothing else
        self.failure: FeaturemapsError | None = None
        self.is_lost = False  # nothing that is in flight will come back
        self.n_stalls = 0  # since something was read
        self.is_stuck = False  # nothing that is in flight is worth waiting for

    # -- the loop --------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do the work.

        Raises
        ------
        FeaturemapsError
            What ended the run early; what was in flight has been waited for and committed.
        """
        try:
            self._prepare()
            self._loop()
        except (OSError, CancelledError, ClosedClientError) as error:
            self._fail(self._why(error, None))
        self._end()

    def _loop(self) -> None:
        started = time.monotonic()
        next_commit = next_receipt = started + COMMIT_S  # the first receipt soon, for those who ask for the status
        try:
            while True:
                if self.trials and not self.draining:
                    self._try_next()
                if not self.trials and not self.draining:
                    self._send_probes()
                    self._append_probed()
                    self._send_batches()
                if not len(self.flight):
                    break
                self._take_finished(next_commit - time.monotonic())
                if self.is_lost or self.client.status != "running":
                    self._fail(scheduler_lost(None))
                    break
                self.summary.count_time(time.monotonic() - started)
                if time.monotonic() >= next_commit:
                    self._commit()
                    self._check_progress()
                    self.notify(self.progress)
                    next_commit = time.monotonic() + COMMIT_S
                if time.monotonic() >= next_receipt:
                    self.summary.touch(time.monotonic() - self.progress.began_s)
                    self.store.write_receipt(self.summary.run_id, receipt(self.summary))
                    next_receipt = time.monotonic() + RECEIPT_S
                    self._check_workers()
                    self._check_stalls()
                if self.is_stuck:
                    break
        finally:
            self.flight.cancel()
            self.summary.count_time(time.monotonic() - started)

    @property
    def draining(self) -> bool:
        """Whether nothing new is sent any more."""
        return self.stop.is_set() or self.failure is not None

    def _prepare(self) -> None:
        """Look at the workers, give them the extractor, and take up the rows that are in the store already."""
        self.fleet = Fleet(self.client)
        self.flight.is_whole = self.fleet.is_whole
        self.summary.slots, self.summary.workers = self.fleet.slots, self.fleet.n_workers
        for size, shape_class in self.store.classes.items():
            rows = self.found.pending.get(shape_class.name, [])
            self.image_of[size] = dict(rows)
            if rows:
                self.kept[size] = self.ledger.rows_with_maps(shape_class.name)
                decode_bytes = guess_decode_bytes(size, max(self.listing.size_bytes[i] for _, i in rows))
                self.intake.decode_bytes = max(self.intake.decode_bytes, decode_bytes)
            self.waiting[size] = [row for row, _ in rows]
        self._check_capacity({}, {})
        self.fleet.register(ActivityPlugin())
        self.fleet.register(tasks.ExtractorPlugin(self.extractor, self.spec, self.store.weights(), self.store.spec.layers))
        self.progress.stage = "running"
        if not self.found.new:
            self._plan(complete=True)

    def _take_finished(self, timeout_s: float) -> None:
        """Take up what has come back, and keep no future of it: a result that is wanted and lost would be computed again."""
        for sent in self.flight.finished(timeout_s):
            self._take(sent)

    def _take(self, sent: Sent) -> None:
        kind, what, future = sent
        if future.status == "finished":
            try:
                result = future.result(timeout=RESULT_S)
            except TimeoutError:
                self.flight.follow(sent)  # the worker that held it is gone: it is computed once more
                return
            except (OSError, RuntimeError, CancelledError, KilledWorker, FeaturemapsError) as error:
                self._fail(self._why(error, what))
                return
            if kind == "probe":
                self.n_stalls *= all(probed.fault for probed in result)
                self.intake.take(what[0], result)
            elif kind == "trial":
                self._judge(result, survived=True)
            else:
                note_batch(future.key, what[0], result)
                self.flight.watch.took(sum(result.stage_s.values()))
                self._take_batch(result)
        elif future.status == "error":
            self._take_error(kind, what, future.exception())
        elif future.status == "cancelled":
            self._fail(scheduler_lost(None))
            self.is_lost = True
        else:
            self.flight.follow(sent)  # the worker that held the result died since, and it is computed once more

    def _take_error(self, kind: str, what: Any, error: BaseException | None) -> None:
        is_killed = isinstance(error, KilledWorker | MemoryError)  # either may be one image's doing
        if is_killed and kind == "trial":
            self._judge(None, survived=False)
        elif is_killed and kind == "probe":
            self.trials.append(HeaderTrial(*what))
        elif is_killed and what[1] < MAX_ACQUITTALS:
            self.trials.append(Trial(*what))
        else:
            self._fail(explain(error, what, self.store.path))

    def _why(self, error: BaseException, what: Any) -> FeaturemapsError:
        return why(error, what, self.store.path, is_connected=self.client.status == "running")

    def _check_workers(self) -> None:
        try:
            self.fleet.check()
        except FeaturemapsError as failure:
            self._fail(failure)
            self.is_lost = True
        self.summary.slots, self.summary.workers = self.fleet.slots, self.fleet.n_workers
        self.summary.n_workers_lost = self.fleet.n_lost

    def _check_stalls(self) -> None:
        """Replace workers that wait for a storage that does not answer, and send what they had without the image; but not for ever."""
        for stall in find_stalls(self.client, self.job.deadline_s):
            if self.summary.run_id not in stall.key:  # another run's, who sees to it
                continue
            fault = f"{stall.what or self.store.path}: the storage did not answer for {stall.since_s:.0f} s"
            logger.warning("%s; replacing the worker that waits for it, %s", fault, stall.worker)
            try:
                self.flight.begin_anew(stall)
            except FeaturemapsError as failure:
                self._fail(failure)
                self.is_stuck = True
                return
            self.n_stalls += 1
            if self.draining or self.n_stalls >= MAX_STALLS:
                self.is_stuck = True
                self.summary.faults.insert(
                    0, f"{fault}, as for {self.n_stalls} tasks in a row: the run did not wait for the others"
                )

    def _check_progress(self) -> None:
        """End a run whose workers retire before they finish anything; one that was asked to stop leaves the rest to the next."""
        try:
            self.flight.check_progress()
        except FeaturemapsError as failure:
            self.is_stuck = True
            if self.stop.is_set():
                self.summary.faults.insert(0, str(failure))
            else:
                self._fail(failure)

    def _fail(self, failure: FeaturemapsError) -> None:
        """Note the first failure; the loop drains and `run` raises it."""
        if self.failure is None:
            logger.info("stopping: %s", failure)
            self.failure = failure

    # -- probing and appending -------------------------------------------------------------------------------------------------

    def _send_probes(self) -> None:
        slots = max(1, self.fleet.slots)  # workers that are lost come back
        limit = BATCHES_IN_FLIGHT_PER_SLOT * slots
        while self.flight.count("probe") < limit and len(self.ready) < READY_BATCHES_PER_SLOT * slots:
            block = self.intake.next_block()
            if block is None:
                return
            self.flight.send("probe", (block, self.intake.paths(block)))

    def _append_probed(self) -> None:
        if not self.intake.is_due():
            return
        try:
            appended = self.intake.append(self._check_capacity)
        except FeaturemapsError as failure:
            self._fail(failure)
        except OSError as error:
            self._fail(explain(error, None, self.store.path))
        else:
            for size, rows in appended.items():
                if size not in self.kept and rows[0][0]:  # the class is older: its last shard may be half full
                    self.kept[size] = self.ledger.rows_with_maps(class_name(size))
                self.image_of.setdefault(size, {}).update(rows)
                self.waiting.setdefault(size, []).extend(row for row, _ in rows)
            self._plan(complete=self.intake.is_complete)

    def _check_capacity(self, new: Mapping[Size, ClassLayout], n_new: Mapping[Size, int]) -> None:
        """Refuse what cannot fit memory or disk, with the number that would."""
        layouts = {size: self.store.classes[size].layout for size, rows in self.image_of.items() if rows} | dict(new)
        n_rows = {size: n_new.get(size, 0) + len(self.image_of.get(size, {})) for size in layouts}
        scratch = {size: scratch_bytes(self.spec, self.job.dtype, size, self.channels) for size in layouts}
        fleet, decode_bytes = self.fleet, self.intake.decode_bytes
        kind = fleet.kind._replace(bucket_bytes=bucket_bytes(self.listing.root, self.store.path))
        require_memory(layouts, self.channels, kind, fleet.memory_limit_bytes, decode_bytes, scratch)
        require_space(self.store.path, sum(n * layouts[size].row_bytes for size, n in n_rows.items()), sum(n_rows.values()))

    # -- batches ---------------------------------------------------------------------------------------------------------------

    def _plan(self, *, complete: bool) -> None:
        """Cut what may be sent into batches; the last shard of a class waits while the class may grow."""
        pieces = []
        for size, rows in self.waiting.items():
            shape_class = self.store.classes[size]
            image_s = cost_s(self.spec, shape_class.layout, self.channels)
            cut, self.waiting[size] = cut_pieces(
                shape_class.layout, rows, shape_class.length, image_s, self.channels, complete=complete
            )
            pieces += cut
        self.ready.extend(pack_batches(pieces, max(1, self.fleet.slots), is_whole=self.fleet.is_whole, complete=complete))

    def _send_batches(self) -> None:
        n_sent = self.flight.count("batch")
        while self.ready and n_sent < self.fleet.window and self._has_room(self.ready[0]):
            self.flight.send("batch", ([self._work_piece(piece) for piece in self.ready.popleft().pieces], 0))
            n_sent += 1

    def _has_room(self, batch: Batch) -> bool:
        """Whether the disk holds one batch more; others may have filled it since the run began."""
        wanted = sum((piece.stop - piece.start) * self.store.classes[piece.size].layout.row_bytes for piece in batch.pieces)
        try:
            require_room(self.store.path, self.flight.n_bytes + wanted)
        except (FeaturemapsError, OSError) as error:
            self._fail(explain(error, None, self.store.path))
        return self.failure is None

    # -- batches that killed their worker ----------------------------------------------------------------------------------------

    def _try_next(self) -> None:
        """Compute the next suspect with nobody beside it that could be blamed; in a drain the suspects stay pending."""
        while self.trials and not len(self.flight):
            suspect = self.trials[0].next()
            if suspect is None:
                self._end_trial(self.trials.popleft())
            else:
                self.flight.send("trial", suspect)

    def _judge(self, result: Any, *, survived: bool) -> None:
        trial = self.trials[0]
        if isinstance(trial, HeaderTrial):
            trial.judge(result if survived else None)
        else:
            trial.judge(survived=survived)

    def _end_trial(self, trial: Trial | HeaderTrial) -> None:
        """Record the guilty and send the others once more."""
        if isinstance(trial, HeaderTrial):
            self.intake.take(trial.block, trial.probed)
            return
        result = tasks.BatchResult(trial.verdicts(), "none", {})
        if result.pieces:
            self._take_batch(result)
        if innocent := trial.innocent():
            self.flight.send("batch", (innocent, 0 if trial.n_guilty else trial.n_before + 1))

    def _work_piece(self, piece: Piece) -> tasks.WorkPiece:
        images = [self.image_of[piece.size].pop(row) for row in piece.rows]
        layout, kept = self.store.classes[piece.size].layout, self.kept.get(piece.size, np.empty(0, np.int64))
        return work_piece(piece, layout, self.listing, images, kept)

    def _take_batch(self, result: tasks.BatchResult) -> None:
        self.n_stalls *= not any((piece.status != Status.PENDING).any() for piece in result.pieces)
        try:
            self.outcomes.take(result)
        except FeaturemapsError as failure:
            self._fail(failure)

    # -- the end ---------------------------------------------------------------------------------------------------------------

    def _commit(self, *, last: bool = False) -> None:
        try:
            self.outcomes.commit(last=last)
        except OSError as error:
            self._fail(explain(error, None, self.store.path))

    def _end(self) -> None:
        """Commit the rest and say how the run ended."""
        self._commit(last=True)
        self.notify(self.progress)
        if self.failure is not None:
            raise self.failure
        if not self.is_stuck and self.fleet.has_lost_workers():  # else this process might hang there, too
            require_lock(self.store.path / RUNS, self.summary.run_id)
            self.store.repair()  # what the workers that were lost left
        unsent = sum(map(len, self.image_of.values())) + sum(trial.n_images for trial in self.trials)
        self.summary.n_pending += unsent + self.intake.n_left + self.flight.n_images
        if self.stop.is_set() and self.summary.n_pending:
            self.summary.outcome = "stopped"
        else:
            self.summary.outcome = "incomplete" if self.summary.n_pending else "complete"
