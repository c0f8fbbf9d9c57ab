"""What a run is doing and what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

STAGES = ("read", "decode", "extract", "write")


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


@dataclass(slots=True)
class Summary:
    """What a run did; its receipt in ``runs/`` holds the same."""

    run_id: str
    outcome: str = "running"
    """running, complete, stopped, incomplete (passing faults left rows pending) or failed."""
    started: str = ""
    ended: str = ""
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
    n_done: int = 0
    n_quarantined: int = 0
    n_rejected: int = 0
    n_pending: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Images that this run has quarantined or rejected, per code."""
    n_bad_total: int = 0
    """Quarantined and rejected images of the whole store."""
    pixels: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    """Seconds of one core per stage, over all workers."""
    compute_s: float = 0.0
    """Wall time from the first task to the last."""
    slots: int = 0
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

    def note_bad(self, error: str) -> None:
        """Count the reason of one image that was quarantined or rejected."""
        code = error.partition(":")[0]
        self.reasons[code] = self.reasons.get(code, 0) + 1

    def shares(self) -> dict[str, float]:
        """Share of each stage, and of waiting, in the workers' time; they sum to 1 when anything ran."""
        capacity = max(self.compute_s * self.slots, sum(self.stage_s.values()))
        if not capacity:
            return {}
        shares = {stage: seconds / capacity for stage, seconds in self.stage_s.items()}
        return shares | {"waiting": max(0.0, 1 - sum(shares.values()))}

    @property
    def bottleneck(self) -> str:
        """The stage that took most of the workers' time."""
        shares = self.shares()
        return max(shares, key=lambda stage: shares[stage]) if shares else ""


def printable(name: str) -> str:
    r"""A name on one line, without what a terminal would obey: unprintable characters as Python escapes them.

    Examples
    --------
    >>> printable("caf\u00e9\n.jpg")
    'café\\n.jpg'
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def describe_news(summary: Summary) -> list[str]:
    """What was found to be other than at the last run, for a person; no lines where nothing was.

    Examples
    --------
    >>> describe_news(Summary("r", n_new=7, n_changed=2, n_removed=1, reasons={"truncated": 2, "empty": 1}))
    ['since the last run: 5 new, 2 changed or tried again, 1 removed', 'found bad by this run: 2 truncated, 1 empty']
    """
    n_of = {
        "new": summary.n_new - summary.n_changed,
        "changed or tried again": summary.n_changed,
        "back": summary.n_returned,
        "removed": summary.n_removed,
    }
    changes = ", ".join(f"{n} {name}" for name, n in n_of.items() if n)
    reasons = ", ".join(f"{n} {code}" for code, n in sorted(summary.reasons.items(), key=lambda item: -item[1]))
    return [f"since the last run: {changes}"] * bool(changes) + [f"found bad by this run: {reasons}"] * bool(reasons)


def receipt(summary: Summary) -> dict[str, Any]:
    """The summary with what follows from it, as JSON values."""
    derived = {"images_per_s": summary.images_per_s, "megapixels_per_s": summary.megapixels_per_s}
    return asdict(summary) | derived | {"shares": summary.shares(), "bottleneck": summary.bottleneck}
