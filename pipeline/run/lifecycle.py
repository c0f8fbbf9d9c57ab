"""A run from listing to receipt: list, lock, compare with the store, compute what is missing, write the receipt."""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

from pipeline.config import Job
from pipeline.errors import StoppedError
from pipeline.extract import kernel
from pipeline.run.comparison import apply, compare_with_store
from pipeline.run.context import Context
from pipeline.run.plan.changes import Changes, check_removals
from pipeline.run.summary import Progress, Summary, receipt, working
from pipeline.source.decoding import decode_versions
from pipeline.store.contents import count_statuses
from pipeline.store.create import check_job, create_store, list_job, open_for, prepare_folder
from pipeline.store.lock import StoreLock, last_holder, require_lock
from pipeline.store.lock_owner import LOCK_NAME, Holder
from pipeline.store.objects import Place, fetch, place
from pipeline.store.opening import read_spec
from pipeline.store.receipts import last_work, receipt_ids, write_receipt
from pipeline.store.run_ids import new_run_id, next_number
from pipeline.store.schema import RUNS, StoreSpec, narrowed
from pipeline.store.settings import VERSION

logger = logging.getLogger(__name__)

Connect = Callable[[threading.Event, Callable[[str], None], int], AbstractContextManager[Any]]


def run_job(
    job: Job,
    connect: Connect,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Bring a store up to date with its source. `api.run_job` says what it returns and raises; Ctrl-C is not handled here.

    Parameters
    ----------
    job : Job
    connect : callable
        Returns a context manager that yields a ``distributed.Client``. Called only if there is work, with ``stop``, with a callable
        that takes a text about the workers that are waited for, and with the number of images that have work.
    on_progress, stop
        Same as for `api.run_job`.
    """
    path = place(job.store).absolute()
    progress = Progress()
    notify = _unfailing(on_progress) if on_progress else (lambda _: None)
    notify(progress)
    summary = Summary("", started=_now(), config=job.model_dump(mode="json"), versions=_versions())
    try:
        listing = list_job(job)
        spec, weights = check_job(job, listing)
    except Exception as error:
        summary.elapsed_s, summary.ended = time.monotonic() - progress.began_s, _now()
        _leave_refusal(path, summary, error, job)
        raise
    durable = job.durability == "machine"
    prepare_folder(path, durable=durable)
    summary.n_listed = len(listing)
    summary.ignored, summary.excluded = dict(listing.ignored), dict(listing.excluded)
    summary.unreadable_folders = list(listing.unreadable[:100])
    with _numbered(path, summary, sole_writer=job.sole_writer) as took_over, working(str(path), summary, progress):
        store = open_for(path, spec) or create_store(path, spec, weights, durable=durable)
        store.durable = durable
        store.fence = partial(require_lock, path / RUNS, summary.run_id)
        previous = last_work(path)
        summary.dropped_total = dict(previous.get("dropped_total") or {})
        if took_over or previous.get("outcome") != "complete":
            store.repair()
        try:
            found = compare_with_store(job, store, listing)
            summary.n_left = _n_left(previous, found)
            _work(Context(job, store, listing, found, summary, progress, notify, stop or threading.Event()), spec, connect)
        except KeyboardInterrupt:
            summary.outcome = "stopped"
            raise
        except BaseException as error:
            summary.note_failure(error)
            raise
        finally:
            summary.elapsed_s, summary.ended = time.monotonic() - progress.began_s, _now()
            # A full disk was reported already.
            with contextlib.suppress(*([OSError] if summary.outcome == "failed" else [])):
                store.write_receipt(summary.run_id, receipt(summary))
    return summary


def _n_left(previous: Mapping[str, Any], found: Changes) -> int:
    """New images that the previous run had listed, but did not enter into the store, because it ended early."""
    if previous.get("outcome", "complete") == "complete":
        return 0
    return max(0, min(len(found.new) - len(found.replaces), int(previous.get("n_listed") or 0) - found.n_live))


def _leave_refusal(path: Place, summary: Summary, error: Exception, job: Job) -> None:
    """Leave a receipt of a run whose source cannot be listed or whose settings do not fit, if the store is of this format and free."""
    summary.note_failure(error)
    summary.is_refusal = True
    with contextlib.suppress(Exception):  # whatever else is wrong: the user is told why the run was refused
        read_spec(path)  # raises if there is no store, or one of another format
        content, _ = fetch(path / RUNS / LOCK_NAME)
        holder = None if content is None else Holder.parse(content)
        if holder is not None and not holder.is_dead():
            return  # a refusal neither waits for a lock nor takes one over
        with _numbered(path, summary, sole_writer=job.sole_writer):
            last = last_work(path)
            summary.dropped_total, summary.n_listed = dict(last.get("dropped_total") or {}), int(last.get("n_listed") or 0)
            write_receipt(path, summary.run_id, receipt(summary), durable=job.durability == "machine")


def _unfailing(on_progress: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Wrap ``on_progress``: after an OSError it is not called again, because the error says nothing about the store."""
    is_broken = False

    def notify(progress: Progress) -> None:
        nonlocal is_broken
        if is_broken:
            return
        try:
            on_progress(progress)
        except OSError as error:
            is_broken = True
            logger.warning("on_progress failed, and is not called again (%s); the run goes on", error)

    return notify


@contextlib.contextmanager
def _numbered(path: Place, summary: Summary, *, sole_writer: bool) -> Iterator[bool]:
    """Lock the store for a run with the highest number so far; yield whether the lock was taken over from a run that died."""
    took_over = False
    while True:
        number = next_number([*receipt_ids(path), last_holder(path / RUNS)])
        summary.run_id, summary.number = new_run_id(number, datetime.now(UTC)), number
        with StoreLock(path / RUNS, summary.run_id, sole_writer=sole_writer) as lock:
            took_over |= lock.took_over
            if number >= next_number(receipt_ids(path)):  # else another run came and went before this one had the lock
                yield took_over
                return


def _work(context: Context, spec: StoreSpec, connect: Connect) -> None:
    """Apply what the listing says, and send the work, if any, to the cluster."""
    store, found, summary, progress = context.store, context.found, context.summary, context.progress
    check_removals(found, context.job.max_removed)
    if found.has_work:
        store.write_receipt(
            summary.run_id, receipt(summary)
        )  # with outcome "running": if this run dies, the next one repairs the store
    apply(store, found)
    summary.n_removed, summary.n_unreachable = found.n_removed, found.n_unreachable
    _account(context)
    all_checked, has_images = True, bool(found.new or found.n_pending or found.to_check)
    progress.stage = "starting workers" if has_images else "up to date"
    context.notify(progress)
    if has_images:
        for line in narrowed(store.spec, spec):
            logger.warning("%s; images that are done stay", line)
        store.take_up(spec)
        all_checked = _compute(context, connect)
    if summary.outcome in {"running", "complete"}:
        summary.outcome = "complete" if all_checked else "stopped" if context.stop.is_set() else "incomplete"
    counts = count_statuses(store)
    summary.n_bad_total, summary.n_done_total = counts["quarantined"] + counts["rejected"], counts["done"]


def _compute(context: Context, connect: Connect) -> bool:
    """Connect to the cluster and compute; return whether every image that had to be compared was compared."""
    from pipeline.run.admission import only_like_this  # noqa: PLC0415 (no Dask when there is nothing to do)
    from pipeline.run.content_check import check_digests  # noqa: PLC0415 (as above)
    from pipeline.run.driver import Driver  # noqa: PLC0415 (as above)
    from pipeline.run.failures import scheduler_lost  # noqa: PLC0415 (as above)
    from pipeline.run.metrics import beside_dask  # noqa: PLC0415 (as above)

    found, summary, progress = context.found, context.summary, context.progress
    all_checked, began_s = True, time.monotonic()

    def on_wait(text: str) -> None:
        progress.stage = f"waiting for workers ({text})"
        context.notify(progress)

    n_images = len(found.new) + found.n_pending + found.n_to_check
    try:
        _require_no_stop(context)
        with beside_dask(), connect(context.stop, on_wait, n_images) as client:
            summary.start_s = time.monotonic() - began_s
            progress.dashboard = getattr(client.cluster, "dashboard", "")
            with only_like_this(client):
                all_checked = check_digests(context, client)
                _account(context)
                if found.new or found.n_pending:
                    _require_no_stop(context)
                    Driver(context, client).run()
    except ConnectionError as error:
        raise scheduler_lost(error) from error
    except StoppedError as error:
        logger.warning("%s", error)
        summary.outcome, summary.n_pending = "stopped", len(found.new) + found.n_pending
    return all_checked


def _require_no_stop(context: Context) -> None:
    if context.stop.is_set():
        raise StoppedError("stopped before the first image was computed: nothing is lost; run again to go on")


def _account(context: Context) -> None:
    found, summary, progress = context.found, context.summary, context.progress
    summary.n_unchanged, summary.n_new = found.n_unchanged, len(found.new)
    summary.n_returned = sum(map(len, found.returned.values()))
    progress.n_total = len(context.listing)
    progress.n_start = progress.n_finished = progress.n_total - len(found.new) - found.n_pending


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("dask", "distributed", "numpy", "torch", "zarr")} | {"kernel": kernel.version()}
    return {"featuremaps": VERSION, "python": platform.python_version(), **packages, **decode_versions()}
