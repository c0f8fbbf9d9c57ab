"""Dask's settings for a run: for the scheduler and client here, and as environment variables for workers elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pipeline.cluster.spec import GroupSpec
from pipeline.store.lock import WORKER_TTL_S

DASK_SETTINGS: dict[str, Any] = {
    # A batch's data stay on one worker, and a task without a worker fails instead of hanging.
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.no-workers-timeout": "120s",
    "distributed.scheduler.worker-ttl": f"{WORKER_TTL_S:.0f}s",
    # Dask suspects every task of a dead worker, not only the guilty one: `pipeline.run.crash_finder` finds that one.
    "distributed.scheduler.allowed-failures": 3,
    # The window bounds memory; spilling would only hide a plan that is too large.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": 0.85,
    "distributed.worker.memory.terminate": 0.97,
    # `groups.GroupCluster` replaces lost workers.
    "distributed.deploy.lost-worker-timeout": "1000h",
    "distributed.admin.large-graph-warning-threshold": "1GB",
    # Dask's self-monitoring, 50 and 100 times a second by default, costs a tenth of the throughput of two cores.
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "1s",
    "distributed.worker.profile.interval": "200ms",
    "distributed.nanny.pre-spawn-environ": {
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "DASK_LOGGING__DISTRIBUTED": "critical",  # a run gets what it needs to know about its workers by other ways
    },
}


def worker_environment() -> dict[str, str]:
    """Variables with the settings of a worker that this process does not start itself; it logs to its own file, so it logs more.

    Examples
    --------
    >>> worker_environment()["DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE"]
    '0.85'
    """
    settings = {
        f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
        for key, value in DASK_SETTINGS.items()
        if key.startswith(("distributed.worker.", "distributed.admin."))
    }
    process: dict[str, str] = DASK_SETTINGS["distributed.nanny.pre-spawn-environ"]
    return settings | process | {"DASK_LOGGING__DISTRIBUTED": "warning"}


def group_environment(group: GroupSpec, own_gpus: Iterable[int] | None = None) -> dict[str, str]:
    """All environment variables of a worker that this process does not start itself; the group's own take precedence.

    ``own_gpus`` are the GPUs of the machine that the worker may use. None leaves them to whoever assigns GPUs.
    """
    is_given = group.gpus and own_gpus is None
    visible = {} if is_given else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, own_gpus or ()))}
    return worker_environment() | visible | group.environment
