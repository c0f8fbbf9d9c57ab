"""The driver: compare the listing with the ledger, send batches within a window, commit what they did."""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from pipeline.config import Job
from pipeline.errors import StoppedError, UsageError
from pipeline.extract import kernel
from pipeline.extract.weights import load_weights
from pipeline.run.plan import changes as ledger_changes
from pipeline.run.plan.changes import Changes, Entries
from pipeline.run.summary import Progress, Summary, receipt, working
from pipeline.source.decoding import decode_versions
from pipeline.source.fingerprints import Listing
from pipeline.source.identity import is_same_folder, is_same_source
from pipeline.source.listing import list_collection, walks_into
from pipeline.store.codecs import Array
from pipeline.store.create import check_folder, create_store, prepare_folder
from pipeline.store.lock import StoreLock, last_holder, require_lock
from pipeline.store.objects import Place, place
from pipeline.store.run_ids import new_run_id, next_number
from pipeline.store.schema import REJECTED, RUNS, Status, StoreSpec, difference
from pipeline.store.settings import VERSION, needed_size, store_spec
from pipeline.store.store import Store, is_store, receipt_ids

logger = logging.getLogger(__name__)

Connect = Callable[[threading.Event, Callable[[str], None]], AbstractContextManager[Any]]


def run_job(
    job: Job,
    connect: Connect,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> Summary:
    """Bring a store up to date with its source: the first run, a resumed one and tonight's are the same call.

    Parameters
    ----------
    job : Job
    connect : callable
        Called only if there is work, with ``stop`` and with what takes words about the workers that are waited for; returns a
        context manager that yields a ``distributed.Client``.
    on_progress : callable, optional
        Called about every second with the `Progress`.
    stop : threading.Event, optional
        Once set, the run finishes what is in flight, commits it and ends as ``stopped``.

    Returns
    -------
    Summary
        Also left in the store as the run's receipt.

    Raises
    ------
    UsageError
        When source, settings or store do not fit; nothing was started.
    StoreBusyError
        When another run holds the store.
    FeaturemapsError
        When the run had to end early; what was committed stands and the same call goes on from there.
    """
    path = place(job.store).absolute()
    progress = Progress()
    notify = on_progress or (lambda _: None)
    notify(progress)
    listing = list_collection(job.source)
    if job.limit is not None:
        listing = listing.limit(job.limit)
    spec, weights = check_job(job, listing)
    durable = job.durability == "machine"
    prepare_folder(path, durable=durable)
    summary = Summary("", started=_now(), config=job.model_dump(mode="json"), versions=_versions(), n_listed=len(listing))
    summary.ignored = dict(listing.ignored)
    summary.unreadable_folders = list(listing.unreadable[:100])
    with _numbered(path, summary, sole_writer=job.sole_writer) as took_over, working(str(path), summary, progress):
        store = open_for(path, spec) or create_store(path, spec, weights, durable=durable)
        store.durable = durable
        store.fence = partial(require_lock, path / RUNS, summary.run_id)
        previous = store.last_receipt() or {}
        summary.dropped_total = dict(previous.get("dropped_total") or {})
        if took_over or previous.get("outcome") != "complete":
            store.repair()
        try:
            _work(job, store, listing, summary, progress, notify, connect, stop or threading.Event())
        except KeyboardInterrupt:
            summary.outcome = "stopped"
            raise
        except BaseException as error:
            summary.outcome, summary.message = "failed", f"{type(error).__name__}: {error}"
            raise
        finally:
            summary.elapsed_s, summary.ended = time.monotonic() - progress.began_s, _now()
            with contextlib.suppress(*([OSError] if summary.outcome == "failed" else [])):  # a full disk has been told of already
                store.write_receipt(summary.run_id, receipt(summary))
    return summary


@contextlib.contextmanager
def _numbered(path: Place, summary: Summary, *, sole_writer: bool) -> Iterator[bool]:
    """Hold the store for a run with the highest number of all; yields whether it was taken over from a run that died."""
    took_over = False
    while True:
        number = next_number([*receipt_ids(path), last_holder(path / RUNS)])
        summary.run_id, summary.number = new_run_id(number, datetime.now(UTC)), number
        with StoreLock(path / RUNS, summary.run_id, sole_writer=sole_writer) as lock:
            took_over |= lock.took_over
            if number >= next_number(receipt_ids(path)):  # else another run came and went before the lock was ours
                yield took_over
                return


def _work(
    job: Job,
    store: Store,
    listing: Listing,
    summary: Summary,
    progress: Progress,
    notify: Callable[[Progress], None],
    connect: Connect,
    stop: threading.Event,
) -> None:
    """Compare, and send what there is to do, if anything, to the cluster."""
    found = compare_with_store(job, store, listing)
    ledger_changes.check_removals(found, job.max_removed)
    if found.has_work:
        store.write_receipt(
            summary.run_id, receipt(summary)
        )  # whose outcome has the next run repair the store, should this one die
    _apply(store, found)
    summary.n_removed, summary.n_unreachable = found.n_removed, found.n_unreachable
    _account(found, listing, summary, progress)
    progress.stage = "starting workers"
    notify(progress)
    all_checked = True
    if found.new or found.n_pending or found.to_check:
        store.touch_version(VERSION)
        from pipeline.run.admission import only_like_this  # noqa: PLC0415 (no Dask when there is nothing to do)
        from pipeline.run.content_check import check_digests  # noqa: PLC0415 (as above)
        from pipeline.run.driver import Driver  # noqa: PLC0415 (as above)
        from pipeline.run.failures import scheduler_lost  # noqa: PLC0415 (as above)
        from pipeline.run.metrics import beside_dask  # noqa: PLC0415 (as above)

        def on_wait(text: str) -> None:
            progress.stage = f"waiting for workers ({text})"
            notify(progress)

        try:
            with beside_dask(), connect(stop, on_wait) as connected:
                progress.dashboard = getattr(connected.cluster, "dashboard", "")
                with only_like_this(connected):
                    all_checked = check_digests(store, listing, found, connected, summary, progress, notify, stop, job.deadline_s)
                    _account(found, listing, summary, progress)
                    if found.new or found.n_pending:
                        Driver(job, store, listing, found, connected, summary, progress, notify, stop).run()
        except ConnectionError as error:
            raise scheduler_lost(error) from error
        except StoppedError as error:
            logger.warning("%s", error)
            summary.outcome, summary.n_pending = "stopped", len(found.new) + found.n_pending
    if summary.outcome in {"running", "complete"}:
        summary.outcome = "complete" if all_checked else "stopped" if stop.is_set() else "incomplete"
    counts = count_statuses(store)
    summary.n_bad_total, summary.n_done_total = counts["quarantined"] + counts["rejected"], counts["done"]


def _account(found: Changes, listing: Listing, summary: Summary, progress: Progress) -> None:
    summary.n_unchanged, summary.n_new = found.n_unchanged, len(found.new)
    summary.n_returned = sum(map(len, found.returned.values()))
    progress.n_total, progress.n_start = len(listing), len(listing) - len(found.new) - found.n_pending
    progress.n_finished = progress.n_start


def check_job(job: Job, listing: Listing) -> tuple[StoreSpec, dict[str, Array]]:
    """Check settings and store against each other before anything is written; return the store's spec and the weights.

    Raises
    ------
    UsageError
        When they do not fit.
    """
    path = place(job.store).absolute()
    check_apart(path, job.source, listing.root)
    needed, resize = needed_size(job.extractor), job.decode.resize
    if resize and (resize[0] < needed[0] or resize[1] < needed[1]):
        raise UsageError(
            f"images resized to {resize[0]} x {resize[1]} pixels (height x width) leave no maps, because one value of these layers needs "
            f"{needed[0]} x {needed[1]}: nothing was started; resize to at least that, or change the layers"
        )
    weights = load_weights(job.extractor, job.decode.channels)
    spec = store_spec(job, listing.root, weights)
    check_folder(path)
    open_for(path, spec)
    return spec, weights


def check_apart(store: Place, source: str, root: str) -> None:
    """Refuse a store inside the folder that is walked; beside a list of paths it may be.

    Raises
    ------
    UsageError
    """
    if walks_into(source, root, str(store.resolve())):
        raise UsageError(
            f"store {store} lies inside the source {root}: the next listing would walk through the store's own files; nothing was "
            "started; put the store beside the source"
        )


def open_for(path: Place, spec: StoreSpec) -> Store | None:
    """Open an existing store if it was made with the same settings; None where there is none.

    Raises
    ------
    UsageError
        With a line for each setting that differs.
    """
    if not is_store(path):
        return None
    store = Store(path)
    if is_same_folder(store.spec.source_root, spec.source_root):
        spec = replace(spec, source_root=store.spec.source_root)  # through a link
    lines = difference(store.spec, spec)
    if lines:
        has_maps = any((store.column(c.name, "maps_digest") != "").any() for c in store.classes.values())
        raise UsageError(
            f"store {path} was made with other settings, and one store never mixes two: nothing was touched. What differs: "
            f"{'; '.join(lines)}. Run with the store's settings, or give another store"
            + ("" if has_maps else "; this one holds no maps, so it may as well be deleted")
        )
    return store


def compare_with_store(job: Job, store: Store | None, listing: Listing) -> Changes:
    """`changes.compare` for a store on disk; without one everything is new."""
    groups = [] if store is None else [*(c.name for c in store.classes.values()), REJECTED]
    entries = (_entries(store, group) for group in groups if store is not None)
    complete = listing.complete and (store is None or is_same_source(store.spec.source, job.source))
    return ledger_changes.compare(
        entries,
        listing.paths,
        listing.fingerprint,
        retry_quarantined=job.retry_quarantined,
        check_digests=job.check == "digest",
        complete=complete,
        unreadable=listing.unreadable,
    )


def _entries(store: Store, group: str) -> Entries:
    column = partial(store.column, group)
    return Entries(group, column("path"), column("fingerprint"), column("status"), partial(column, "error"))


def settle_returned(store: Store, found: Changes) -> None:
    """`Changes.settle_returned` for a store on disk."""
    found.settle_returned(lambda group: (store.column(group, "maps_digest"), store.column(group, "error")))


def _apply(store: Store, found: Changes) -> None:
    """Set the statuses that follow from the listing alone; returned rows are what their columns say they were."""
    settle_returned(store, found)
    for group, statuses in found.set_status.items():
        rows_array = np.array(sorted(statuses))
        store.commit(group, rows_array, {"status": np.array([statuses[row] for row in rows_array.tolist()], np.uint8)})


def count_statuses(store: Store) -> dict[str, int]:
    """Rows of each status over all classes, and live ``rejected`` entries."""
    counts = {status.name.lower(): 0 for status in Status}
    for shape_class in store.classes.values():
        values, numbers = np.unique(store.column(shape_class.name, "status"), return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[Status(value).name.lower()] += number
    counts["rejected"] = int((store.column(REJECTED, "status") < Status.REMOVED).sum())
    return counts


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("dask", "distributed", "numpy", "torch", "zarr")} | {"kernel": kernel.version()}
    return {"featuremaps": VERSION, "python": platform.python_version(), **packages, **decode_versions()}
