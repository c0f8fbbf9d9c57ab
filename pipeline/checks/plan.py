"""What a run would do, and how far a store is; both only look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cluster.batch_commands import QueuedJob
from pipeline.cluster.connection import check_cluster
from pipeline.cluster.local import local_workers
from pipeline.cluster.session import cluster_of
from pipeline.cluster.slots import planned_slots
from pipeline.cluster.submit.record import GONE, last_submission
from pipeline.config import Job
from pipeline.errors import EXIT_COMPLETE, UsageError
from pipeline.run.comparison import compare_with_store, settle_returned
from pipeline.run.forecast import Forecast, end_of_run
from pipeline.run.plan.changes import check_removals
from pipeline.run.plan.memory import WorkerKind, bucket_bytes, guess_decode_bytes, usable_bytes, worker_memory_bytes
from pipeline.run.summary import MAX_BAD
from pipeline.run.summary_text import describe_bottleneck
from pipeline.run.workers import judge
from pipeline.source.dropped import describe_dropped
from pipeline.source.fetch import Probed, Source, probe_block
from pipeline.source.fingerprints import Listing
from pipeline.source.listing import list_collection
from pipeline.store.counts import count_statuses
from pipeline.store.create import check_job, open_for
from pipeline.store.layout import (
    ClassLayout,
    Size,
    assign_classes,
    class_name,
    cut_pieces,
    pack_batches,
)
from pipeline.store.lock import current_holder, last_heard
from pipeline.store.objects import Place, free_bytes, place
from pipeline.store.schema import REJECTED, ShapeClass, Status
from pipeline.store.settings import cost_s, layout_of, needed_size, scratch_bytes
from pipeline.store.store import Store, is_store
from pipeline.text import count, printable

BLOCK = 2048
INLINE = 4 * BLOCK


@dataclass(slots=True)
class Preview:
    """What `run` would do."""

    n_listed: int = 0
    n_unchanged: int = 0
    n_to_compute: int = 0
    n_to_reject: int = 0
    n_faults: int = 0
    n_removed: int = 0
    n_returned: int = 0
    """Removed images that are back unchanged."""
    n_to_check: int = 0
    """Images that would be read and compared with their digests; those that differ are computed too."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Images to reject per code."""
    bad: list[dict[str, str]] = field(default_factory=list)
    """The first of them: path and error."""
    classes: dict[str, int] = field(default_factory=dict)
    """Images to compute per shape class."""
    n_new_classes: int = 0
    n_shards: int = 0
    n_batches: int = 0
    work_s: float = 0.0
    """Rough estimate for one core."""
    maps_bytes: int = 0
    """Upper bound: uncompressed."""
    free_bytes: int | None = 0
    worker_memory_bytes: int = 0
    worker_limit_bytes: int = 0
    """What one worker on this machine may take of its memory limit; 0 where the cluster is another."""
    workers: int = 0

    ignored: dict[str, int] = field(default_factory=dict)
    """Files that are no images by their name: number per suffix."""
    exit_code: int = EXIT_COMPLETE
    """What a run would end with, as far as can be known before it starts; ``plan`` ends with the same."""
    verdict: str = ""
    """Why, for a person."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Images to enter of which something would be dropped, per code of `dropped.dropped`."""

    @property
    def fits(self) -> bool:
        """Whether disk and memory hold it; `run` refuses what they do not."""
        return self.fits_disk and self.fits_memory

    @property
    def fits_disk(self) -> bool:
        """Whether the disk holds the maps, should they not compress at all."""
        return self.free_bytes is None or self.maps_bytes <= self.free_bytes

    @property
    def fits_memory(self) -> bool:
        """Whether a worker holds it, where its limit is known."""
        return not 0 < self.worker_limit_bytes < self.worker_memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """For a person."""
        largest = sorted(self.classes.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} ({n})" for name, n in largest[:5]) + (", ..." if len(largest) > 5 else "")
        lines = [
            (
                f"{count(self.n_listed, 'image')} listed: {self.n_to_compute} to compute, {self.n_unchanged} unchanged, "
                f"{self.n_to_reject} to reject, {self.n_removed} to mark removed"
                + (f", {self.n_returned} back" if self.n_returned else "")
            ),
            f"{count(len(self.classes), 'shape class', 'shape classes')} ({self.n_new_classes} new): {listed or 'none'}",
            f"shards: {self.n_shards}, batches: {self.n_batches}, workers: {self.workers}; roughly {max(1, self.work_s):.0f} s of one core",
            f"maps up to {self.maps_bytes / 1e6:,.0f} MB before compression, "
            + ("in a bucket" if self.free_bytes is None else f"{self.free_bytes / 1e6:,.0f} MB free")
            + ("" if self.fits_disk else " -- DOES NOT FIT"),
            f"up to {self.worker_memory_bytes / 2**20:.0f} MiB per worker"
            + (f" of {self.worker_limit_bytes / 2**20:.0f} MiB" if self.worker_limit_bytes else "")
            + ("" if self.fits_memory else " -- DOES NOT FIT"),
        ]
        if self.n_to_check:
            lines.append(
                f"{count(self.n_to_check, 'image')} to read and compare with their digests; those that differ are computed too"
            )
        if self.reasons:
            lines.append("to reject: " + ", ".join(f"{n} {code}" for code, n in self.reasons.items()))
            lines += [f"  {printable(item['path'])}  {printable(item['error'])}" for item in self.bad]
            n_more = self.n_to_reject - len(self.bad)
            lines += [f"  and {n_more} more"] if n_more else []
        lines += describe_dropped(self.dropped)
        if self.ignored:
            lines.append(
                f"{count(sum(self.ignored.values()), 'other file')} passed over, by their suffix: {', '.join(map(printable, self.ignored))}"
            )
        if self.n_faults:
            lines.append(f"{count(self.n_faults, 'image')} could not be reached just now and would be tried again")
        lines.append(f"a run would end with exit code {self.exit_code}: {self.verdict}")
        return "\n".join(lines)


