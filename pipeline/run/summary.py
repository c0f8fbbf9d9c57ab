"""What a run is doing and what it did."""

from __future__ import annotations

import builtins
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from pipeline import errors
from pipeline.errors import EXIT_COMPLETE, EXIT_FAILED, EXIT_QUARANTINED, EXIT_RUN_AGAIN
from pipeline.text import count

STAGES = ("read", "decode", "extract", "write")
MAX_BAD = 20
"""Bad images that a summary lists."""
WAITING = "waiting"
"""Time in which a slot had no batch. Waiting for storage counts in its stage, except for headers, which are read before batches exist."""

SAID_S = 1.0
"""Shorter starts are not mentioned."""


@dataclass(slots=True)
class Progress:
    """The state of a run, updated by the driver, for display."""

    n_total: int = 0
    """Images of the listing."""
    n_finished: int = 0
    """Of those, done, quarantined or rejected, by this run or an earlier one."""
    n_start: int = 0
    """Of those, finished before this run."""
    n_quarantined: int = 0
    stage: str = "listing"
    dashboard: str = ""
    """Address of Dask's dashboard, if there is one."""
    last_commit_s: float = 0.0
    """When the ledger was last written, in seconds since 1970; 0 before the first time."""
    began_s: float = field(default_factory=time.monotonic)
    """On the monotonic clock, which changes of the wall clock do not affect."""


@dataclass(slots=True, repr=False)
class Summary:
    """What a run did; its receipt in ``runs/`` holds the same."""

    run_id: str
    number: int = 0
    """Orders the runs of a store, independent of their clocks; 0 in receipts of versions that had no numbers."""
    outcome: str = "running"
    """running, complete, stopped, incomplete (passing faults left rows pending) or failed."""
    started: str = ""
    ended: str = ""
    updated: str = ""
    """When the receipt of a run in progress was written."""
    elapsed_s: float = 0.0
    message: str = ""
    is_refusal: bool = False
    """Whether the run was refused before it took the store; ``n_listed`` and ``dropped_total`` are then the previous run's."""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, int] = field(default_factory=dict)
    """Images done per host."""
    n_listed: int = 0
    n_unchanged: int = 0
    n_new: int = 0
    n_changed: int = 0
    """Of ``n_new``, images that had an entry before: their content changed, or they were rejected and are tried again."""
    n_retried: int = 0
    """Of ``n_changed``, images whose content is unchanged: they were rejected, and are tried again."""
    n_left: int = 0
    """Of ``n_new``, images that the previous run had listed but not entered, because it ended early."""
    n_removed: int = 0
    n_returned: int = 0
    n_unreachable: int = 0
    n_checked: int = 0
    """Images that were read and compared with the ledger's digest (`--check digest`)."""
    n_touched: int = 0
    """Of those, images whose fingerprint changed but whose bytes did not: their entry stands, with the current fingerprint."""
    n_unchecked: int = 0
    """Images that could not be read for the comparison; they keep what they have."""
    kernels: dict[str, int] = field(default_factory=dict)
    """Images done by each version of the first layer; the versions agree only up to rounding."""
    n_done_total: int = 0
    """Images of the store that are done, by this run or an earlier one."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Files without an image suffix: number per suffix."""
    excluded: dict[str, int] = field(default_factory=dict)
    """Excluded folders and files: number per pattern."""
    n_done: int = 0
    n_quarantined: int = 0
    n_rejected: int = 0
    n_pending: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Images that this run has quarantined or rejected, per code."""
    bad: list[dict[str, str]] = field(default_factory=list)
    """The first of these images: path and error."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Images added by this run of which a part was dropped, per code of `dropped.dropped`."""
    dropped_total: dict[str, int] = field(default_factory=dict)
    """The same over all runs of the store, since the first version that counts it; includes images that have left."""
    n_bad_total: int = 0
    """Quarantined and rejected images of the whole store."""
    pixels: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Core-seconds per stage, over all workers."""
    compute_s: float = 0.0
    """Wall time from the first task to the last."""
    start_s: float = 0.0
    """Wall time until the workers were ready."""
    slots: int = 0
    """Batches that the workers extract at once, as last seen."""
    workers: int = 0
    """Worker processes, as last seen."""
    n_workers_lost: int = 0
    """Worker processes that left during the run, as far as it noticed; others did their batches."""
    slot_s: float = 0.0
    """Time available to the slots between the first task and the last: seconds times slots."""
    unreadable_folders: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """The first faults that may pass."""

    def __str__(self) -> str:
        """How the run ended, in one line."""
        start = f", of which {self.start_s:.1f} s to start workers" if self.start_s >= SAID_S else ""
        return (
            f"{self.outcome}: {count(self.n_done, 'image')} done, {self.n_unchanged} unchanged, {self.n_quarantined} quarantined, "
            f"{self.n_rejected} rejected, {self.n_pending} pending, {self.n_removed} removed of {self.n_listed} listed, "
            f"in {self.elapsed_s:.1f} s{start}"
        )

    def __repr__(self) -> str:
        """Short, because a notebook shows it; `receipt` has all values."""
        return f"<Summary of run {self.run_id}: {self}>"

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

    def note_failure(self, error: BaseException) -> None:
        """Set the outcome to failed. The message begins with the name of the error's class, which `failure` reads."""
        self.outcome, self.message = "failed", f"{type(error).__name__}: {error}"

    def note_dropped(self, codes: Iterable[str]) -> None:
        """Count what was dropped of some images."""
        for code in codes:
            self.dropped[code] = self.dropped.get(code, 0) + 1
            self.dropped_total[code] = self.dropped_total.get(code, 0) + 1

    @property
    def did_anything(self) -> bool:
        """Whether the run had anything to do."""
        return any(
            (self.n_new, self.n_done, self.n_quarantined, self.n_rejected, self.n_removed, self.n_checked, self.n_unchecked)
        )

    def count_time(self, compute_s: float) -> None:
        """Set the time since the first task, and add the slots' time since the last call."""
        self.slot_s += (compute_s - self.compute_s) * self.slots
        self.compute_s = compute_s

    def touch(self, elapsed_s: float) -> None:
        """Set the time of update and the duration so far, before the receipt of a run in progress is written."""
        self.updated, self.elapsed_s = datetime.now(UTC).isoformat(timespec="seconds"), elapsed_s

    def shares(self) -> dict[str, float]:
        """Share of each stage, and of `WAITING`, in the workers' time; the shares sum to 1 if anything ran."""
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
        """Exit code of the command."""
        if self.outcome == "stopped":
            return EXIT_RUN_AGAIN
        if self.outcome != "complete":
            return failure(self.message).exit_code
        limit = self.config.get("max_quarantined")
        too_many = limit is not None and self.n_bad_total > limit
        return EXIT_QUARANTINED if too_many or (self.n_bad_total and not self.n_done_total) else EXIT_COMPLETE


