"""How many rows of a store have each status."""

from __future__ import annotations

import numpy as np

from pipeline.store.codecs import Array
from pipeline.store.schema import REJECTED, Status
from pipeline.store.store import Store


def tally(status: Array) -> dict[Status, int]:
    """Count the rows of each status in a column ``status``; statuses without a row are left out.

    Examples
    --------
    >>> tally(np.array([Status.DONE, Status.PENDING, Status.DONE], np.uint8))[Status.DONE]
    2
    """
    values, numbers = np.unique(status, return_counts=True)
    return {Status(value): number for value, number in zip(values.tolist(), numbers.tolist(), strict=True)}


def count_statuses(store: Store) -> dict[str, int]:
    """Count the rows of each status over all classes, and the live entries of ``rejected``."""
    counts = {status.name.lower(): 0 for status in Status}
    for shape_class in store.classes.values():
        for status, number in tally(store.column(shape_class.name, "status")).items():
            counts[status.name.lower()] += number
    counts["rejected"] = int((store.column(REJECTED, "status") < Status.REMOVED).sum())
    return counts