def plan_job(job: Job, cluster_file: Path = Path("cluster.yaml")) -> Preview:
    """Say what `run_job` would do with a job, by listing and probing but writing nothing.

    Raises
    ------
    UsageError
        As `run_job`.
    """
    listing = list_collection(job.source)
    if job.limit is not None:
        listing = listing.limit(job.limit)
    check_cluster(job, cluster_file)
    spec, _ = check_job(job, listing)
    store = open_for(place(job.store), spec)
    found = compare_with_store(job, store, listing)
    holder = current_holder(place(job.store).absolute())
    if holder is None:
        check_removals(found, job.max_removed)  # which a run does once it holds the store
    slots = planned_slots(cluster_of(job, cluster_file))
    needs = judge(slots) if slots else None
    workers = sum(worker.extract for worker in slots) or local_workers(job.workers)
    preview = Preview(len(listing), found.n_unchanged, n_removed=found.n_removed, workers=workers)
    preview.ignored = dict(listing.ignored)
    if needs is not None:
        preview.worker_limit_bytes = usable_bytes(needs.memory_limit_bytes)
    n_pending = found.n_pending
    if store is not None:
        settle_returned(store, found)
    preview.n_returned = sum(map(len, found.returned.values())) - (found.n_pending - n_pending)
    preview.n_to_check = found.n_to_check
    preview.free_bytes = free_bytes(place(job.store).absolute())

    existing = {} if store is None else store.classes
    pending = {size: [row for row, _ in found.pending.get(c.name, ())] for size, c in existing.items()}
    sizes: list[Size] = []
    decode_bytes = max(
        (
            guess_decode_bytes(size, max(listing.size_bytes[i] for _, i in found.pending[c.name]))
            for size, c in existing.items()
            if found.pending.get(c.name)
        ),
        default=0,
    )
    reasons: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    forecast = Forecast(store, listing, found)
    for i, probed in zip(found.new, _probe_all(job, listing, found.new, local_workers(None)), strict=True):
        p = forecast.take(i, probed)
        if p.error:
            reasons[p.error.split(":", 1)[0]] += 1
            if len(preview.bad) < MAX_BAD:
                preview.bad.append({"path": listing.paths[i], "error": p.error})
        elif not p.fault:
            sizes.append((p.input_height, p.input_width))
            decode_bytes = max(decode_bytes, p.decode_bytes)
            dropped.update(p.dropped)
    new = Counter(assign_classes(sizes, existing))
    pending = {size: rows for size, rows in pending.items() if rows}
    kind = WorkerKind(1) if needs is None else needs.kind
    kind = kind._replace(bucket_bytes=bucket_bytes(listing.root, place(job.store)))
    _fill(
        preview,
        job,
        existing,
        pending,
        new,
        kind,
        decode_bytes,
    )
    preview.dropped = dict(dropped)
    preview.reasons, preview.n_to_reject, preview.n_faults = dict(reasons), sum(reasons.values()), forecast.n_faults
    preview.exit_code, preview.verdict = end_of_run(
        forecast,
        holder=holder,
        fits_memory=preview.fits_memory or not preview.n_to_compute,
        fits_disk=preview.fits_disk,
        max_quarantined=job.max_quarantined,
    )
    return preview


