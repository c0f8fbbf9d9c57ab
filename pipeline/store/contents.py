"""What a store holds, from its columns: the number of rows per status, and which images are bad and why."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from pipeline.extract.layers import Array
from pipeline.store.schema import REJECTED, Status
from pipeline.store.store import Store


class BadImage(NamedTuple):
    """A quarantined or rejected image."""

    path: str
    error: str
    """A stable code such as ``truncated``, a colon, and the finding."""
    status: str
    """quarantined or rejected."""
    size_bytes: int
    fingerprint: str

    @property
    def code(self) -> str:
        """The code of the error."""
        return code_of(self.error)

    @property
    def text(self) -> str:
        """What was found."""
        code, _, text = self.error.partition(":")
        return text.strip() or code


def count_class(store: Store, name: str) -> dict[Status, int]:
    """Rows per status of a class, only statuses that occur; damaged values are ignored here, and `verify` finds them."""
    values, numbers = np.unique(store.column(name, "status"), return_counts=True)
    known = {status.value for status in Status}
    return {Status(value): n for value, n in zip(values.tolist(), numbers.tolist(), strict=True) if value in known}


def count_statuses(store: Store) -> dict[str, int]:
    """Rows per status over all classes, and live ``rejected`` entries."""
    total: Counter[Status] = Counter()
    for shape_class in store.classes.values():
        total.update(count_class(store, shape_class.name))
    return {status.name.lower(): total[status] for status in Status} | {"rejected": count_rejected(store)}


def count_rejected(store: Store) -> int:
    """Rejected images with a live entry."""
    return len(_bad_rows(store, REJECTED))


class Bad(NamedTuple):
    """Bad images: rejected ones, then quarantined ones class by class."""

    images: list[BadImage]
    """The first of them."""
    reasons: dict[str, int]
    """Number of bad images per code, most frequent first; empty if not asked for."""


def bad_images(store: Store, n: int, *, with_reasons: bool = False) -> Bad:
    """The first ``n`` bad images; ``with_reasons`` reads the errors of all bad images."""
    images: list[BadImage] = []
    reasons: Counter[str] = Counter()
    for group in [REJECTED, *(c.name for c in store.classes.values())]:
        n_left = n - len(images)
        if n_left <= 0 and not with_reasons:
            break
        rows = _bad_rows(store, group)
        if not len(rows):
            continue
        errors = store.column(group, "error")
        reasons.update(code_of(error) for error in (errors[rows] if with_reasons else ()))
        if n_left > 0:
            path, size_bytes, fingerprint = (store.column(group, name) for name in ("path", "size_bytes", "fingerprint"))
            status = "rejected" if group == REJECTED else "quarantined"
            images += [
                BadImage(path[row], str(errors[row]), status, int(size_bytes[row]), fingerprint[row])
                for row in rows[:n_left].tolist()
            ]
    return Bad(images, dict(reasons.most_common()))


def code_of(error: str) -> str:
    """The stable code at the start of an error.

    Examples
    --------
    >>> code_of("truncated: the file ends early"), code_of("no code")
    ('truncated', 'other')
    """
    code, colon, _ = str(error).partition(":")
    return code if colon and code.replace("_", "").isalpha() and code.islower() else "other"


def _bad_rows(store: Store, group: str) -> Array:
    """Rows of bad images: the live ones of ``rejected``, the quarantined ones of a class."""
    status = store.column(group, "status")
    rows: Array = np.flatnonzero(status < Status.REMOVED if group == REJECTED else status == Status.QUARANTINED)
    return rows
