"""The loop of a run: probe, append, send batches within a window, commit about once a second, drain when asked."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
from distributed import Client, Future, KilledWorker
from distributed.client import ClosedClientError

from pipeline import reading, tasks
from pipeline.capacity import guess_decode_bytes, require_memory, require_space
from pipeline.changes import Changes
from pipeline.cluster import ROLES
from pipeline.collection import Listing
from pipeline.config import Job
from pipeline.errors import FeaturemapsError
from pipeline.faults import explain, scheduler_lost, why
from pipeline.fleet import Fleet
from pipeline.intake import Intake
from pipeline.ledger import Ledger
from pipeline.lock import require_lock
from pipeline.outcomes import Outcomes
from pipeline.plan import (
    BATCHES_IN_FLIGHT_PER_SLOT,
    Batch,
    ClassLayout,
    Size,
    class_name,
    cut_pieces,
    pack_batches,
)
from pipeline.schema import RUNS, Status
from pipeline.settings import cost_s, extractor_spec, needed_size, scratch_bytes
from pipeline.source_watch import SourceWatch
from pipeline.store import Store
from pipeline.summary import Progress, Summary, receipt
from pipeline.trial import HeaderTrial, Trial

logger = logging.getLogger(__name__)

COMMIT_S = 1.0
RECEIPT_S = 10.0
READY_BATCHES_PER_SLOT = 4
RESULT_S = 10.0
MAX_ACQUITTALS = 3


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
        self.source = reading.Source(listing.root, job.decode)
        self.target = tasks.Target(
            str(store.path), summary.run_id, f"extractor-{store.spec.extractor['sha256'][:16]}-{job.dtype}"
        )
        self.finished: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.in_flight: dict[str, tuple[str, Any, Future]] = {}  # key -> kind, what was sent, future
        self.ready: deque[Batch] = deque()
        self.image_of: dict[Size, dict[int, int]] = {}  # rows of the store that are not sent yet -> image of the listing
        self.waiting: dict[Size, list[int]] = {}  # those of them that are in no batch
        self.kept: dict[Size, np.ndarray[Any, np.dtype[np.int64]]] = {}  # rows of former runs whose maps must not be lost
        self.n_sent = 0
        watch, ledger = SourceWatch(listing.root), Ledger(store, listing)
        self.intake = Intake(listing, found, ledger, watch, self.channels, summary, progress)
        self.outcomes = Outcomes(found, ledger, watch, summary, progress)
        self.trials: deque[Trial | HeaderTrial] = deque()  # the first of them is going on, and nothing else
        self.failure: FeaturemapsError | None = None
        self.is_lost = False  # nothing that is in flight will come back

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
        next_commit, next_receipt = started + COMMIT_S, started + RECEIPT_S
        try:
            while True:
                if self.trials and not self.draining:
                    self._try_next()
                if not self.trials and not self.draining:
                    self._send_probes()
                    self._append_probed()
                    self._send_batches()
                if not self.in_flight:
                    break
                self._wait(next_commit - time.monotonic())
                if self.is_lost or self.client.status != "running":
                    self._fail(scheduler_lost(None))
                    break
                self.summary.compute_s = time.monotonic() - started
                if time.monotonic() >= next_commit:
                    self._commit()
                    self.notify(self.progress)
                    next_commit = time.monotonic() + COMMIT_S
                if time.monotonic() >= next_receipt:
                    self.store.write_receipt(self.summary.run_id, receipt(self.summary))
                    next_receipt = time.monotonic() + RECEIPT_S
                    self._check_workers()
        finally:
            with contextlib.suppress(OSError, CancelledError, ClosedClientError):
                self.client.cancel([future for _, _, future in self.in_flight.values()], force=True)
            self.summary.compute_s = time.monotonic() - started

    @property
    def draining(self) -> bool:
        """Whether nothing new is sent any more."""
        return self.stop.is_set() or self.failure is not None

    def _prepare(self) -> None:
        """Look at the workers, give them the extractor, and take up the rows that are in the store already."""
        self.fleet = Fleet(self.client)
        self.summary.slots = self.fleet.slots
        for size, shape_class in self.store.classes.items():
            rows = self.found.pending.get(shape_class.name, [])
            self.image_of[size] = dict(rows)
            if rows:
                self.kept[size] = self._rows_with_maps(shape_class.name)
                decode_bytes = guess_decode_bytes(size, max(self.listing.size_bytes[i] for _, i in rows))
                self.intake.decode_bytes = max(self.intake.decode_bytes, decode_bytes)
            self.waiting[size] = [row for row, _ in rows]
        self._check_capacity({}, {})
        self.fleet.register(tasks.ExtractorPlugin(self.target.extractor, self.spec, self.store.weights(), self.store.spec.layers))
        self.progress.stage = "running"
        if not self.found.new:
            self._plan(complete=True)

    def _rows_with_maps(self, group: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows that are done, or would be if their image came back."""
        status = self.store.column(group, "status")
        removed = status == Status.REMOVED
        if removed.any():
            removed &= self.store.column(group, "maps_digest") != ""
        return np.flatnonzero((status == Status.DONE) | removed)

    def _wait(self, timeout_s: float) -> None:
        """Take up what finished, waiting for the first at most ``timeout_s``."""
        try:
            self._take(self.finished.get(timeout=max(0.01, timeout_s)))
            while True:
                self._take(self.finished.get_nowait())
        except queue.Empty:
            pass

    def _submit(self, kind: str, sent: Any, future: Future) -> None:
        self.in_flight[future.key] = (kind, sent, future)
        future.add_done_callback(lambda done: self.finished.put(done.key))

    def _take(self, key: str) -> None:
        kind, sent, future = self.in_flight.pop(key)
        if future.status == "finished":
            try:
                result = future.result(timeout=RESULT_S)
            except TimeoutError:
                self._submit(kind, sent, future)  # the worker that held it is gone: it is computed once more
                return
            except (OSError, RuntimeError, CancelledError, KilledWorker, FeaturemapsError) as error:
                self._fail(self._why(error, sent))
                return
            if kind == "probe":
                self.intake.take(sent, result)
            elif kind == "trial":
                self._judge(result, survived=True)
            else:
                self._take_batch(result)
        elif future.status == "error":
            self._take_error(kind, sent, future.exception())
        else:
            self._fail(scheduler_lost(None))
            self.is_lost = True

    def _take_error(self, kind: str, sent: Any, error: BaseException | None) -> None:
        is_killed = isinstance(error, KilledWorker)
        if is_killed and kind == "trial":
            self._judge(None, survived=False)
        elif is_killed and kind == "probe":
            self.trials.append(HeaderTrial(sent, self.intake.paths(sent)))
        elif is_killed and sent[1] < MAX_ACQUITTALS:
            self.trials.append(Trial(*sent))
        else:
            self._fail(explain(error, sent, self.store.path))

    def _why(self, error: BaseException, sent: Any) -> FeaturemapsError:
        return why(error, sent, self.store.path, is_connected=self.client.status == "running")

    def _check_workers(self) -> None:
        try:
            self.fleet.check()
        except FeaturemapsError as failure:
            self._fail(failure)
            self.is_lost = True

    def _fail(self, failure: FeaturemapsError) -> None:
        """Note the first failure; the loop drains and `run` raises it."""
        if self.failure is None:
            logger.info("stopping: %s", failure)
            self.failure = failure

    # -- probing and appending -------------------------------------------------------------------------------------------------

    def _send_probes(self) -> None:
        probing = sum(kind == "probe" for kind, _, _ in self.in_flight.values())
        limit = BATCHES_IN_FLIGHT_PER_SLOT * self.fleet.slots
        while probing < limit and len(self.ready) < READY_BATCHES_PER_SLOT * self.fleet.slots:
            block = self.intake.next_block()
            if block is None:
                return
            future = self.client.submit(
                reading.probe_block,
                self.source,
                self.intake.paths(block),
                needed_size(self.spec),
                key=f"probe-{self.summary.run_id}-{block}",
                resources={"read": 1},
                priority=10,
                pure=False,
            )
            self._submit("probe", block, future)
            probing += 1

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
                    self.kept[size] = self._rows_with_maps(class_name(size))
                self.image_of.setdefault(size, {}).update(rows)
                self.waiting.setdefault(size, []).extend(row for row, _ in rows)
            self._plan(complete=self.intake.is_complete)

    def _check_capacity(self, new: Mapping[Size, ClassLayout], n_new: Mapping[Size, int]) -> None:
        """Refuse what cannot fit memory or disk, with the number that would."""
        layouts = {size: self.store.classes[size].layout for size, rows in self.image_of.items() if rows} | dict(new)
        n_rows = {size: n_new.get(size, 0) + len(self.image_of.get(size, {})) for size in layouts}
        scratch = {size: scratch_bytes(self.spec, self.job.dtype, size, self.channels) for size in layouts}
        fleet, decode_bytes = self.fleet, self.intake.decode_bytes
        require_memory(layouts, self.channels, fleet.kind, fleet.memory_limit_bytes, decode_bytes, scratch)
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
        self.ready.extend(pack_batches(pieces, self.fleet.slots, is_whole=self.fleet.is_whole, complete=complete))

    def _send_batches(self) -> None:
        sent = sum(kind == "batch" for kind, _, _ in self.in_flight.values())
        while self.ready and sent < self.fleet.window:
            self._send(self.ready.popleft())
            sent += 1

    def _send(self, batch: Batch) -> None:
        self._send_pieces([self._work_piece(piece) for piece in batch.pieces])

    def _send_pieces(self, pieces: list[tasks.WorkPiece], n_acquittals: int = 0) -> None:
        """Only the last task's result, a few kB, comes back."""
        name = f"{self.summary.run_id}-{self.n_sent}"
        self.n_sent += 1
        submit = self.client.submit
        if self.fleet.is_whole:
            resources = dict.fromkeys(ROLES, 1)
            future = submit(
                tasks.process, self.source, self.target, pieces, key=f"process-{name}", resources=resources, pure=False
            )
        else:
            decoded = submit(tasks.read, self.source, pieces, key=f"read-{name}", resources={"read": 1}, pure=False)
            extracted = submit(tasks.extract, self.target, decoded, key=f"extract-{name}", resources={"extract": 1}, pure=False)
            future = submit(tasks.write, self.target, extracted, key=f"write-{name}", resources={"write": 1}, pure=False)
        self._submit("batch", (pieces, n_acquittals), future)

    # -- batches that killed their worker ----------------------------------------------------------------------------------------

    def _try_next(self) -> None:
        """Compute the next suspect with nobody beside it that could be blamed; in a drain the suspects stay pending."""
        while self.trials and not self.in_flight:
            trial = self.trials[0]
            suspect = trial.next()
            if suspect is None:
                self._end_trial(self.trials.popleft())
                continue
            name, submit = f"{self.summary.run_id}-{self.n_sent}", self.client.submit
            self.n_sent += 1
            if isinstance(suspect, str):
                arguments: tuple[Any, ...] = (reading.probe_block, self.source, [suspect], needed_size(self.spec))
                future = submit(*arguments, key=f"trial-{name}", resources={"read": 1}, pure=False)
            else:
                decoded = submit(tasks.read, self.source, [suspect], key=f"suspect-{name}", resources={"read": 1}, pure=False)
                arguments = (tasks.attempt, self.target, decoded)
                future = submit(*arguments, key=f"trial-{name}", resources={"extract": 1}, pure=False)
            self._submit("trial", suspect, future)

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
            self._send_pieces(innocent, 0 if trial.n_guilty else trial.n_before + 1)

    def _work_piece(self, piece: Any) -> tasks.WorkPiece:
        images = [self.image_of[piece.size].pop(row) for row in piece.rows]
        known = self.kept.get(piece.size, np.empty(0, np.int64))
        kept = known[slice(*np.searchsorted(known, (piece.start, piece.stop)))].tolist()
        return tasks.WorkPiece(
            self.store.classes[piece.size].layout,
            piece.start,
            piece.stop,
            piece.rows,
            tuple(self.listing.paths[i] for i in images),
            tuple(self.listing.fingerprint(i) for i in images),
            tuple(kept),
        )

    def _take_batch(self, result: tasks.BatchResult) -> None:
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
        if self.fleet.has_lost_workers():
            require_lock(self.store.path / RUNS, self.summary.run_id)
            self.store.repair()  # what the workers that were lost left
        unsent = sum(map(len, self.image_of.values())) + sum(trial.n_images for trial in self.trials)
        self.summary.n_pending += unsent + self.intake.n_left
        if self.stop.is_set() and self.summary.n_pending:
            self.summary.outcome = "stopped"
        else:
            self.summary.outcome = "incomplete" if self.summary.n_pending else "complete"
