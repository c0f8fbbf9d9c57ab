"""Compares a listing with a store on disk, and applies what follows from the listing alone."""

from __future__ import annotations

from functools import partial

import numpy as np

from pipeline.config import Job
from pipeline.run.plan import changes
from pipeline.run.plan.changes import Changes, Entries
from pipeline.source.fingerprints import Listing
from pipeline.source.header_limits import is_admitted_now
from pipeline.source.health import is_inaccessible
from pipeline.source.identity import is_same_source
from pipeline.store.schema import REJECTED
from pipeline.store.store import Store


def compare_with_store(job: Job, store: Store | None, listing: Listing) -> Changes:
    """Call `changes.compare` for a store on disk; without a store every image is new."""
    groups = [] if store is None else [*(c.name for c in store.classes.values()), REJECTED]
    entries = (_entries(store, group) for group in groups if store is not None)
    complete = listing.complete and (store is None or is_same_source(store.spec.source, job.source))
    return changes.compare(
        entries,
        listing.paths,
        listing.fingerprint,
        retry_quarantined=job.retry_quarantined,
        may_retry=lambda error: is_inaccessible(error) or is_admitted_now(error, job.decode),
        check_digests=job.check == "digest",
        complete=complete,
        unreadable=listing.unreadable,
    )


def _entries(store: Store, group: str) -> Entries:
    column = partial(store.column, group)
    return Entries(group, column("path"), column("fingerprint"), column("status"), partial(column, "error"))


def settle_returned(store: Store, found: Changes) -> None:
    """Call `Changes.settle_returned` for a store on disk."""
    found.settle_returned(lambda group: (store.column(group, "maps_digest"), store.column(group, "error")))


def apply(store: Store, found: Changes) -> None:
    """Set the statuses that follow from the listing alone; a row whose image is back gets the status that its columns imply."""
    settle_returned(store, found)
    for group, statuses in found.set_status.items():
        rows_array = np.array(sorted(statuses))
        store.commit(group, rows_array, {"status": np.array([statuses[row] for row in rows_array.tolist()], np.uint8)})
