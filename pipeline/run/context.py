"""What all parts of a run share, as one value."""

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
    """One run, from its comparison with the store to its receipt."""

    job: Job
    store: Store
    listing: Listing
    """The images of the source."""
    found: Changes
    """What is to be done."""
    summary: Summary
    """Filled as the run goes on."""
    progress: Progress
    """The state of the run, for display."""
    notify: Callable[[Progress], None]
    """Called with ``progress`` about once a second."""
    stop: threading.Event
    """Once set, no new task is sent."""
