"""Checks the workers of a cluster, after starting it or connecting to one that runs."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from distributed import Client

from pipeline.checks.finding import Finding
from pipeline.cluster.finding import compare_versions
from pipeline.cluster.session import connect
from pipeline.cluster.spec import ClusterSpec
from pipeline.errors import FeaturemapsError
from pipeline.run.admission import ask, having_gpus
from pipeline.run.slots import scheduler_workers, worker_slots
from pipeline.run.worker_versions import asking_for_versions, n_gpus_there
from pipeline.store.objects import Place, delete, nearest_folder, put
from pipeline.text import count

MAX_WAIT_S = 120.0
"""The longest wait for workers: nobody watches a terminal for an hour, and a longer queue is reported."""


def started(
    spec: ClusterSpec,
    store: Place | None,
    stop: threading.Event | None = None,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Iterator[Finding]:
    """Start the cluster, or connect to one that runs, and check its workers.

    Parameters
    ----------
    spec : ClusterSpec
    store : Place, optional
        Place of a store that all workers have to reach.
    stop, on_wait
        Same as for `cluster.connect`.
    """
    what = "scheduler" if spec.runs_already else "starting"
    spec = spec.waiting_at_most(MAX_WAIT_S)
    try:
        with connect(spec, stop=stop, on_wait=on_wait) as client:
            yield from _workers(client, spec)
            yield from _roles(client)
            yield from _worker_versions(client)
            yield from _worker_gpus(client)
            if store is not None:
                yield from _worker_places(client, store)
    except FeaturemapsError as error:
        yield Finding("FAIL", what, str(error), "correct what the error names")


def _workers(client: Client, spec: ClusterSpec) -> Iterator[Finding]:
    if spec.runs_already:
        n = len(scheduler_workers(client))
        yield Finding("ok" if n else "FAIL", "workers", f"{n} at {spec.describe()}", "" if n else "start some: dask worker")
        return
    for group, (n, wanted) in client.cluster.counts().items():
        if n == wanted:
            yield Finding("ok", f"group {group}", f"all of {wanted} workers are there")
        else:
            remedy = "" if spec.is_here else "a run starts with one worker, and uses the others when they come"
            yield Finding("note" if n else "FAIL", f"group {group}", f"{n} of {count(wanted, 'worker')} there yet", remedy)


def _roles(client: Client) -> Iterator[Finding]:
    try:
        slots = worker_slots(client).values()
    except FeaturemapsError as error:
        yield Finding("FAIL", "roles", str(error), "start the workers with these resources, or correct the roles of the groups")
        return
    text = f"{sum(worker.read for worker in slots)} batches are read at once, {sum(worker.extract for worker in slots)} extracted"
    yield Finding("ok", "roles", text)


def _worker_versions(client: Client) -> Iterator[Finding]:
    everybody = scheduler_workers(client)
    answers = ask(client, asking_for_versions(), everybody)
    for versions, workers in _by_answer({address: tuple(found.items()) for address, found in answers.items()}).items():
        yield compare_versions(f"versions of {count(len(workers), 'worker')}", dict(versions))
    silent = set(everybody) - set(answers)
    if silent:
        found = f"{len(silent)} of {len(everybody)} workers gave no answer; one that hangs keeps all back: {', '.join(sorted(silent)[:3])}"
        yield Finding("FAIL", "answers of workers", found, "look at their logs, and start them again")


def _worker_gpus(client: Client) -> Iterator[Finding]:
    for n, workers in _by_answer(ask(client, n_gpus_there, having_gpus(scheduler_workers(client)))).items():
        found = f"{count(len(workers), 'worker')} that say they have one see {n}"
        if n:
            yield Finding("ok", "GPUs of workers", found)
        else:
            remedy = "check the driver there, that the batch system gives the GPU (gpus, options), and that torch there has CUDA"
            yield Finding("FAIL", "GPUs of workers", f"{found}: {', '.join(workers[:3])}", remedy)


def _worker_places(client: Client, store: Place) -> Iterator[Finding]:
    """Check that all workers can read a file written beside the store: a different disk with the same path would not have it."""
    token = uuid.uuid4().hex
    folder = nearest_folder(store)
    probe = folder / f"doctor.{token}.partial"
    put(probe, token.encode())

    def read() -> str:
        try:
            return "it" if probe.read_bytes() == token.encode() else "something else"
        except OSError as error:
            return str(error.strerror or error)

    try:
        answers = _by_answer(ask(client, read, scheduler_workers(client)))
    finally:
        delete(probe)
    for answer, workers in answers.items():
        if answer == "it":
            yield Finding("ok", "store from workers", f"{count(len(workers), 'worker')} read what was written at {folder}")
        else:
            remedy = "mount the same file system there, or export the bucket's credentials there"
            yield Finding("FAIL", "store from workers", f"{', '.join(workers[:3])} do not see {folder} ({answer})", remedy)


def _by_answer(answers: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Addresses of workers, grouped by their answer."""
    found: dict[Any, list[str]] = {}
    for address, answer in answers.items():
        found.setdefault(answer, []).append(address)
    return found
