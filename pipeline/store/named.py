"""Finds the store that a user names, by its place or by its job file."""

from __future__ import annotations

import os

from pipeline.config import JOB_SUFFIXES, load_job
from pipeline.source.urls import Url
from pipeline.store.objects import Place, place


def named_store(store: str | os.PathLike[str] | Place) -> Place:
    """Place of a store, given as a folder (``~`` is the home folder), file://, a bucket's URL, or a job file.

    Raises
    ------
    UsageError
        When the job file cannot be read, or the place cannot hold a store.
    """
    if isinstance(store, Url):
        return store
    text = os.fspath(store)
    return place(load_job(text).store if text.endswith(JOB_SUFFIXES) else text)
