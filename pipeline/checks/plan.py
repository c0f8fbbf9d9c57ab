"""What a run would do; changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checks.user_script import require_guard
from pipeline.cluster.connection import check_cluster
from pipeline.cluster.local import local_workers
from pipeline.cluster.session import cluster_of
from pipeline.cluster.slots import planned_slots
from pipeline.cluster.spec import ClusterSpec
from pipeline.config import Job
from pipeline.errors import EXIT_COMPLETE
from pipeline.run.comparison import compare_with_store, settle_returned
from pipeline.run.forecast import Forecast, end_of_run
from pipeline.run.plan.changes import Changes, check_removals
from pipeline.run.plan.memory import WorkerKind, bucket_bytes, guess_decode_bytes, usable_bytes, worker_memory_bytes
from pipeline.run.summary import MAX_BAD, SAID_S
from pipeline.run.workers import judge
from pipeline.source.dropped import describe_dropped
from pipeline.source.fetch import Probed, Source, probe_block
from pipeline.source.fingerprints import Listing
from pipeline.store.create import check_job, list_job, open_for
from pipeline.store.layout import (
    ClassLayout,
    Size,
    assign_classes,
    class_name,
    cut_pieces,
    pack_batches,
)
from pipeline.store.lock import current_holder
from pipeline.store.objects import free_bytes, place
from pipeline.store.receipts import each_receipt
from pipeline.store.schema import ShapeClass
from pipeline.store.settings import cost_s, layout_of, needed_size, scratch_of
from pipeline.store.store import Store
from pipeline.text import bad_lines, count, human_size, left_out, skipped

BLOCK = 2048
INLINE = 4 * BLOCK
DOES_NOT_FIT = " -- DOES NOT FIT"
START_S = 5.0
"""Rough time on two AVX2 cores without other load: each worker imports Dask and, for more than one layer, PyTorch."""
N_RECEIPTS = 50
"""Receipts among which the last run that started workers is looked for."""


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
    """Images that would be read and compared with their digests; images that differ are computed too."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Images to reject per code."""
    bad: list[dict[str, str]] = field(default_factory=list)
    """The first of these images: path and error."""
    classes: dict[str, int] = field(default_factory=dict)
    """Images to compute per shape class."""
    n_new_classes: int = 0
    n_shards: int = 0
    n_batches: int = 0
    work_s: float = 0.0
    """Rough estimate in seconds of one core."""
    start_s: float | None = None
    """Time to start the workers: that of the last run, else a rough guess; None if unknown, or if no workers are needed."""
    maps_bytes: int = 0
    """Upper bound: uncompressed."""
    free_bytes: int | None = 0
    worker_memory_bytes: int = 0
    worker_limit_bytes: int = 0
    """Memory that one worker on this machine may use under its limit; 0 for other clusters."""
    workers: int = 0

    ignored: dict[str, int] = field(default_factory=dict)
    """Files without an image suffix: number per suffix."""
    excluded: dict[str, int] = field(default_factory=dict)
    """Folders and files that are left out: number per pattern."""
    exit_code: int = EXIT_COMPLETE
    """Predicted exit code of the run; ``plan`` ends with the same."""
    verdict: str = ""
    """Why, for a person."""
    dropped: dict[str, int] = field(default_factory=dict)
    """New images of which a part would be dropped, per code of `dropped.dropped`."""

    @property
    def fits(self) -> bool:
        """Whether disk and memory are large enough; `run` refuses if not."""
        return self.fits_disk and self.fits_memory

    @property
    def fits_disk(self) -> bool:
        """Whether the disk holds the maps, even if they do not compress at all."""
        return self.free_bytes is None or self.maps_bytes <= self.free_bytes

    @property
    def fits_memory(self) -> bool:
        """Whether a worker's memory is large enough, if its limit is known."""
        return not 0 < self.worker_limit_bytes < self.worker_memory_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def describe(self) -> str:
        """For a person."""
        lines = [*self._describe_work(), *self._describe_size()]
        if self.n_to_check:
            lines.append(
                f"{count(self.n_to_check, 'image')} to read and compare with their digests; those that differ are computed too"
            )
        if self.reasons:
            lines.append("to reject: " + ", ".join(f"{n} {code}" for code, n in self.reasons.items()))
            lines += bad_lines(self.bad, self.n_to_reject)
        lines += describe_dropped(self.dropped)
        if self.ignored:
            lines.append(skipped(self.ignored))
        if self.excluded:
            lines.append(left_out(self.excluded))
        if self.n_faults:
            lines.append(f"{count(self.n_faults, 'image')} could not be reached now; a run would try them again")
        lines.append(f"a run would end with exit code {self.exit_code}: {self.verdict}")
        return "\n".join(lines)

    def _describe_work(self) -> list[str]:
        """Images, classes and batches."""
        largest = sorted(self.classes.items(), key=lambda item: -item[1])
        listed = ", ".join(f"{name} ({n})" for name, n in largest[:5]) + (", ..." if len(largest) > 5 else "")
        return [
            (
                f"{count(self.n_listed, 'image')} listed: {self.n_to_compute} to compute, {self.n_unchanged} unchanged, "
                f"{self.n_to_reject} to reject, {self.n_removed} to mark removed"
                + (f", {self.n_returned} back" if self.n_returned else "")
            ),
            f"{count(len(self.classes), 'shape class', 'shape classes')} ({self.n_new_classes} new): {listed or 'none'}",
            f"shards: {self.n_shards}, batches: {self.n_batches}, workers: {self.workers}"
            + (f"; roughly {max(1, self.work_s):.0f} s of one core" if self.n_batches else "")
            + (f", and {max(1, self.start_s):.0f} s to start workers" if self.start_s is not None else ""),
        ]

    def _describe_size(self) -> list[str]:
        """Disk and memory."""
        room = "in a bucket" if self.free_bytes is None else f"{human_size(self.free_bytes)} free"
        limit = f" of {self.worker_limit_bytes / 2**20:.0f} MiB" if self.worker_limit_bytes else ""
        return [
            f"maps up to {human_size(self.maps_bytes)} before compression, {room}{'' if self.fits_disk else DOES_NOT_FIT}",
            f"up to {self.worker_memory_bytes / 2**20:.0f} MiB per worker{limit}{'' if self.fits_memory else DOES_NOT_FIT}",
        ]


