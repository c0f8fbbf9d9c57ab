"""Connects a run to its workers: checks the cluster before anything is written, connects only if there is work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Job
from pipeline.errors import UsageError, needs_extra
from pipeline.run.plan.memory import base_bytes, wanted_limit_bytes
from pipeline.store.objects import place
from pipeline.store.settings import is_compiled
from pipeline.store.store import is_store

if TYPE_CHECKING:
    from pipeline.cluster.spec import ClusterSpec


def connector(
    job: Job, client: Any = None, cluster_file: Path = Path("cluster.yaml")
) -> Callable[[threading.Event, Callable[[str], None], int], AbstractContextManager[Any]]:
    """Check the cluster that a job names, and return the callable with which `lifecycle.run_job` connects to it.

    Parameters
    ----------
    job : Job
    client : distributed.Client, optional
        Used instead of the job's cluster; it is left running.
    cluster_file : Path
        The file in which ``job.cluster`` is looked up.

    Raises
    ------
    UsageError
        As raised by `check_cluster`, and for a new store by `require_startable`.
    """
    spec = None
    if client is None:
        spec = check_cluster(job, cluster_file)
        if spec is not None:
            require_startable(spec)  # a run that cannot start must leave no new store behind

    @contextmanager
    def connect(stop: threading.Event, on_wait: Callable[[str], None], n_images: int) -> Iterator[Any]:
        from pipeline.cluster.session import with_client  # noqa: PLC0415 (no Dask when there is nothing to do)

        with with_client(job, client, cluster_file, stop, on_wait, n_images, spec) as connected:
            yield connected

    return connect


def require_startable(spec: ClusterSpec) -> None:
    """Check that this machine has what starts a cluster.

    Raises
    ------
    UsageError
        When a package, a command or a GPU is missing.
    """
    if spec.extra is not None:
        package, extra = spec.extra
        with needs_extra(extra, f"a cluster of kind {spec.kind}"):
            if find_spec(package) is None:  # not imported: dask_jobqueue takes the handler of SIGINT
                raise ImportError(f"No module named {package!r}")
    spec.require_usable()


def check_cluster(job: Job, cluster_file: Path) -> ClusterSpec | None:
    """Check what a job says about workers; for a new store, also read the cluster that it names, and return it.

    Raises
    ------
    UsageError
        When the workers would have too little memory, this machine lacks the GPUs, or the cluster's entry is wrong.
    """
    if job.cluster is None:
        limit = job.memory_limit_bytes
        has_torch = bool(job.gpus) or not is_compiled(job.extractor, job.dtype, job.decode.channels)
        needed = wanted_limit_bytes(base_bytes(has_torch=has_torch))
        if limit is not None and limit < needed:
            raise UsageError(
                f"workers have a limit of {limit / 2**20:.0f} MiB each, and they need "
                f"{needed / 2**20:.0f} MiB before they hold an image: they would be paused or killed "
                "as they start, so nothing was started; give a larger --memory-limit, or none"
            )
        if job.gpus:
            from pipeline.cluster.local import local_gpus  # noqa: PLC0415 (no Dask when there is nothing to do)

            local_gpus(job.gpus)
    elif not is_store(place(job.store).absolute()):
        from pipeline.cluster.config import load_cluster  # noqa: PLC0415 (no Dask when there is nothing to do)

        return load_cluster(job.cluster, cluster_file).for_job(job)
    return None
