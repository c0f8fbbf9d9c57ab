"""The driver of a run and the tasks of its workers.

They read, extract, write and commit each missing image once.
A run is handed its workers; it does not know what kind of cluster they come from.
"""

from __future__ import annotations

from pipeline import lazily

__all__ = ["Progress", "Summary", "run_job"]
__getattr__ = lazily(__name__, {"Progress": "summary", "Summary": "summary", "run_job": "lifecycle"})
