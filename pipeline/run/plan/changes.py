"""What a listing means for the ledger: which images are new, changed, pending, gone or back. Pure, and one pass over each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UsageError
from pipeline.source.fingerprints import UNREADABLE
from pipeline.source.health import is_inaccessible
from pipeline.store.schema import REJECTED, Status


class Entry(NamedTuple):
    """One row of a class, or of ``rejected``."""

    group: str
    row: int


@dataclass(frozen=True, slots=True)
class Entries:
    """The columns of one group that decide what becomes of its rows, each (image,)."""

    group: str
    path: np.ndarray[Any, Any]
    fingerprint: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    error: Callable[[], np.ndarray[Any, Any]]
    """Asked for only where a row is quarantined."""

    def to_retry(self, may_retry: Callable[[str], bool]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Rows that were quarantined for a reason that may not hold any more."""
        found = np.asarray(self.status == Status.QUARANTINED)
        if found.any():
            error = self.error()
            found[found] = [may_retry(text) for text in error[found]]
        return found


@dataclass(slots=True)
class Changes:
    """What a run has to do; images are positions in the listing."""

    new: list[int] = field(default_factory=list)
    """Images to probe and append, ascending: unknown ones, changed ones, and rejected ones that are tried again."""
    replaces: dict[int, Entry] = field(default_factory=dict)
    """Of those, the entry that is superseded once the new one is there."""
    pending: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Per class: (row, image) to compute, rows ascending."""
    returned: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Per class: (row, image) of removed rows whose image is back unchanged."""
    set_status: dict[str, dict[int, int]] = field(default_factory=dict)
    """Per group: row -> status to set before anything else."""
    retried: set[Entry] = field(default_factory=set)
    """Of the pending rows, those that were quarantined."""
    to_check: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Per class: (row, image) of done rows whose digest is to be compared with the image's bytes, where digests are checked."""
    retry_quarantined: bool = False
    may_retry: Callable[[str], bool] = is_inaccessible
    """Whether an image with an error is tried again whatever `retry_quarantined` says."""
    check_digests: bool = False
    n_live: int = 0
    n_removed: int = 0
    n_unchanged: int = 0
    """Images whose entry stands: done, quarantined or rejected."""
    n_unreachable: int = 0
    """Of those, images that cannot be looked at just now."""

    def mark(self, entry: Entry, status: int) -> None:
        """Note a status to set."""
        self.set_status.setdefault(entry.group, {})[entry.row] = status

    @property
    def n_pending(self) -> int:
        """Rows to compute that are in the store already."""
        return sum(map(len, self.pending.values()))

    @property
    def has_work(self) -> bool:
        """Whether the ledger is to be written at all."""
        return bool(self.new or self.pending or self.returned or self.set_status or self.to_check)

    @property
    def n_to_check(self) -> int:
        """Images whose bytes are to be compared with the ledger's digest."""
        return sum(map(len, self.to_check.values()))

    def check(self, entry: Entry, i: int) -> None:
        """Note that the digest of a done row is to be compared, if digests are checked at all."""
        if self.check_digests and entry.group != REJECTED:
            self.to_check.setdefault(entry.group, []).append((entry.row, i))

    def settle_checked(self, changed: Mapping[int, Entry], touched: set[int]) -> None:
        """Take up what the bytes say: images that changed though size and time did not, and those of which only these did."""
        self.new = sorted((set(self.new) | changed.keys()) - touched)
        self.replaces = {i: entry for i, entry in self.replaces.items() if i not in touched} | dict(changed)
        n_returned = sum(map(len, self.returned.values()))
        self.returned = {group: [pair for pair in pairs if pair[1] not in changed] for group, pairs in self.returned.items()}
        self.n_unchanged += len(touched) - len(changed) + n_returned - sum(map(len, self.returned.values()))

    def settle_returned(self, outcome: Callable[[str], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> None:
        """Decide what rows are whose image is back, by ``maps_digest`` and ``error`` of their group: those without are pending."""
        for group, rows in self.returned.items():
            maps_digest, error = outcome(group)
            for row, i in rows:
                if maps_digest[row]:
                    self.mark(Entry(group, row), Status.DONE)
                    self.check(Entry(group, row), i)
                elif error[row] and not self.may_retry(error[row]) and not self.retry_quarantined:
                    self.mark(Entry(group, row), Status.QUARANTINED)
                else:
                    self.mark(Entry(group, row), Status.PENDING)
                    self.pending.setdefault(group, []).append((row, i))
        for pending in self.pending.values():
            pending.sort()


def compare(
    groups: Iterable[Entries],
    paths: Sequence[str],
    fingerprint: Callable[[int], str],
    *,
    retry_quarantined: bool = False,
    may_retry: Callable[[str], bool] = is_inaccessible,
    check_digests: bool = False,
    complete: bool = True,
    unreadable: Sequence[str] = (),
) -> Changes:
    """Compare a listing with the ledger.

    Parameters
    ----------
    groups : iterable of Entries
        Every class, then ``rejected``, whose group is named so.
    paths : sequence of str
        The listing, without duplicates.
    fingerprint : callable
        Fingerprint of an image by its position.
    retry_quarantined : bool
        Compute quarantined rows and probe rejected images again.
    may_retry : callable
        Takes an error and says whether its image is tried again in any case, as it could not be reached or may be read now.
    check_digests : bool
        Have the digest of every done row compared, whether or not the image's fingerprint is the ledger's.
    complete : bool
        Whether the listing is all of the source: only then are images that it lacks removed.
    unreadable : sequence of str
        Folders that could not be listed; what lies below keeps its entries.

    Returns
    -------
    Changes
        Every listed image is in exactly one of ``new``, ``pending``, ``returned`` and the unchanged ones.
    """
    position = {path: i for i, path in enumerate(paths)}
    owners = _Owners(len(paths))
    gone: list[Entry] = []
    changes = Changes(retry_quarantined=retry_quarantined, may_retry=may_retry, check_digests=check_digests)

    for entries in groups:
        owners.names.append(entries.group)
        to_retry = entries.to_retry(may_retry).tolist()
        for row, (status, again) in enumerate(zip(entries.status.tolist(), to_retry, strict=True)):
            if status == Status.SUPERSEDED:
                continue
            entry = Entry(entries.group, row)
            i = position.get(entries.path[row], -1)
            changes.n_live += status != Status.REMOVED
            if i < 0:
                if status != Status.REMOVED and not _below(entries.path[row], unreadable):
                    gone.append(entry)
                continue
            same = entries.fingerprint[row] == fingerprint(i)
            if status == Status.REMOVED and (not same or entries.fingerprint[row] == UNREADABLE):  # which identifies nothing
                continue
            owners.claim(changes, i, entry, status, same=same, retry=retry_quarantined or again)

    for i in range(len(paths)):
        is_unreachable = fingerprint(i) == UNREADABLE
        is_current, status, retry = bool(owners.is_current[i]), owners.status[i], bool(owners.retry[i])
        _decide(changes, i, owners.entry(i), is_current, status, retry, is_unreachable)
    for rows in changes.pending.values():
        rows.sort()
    if complete:
        for entry in gone:
            changes.mark(entry, Status.REMOVED)
        changes.n_removed = len(gone)
    return changes


class _Owners:
    """The entry that stands for each image of a listing; in arrays, because a listing may have millions."""

    def __init__(self, n: int) -> None:
        self.names: list[str] = []  # of the groups so far
        self.group = array("i", [-1]) * n
        self.row = array("q", [-1]) * n
        self.is_current = bytearray(n)  # whether the entry has today's fingerprint
        self.status = bytearray(n)
        self.retry = bytearray(n)

    def entry(self, i: int) -> Entry | None:
        """Which one stands for image ``i``."""
        return Entry(self.names[self.group[i]], self.row[i]) if self.row[i] >= 0 else None

    def claim(self, changes: Changes, i: int, entry: Entry, status: int, *, same: bool, retry: bool) -> None:
        """Have an entry of the last group stand for image ``i``, unless a better one does; the other one is retired."""
        old = self.entry(i)
        # Of two entries the one with today's fingerprint wins, a live one before a removed one, then the last.
        if old is not None and (self.is_current[i], self.status[i] != Status.REMOVED) > (same, status != Status.REMOVED):
            _retire(changes, entry, status)
            return
        if old is not None:
            _retire(changes, old, self.status[i])
        self.group[i], self.row[i], self.is_current[i], self.status[i] = len(self.names) - 1, entry.row, same, status
        self.retry[i] = retry


def _retire(changes: Changes, entry: Entry, status: int) -> None:
    """Another entry stands for the image: of two live rows one is superseded; a removed one stays as it is."""
    if status != Status.REMOVED:
        changes.mark(entry, Status.SUPERSEDED)


def _decide(changes: Changes, i: int, entry: Entry | None, same: bool, status: int, retry: bool, is_unreachable: bool) -> None:
    """Put one listed image where it belongs."""
    rejected = entry is not None and entry.group == REJECTED
    if entry is None:
        changes.new.append(i)
    elif is_unreachable and status != Status.PENDING:  # whatever is wrong with it says nothing about what was done
        changes.n_unreachable += not same
        changes.n_unchanged += 1
    elif not same or (rejected and (retry or status == Status.REMOVED)):
        changes.new.append(i)
        if status != Status.REMOVED:
            changes.replaces[i] = entry
        if status == Status.DONE:
            changes.check(entry, i)
    elif status == Status.REMOVED:
        changes.returned.setdefault(entry.group, []).append((entry.row, i))
    elif status == Status.PENDING or (status == Status.QUARANTINED and retry):
        if status == Status.QUARANTINED:
            changes.mark(entry, Status.PENDING)  # before its columns are written anew
            changes.retried.add(entry)
        changes.pending.setdefault(entry.group, []).append((entry.row, i))
    else:
        changes.n_unchanged += 1
        if status == Status.DONE:
            changes.check(entry, i)


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(folder == "" or path.startswith(f"{folder}/") for folder in folders)


def check_removals(changes: Changes, max_removed: float) -> None:
    """Refuse a run that would mark more images as removed than allowed.

    Raises
    ------
    UsageError
        Which is what an unmounted disk or a wrong folder looks like.
    """
    n_gone = changes.n_removed + changes.n_unreachable
    if n_gone > max_removed * changes.n_live:
        raise UsageError(
            f"{n_gone} of the store's {changes.n_live} images are not in the source any more, above the allowed "
            f"{max_removed:.0%}: this looks like an unmounted disk or a wrong folder, so nothing was marked as removed and nothing "
            "was read; check the source, or allow it with --max-removed"
        )
