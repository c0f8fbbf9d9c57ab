"""What a run is about: one value, handed to all that work for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import Job
from pipeline.run.plan.changes import Changes
from pipeline.run.summary import Progress, Summary
from pipeline.source.fingerprints import Listing
from pipeline.store.store import Store


@dataclass(frozen=True, slots=True)
class Context:
    """A run from its comparison with the store to its receipt."""

    job: Job
    store: Store
    listing: Listing
    """What there is."""
    found: Changes
    """What of it is to be done."""
    summary: Summary
    """Filled as the run goes on."""
    progress: Progress
    """The same, for those who look."""
    notify: Callable[[Progress], None]
    """Called with ``progress`` about every second."""
    stop: threading.Event
    """Once set, nothing new is sent."""