def _probe_all(job: Job, listing: Listing, images: Sequence[int], workers: int) -> Iterator[Probed]:
    """Probe here, or with one process per core where that pays."""
    source, needed = Source(listing.root, job.decode), needed_size(job.extractor)
    blocks = ([listing.paths[i] for i in images[start : start + BLOCK]] for start in range(0, len(images), BLOCK))
    if len(images) <= INLINE or workers == 1:
        for block in blocks:
            yield from probe_block(source, block, needed)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        waiting = []
        for block in blocks:  # Executor.map would take all blocks at once
            waiting.append(pool.submit(probe_block, source, block, needed))
            if len(waiting) > 2 * workers:
                yield from waiting.pop(0).result()
        for future in waiting:
            yield from future.result()


def _fill(
    preview: Preview,
    job: Job,
    existing: Mapping[Size, ShapeClass],
    pending: dict[Size, list[int]],
    new: Mapping[Size, int],
    worker: WorkerKind,
    decode_bytes: int,
) -> None:
    """Cut the rows of each class as a run would."""
    layouts: dict[Size, ClassLayout] = {}
    pieces = []
    channels = job.decode.channels
    for size in pending.keys() | new.keys():
        known = existing.get(size)
        length = known.length if known else 0
        n_rows = length + new.get(size, 0)
        rows = [*pending[size], *range(length, n_rows)] if size in pending else range(length, n_rows)
        layout = known.layout if known else layout_of(size, job.extractor, np.dtype(job.dtype).itemsize, channels)
        layouts[size] = layout
        image_s = cost_s(job.extractor, layout, channels)
        pieces += cut_pieces(layout, rows, n_rows, image_s, channels)[0]
        preview.work_s += len(rows) * image_s
        preview.maps_bytes += len(rows) * layout.row_bytes
        preview.classes[class_name(size)] = len(rows)
    preview.n_to_compute = sum(preview.classes.values())
    preview.n_new_classes = len(layouts.keys() - existing.keys())
    preview.n_shards = len(pieces)
    preview.n_batches = len(pack_batches(pieces, preview.workers))
    scratch = {size: scratch_bytes(job.extractor, job.dtype, size, channels) for size in layouts}
    preview.worker_memory_bytes = worker_memory_bytes(layouts.values(), channels, worker, decode_bytes, scratch)


