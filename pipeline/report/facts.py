"""What a report says of a store: counts, runs, size classes, bad images, and a verdict; read without maps and without the lock."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import EXIT_QUARANTINED, EXIT_USAGE
from pipeline.run.summary import Summary, failure
from pipeline.store.contents import BadImage, bad_images, count_class, count_rejected
from pipeline.store.schema import Status
from pipeline.store.store import Store
from pipeline.text import count, printable

N_RECEIPTS = 50
"""Receipts among which the last run that computed anything is looked for."""
WALK_OBJECTS = 200_000
WALK_S = 5.0
"""How long the objects of a store are counted, at most."""
LIVE = ("done", "pending", "quarantined", "rejected")
Tone = Literal["good", "working", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a store stands, in a sentence."""

    tone: Tone
    text: str
    remedy: str = ""
    """What to do; empty where nothing is to be done."""


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """A shape class."""

    name: str
    kind: str
    """exact or padded."""
    n_live: int
    n_done: int
    disk_bytes: int | None
    """None where it was not counted."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """One run, by its receipt."""

    run_id: str
    started: str
    elapsed_s: float
    state: str
    """complete, stopped, incomplete, failed, refused, at work, or died."""
    exit_code: int | None
    """None while it works, or where it died."""
    n_done: int
    n_bad: int
    """Images that this run quarantined or rejected."""
    n_changed: int
    """Images with an entry that this run computed again, or tried again."""
    n_removed: int
    """Images that this run no longer found in the source."""
    images_per_s: float
    message: str
    """Why it ended early; empty where it did not."""


@dataclass(slots=True)
class Facts:
    """All of it."""

    counts: dict[str, int]
    """Rows of each status; `LIVE` ones are images of the collection."""
    holder: dict[str, Any] | None
    """Who works on the store now."""
    receipts: list[dict[str, Any]]
    """Newest first, at most `N_RECEIPTS`."""
    n_runs: int = 0
    first_run: str = ""
    """When the oldest run began, UTC; empty where there was none."""
    classes: list[ClassFacts] = field(default_factory=list)
    """Largest first."""
    other_bytes: int | None = None
    """Ledger of rejected images, weights, receipts."""
    bad: list[BadImage] = field(default_factory=list)
    """The first of them."""
    reasons: dict[str, int] = field(default_factory=dict)
    """All bad images per code, most frequent first."""

    @property
    def n_live(self) -> int:
        """Images of the collection that have an entry."""
        return sum(self.counts[name] for name in LIVE)

    @property
    def n_bad(self) -> int:
        """Quarantined and rejected images."""
        return self.counts["quarantined"] + self.counts["rejected"]

    @property
    def last(self) -> dict[str, Any] | None:
        """The newest receipt."""
        return self.receipts[0] if self.receipts else None

    @property
    def last_working(self) -> dict[str, Any] | None:
        """That of the last run that computed maps."""
        return next((receipt for receipt in self.receipts if as_summary(receipt).n_done), None)

    @property
    def disk_bytes(self) -> int | None:
        """Space of the whole store."""
        sizes = [self.other_bytes, *(c.disk_bytes for c in self.classes)]
        return None if None in sizes else sum(size or 0 for size in sizes)


def gather(store: Store, holder: dict[str, Any] | None, n_bad: int) -> Facts:
    """Look at a store, of whatever state: columns are read where they are needed, maps never.

    Parameters
    ----------
    store : Store
    holder : dict, optional
        Who works on the store, from `lock.current_holder`.
    n_bad : int
        Bad images to name.
    """
    found = Facts(
        dict.fromkeys((status.name.lower() for status in Status), 0) | {"rejected": 0}, holder, store.receipts(N_RECEIPTS)
    )
    run_ids = store.run_ids()
    found.n_runs, found.first_run = len(run_ids), _date_of(run_ids[0]) if run_ids else ""
    sizes, found.other_bytes = _disk_bytes(store)
    for shape_class in store.classes.values():
        counted = count_class(store, shape_class.name)
        for status, number in counted.items():
            found.counts[status.name.lower()] += number
        n_live = sum(number for status, number in counted.items() if status.is_live)
        n_done = counted.get(Status.DONE, 0)
        found.classes.append(ClassFacts(shape_class.name, shape_class.kind, n_live, n_done, sizes.get(shape_class.name)))
    found.bad, found.reasons = bad_images(store, n_bad, with_reasons=True)
    found.counts["rejected"] = count_rejected(store)
    found.classes.sort(key=lambda c: (-c.n_live, c.name))
    return found


def _date_of(run_id: str) -> str:
    """When a run began, by its name.

    Examples
    --------
    >>> _date_of("20261123T215159.378Z-f45a62a9")
    '2026-11-23 21:51:59'
    """
    return f"{run_id[:4]}-{run_id[4:6]}-{run_id[6:8]} {run_id[9:11]}:{run_id[11:13]}:{run_id[13:15]}"


def _disk_bytes(store: Store) -> tuple[dict[str, int], int | None]:
    """Space of each class and of the rest; nothing where that would take long, or a request per thousand objects of a bucket."""
    if not isinstance(store.path, Path):
        return {}, None
    end_s, left = time.monotonic() + WALK_S, WALK_OBJECTS
    total: Counter[str] = Counter()
    pending = [(entry, entry) for entry in (c.name for c in store.classes.values())] + [("", ".")]
    while pending:
        group, folder = pending.pop()
        try:
            entries = list(os.scandir(store.path / folder))
        except OSError:  # a class that is gone meanwhile
            continue
        left -= len(entries)
        if left < 0 or time.monotonic() > end_s:
            return {}, None
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if group or not (folder == "." and entry.name in {c.name for c in store.classes.values()}):
                    pending.append((group, f"{folder}/{entry.name}"))
            else:
                total[group] += _size(entry)
    return {c.name: total[c.name] for c in store.classes.values()}, total[""]


def _size(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # a temporary file of a run at work
        return 0
    return status.st_blocks * 512


# -- runs ------------------------------------------------------------------------------------------------------------------------


def run_facts(receipts: Sequence[Mapping[str, Any]], holder: Mapping[str, Any] | None) -> Iterator[RunFacts]:
    """Runs as a person wants to see them."""
    for receipt in receipts:
        run = as_summary(receipt)
        state, exit_code = _state(run, holder)
        yield RunFacts(
            run_id=run.run_id,
            started=run.started,
            elapsed_s=run.elapsed_s,
            state=state,
            exit_code=exit_code,
            n_done=run.n_done,
            n_bad=run.n_quarantined + run.n_rejected,
            n_changed=run.n_changed,
            n_removed=run.n_removed,
            images_per_s=run.images_per_s,
            message=failure(run.message).reason,
        )


def _state(run: Summary, holder: Mapping[str, Any] | None) -> tuple[str, int | None]:
    if run.outcome == "running":
        return ("at work" if holder and holder["run_id"] == run.run_id else "died"), None
    if run.outcome == "failed" and run.exit_code == EXIT_USAGE:
        return "refused", EXIT_USAGE
    return run.outcome or "not said", run.exit_code


def as_summary(receipt: Mapping[str, Any]) -> Summary:
    """The summary that a receipt was made of; what another version wrote otherwise, or besides, is passed over.

    Examples
    --------
    >>> as_summary({"run_id": "r", "started": None, "n_done": "many", "hosts": {"a": 1, "b": []}, "new": 1}).hosts
    {'a': 1}
    """
    blank = asdict(Summary("", outcome=""))
    run = Summary(**blank | {name: _like(blank[name], value) for name, value in receipt.items() if name in blank})
    run.versions = {name: value for name, value in run.versions.items() if isinstance(value, str)}
    run.faults = [fault for fault in run.faults if isinstance(fault, str)]
    run.hosts = {name: int(n) for name, n in run.hosts.items() if _is_number(n)}
    run.stage_s = {name: seconds for name, seconds in run.stage_s.items() if _is_number(seconds)}
    if not _is_number(run.config.get("max_quarantined")):
        run.config = run.config | {"max_quarantined": None}
    return run


def _like(default: Any, value: Any) -> Any:
    """A value of a receipt where it is of its field's kind, and else the field's default."""
    if isinstance(default, int | float):
        return type(default)(value) if _is_number(value) else default
    return value if isinstance(value, type(default)) else default


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- the verdict -----------------------------------------------------------------------------------------------------------------


def verdict_of(facts: Facts) -> Verdict:
    """One sentence for those who read no further, and what to do."""
    run = as_summary(facts.last) if facts.last else None
    state = next(run_facts(facts.receipts[:1], facts.holder)).state if run else ""
    n_done, n_live = facts.counts["done"], facts.n_live
    n_listed = max(n_live, run.n_listed) if run and state != "complete" else n_live
    if facts.holder:
        return Verdict("working", f"A run is at work: {n_done:,} of {_images(n_listed)} are done so far.", "Look again later.")
    n_missing = n_listed - n_done - facts.n_bad
    missing = f"{n_missing:,} of {_images(n_listed)} {'is' if n_missing == 1 else 'are'} missing" if n_missing else ""
    if run and state in {"failed", "refused", "died"}:
        why = f": {printable(failure(run.message).reason)}" if run.message else ""
        text = "The last run " + {"died": "died before its end", "refused": "was refused"}.get(state, "failed")
        return Verdict(
            "bad",
            f"{text}{f'; {missing}' if missing else ''}{why}.".replace("..", "."),
            "Finished images are kept. Fix the cause, if one is named, and run the same command again.",
        )
    if n_missing:
        return Verdict("warning", f"{missing}: {_why_missing(run)}.", "Run the same command again. Finished images are kept.")
    if not n_live:
        return Verdict("warning", "The store is empty: no image was entered yet.", "Run the command that made it again.")
    reasons = ", ".join(f"{n:,} {code}" for code, n in facts.reasons.items())
    if not n_done:
        remedy = "Look at the reasons below; if the settings were wrong, delete the store and run with others."
        return Verdict("bad", f"No image is done: all {n_live:,} are bad ({reasons}).", remedy)
    if run and run.exit_code == EXIT_QUARANTINED:
        limit, n_bad = run.config.get("max_quarantined"), count(facts.n_bad, "bad image", commas=True)
        text = f"Complete, but with {n_bad} ({reasons}), more than the {limit:,} that the run allows."
        return Verdict(
            "warning", text, "Look at the reasons below, replace or repair the images, and run with --retry-quarantined."
        )
    if facts.n_bad:
        return Verdict("good", f"Complete: {_are(n_done)} done, and {facts.n_bad:,} cannot be ({reasons}).")
    return Verdict("good", f"Complete: {f'all {n_done:,} images are' if n_done > 1 else '1 image is'} done.")


def _why_missing(run: Summary | None) -> str:
    if run is None:
        return "no run has left a receipt"
    if run.outcome == "stopped":
        return "the last run was stopped before its end"
    if run.faults:
        return f"the storage failed, which may pass ({printable(run.faults[0])})"
    return "no run has reached them yet"


def _images(n: int) -> str:
    return count(n, "image", commas=True)


def _are(n: int) -> str:
    return f"{_images(n)} {'is' if n == 1 else 'are'}"
