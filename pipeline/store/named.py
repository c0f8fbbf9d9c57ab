"""Where the store is that a user names: by its place, or by the job file that makes it."""

from __future__ import annotations

import os

from pipeline.config import JOB_SUFFIXES, load_job
from pipeline.source.urls import Url
from pipeline.store.objects import Place, place


def named_store(store: str | os.PathLike[str] | Place) -> Place:
    """Where a store is: a folder (``~`` is the home folder), file://, a bucket's address, or what a job file says.

    Raises
    ------
    UsageError
        When the job file cannot be read, or nothing can be there.
    """
    if isinstance(store, Url):
        return store
    text = os.fspath(store)
    return place(load_job(text).store if text.endswith(JOB_SUFFIXES) else text)