class Failure(NamedTuple):
    """Why a run failed."""

    exit_code: int
    """That the command ended with."""
    reason: str
    """Without the name of an error that is no fault of the program."""


def failure(message: str) -> Failure:
    """Read the message of a receipt, as `Summary.note_failure` wrote it.

    Examples
    --------
    >>> failure("UsageError: no source"), failure("OSError: disk full")
    (Failure(exit_code=2, reason='no source'), Failure(exit_code=1, reason='disk full'))
    >>> failure("KeyError: 1"), failure("")
    (Failure(exit_code=1, reason='KeyError: 1'), Failure(exit_code=1, reason=''))
    """
    name, _, reason = message.partition(": ")
    kind = getattr(errors, name, getattr(builtins, name, None))
    is_known = isinstance(kind, type) and issubclass(kind, errors.FeaturemapsError | OSError)
    return Failure(int(getattr(kind, "exit_code", EXIT_FAILED)), reason if is_known else message)  # a refusal is a UsageError


class Run(NamedTuple):
    """A run in progress, as seen from the same process."""

    store: str
    summary: Summary
    progress: Progress


at_work: dict[str, Run] = {}
"""The runs of this process that hold their store, by run id."""


@contextmanager
def working(store: str, summary: Summary, progress: Progress) -> Iterator[None]:
    """Register a run in `at_work` while the block runs."""
    at_work[summary.run_id] = Run(store, summary, progress)
    try:
        yield
    finally:
        del at_work[summary.run_id]


def receipt(summary: Summary) -> dict[str, Any]:
    """The summary and its derived values, as JSON values."""
    derived = {"images_per_s": summary.images_per_s, "megapixels_per_s": summary.megapixels_per_s}
    return asdict(summary) | derived | {"shares": summary.shares(), "bottleneck": summary.bottleneck}