def plan_job(job: Job, cluster_file: Path = Path("cluster.yaml")) -> Preview:
    """Predict what `run_job` would do with a job, by listing and probing; nothing is written.

    Raises
    ------
    UsageError
        When a run would be refused: settings, store or cluster do not fit, or too many images are gone.
    """
    listing = list_job(job)
    cluster = check_cluster(job, cluster_file)
    spec, _ = check_job(job, listing)
    path = place(job.store)
    store = open_for(path, spec)
    found = compare_with_store(job, store, listing)
    holder = current_holder(path.absolute())
    if holder is None:
        check_removals(found, job.max_removed)  # a run does this once it holds the store
    preview = Preview(len(listing), found.n_unchanged, n_removed=found.n_removed, ignored=dict(listing.ignored))
    preview.excluded = dict(listing.excluded)
    cluster = cluster or cluster_of(job, cluster_file)
    kind = _look_at_workers(preview, job, cluster)
    kind = kind._replace(bucket_bytes=bucket_bytes(listing.root, path))
    n_pending = found.n_pending
    if store is not None:
        settle_returned(store, found)
    preview.n_returned = sum(map(len, found.returned.values())) - (found.n_pending - n_pending)
    preview.n_to_check = found.n_to_check
    preview.free_bytes = free_bytes(path.absolute())

    forecast = Forecast(store, listing, found)
    work = _pending(store, listing, found)
    _take_new(preview, work, job, forecast)
    _fill(preview, work, job, kind)
    if found.new or found.n_pending or found.n_to_check:
        preview.start_s = _start_s(store, is_here=cluster.is_here)
    preview.exit_code, preview.verdict = end_of_run(
        forecast,
        holder=holder,
        fits_memory=preview.fits_memory or not preview.n_to_compute,
        fits_disk=preview.fits_disk,
        max_quarantined=job.max_quarantined,
    )
    return preview


@dataclass(slots=True)
class _Work:
    """What is to compute."""

    existing: Mapping[Size, ShapeClass]
    """Classes that the store already has."""
    pending: dict[Size, list[int]]
    """Rows of these that wait."""
    decode_bytes: int
    """Memory to decode the largest of the images."""
    new: Mapping[Size, int] = field(default_factory=dict)
    """New images, per class."""


def _look_at_workers(preview: Preview, job: Job, cluster: ClusterSpec) -> WorkerKind:
    """Set the number of workers and their memory limit; return what their memory need depends on."""
    slots = planned_slots(cluster)
    preview.workers = sum(worker.extract for worker in slots) or local_workers(job.workers)
    if not slots:
        return WorkerKind(1)
    needs = judge(slots)
    preview.worker_limit_bytes = usable_bytes(needs.memory_limit_bytes)
    return needs.kind


