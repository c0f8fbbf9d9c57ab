"""What a run is doing and what it did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pipeline import errors
from pipeline.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_QUARANTINED, EXIT_RUN_AGAIN

STAGES = ("read", "decode", "extract", "write")
MAX_BAD = 20
"""Bad images that a summary names."""
WAITING = "waiting"
"""Time in which a slot had no batch: what waits for storage is in the stages, but for headers, which are read before there are batches."""


@dataclass(slots=True)
class Progress:
    """Where a run stands; the driver updates it, others look."""

    n_total: int = 0
    """Images of the listing."""
    n_finished: int = 0
    """Of those, done, quarantined or rejected, by this run or an earlier one."""
    n_start: int = 0
    """Of those, finished before this run."""
    n_quarantined: int = 0
    stage: str = "listing"
    dashboard: str = ""
    """Address of Dask's dashboard, where there is one."""
    last_commit_s: float = 0.0
    """When outcomes were last written to the ledger, in seconds since 1970; 0 for not yet."""
    began_s: float = field(default_factory=time.monotonic)
    """By the monotonic clock, which no step of the wall clock moves."""


@dataclass(slots=True)
class Summary:
    """What a run did; its receipt in ``runs/`` holds the same."""

    run_id: str
    number: int = 0
    """Orders the runs of a store, whatever their clocks said; 0 in receipts of versions before numbers."""
    outcome: str = "running"
    """running, complete, stopped, incomplete (passing faults left rows pending) or failed."""
    started: str = ""
    ended: str = ""
    updated: str = ""
    """When the receipt of a run at work was written."""
    elapsed_s: float = 0.0
    message: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, int] = field(default_factory=dict)
    """Images done per host."""
    n_listed: int = 0
    n_unchanged: int = 0
    n_new: int = 0
    n_changed: int = 0
    """Of these, images that have an entry already: their content is another, or they are tried again."""
    n_removed: int = 0
    n_returned: int = 0
    n_unreachable: int = 0
    n_checked: int = 0
    """Images that were read and compared with the ledger's digest, because the run was to check digests."""
    n_touched: int = 0
    """Of those, images whose size and time had changed and whose bytes had not: their entry stands, with today's fingerprint."""
    n_unchecked: int = 0
    """Images that were to be compared and could not be; they keep what they have."""
    kernels: dict[str, int] = field(default_factory=dict)
    """Images done by each version of the first layer; they agree to rounding only."""
    n_done_total: int = 0
    """Images of the store that are done, by this run or an earlier one."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Files that are no images by their name: number per suffix."""
    excluded: dict[str, int] = field(default_factory=dict)
    """Folders and files that were left out: number per pattern."""
    n_done: int = 0
    n_quarantined: int = 0
    n_rejected: int = 0
    n_pending: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Images that this run has quarantined or rejected, per code."""
    bad: list[dict[str, str]] = field(default_factory=list)
    """The first of them: path and error."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Images that this run has entered and of which something is dropped, per code of `dropped.dropped`."""
    dropped_total: dict[str, int] = field(default_factory=dict)
    """The same of all runs of the store since they count it; images that left meanwhile included."""
    n_bad_total: int = 0
    """Quarantined and rejected images of the whole store."""
    pixels: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Seconds of one core per stage, over all workers."""
    compute_s: float = 0.0
    """Wall time from the first task to the last."""
    start_s: float = 0.0
    """Wall time until the workers were there and had what they need."""
    slots: int = 0
    """Batches that are extracted at once, when the run last looked."""
    workers: int = 0
    """Worker processes, when the run last looked."""
    n_workers_lost: int = 0
    """Worker processes that went while the run lasted, as far as it saw; their batches were done by others."""
    slot_s: float = 0.0
    """Time that the slots had between the first task and the last: seconds times slots."""
    unreadable_folders: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """The first passing faults."""

    @property
    def images_per_s(self) -> float:
        """Images done per second of wall time between the first task and the last."""
        return self.n_done / self.compute_s if self.compute_s else 0.0

    @property
    def megapixels_per_s(self) -> float:
        """Input pixels (10^6) per second of the same time."""
        return self.pixels / 1e6 / self.compute_s if self.compute_s else 0.0

    def note_bad(self, path: str, error: str) -> None:
        """Note one image that was quarantined or rejected."""
        code = error.partition(":")[0]
        self.reasons[code] = self.reasons.get(code, 0) + 1
        if len(self.bad) < MAX_BAD:
            self.bad.append({"path": path, "error": error})

    def note_dropped(self, codes: Iterable[str]) -> None:
        """Note what is dropped of some images."""
        for code in codes:
            self.dropped[code] = self.dropped.get(code, 0) + 1
            self.dropped_total[code] = self.dropped_total.get(code, 0) + 1

    @property
    def did_anything(self) -> bool:
        """Whether there was something to do."""
        return any(
            (self.n_new, self.n_done, self.n_quarantined, self.n_rejected, self.n_removed, self.n_checked, self.n_unchecked)
        )

    def count_time(self, compute_s: float) -> None:
        """Note how long it has been since the first task, with the slots there are."""
        self.slot_s += (compute_s - self.compute_s) * self.slots
        self.compute_s = compute_s

    def touch(self, elapsed_s: float) -> None:
        """Note the time, and how long the run takes so far, before a receipt is written while it is at work."""
        self.updated, self.elapsed_s = datetime.now(UTC).isoformat(timespec="seconds"), elapsed_s

    def shares(self) -> dict[str, float]:
        """Share of each stage, and of `WAITING`, in the workers' time; they sum to 1 when anything ran."""
        capacity = max(self.slot_s, sum(self.stage_s.values()))
        if not capacity:
            return {}
        shares = {stage: seconds / capacity for stage, seconds in self.stage_s.items()}
        return shares | {WAITING: max(0.0, 1 - sum(shares.values()))}

    @property
    def bottleneck(self) -> str:
        """The stage that took most of the workers' time."""
        shares = self.shares()
        return max(shares, key=lambda stage: shares[stage]) if shares else ""

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        if self.outcome == "stopped":
            return EXIT_RUN_AGAIN
        if self.outcome != "complete":
            error = getattr(errors, self.message.partition(":")[0], None)  # a refusal is a UsageError
            return int(getattr(error, "exit_code", EXIT_FAILED))
        limit = self.config.get("max_quarantined")
        too_many = limit is not None and self.n_bad_total > limit
        return EXIT_QUARANTINED if too_many or (self.n_bad_total and not self.n_done_total) else EXIT_COMPLETE


class Run(NamedTuple):
    """A run at work, for those who look at it from the same process."""

    store: str
    summary: Summary
    progress: Progress


at_work: dict[str, Run] = {}
"""The runs of this process that hold their store, by run id."""


@contextmanager
def working(store: str, summary: Summary, progress: Progress) -> Iterator[None]:
    """Have a run be seen while it is at work."""
    at_work[summary.run_id] = Run(store, summary, progress)
    try:
        yield
    finally:
        del at_work[summary.run_id]


def receipt(summary: Summary) -> dict[str, Any]:
    """The summary with what follows from it, as JSON values."""
    derived = {"images_per_s": summary.images_per_s, "megapixels_per_s": summary.megapixels_per_s}
    return asdict(summary) | derived | {"shares": summary.shares(), "bottleneck": summary.bottleneck}
