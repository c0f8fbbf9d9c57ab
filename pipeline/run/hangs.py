"""Finds workers that wait for a storage that does not answer, by their heartbeats, and replaces them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import signal
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from distributed import Client
from distributed.core import rpc

from pipeline.errors import FeaturemapsError
from pipeline.run.activity import METRIC
from pipeline.run.slots import scheduler_workers

logger = logging.getLogger(__name__)

KILL_S = 2.0  # a killed process that is still there after this time is stuck in the kernel
REPLACE_S = 60.0


class Stall(NamedTuple):
    """A task that has done the same thing for too long."""

    worker: str
    key: str
    what: str
    """An image's path, or `current.STORE`."""
    since_s: float


def find_stalls(client: Client, run_id: str, deadline_s: float) -> list[Stall]:
    """Find tasks of a run that have spent longer than ``deadline_s`` on one image or one write.

    The workers' last heartbeats tell. Other runs on the same workers look after their own tasks.
    """
    workers = scheduler_workers(client)
    return [
        Stall(address, key, what, since_s)
        for address, worker in workers.items()
        for key, what, since_s in worker["metrics"].get(METRIC, ())
        if since_s > deadline_s and run_id in key
    ]


def replace_worker(client: Client, address: str) -> None:
    """Kill a worker's process and have its nanny start another; its tasks go to others at once, and none is blamed for it."""
    try:
        client.run_on_scheduler(_replace, address)
    except (ImportError, AttributeError) as error:
        raise FeaturemapsError(
            f"worker {address} waits for a storage that does not answer, and its scheduler cannot have it replaced ({error}): the run "
            "stopped, and what was committed stands; install featuremaps where the scheduler runs, look at the storage, and run again"
        ) from error


async def _replace(address: str, dask_scheduler: Any) -> None:
    """On the scheduler: forget the worker before its process ends, so that its tasks are not blamed for that."""
    worker = dask_scheduler.workers.get(address)
    if worker is None:
        return
    # A forgotten worker that still sends a heartbeat closes, and its nanny with it, which then starts no other: so it is stopped first.
    await _tell_nanny(dask_scheduler, worker.nanny, _stop)
    await dask_scheduler.remove_worker(address, stimulus_id="featuremaps-stalled", expected=True, close=not worker.nanny)
    await _tell_nanny(dask_scheduler, worker.nanny, _start_anew)


async def _tell_nanny(scheduler: Any, address: str | None, function: Callable[..., Awaitable[None]]) -> None:
    if address:
        with contextlib.suppress(OSError, asyncio.TimeoutError):  # the other workers go on without it
            async with rpc(address, connection_args=scheduler.connection_args) as nanny:
                await asyncio.wait_for(nanny.run(function=pickle.dumps(function)), REPLACE_S)


async def _stop(dask_worker: Any) -> None:
    """On the nanny: have the process send nothing more. It is killed also if the word to do so never comes."""
    process = dask_worker.process
    os.kill(process.pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(2 * REPLACE_S, _kill, process)


def _kill(process: Any) -> None:
    with contextlib.suppress(ValueError, OSError):  # it was closed, or has just ended
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)


async def _start_anew(dask_worker: Any) -> None:
    """On the nanny: start another process when the old one has died, and leave it behind if it cannot die."""
    nanny, process = dask_worker, dask_worker.process
    os.kill(process.pid, signal.SIGKILL)
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(process.stopped.wait(), KILL_S)
        return
    process.on_exit = lambda _: None  # if it dies later, that says nothing about its successor
    nanny.process = None
    await nanny.instantiate()