def _start_s(store: Store | None, *, is_here: bool) -> float | None:
    """Time that the last run that started workers needed for it, else a guess; for workers elsewhere, which may queue, no guess."""
    receipts = islice(each_receipt(store.path), N_RECEIPTS) if store is not None else ()
    known_s = (float(receipt.get("start_s") or 0.0) for receipt in receipts)
    return next((seconds for seconds in known_s if seconds >= SAID_S), START_S if is_here else None)


def _pending(store: Store | None, listing: Listing, found: Changes) -> _Work:
    """The rows that wait."""
    existing = {} if store is None else store.classes
    pending = {size: found.pending[c.name] for size, c in existing.items() if found.pending.get(c.name)}
    largest = (guess_decode_bytes(size, max(listing.size_bytes[i] for _, i in rows)) for size, rows in pending.items())
    return _Work(existing, {size: [row for row, _ in rows] for size, rows in pending.items()}, max(largest, default=0))


def _take_new(preview: Preview, work: _Work, job: Job, forecast: Forecast) -> None:
    """Probe the images that are new to the store, and note what a run would make of them."""
    listing, found = forecast.listing, forecast.found
    sizes: list[Size] = []
    reasons: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    for i, probed in zip(found.new, _probe_all(job, listing, found.new, local_workers(None)), strict=True):
        p = forecast.take(i, probed)
        if p.error:
            reasons[p.error.split(":", 1)[0]] += 1
            if len(preview.bad) < MAX_BAD:
                preview.bad.append({"path": listing.paths[i], "error": p.error})
        elif not p.fault:
            sizes.append((p.input_height, p.input_width))
            work.decode_bytes = max(work.decode_bytes, p.decode_bytes)
            dropped.update(p.dropped)
    work.new = Counter(assign_classes(sizes, work.existing))
    preview.dropped = dict(dropped)
    preview.reasons, preview.n_to_reject, preview.n_faults = dict(reasons), sum(reasons.values()), forecast.n_faults


def _probe_all(job: Job, listing: Listing, images: Sequence[int], workers: int) -> Iterator[Probed]:
    """Probe in this process, or with one process per core if that pays."""
    source, needed = Source(listing.root, job.decode), needed_size(job.extractor)
    blocks = ([listing.paths[i] for i in images[start : start + BLOCK]] for start in range(0, len(images), BLOCK))
    if len(images) <= INLINE or workers == 1:
        for block in blocks:
            yield from probe_block(source, block, needed)
        return
    require_guard("plan_job")
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        waiting = []
        for block in blocks:  # Executor.map would take all blocks at once
            waiting.append(pool.submit(probe_block, source, block, needed))
            if len(waiting) > 2 * workers:
                yield from waiting.pop(0).result()
        for future in waiting:
            yield from future.result()


def _fill(preview: Preview, work: _Work, job: Job, worker: WorkerKind) -> None:
    """Cut the rows of each class into batches, as a run would."""
    layouts: dict[Size, ClassLayout] = {}
    pieces = []
    channels = job.decode.channels
    for size in work.pending.keys() | work.new.keys():
        known = work.existing.get(size)
        length = known.length if known else 0
        n_rows = length + work.new.get(size, 0)
        rows = [*work.pending[size], *range(length, n_rows)] if size in work.pending else range(length, n_rows)
        layout = known.layout if known else layout_of(size, job.extractor, np.dtype(job.dtype).itemsize, channels)
        layouts[size] = layout
        image_s = cost_s(job.extractor, layout, channels)
        pieces += cut_pieces(layout, rows, n_rows, image_s, channels)[0]
        preview.work_s += len(rows) * image_s
        preview.maps_bytes += len(rows) * layout.row_bytes
        preview.classes[class_name(size)] = len(rows)
    preview.n_to_compute = sum(preview.classes.values())
    preview.n_new_classes = len(layouts.keys() - work.existing.keys())
    preview.n_shards = len(pieces)
    preview.n_batches = len(pack_batches(pieces, preview.workers))
    scratch = {size: scratch_of(job.extractor, job.dtype, size, channels) for size in layouts}
    preview.worker_memory_bytes = worker_memory_bytes(layouts.values(), channels, worker, work.decode_bytes, scratch)
