"""From an entry of ``cluster.yaml`` to a client with workers; in the end, also after an error, all that was started is stopped."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import dask
from distributed import Client

from pipeline.cluster.config import load_cluster
from pipeline.cluster.dask_settings import DASK_SETTINGS
from pipeline.cluster.spec import ClusterSpec
from pipeline.config import Job
from pipeline.store.objects import place


@contextlib.contextmanager
def connect(
    spec: ClusterSpec,
    *,
    name: str = "",
    stop: threading.Event | None = None,
    on_wait: Callable[[str], None] = lambda _: None,
    n_images: int | None = None,
) -> Iterator[Client]:
    """Start or find the cluster and wait for workers; in the end, also after an error, stop all that was started.

    Parameters
    ----------
    spec : ClusterSpec
    name : str
        Name of the jobs; queued jobs of this name, left by a dead run, are cancelled first. Empty makes a new name.
    stop : threading.Event, optional
        Once set, waiting ends.
    on_wait : callable
        Called every few seconds with a text about the workers that are there and those that are missing.
    n_images : int, optional
        Number of images; workers that would get none are not started.

    Raises
    ------
    UsageError
        When this machine cannot start such a cluster.
    FeaturemapsError
        When a given scheduler does not answer, or a group got no worker.
    StoppedError
        When ``stop`` was set before the workers were there.
    """
    name = name or f"featuremaps-{secrets.token_hex(4)}"
    with dask.config.set(DASK_SETTINGS), spec.connect(name, stop, on_wait, n_images) as client:
        yield client


@contextlib.contextmanager
def with_client(
    job: Job,
    client: Client | None,
    cluster_file: Path,
    stop: threading.Event | None = None,
    on_wait: Callable[[str], None] = lambda _: None,
    n_images: int | None = None,
    spec: ClusterSpec | None = None,
) -> Iterator[Client]:
    """Yield the given client, or a client of the cluster that the job names; it is read from the file unless ``spec`` gives it."""
    if client is not None:
        yield client
        return
    spec = spec or cluster_of(job, cluster_file)
    with connect(spec, name=job_name(job.store), stop=stop, on_wait=on_wait, n_images=n_images) as connected:
        yield connected


def cluster_of(job: Job, cluster_file: Path) -> ClusterSpec:
    """The cluster that a job names, with the job's own settings for workers.

    Raises
    ------
    UsageError
        As raised by `load_cluster`, or when the job has settings that the cluster does not accept.
    """
    return load_cluster(job.cluster, cluster_file).for_job(job)


def job_name(store: str) -> str:
    """Name of a store's jobs in a batch system; the same for every spelling of the store's path."""
    place_ = str(place(store).absolute())
    return f"featuremaps-{hashlib.sha256(place_.encode(errors='surrogateescape')).hexdigest()[:8]}"
