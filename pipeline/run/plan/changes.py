"""What a listing means for the ledger: which images are new, changed, pending, gone or back.

Pure, in one pass over the listing and one over the ledger.
"""

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
    """One row of a class or of ``rejected``."""

    group: str
    row: int


@dataclass(frozen=True, slots=True)
class Entries:
    """The columns of one group that decide what happens to its rows, each of shape (image,)."""

    group: str
    path: np.ndarray[Any, Any]
    fingerprint: np.ndarray[Any, Any]
    status: np.ndarray[Any, Any]
    error: Callable[[], np.ndarray[Any, Any]]
    """Called only if a row is quarantined."""

    def to_retry(self, may_retry: Callable[[str], bool]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Rows that were quarantined for a reason that may no longer hold."""
        found = np.asarray(self.status == Status.QUARANTINED)
        if found.any():
            error = self.error()
            found[found] = [may_retry(text) for text in error[found]]
        return found


@dataclass(slots=True)
class Changes:
    """What a run has to do. Images are given by their position in the listing."""

    new: list[int] = field(default_factory=list)
    """Images to probe and append, ascending: unknown, changed, and rejected ones that are tried again."""
    replaces: dict[int, Entry] = field(default_factory=dict)
    """For some of these images, the entry that is superseded once the new one exists."""
    pending: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Per class: (row, image) to compute, rows ascending."""
    returned: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Per class: (row, image) of removed rows whose image is back unchanged."""
    set_status: dict[str, dict[int, int]] = field(default_factory=dict)
    """Per group: row -> status to set first."""
    retried: set[Entry] = field(default_factory=set)
    """Entries of unchanged images that are tried again: pending rows that were quarantined, and rejected images."""
    to_check: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Per class: (row, image) of done rows whose digest must be compared with the image's bytes, if digests are checked."""
    retry_quarantined: bool = False
    may_retry: Callable[[str], bool] = is_inaccessible
    """Takes an error; whether an image with this error is tried again even without `retry_quarantined`."""
    check_digests: bool = False
    n_live: int = 0
    n_removed: int = 0
    n_unchanged: int = 0
    """Images whose entry stands: done, quarantined or rejected."""
    n_unreachable: int = 0
    """Of these, images that could not be examined."""

    def mark(self, entry: Entry, status: int) -> None:
        """Note a status to set."""
        self.set_status.setdefault(entry.group, {})[entry.row] = status

    @property
    def n_pending(self) -> int:
        """Rows to compute that are already in the store."""
        return sum(map(len, self.pending.values()))

    @property
    def has_work(self) -> bool:
        """Whether the ledger has to be written at all."""
        return bool(self.new or self.pending or self.returned or self.set_status or self.to_check)

    @property
    def n_to_check(self) -> int:
        """Images whose bytes must be compared with the ledger's digest."""
        return sum(map(len, self.to_check.values()))

    def check(self, entry: Entry, i: int) -> None:
        """Add a done row to those whose digest is compared, if digests are checked."""
        if self.check_digests and entry.group != REJECTED:
            self.to_check.setdefault(entry.group, []).append((entry.row, i))

    def settle_checked(self, changed: Mapping[int, Entry], touched: set[int]) -> None:
        """Take up the comparison of bytes.

        Parameters
        ----------
        changed : mapping of int to Entry
            Images whose bytes changed although their fingerprint did not, with their entries.
        touched : set of int
            Images whose fingerprint changed although their bytes did not.
        """
        self.new = sorted((set(self.new) | changed.keys()) - touched)
        self.replaces = {i: entry for i, entry in self.replaces.items() if i not in touched} | dict(changed)
        n_returned = sum(map(len, self.returned.values()))
        self.returned = {group: [pair for pair in pairs if pair[1] not in changed] for group, pairs in self.returned.items()}
        self.n_unchanged += len(touched) - len(changed) + n_returned - sum(map(len, self.returned.values()))

    def settle_returned(self, outcome: Callable[[str], tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]) -> None:
        """Decide the status of rows whose image is back, by ``maps_digest`` and ``error`` of their group; without either: pending."""
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
        Every class, then the group named ``rejected``.
    paths : sequence of str
        The listing, without duplicates.
    fingerprint : callable
        Fingerprint of an image by its position.
    retry_quarantined : bool
        Compute quarantined rows and probe rejected images again.
    may_retry : callable
        Takes an error; returns whether its image is tried again anyway: it was out of reach, or may be readable now.
    check_digests : bool
        Have the digest of every done row compared, also if the image's fingerprint differs from the ledger's.
    complete : bool
        Whether the listing covers the whole source: only then are missing images removed.
    unreadable : sequence of str
        Folders that could not be listed; images below them keep their entries.

    Returns
    -------
    Changes
        Every listed image is in exactly one of ``new``, ``pending``, ``returned`` and the unchanged images.
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
            # An unreadable fingerprint identifies nothing.
            if status == Status.REMOVED and (not same or entries.fingerprint[row] == UNREADABLE):
                continue
            owners.claim(changes, i, entry, status, same=same, retry=retry_quarantined or again)

    for i, row in enumerate(owners.row):
        if row < 0:
            changes.new.append(i)
            continue
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
    """The entry that stands for each image of a listing. Uses arrays, because a listing may have millions of images."""

    def __init__(self, n: int) -> None:
        self.names: list[str] = []  # of the groups read so far
        self.group = array("i", [-1]) * n
        self.row = array("q", [-1]) * n
        self.is_current = bytearray(n)  # whether the entry has the current fingerprint
        self.status = bytearray(n)
        self.retry = bytearray(n)

    def entry(self, i: int) -> Entry:
        """The entry that stands for image ``i``; there must be one."""
        return Entry(self.names[self.group[i]], self.row[i])

    def claim(self, changes: Changes, i: int, entry: Entry, status: int, *, same: bool, retry: bool) -> None:
        """Let an entry of the last group stand for image ``i``, unless the present one is better; retire the other one."""
        old = self.entry(i) if self.row[i] >= 0 else None
        # Of two entries, one with the current fingerprint wins, then a live one over a removed one, then the last.
        if old is not None and (self.is_current[i], self.status[i] != Status.REMOVED) > (same, status != Status.REMOVED):
            _retire(changes, entry, status)
            return
        if old is not None:
            _retire(changes, old, self.status[i])
        self.group[i], self.row[i], self.is_current[i], self.status[i] = len(self.names) - 1, entry.row, same, status
        self.retry[i] = retry


def _retire(changes: Changes, entry: Entry, status: int) -> None:
    """Mark a live row as superseded, because another entry stands for its image; a removed row stays as it is."""
    if status != Status.REMOVED:
        changes.mark(entry, Status.SUPERSEDED)


def _decide(changes: Changes, i: int, entry: Entry, same: bool, status: int, retry: bool, is_unreachable: bool) -> None:
    """Put one listed image that has an entry into the group of changes where it belongs."""
    rejected = entry.group == REJECTED
    # That it cannot be examined says nothing about the work that was done.
    if is_unreachable and status != Status.PENDING:
        changes.n_unreachable += not same
        changes.n_unchanged += 1
    elif not same or (rejected and (retry or status == Status.REMOVED)):
        changes.new.append(i)
        if status != Status.REMOVED:
            changes.replaces[i] = entry
            if same:
                changes.retried.add(entry)
        if status == Status.DONE:
            changes.check(entry, i)
    elif status == Status.REMOVED:
        changes.returned.setdefault(entry.group, []).append((entry.row, i))
    elif status == Status.PENDING or (status == Status.QUARANTINED and retry):
        if status == Status.QUARANTINED:
            changes.mark(entry, Status.PENDING)  # before its columns are rewritten
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
        Because an unmounted disk or a wrong folder looks just like that.
    """
    n_gone = changes.n_removed + changes.n_unreachable
    if n_gone > max_removed * changes.n_live:
        raise UsageError(
            f"{n_gone} of the store's {changes.n_live} images are not in the source any more, above the allowed "
            f"{max_removed:.0%}: this looks like an unmounted disk or a wrong folder, so nothing was marked as removed and nothing "
            "was read; check the source, or allow it with --max-removed"
        )
