"""The loop of a run: probe, append, send batches within a window, commit about once a second, drain when asked."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from typing import Any

import numpy as np
from distributed import Client, Future, KilledWorker
from distributed.client import ClosedClientError
from distributed.comm import CommClosedError

from pipeline import reading, tasks
from pipeline.capacity import require_memory, require_space
from pipeline.changes import Changes, Entry, is_inaccessible
from pipeline.cluster import ROLES, worker_slots
from pipeline.collection import UNREADABLE, Listing
from pipeline.config import Job
from pipeline.errors import FeaturemapsError
from pipeline.faults import explain, scheduler_lost
from pipeline.ledger import Ledger, has_inaccessible
from pipeline.lock import require_lock
from pipeline.plan import (
    BATCHES_IN_FLIGHT_PER_SLOT,
    Batch,
    ClassLayout,
    Size,
    assign_classes,
    class_name,
    cut_pieces,
    pack_batches,
)
from pipeline.schema import REJECTED, RUNS, Status
from pipeline.settings import cost_s, extractor_spec, layout_of, needed_size
from pipeline.source_watch import SourceWatch
from pipeline.store import Store
from pipeline.summary import Progress, Summary, receipt
from pipeline.trial import HeaderTrial, Trial

logger = logging.getLogger(__name__)

COMMIT_S = 1.0
RECEIPT_S = 10.0
PROBE_BLOCK = 512
FIRST_APPEND = 4096
MAX_APPEND = 65_536
READY_BATCHES_PER_SLOT = 4
RESULT_S = 10.0
NO_WORKERS_S = 120.0
REGISTER_TRIES = 5
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
        self.ledger = Ledger(store, listing)
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
        self.next_probe = self.next_append = 0  # blocks of `found.new`
        self.probed: dict[int, Sequence[reading.Probed]] = {}
        self.buffer: list[tuple[int, reading.Probed]] = []  # probed, in the order of the listing, not appended
        self.n_appended = self.n_sent = 0
        self.watch = SourceWatch(listing.root)
        self.trials: deque[Trial | HeaderTrial] = deque()  # the first of them is going on, and nothing else
        self.decode_bytes = 0  # the most that one of the images probed takes
        self.is_whole, self.n_readers = True, 0  # whether one task does all of a batch; else who reads
        self.results: list[tasks.BatchResult] = []
        self.failure: FeaturemapsError | None = None
        self.is_lost = False  # nothing that is in flight will come back
        self.no_workers_since: float | None = None

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
        workers = worker_slots(self.client)
        self.addresses = set(workers)
        self.slots = self.summary.slots = sum(worker.extract for worker in workers.values())
        self.memory_limit_bytes = min((w.memory_limit_bytes for w in workers.values() if w.memory_limit_bytes), default=0)
        self.threads = max(worker.extract for worker in workers.values())
        self.is_whole = all(worker.is_whole for worker in workers.values() if worker.extract)
        self.n_readers = 0 if self.is_whole else sum(worker.read for worker in workers.values())
        for size, shape_class in self.store.classes.items():
            rows = self.found.pending.get(shape_class.name, [])
            self.image_of[size] = dict(rows)
            self.waiting[size] = [row for row, _ in rows]
        self._check_capacity({size: self.store.classes[size].layout for size, rows in self.image_of.items() if rows}, {})
        self._register(tasks.ExtractorPlugin(self.target.extractor, self.spec, self.store.weights(), self.store.spec.layers))
        self.progress.stage = "running"
        if not self.found.new:
            self._plan(complete=True)

    def _register(self, plugin: tasks.ExtractorPlugin) -> None:
        """Give every worker the extractor; a worker that dies meanwhile makes the whole call fail, and gets it when it is back."""
        for left in reversed(range(REGISTER_TRIES)):
            try:
                self.client.register_plugin(plugin)
                return
            except OSError as error:
                if not left or self.client.status != "running":
                    raise
                logger.info("giving the extractor to the workers once more: %s", error)
                time.sleep(1.0)

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
                self.probed[sent] = result
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
            images = self.found.new[sent * PROBE_BLOCK : (sent + 1) * PROBE_BLOCK]
            self.trials.append(HeaderTrial(sent, [self.listing.paths[i] for i in images]))
        elif is_killed and sent[1] < MAX_ACQUITTALS:
            self.trials.append(Trial(*sent))
        else:
            self._fail(explain(error, sent, self.store.path))

    def _why(self, error: BaseException, sent: Any) -> FeaturemapsError:
        """Tell a lost scheduler from what a task or the store raised."""
        lost = self.client.status != "running" or isinstance(error, CommClosedError | CancelledError | ClosedClientError)
        return scheduler_lost(error) if lost else explain(error, sent, self.store.path)

    def _check_workers(self) -> None:
        """Give up when nobody is left to work: a scheduler that was started by hand would wait for ever."""
        try:
            self.slots = sum(worker.extract for worker in worker_slots(self.client).values())
            self.no_workers_since = None
        except FeaturemapsError as error:
            now = time.monotonic()
            self.no_workers_since = self.no_workers_since or now
            if now - self.no_workers_since >= NO_WORKERS_S:
                failure = FeaturemapsError(
                    f"workers were lost and none has come for {NO_WORKERS_S:.0f} s: the run stopped, and what was committed stands; "
                    f"start workers and run the same command again to go on from there ({error})"
                )
                self._fail(failure)
                self.is_lost = True

    def _fail(self, failure: FeaturemapsError) -> None:
        """Note the first failure; the loop drains and `run` raises it."""
        if self.failure is None:
            logger.info("stopping: %s", failure)
            self.failure = failure

    # -- probing and appending -------------------------------------------------------------------------------------------------

    @property
    def n_blocks(self) -> int:
        """Blocks of images to probe."""
        return -(-len(self.found.new) // PROBE_BLOCK)

    def _send_probes(self) -> None:
        probing = sum(kind == "probe" for kind, _, _ in self.in_flight.values())
        while (
            self.next_probe < self.n_blocks
            and probing < BATCHES_IN_FLIGHT_PER_SLOT * self.slots
            and len(self.ready) < READY_BATCHES_PER_SLOT * self.slots
        ):
            images = self.found.new[self.next_probe * PROBE_BLOCK : (self.next_probe + 1) * PROBE_BLOCK]
            future = self.client.submit(
                reading.probe_block,
                self.source,
                [self.listing.paths[i] for i in images],
                needed_size(self.spec),
                key=f"probe-{self.summary.run_id}-{self.next_probe}",
                resources={"read": 1},
                priority=10,
                pure=False,
            )
            self._submit("probe", self.next_probe, future)
            self.next_probe += 1
            probing += 1

    def _append_probed(self) -> None:
        """Append in the order of the listing, in growing blocks: each append rewrites the metadata of the classes it touches."""
        while self.next_append in self.probed:
            images = self.found.new[self.next_append * PROBE_BLOCK : (self.next_append + 1) * PROBE_BLOCK]
            self.buffer += zip(images, self.probed.pop(self.next_append), strict=True)
            self.next_append += 1
        complete = self.next_append == self.n_blocks
        enough = min(max(self.n_appended, FIRST_APPEND), MAX_APPEND)
        if self.buffer and (complete or len(self.buffer) >= enough):
            try:
                self._append(self.buffer, complete=complete)
            except FeaturemapsError as failure:
                self._fail(failure)
            except OSError as error:
                self._fail(explain(error, None, self.store.path))
            self.buffer = []

    def _append(self, probed: list[tuple[int, reading.Probed]], *, complete: bool) -> None:
        probed = [self._doubt(i, p) for i, p in probed if not self._is_known(i, p)]
        for _, p in probed:
            self.watch.note(p.error, is_fault=bool(p.fault))
        self.watch.check()
        faults = [p.fault for _, p in probed if p.fault]
        self.summary.faults = (self.summary.faults + faults)[:20]
        self.summary.n_pending += len(faults)
        rejected = [(i, p) for i, p in probed if p.error]
        good = [(i, p) for i, p in probed if not p.error and not p.fault]
        sizes = assign_classes(((p.input_height, p.input_width) for _, p in good), self.store.classes)
        groups: dict[Size, list[tuple[int, reading.Probed]]] = {}
        for size, item in zip(sizes, good, strict=True):
            groups.setdefault(size, []).append(item)
        layouts = {size: self._layout(size) for size in groups}
        self.decode_bytes = max([self.decode_bytes, *(p.decode_bytes for _, p in good)])
        known = {size: self.store.classes[size].layout for size, rows in self.image_of.items() if rows}
        self._check_capacity({**known, **layouts}, {size: len(items) for size, items in groups.items()})
        require_lock(self.store.path / RUNS, self.summary.run_id)
        for size, items in groups.items():
            rows = self.ledger.append(size, layouts[size], items)
            self.image_of.setdefault(size, {}).update(zip(rows, (i for i, _ in items), strict=True))
            self.waiting.setdefault(size, []).extend(rows)
        if rejected:
            self.ledger.append_rejected(rejected)
            self.summary.n_rejected += len(rejected)
            self.progress.n_quarantined += len(rejected)
            self.progress.n_finished += len(rejected)
        self.ledger.supersede(self.found.replaces[i] for i, p in probed if not p.fault and i in self.found.replaces)
        self.n_appended += len(good)
        self._plan(complete=complete)

    def _doubt(self, i: int, found: reading.Probed) -> tuple[int, reading.Probed]:
        """An image that can be read, but could not be looked at when it was listed, has no fingerprint: the next run does it."""
        if self.listing.fingerprint(i) == UNREADABLE and not found.error and not found.fault:
            found = reading.Probed(fault=f"{self.listing.paths[i]}: could not be looked at when the source was listed")
        return i, found

    def _is_known(self, i: int, found: reading.Probed) -> bool:
        """Whether an image that was tried again is rejected for the reason on record; the entry stands."""
        entry = self.found.replaces.get(i)
        known = (
            entry is not None and entry.group == REJECTED and bool(found.error) and self.ledger.is_rejected(entry, i, found.error)
        )
        self.summary.n_unchanged += known
        self.progress.n_finished += known
        return known

    def _layout(self, size: Size) -> ClassLayout:
        if size in self.store.classes:
            return self.store.classes[size].layout
        return layout_of(size, self.spec, np.dtype(self.job.dtype).itemsize, self.channels)

    def _check_capacity(self, layouts: dict[Size, ClassLayout], n_new: dict[Size, int]) -> None:
        """Refuse what cannot fit memory or disk, with the number that would."""
        n_rows = {size: n_new.get(size, 0) + len(self.image_of.get(size, {})) for size in layouts}
        window = 0 if self.is_whole else self._window  # the images of all of them may wait on one worker
        require_memory(layouts, self.channels, self.threads, window, self.memory_limit_bytes, self.decode_bytes)
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
        self.ready.extend(pack_batches(pieces, self.slots, is_whole=self.is_whole, complete=complete))

    @property
    def _window(self) -> int:
        """Batches in flight: enough that nobody waits for the driver, and where others read, enough for all of them."""
        return BATCHES_IN_FLIGHT_PER_SLOT * self.slots + self.n_readers

    def _send_batches(self) -> None:
        sent = sum(kind == "batch" for kind, _, _ in self.in_flight.values())
        while self.ready and sent < self._window:
            self._send(self.ready.popleft())
            sent += 1

    def _send(self, batch: Batch) -> None:
        self._send_pieces([self._work_piece(piece) for piece in batch.pieces])

    def _send_pieces(self, pieces: list[tasks.WorkPiece], n_acquittals: int = 0) -> None:
        """Only the last task's result, a few kB, comes back."""
        name = f"{self.summary.run_id}-{self.n_sent}"
        self.n_sent += 1
        submit = self.client.submit
        if self.is_whole:
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
            self.probed[trial.block] = trial.probed
            return
        result = tasks.BatchResult(trial.verdicts(), "none", {})
        if result.pieces:
            self._take_batch(result)
        if innocent := trial.innocent():
            self._send_pieces(innocent, 0 if trial.n_guilty else trial.n_before + 1)

    def _work_piece(self, piece: Any) -> tasks.WorkPiece:
        images = [self.image_of[piece.size].pop(row) for row in piece.rows]
        return tasks.WorkPiece(
            self.store.classes[piece.size].layout,
            piece.start,
            piece.stop,
            piece.rows,
            tuple(self.listing.paths[i] for i in images),
            tuple(self.listing.fingerprint(i) for i in images),
        )

    def _take_batch(self, result: tasks.BatchResult) -> None:
        for piece in result.pieces:
            group = class_name(piece.layout.size)
            for row, is_fault, error in zip(piece.rows, (piece.status == Status.PENDING).tolist(), piece.error, strict=True):
                if not (is_inaccessible(error) and Entry(group, row) in self.found.retried):  # which is no news
                    self.watch.note(error, is_fault=is_fault)
        self.results.append(result)
        try:
            self.watch.check()
        except FeaturemapsError as failure:
            self._fail(failure)

    # -- the ledger ------------------------------------------------------------------------------------------------------------

    def _commit(self, *, last: bool = False) -> None:
        """Write what finished batches reported; what they say of access waits until the source has shown that it can be read."""
        is_held = self.watch.is_undecided and not last
        held: list[tasks.BatchResult] = []
        results: list[tasks.BatchResult] = []
        for result in self.results:
            (held if is_held and has_inaccessible(result.pieces) else results).append(result)
        if not results:
            return
        self.results = held
        try:
            pieces = [piece for result in results for piece in result.pieces]
            self.ledger.commit(pieces, source_failed=self.watch.failed)
        except OSError as error:
            self._fail(explain(error, None, self.store.path))
            return
        for result in results:
            self._account(result)

    def _account(self, result: tasks.BatchResult) -> None:
        summary = self.summary
        n_done = 0
        for piece in result.pieces:
            n_done += int((piece.status == Status.DONE).sum())
            n_quarantined = int((piece.status == Status.QUARANTINED).sum())
            summary.n_quarantined += n_quarantined
            self.progress.n_quarantined += n_quarantined
            self.progress.n_finished += n_quarantined
            faults = [piece.error[i] for i in np.flatnonzero(piece.status == Status.PENDING)]
            summary.n_pending += len(faults)
            summary.faults = (summary.faults + faults)[:20]
        summary.n_done += n_done
        self.progress.n_finished += n_done
        if n_done:
            summary.hosts[result.host] = summary.hosts.get(result.host, 0) + n_done
            summary.kernels[result.kernel] = summary.kernels.get(result.kernel, 0) + n_done
        summary.pixels += result.pixels
        summary.bytes_read += result.bytes_read
        summary.bytes_written += result.bytes_written
        for stage, seconds in result.stage_s.items():
            summary.stage_s[stage] += seconds

    def _end(self) -> None:
        """Commit the rest and say how the run ended."""
        self._commit(last=True)
        self.notify(self.progress)
        if self.failure is not None:
            raise self.failure
        if self._has_lost_workers():
            require_lock(self.store.path / RUNS, self.summary.run_id)
            self.store.repair()  # what the workers that were lost left
        unsent = sum(map(len, self.image_of.values())) + sum(trial.n_images for trial in self.trials)
        unprobed = len(self.found.new) - min(self.next_append * PROBE_BLOCK, len(self.found.new)) + len(self.buffer)
        self.summary.n_pending += unsent + unprobed
        if self.stop.is_set() and self.summary.n_pending:
            self.summary.outcome = "stopped"
        else:
            self.summary.outcome = "incomplete" if self.summary.n_pending else "complete"

    def _has_lost_workers(self) -> bool:
        try:
            return not self.addresses <= set(worker_slots(self.client))
        except (OSError, FeaturemapsError):
            return True
