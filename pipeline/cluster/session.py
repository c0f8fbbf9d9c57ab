"""From an entry of ``cluster.yaml`` to a client whose workers are there; what was started is stopped on every way out."""

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
    """Start or find the cluster and wait for workers; what was started is stopped on every way out.

    Parameters
    ----------
    spec : ClusterSpec
    name : str
        What jobs are called; those of this name that a dead run left in the queue are taken back. Empty is a new one.
    stop : threading.Event, optional
        Ends the waiting.
    on_wait : callable
        Called every few seconds with what workers there are, and what is known of the others.
    n_images : int, optional
        Workers that would get none of so many images are not started.

    Raises
    ------
    UsageError
        When this machine cannot start such a cluster.
    FeaturemapsError
        When a given scheduler does not answer, or no worker of some group came.
    StoppedError
        When ``stop`` was set before workers were there.
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
) -> Iterator[Client]:
    """Yield the given client, or one of the cluster that the job names."""
    if client is not None:
        yield client
        return
    spec = cluster_of(job, cluster_file)
    with connect(spec, name=job_name(job.store), stop=stop, on_wait=on_wait, n_images=n_images) as connected:
        yield connected


def cluster_of(job: Job, cluster_file: Path) -> ClusterSpec:
    """The cluster that a job names, with what the job itself says of workers.

    Raises
    ------
    UsageError
        As `load_cluster`, or when both say how many workers there are to be.
    """
    return load_cluster(job.cluster, cluster_file).for_job(job)


def job_name(store: str) -> str:
    """What the jobs that work for a store are called in a batch system; the same however its place is spelt."""
    place_ = str(place(store).absolute())
    return f"featuremaps-{hashlib.sha256(place_.encode(errors='surrogateescape')).hexdigest()[:8]}"
