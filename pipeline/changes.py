"""What a listing means for the ledger: which images are new, changed, pending, gone or back. Pure, and one pass over each."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from pipeline.errors import UsageError

PENDING, DONE, QUARANTINED, REMOVED, SUPERSEDED = range(5)  # as in store.Status and docs/store-format.md


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
    """Per group: row -> status to set before anything else (removed or superseded)."""
    n_live: int = 0
    n_removed: int = 0
    n_unchanged: int = 0
    """Images whose entry stands: done, quarantined or rejected."""

    def mark(self, entry: Entry, status: int) -> None:
        """Note a status to set."""
        self.set_status.setdefault(entry.group, {})[entry.row] = status

    @property
    def n_pending(self) -> int:
        """Rows to compute that are in the store already."""
        return sum(map(len, self.pending.values()))


def compare(
    groups: Iterable[Entries],
    paths: Sequence[str],
    fingerprint: Callable[[int], str],
    *,
    retry_quarantined: bool = False,
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
    names: list[str] = []
    owner_group = array("i", [-1]) * len(paths)
    owner_row = array("q", [-1]) * len(paths)
    current = bytearray(len(paths))  # whether the owner has today's fingerprint
    statuses = bytearray(len(paths))
    gone: list[Entry] = []
    changes = Changes()

    for entries in groups:
        names.append(entries.group)
        for row, status in enumerate(entries.status.tolist()):
            if status == SUPERSEDED:
                continue
            entry = Entry(entries.group, row)
            i = position.get(entries.path[row], -1)
            changes.n_live += status != REMOVED
            if i < 0:
                if status != REMOVED and not _below(entries.path[row], unreadable):
                    gone.append(entry)
                continue
            same = entries.fingerprint[row] == fingerprint(i)
            if status == REMOVED and not same:
                continue
            old = Entry(names[owner_group[i]], owner_row[i]) if owner_row[i] >= 0 else None
            # Of two entries the one with today's fingerprint wins, a live one before a removed one, then the last.
            if old is not None and (current[i], statuses[i] != REMOVED) > (same, status != REMOVED):
                _retire(changes, entry, status)
                continue
            if old is not None:
                _retire(changes, old, statuses[i])
            owner_group[i], owner_row[i], current[i], statuses[i] = len(names) - 1, row, same, status

    for i in range(len(paths)):
        kept = Entry(names[owner_group[i]], owner_row[i]) if owner_row[i] >= 0 else None
        _decide(changes, i, kept, bool(current[i]), statuses[i], retry_quarantined)
    for rows in changes.pending.values():
        rows.sort()
    if complete:
        for entry in gone:
            changes.mark(entry, REMOVED)
        changes.n_removed = len(gone)
    return changes


def _retire(changes: Changes, entry: Entry, status: int) -> None:
    """Another entry stands for the image: of two live rows one is superseded; a removed one stays as it is."""
    if status != REMOVED:
        changes.mark(entry, SUPERSEDED)


def _decide(changes: Changes, i: int, entry: Entry | None, same: bool, status: int, retry: bool) -> None:
    """Put one listed image where it belongs."""
    rejected = entry is not None and entry.group == "rejected"
    if entry is None:
        changes.new.append(i)
    elif not same or (rejected and (retry or status == REMOVED)):
        changes.new.append(i)
        if status != REMOVED:
            changes.replaces[i] = entry
    elif status == REMOVED:
        changes.returned.setdefault(entry.group, []).append((entry.row, i))
    elif status == PENDING or (status == QUARANTINED and retry and not rejected):
        changes.pending.setdefault(entry.group, []).append((entry.row, i))
    else:
        changes.n_unchanged += 1


def _below(path: str, folders: Sequence[str]) -> bool:
    return any(folder == "" or path.startswith(f"{folder}/") for folder in folders)


def check_removals(changes: Changes, max_removed: float) -> None:
    """Refuse a run that would mark more images as removed than allowed.

    Raises
    ------
    UsageError
        Which is what an unmounted disk or a wrong folder looks like.
    """
    allowed = max_removed * changes.n_live
    if changes.n_removed > max(allowed, 0):
        raise UsageError(
            f"{changes.n_removed} of the store's {changes.n_live} images are not in the source any more, above the allowed "
            f"{max_removed:.0%}: this looks like an unmounted disk or a wrong folder, so nothing was marked as removed and nothing "
            "was read; check the source, or allow it with --max-removed"
        )