@dataclass(slots=True)
class StoreStatus:
    """How far a store is."""

    store: str
    source: str
    dtype: str
    has_maps: bool
    """False where only pooled values are kept."""
    n_classes: int
    counts: dict[str, int]
    bad: list[dict[str, str]]
    """The first quarantined and rejected images: path and error."""
    holder: dict[str, Any] | None
    """Who works on it now, and ``silent_s``, the seconds since its last heartbeat, of which there is one every 10 s."""
    last_run: dict[str, Any] | None
    """The newest receipt; that of a run at work is written every 10 s."""
    submission: dict[str, Any] | None = None
    """What was handed to a batch system, with ``state`` in words and the ``jobs`` that work for the store."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Images that the runs have entered and of which something is dropped, per code of `dropped.dropped`."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"is_at_work": self.holder is not None, "left_s": self.left_s}

    @property
    def left_s(self) -> float | None:
        """Seconds until the run at work ends at its present pace."""
        run = self.last_run
        if not self.holder or not run or run["run_id"] != self.holder["run_id"] or not run["images_per_s"]:
            return None
        finished = sum(run[name] for name in ("n_unchanged", "n_returned", "n_done", "n_quarantined", "n_rejected"))
        return float((run["n_listed"] - finished) / run["images_per_s"])

    def describe(self) -> str:
        """For a person."""
        what = f"{self.dtype} maps" if self.has_maps else "pooled values"
        lines = [
            f"{self.store}: {count(self.n_classes, 'shape class', 'shape classes')} of {what} from {self.source}",
            ", ".join(f"{n} {name}" for name, n in self.counts.items()),
        ]
        if self.holder:
            left = f", about {self.left_s:.0f} s left" if self.left_s is not None else ""
            job = f" (job {self.holder['job_id']})" if self.holder["job_id"] else ""
            lines.append(
                f"run {self.holder['run_id']} works on it: process {self.holder['pid']} on {self.holder['host']}{job}, "
                f"{last_heard(self.holder['silent_s'] - self.holder['ahead_s'])}{left}"
            )
        if self.last_run:
            run = self.last_run
            is_dead = run["outcome"] == "running" and not self.holder
            did = any(run[f"n_{name}"] for name in ("new", "done", "quarantined", "rejected", "removed", "checked"))
            done = f"{run['n_done']} done" if did or run["outcome"] != "complete" else "there was nothing to do"
            outcome = "died before its end; the same command goes on" if is_dead else f"{run['outcome']}, {done}"
            lines.append(
                f"last run {run['run_id']}: {outcome}"
                + (f" at {run['images_per_s']:.1f} images/s" if run["n_done"] else "")
                + (f" on {count(run['slots'], 'slot')}" if run["n_done"] else "")
                + (
                    f", bottleneck {describe_bottleneck(run['bottleneck'])}"
                    if run["bottleneck"] and (run["n_done"] or run["n_checked"])
                    else ""
                )
                + (f" -- {run['message']}" if run["message"] else "")
            )
            if run["outcome"] in {"incomplete", "stopped"} and run["n_pending"]:
                faults = "; ".join(map(printable, run["faults"][:3]))
                lines.append(f"it left {count(run['n_pending'], 'image')} to the next run" + (f": {faults}" if faults else ""))
        if self.submission:
            known = self.submission
            lines.append(f"handed to {known['kind']} as job {known['job_id'] or '?'} on {known['submitted']}: {known['state']}")
            lines += [f"  {QueuedJob(**job)}" for job in known["jobs"] if job["job_id"] != known["job_id"]]
        lines += describe_dropped(self.dropped)
        lines += [f"  {printable(item['path'])}  {printable(item['error'])}" for item in self.bad]
        n_more = self.counts["quarantined"] + self.counts["rejected"] - len(self.bad)
        if n_more:
            lines.append(f"  and {count(n_more, 'more bad image')}: --quarantined N lists N")
        return "\n".join(lines)


def store_status(path: Place, n_bad: int = 20) -> StoreStatus:
    """Look at a store.

    Raises
    ------
    UsageError
        When there is no store.
    """
    submission = last_submission(path)
    if submission is not None and not is_store(path):
        state, _ = submission.look()
        remedy = (
            f"It ended before there was anything to show; {submission.job_name}-driver*, in log_folder of the cluster, says why: mend "
            "that and submit again"
            if state == GONE
            else "Wait until it has begun"
        )
        raise UsageError(
            f"store {path} does not exist yet; its run was handed to {submission.kind} as job {submission.job_id or '?'} on "
            f"{submission.submitted}: {state}. {remedy}"
        )
    state, jobs = ("", []) if submission is None else submission.look()
    store = Store(path)
    last = store.last_receipt()
    return StoreStatus(
        str(path),
        store.spec.source,
        store.spec.dtype,
        bool(store.spec.map_layers),
        len(store.classes),
        count_statuses(store),
        _bad_images(store, n_bad),
        current_holder(path),
        last,
        None if submission is None else asdict(submission) | {"state": state, "jobs": jobs},
        (last or {}).get("dropped_total") or {},
    )


def _bad_images(store: Store, n: int) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for group in [REJECTED, *(c.name for c in store.classes.values())]:
        if len(found) >= n:
            break
        bad = np.flatnonzero(store.column(group, "status") == Status.QUARANTINED)[: n - len(found)]
        if len(bad):
            path, error = store.column(group, "path"), store.column(group, "error")
            found += [{"path": path[row], "error": error[row]} for row in bad.tolist()]
    return found
