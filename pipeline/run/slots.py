"""What workers offer: the number of batches that they read and extract at once, and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed import Client

from pipeline.errors import FeaturemapsError
from pipeline.text import count

ROLES = ("read", "extract", "write")


class WorkerSlots(NamedTuple):
    """What one worker offers."""

    read: int
    """Batches that it reads at once."""
    extract: int
    """Batches that it extracts at once."""
    memory_limit_bytes: int
    """0 for no limit."""
    has_gpu: bool
    """Whether it names a GPU as a resource; the worker itself finds out whether it can use one."""
    is_whole: bool
    """Whether it can read and write as many batches as it extracts, so that one task may do all stages of a batch."""
    is_plain: bool = False
    """Whether it names no roles and may take any: its tasks then ask for none."""


def needs(*roles: str, is_plain: bool) -> dict[str, int]:
    """Resources that a task of these roles asks for; none if the workers name none."""
    return {} if is_plain else dict.fromkeys(roles, 1)


def scheduler_workers(client: Client) -> dict[str, Any]:
    """What the scheduler knows of its workers now, by address; `Client.scheduler_info` may return older values.

    Raises
    ------
    ConnectionError
        When the scheduler is gone.
    """
    if client.status != "running" or client.scheduler is None:
        raise ConnectionError(f"connection to {client} is {client.status}")
    try:
        workers: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    except OSError as error:  # also after a timeout
        raise ConnectionError(f"{client} did not say what workers there are: {error}") from error
    return workers


def worker_slots(client: Client) -> dict[str, WorkerSlots]:
    """What each worker offers, by address.

    On one machine, workers that name no role at all (as with a plain ``Client()``) may take any, one batch per thread.

    Raises
    ------
    FeaturemapsError
        When no worker offers one of the roles.
    ConnectionError
        When the scheduler is gone.
    """
    workers = scheduler_workers(client)
    named = any(worker["resources"].get(role) for worker in workers.values() for role in ROLES)
    if not named and len({worker["host"] for worker in workers.values()}) == 1:
        return {address: _plain(worker) for address, worker in workers.items()}
    for role in ROLES:
        if not any(worker["resources"].get(role) for worker in workers.values()):
            raise FeaturemapsError(
                f"none of the {count(len(workers), 'worker')} offers the resource {role!r}, so its tasks would wait for ever: start "
                'workers with --resources "read=1 extract=1 write=1", or in Python Client(threads_per_worker=1, resources={"read": 1, '
                '"extract": 1, "write": 1}); run_job without a client starts its own'
            )
    return {address: slots_of(worker["resources"], worker["memory_limit"]) for address, worker in workers.items()}


def _plain(worker: Mapping[str, Any]) -> WorkerSlots:
    n, has_gpu = int(worker["nthreads"]), bool(worker["resources"].get("gpu"))
    return WorkerSlots(n, n, int(worker["memory_limit"] or 0), has_gpu, is_whole=True, is_plain=True)


def slots_of(resources: Mapping[str, float], memory_limit_bytes: int | None) -> WorkerSlots:
    """Slots of a worker with these resources and this memory."""
    read, extract, write = (int(resources.get(role, 0)) for role in ROLES)
    return WorkerSlots(read, extract, int(memory_limit_bytes or 0), bool(resources.get("gpu")), min(read, write) >= extract)
