"""Undo what a crash left in a store; only under the lock."""

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
    """Cut arrays that are longer than ``status``; clear unfinished classes and temporary files away.

    Parameters
    ----------
    ledger : Ledger
    lengths : mapping of str to int
        Rows of every group, as its ``status`` says.
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
    """Whether a temporary file of the lock may be that of a run that waits for it just now, by the clock of the file server."""
    try:
        return abs(modified_s(left.parent / LOCK_NAME) - modified_s(left)) < LOCK_TTL_S  # a clock may have been ahead
    except FileNotFoundError:
        return True


def remove_unfinished(group: Place) -> None:
    """Clear away what a crash left of a class that was being created, and which therefore never had a status."""
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = children(group / "status")
    if any(name.startswith("c.") for name in names):
        raise FeaturemapsError(
            f"class {group} has rows but no zarr.json, so it was damaged after it was made: clearing it away would lose its maps, so "
            "nothing was touched; restore that file from a copy, or move the folder away to compute its images again"
        )
    remove_folder(group)
