"""Undoes what a crash left in a store; requires the lock."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from pipeline.errors import FeaturemapsError
from pipeline.store.columns import Ledger
from pipeline.store.lock import LOCK_TTL_S
from pipeline.store.lock_owner import LOCK_NAME
from pipeline.store.objects import Place, children, delete, exists, litter, modified_s, remove_folder
from pipeline.store.schema import CLASS_NAME


def repair(ledger: Ledger, lengths: Mapping[str, int]) -> None:
    """Cut arrays that are longer than ``status``; remove unfinished classes and temporary files.

    Parameters
    ----------
    ledger : Ledger
    lengths : mapping of str to int
        Rows of every group, by its ``status``.
    """
    path = ledger.path
    for group, length in lengths.items():
        ledger.resize(group, length)
    for name in children(path):
        if CLASS_NAME.fullmatch(name) and not exists(path / name / "zarr.json"):
            remove_unfinished(path / name)
    for left in litter(path):
        if not (left.name.startswith(LOCK_NAME) and _is_fresh(left)):
            delete(left)


def _is_fresh(left: Place) -> bool:
    """Whether a temporary lock file may belong to a run that waits for the lock now, by the file server's clock."""
    try:
        # The difference is absolute, because a clock may have been ahead.
        return abs(modified_s(left.parent / LOCK_NAME) - modified_s(left)) < LOCK_TTL_S
    except FileNotFoundError:
        return True


def remove_unfinished(group: Place) -> None:
    """Remove a class that was being created at a crash, and therefore never had a status."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = children(group / "status")
    if any(name.startswith("c.") for name in names):
        raise FeaturemapsError(
            f"class {group} has rows but no zarr.json, so it was damaged after it was made: clearing it away would lose its maps, so "
            "nothing was touched; restore that file from a copy, or move the folder away to compute its images again"
        )
    remove_folder(group)
