"""Predicts how a run would end, from the listing, the headers and the store."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.errors import EXIT_FAILED, EXIT_QUARANTINED, EXIT_RUN_AGAIN, EXIT_USAGE
from pipeline.run.ledger import Ledger
from pipeline.run.plan.changes import Changes, Entry
from pipeline.run.summary import Summary
from pipeline.source.fetch import Probed
from pipeline.source.fingerprints import Listing
from pipeline.source.health import SAMPLE, SourceWatch
from pipeline.store.schema import REJECTED, Status
from pipeline.store.store import Store
from pipeline.text import count


class Forecast:
    """Judges the header of each image that a run would probe, as the run does.

    Parameters
    ----------
    store : Store or None
    listing, found
        The images of the source, and what a run would do with them.
    """

    def __init__(self, store: Store | None, listing: Listing, found: Changes) -> None:
        self.store, self.listing, self.found = store, listing, found
        self.n_faults = 0
        """Images that a run would leave to the next run."""
        self._watch = SourceWatch(listing.root)
        self._ledger = None if store is None else Ledger(store, listing)
        self._n_good = self._n_bad = 0
        self._superseded: list[Entry] = []

    @property
    def source_failed(self) -> bool:
        """Whether a run would stop because the source is at fault."""
        return self._watch.failed

    def take(self, i: int, probed: Probed) -> Probed:
        """Note what the header of image ``i`` of the listing says; return what a run would make of it."""
        if self.listing.is_unreadable(i) and not probed.error and not probed.fault:
            probed = Probed(fault=f"{self.listing.paths[i]}: could not be accessed when the source was listed")
        old = self.found.replaces.get(i)
        if probed.error and old and old.group == REJECTED and self._ledger and self._ledger.is_rejected(old, i, probed.error):
            return probed  # the old entry stands
        self._watch.note(probed.error, is_fault=bool(probed.fault))
        self.n_faults += bool(probed.fault)
        self._n_bad += bool(probed.error)
        self._n_good += not probed.error and not probed.fault
        if old and not probed.fault:
            self._superseded.append(old)
        return probed

    def totals(self) -> tuple[int, int]:
        """Bad and done images of the whole store after the run, if every image decodes whose header is good."""
        n_bad, n_done = self._n_bad, self._n_good + self.found.n_pending
        if self.store is None:
            return n_bad, n_done
        for group in [*(c.name for c in self.store.classes.values()), REJECTED]:
            status = np.array(self.store.column(group, "status"))
            for row, value in self.found.set_status.get(group, {}).items():
                status[row] = value
            status[[entry.row for entry in self._superseded if entry.group == group]] = Status.SUPERSEDED
            bad = status < Status.REMOVED if group == REJECTED else status == Status.QUARANTINED
            n_bad += int(bad.sum())
            n_done += int((status == Status.DONE).sum()) if group != REJECTED else 0
        return n_bad, n_done


def end_of_run(
    forecast: Forecast,
    *,
    holder: dict[str, Any] | None,
    fits_memory: bool,
    fits_disk: bool,
    max_quarantined: int | None,
) -> tuple[int, str]:
    """Exit code of the run, and the reason in words; the first reason counts, as in a run."""
    if holder is not None:
        return EXIT_RUN_AGAIN, (
            f"the store is held by run {holder['run_id']}, process {holder['pid']} on {holder['host']}; run again when it has ended"
        )
    if forecast.source_failed:
        return EXIT_FAILED, (
            f"most of {SAMPLE} images in a row cannot be read: the source {forecast.listing.root} is at fault, not the images; check that "
            "it is mounted and readable"
        )
    if not fits_memory:
        return EXIT_USAGE, "the images do not fit a worker's memory; give fewer --workers, a larger --memory-limit, or --resize"
    if not fits_disk:
        return EXIT_FAILED, "the maps may not fit the disk; free space, or use --limit, --dtype uint8 or --resize"
    if forecast.n_faults:
        return EXIT_FAILED, f"{count(forecast.n_faults, 'image')} cannot be read now; run again when the storage answers"
    n_bad, n_done = forecast.totals()
    summary = Summary("", outcome="complete", config={"max_quarantined": max_quarantined}, n_bad_total=n_bad, n_done_total=n_done)
    if summary.exit_code != EXIT_QUARANTINED:
        return summary.exit_code, "complete, if the images decode as their headers promise"
    if not n_done:
        return (
            summary.exit_code,
            f"no image would be done, and {count(n_bad, 'is', 'are')} bad; look at the reasons, and check the source",
        )
    return (
        summary.exit_code,
        f"{count(n_bad, 'image')} of the store would be bad, more than --max-quarantined {max_quarantined} allows",
    )
