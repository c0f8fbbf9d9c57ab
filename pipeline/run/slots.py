"""What workers offer: batches that each reads and extracts at once, and memory."""

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
    """0 for none."""
    has_gpu: bool
    """Whether it says so, as a resource; whether it computes on one is for it to see."""
    is_whole: bool
    """Whether it can also read and write as many batches at once, so that one task may do all of a batch."""
    is_plain: bool = False
    """Whether it names no roles, and may do all: its tasks then ask for none."""


def needs(*roles: str, is_plain: bool) -> dict[str, int]:
    """The resources that a task of some roles asks for; none where workers name none."""
    return {} if is_plain else dict.fromkeys(roles, 1)


def scheduler_workers(client: Client) -> dict[str, Any]:
    """What the scheduler knows of its workers, by address, asked just now: `Client.scheduler_info` may give what it asks for itself.

    Raises
    ------
    ConnectionError
        When the scheduler is gone.
    """
    if client.status != "running" or client.scheduler is None:
        raise ConnectionError(f"connection to {client} is {client.status}")
    try:
        workers: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    except OSError as error:  # also when it does not answer in time
        raise ConnectionError(f"{client} did not say what workers there are: {error}") from error
    return workers


def worker_slots(client: Client) -> dict[str, WorkerSlots]:
    """What each worker offers, by address.

    Workers of one machine that name no role at all, as those of a plain ``Client()``, may do all, a batch per thread.

    Raises
    ------
    FeaturemapsError
        When a role has no worker.
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
    """What a worker with these resources and this memory offers."""
    read, extract, write = (int(resources.get(role, 0)) for role in ROLES)
    return WorkerSlots(read, extract, int(memory_limit_bytes or 0), bool(resources.get("gpu")), min(read, write) >= extract)
