"""From an entry of ``cluster.yaml`` to a client whose workers are there; what was started is stopped on every way out."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import multiprocessing
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import dask
from distributed import Client

from pipeline.cluster import batch_commands
from pipeline.cluster.batch_workers import batch_launches
from pipeline.cluster.config import (
    LOOPBACK,
    AddressSpec,
    BatchSpec,
    ClusterSpec,
    CudaSpec,
    GroupSpec,
    KubernetesSpec,
    LocalSpec,
    SshSpec,
    load_cluster,
)
from pipeline.cluster.dask_settings import DASK_SETTINGS
from pipeline.cluster.groups import MAX_FALSE_STARTS, GroupCluster, Launch, local_launches
from pipeline.cluster.kubernetes import PodCluster, kubernetes_cluster
from pipeline.cluster.local import local_groups
from pipeline.cluster.ssh_workers import ssh_launches
from pipeline.config import Job
from pipeline.errors import FeaturemapsError, StoppedError, UsageError
from pipeline.store.objects import place

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 20.0
LOCAL_PATIENCE_S = 120.0
WAIT_LINE_S = 5.0
QUICK_S = 3.0


@contextlib.contextmanager
def connect(
    spec: ClusterSpec,
    *,
    name: str = "",
    stop: threading.Event | None = None,
    on_wait: Callable[[str], None] = lambda _: None,
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
    with dask.config.set(DASK_SETTINGS):
        if isinstance(spec, AddressSpec):
            with _connect_address(spec) as client:
                yield client
            return
        if isinstance(spec, KubernetesSpec):
            with _quiet_dask(), kubernetes_cluster(spec, name) as pods:
                _wait_for_workers(pods, spec.start_timeout_s, stop, on_wait, everybody=False)
                with Client(pods) as client:
                    yield client
            return
        groups, launches, patience_s = _launches(spec, name)

        def sweep() -> None:
            """Take back jobs that were handed in without our hearing of it, as when the batch system was slow to answer."""
            if isinstance(spec, BatchSpec):
                with contextlib.suppress(FeaturemapsError):
                    _take_back(spec.kind, {f"{name}-{group}" for group in groups})

        settings: dict[str, Any] = {"distributed.scheduler.no-workers-timeout": f"{patience_s}s"}
        if not spec.dashboard:  # without one there are no pages about workers and tasks either, which are another part of Dask
            settings["distributed.scheduler.http.routes"] = ["distributed.http.health"]
        is_here = isinstance(spec, LocalSpec | CudaSpec)
        options = {
            "port": 0,
            "protocol": "tls://" if spec.tls else "tcp://",
            "security": spec.tls and spec.tls.security(),
            "dashboard_address": spec.dashboard or LOOPBACK,  # with no address Dask would take a fixed port
            "dashboard": spec.dashboard is not None,
        }
        options |= {"interface": spec.interface} if isinstance(spec, BatchSpec | SshSpec) else {"host": "127.0.0.1"}
        with (
            dask.config.set(settings),
            _quiet_dask(),
            _stopped(
                lambda: GroupCluster(launches, groups, options, patience_s, spec.tls and spec.tls.security()), sweep
            ) as cluster,
        ):
            _wait_for_workers(cluster, patience_s, stop, on_wait, everybody=is_here)
            with Client(cluster) as client:
                cluster.dashboard = client.dashboard_link if spec.dashboard else ""
                yield client


def _launches(
    spec: LocalSpec | CudaSpec | BatchSpec | SshSpec, name: str
) -> tuple[Mapping[str, GroupSpec], dict[str, Launch], float]:
    """The groups, how their workers are started, and how long that may take."""
    if isinstance(spec, LocalSpec | CudaSpec):
        groups = local_groups(spec)
        return groups, local_launches(groups, security=spec.tls and spec.tls.security()), LOCAL_PATIENCE_S
    if isinstance(spec, SshSpec):
        return spec.groups, ssh_launches(spec), spec.start_timeout_s
    batch_commands.require_commands(spec.kind, "the cluster")
    launches = batch_launches(spec, name)
    _take_back(spec.kind, {f"{name}-{group}" for group in spec.groups})
    return spec.groups, launches, spec.start_timeout_s


def _take_back(kind: str, names: set[str]) -> None:
    """Take back the jobs that a dead run left in the queue; there is none alive, as the store is locked."""
    try:
        left = [job.job_id for name in names for job in batch_commands.jobs_named(kind, name) if job.name == name]
    except (OSError, subprocess.SubprocessError) as error:
        raise FeaturemapsError(
            f"{batch_commands.SYSTEMS[kind].name} does not answer ({batch_commands.said(error)}): nothing was started; try again later"
        ) from error
    if left:
        logger.warning("taking back jobs that a run left in the queue: %s", ", ".join(left))
        batch_commands.cancel(kind, left)


@contextlib.contextmanager
def with_client(
    job: Job,
    client: Client | None,
    cluster_file: Path,
    stop: threading.Event | None = None,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Iterator[Client]:
    """Yield the given client, or one of the cluster that the job names."""
    if client is not None:
        yield client
        return
    spec = cluster_of(job, cluster_file)
    with connect(spec, name=job_name(job.store), stop=stop, on_wait=on_wait) as connected:
        yield connected


def cluster_of(job: Job, cluster_file: Path) -> ClusterSpec:
    """The cluster that a job names, with what the job itself says of workers.

    Raises
    ------
    UsageError
        As `load_cluster`, or when both say how many workers there are to be.
    """
    spec = load_cluster(job.cluster, cluster_file)
    if isinstance(spec, LocalSpec):
        wanted = {"workers": job.workers, "memory": job.memory_limit_bytes, "gpus": job.gpus}
        given = {key: value for key, value in wanted.items() if value is not None}
        if spec.groups and given:
            raise UsageError(
                f"cluster {job.cluster!r} has groups with workers, memory and GPUs of their own, and {', '.join(given)} were given for "
                "the run: nothing was started; leave them away, or write them into the groups"
            )
        spec = spec.model_copy(update=given)
    return spec


def job_name(store: str) -> str:
    """What the jobs that work for a store are called in a batch system; the same however its place is spelt."""
    place_ = str(place(store).absolute())
    return f"featuremaps-{hashlib.sha256(place_.encode(errors='surrogateescape')).hexdigest()[:8]}"


def _wait_for_workers(
    cluster: GroupCluster | PodCluster,
    patience_s: float,
    stop: threading.Event | None,
    on_wait: Callable[[str], None],
    *,
    everybody: bool,
) -> None:
    """Start the workers, and wait for one of each group, or for all."""
    started = time.monotonic()
    next_line = started + (WAIT_LINE_S if everybody else 0.0)  # processes of this machine are there at once
    cluster.start()
    while True:
        counts = cluster.counts()
        if all(n == wanted if everybody else n for n, wanted in counts.values()):
            return
        if stop is not None and stop.is_set():
            raise StoppedError("stopped while waiting for workers: nothing was computed, nothing is lost; run again to go on")
        waited_s = time.monotonic() - started
        if cluster.is_hopeless(MAX_FALSE_STARTS, everybody=everybody):
            raise FeaturemapsError(
                f"workers could not be started, in {MAX_FALSE_STARTS} tries each ({cluster.describe_troubles()}): nothing was computed, "
                "what was started was stopped, and what was committed stands; mend what is said there, or ask for less in cluster.yaml, "
                "and run again"
            )
        if waited_s > patience_s:
            absent = ", ".join(repr(group) for group, (n, wanted) in counts.items() if n < (wanted if everybody else 1))
            raise FeaturemapsError(
                f"no worker of group {absent} came within {waited_s:.0f} s ({cluster.describe()}): nothing was computed, what was started "
                "was stopped, and what was committed stands; ask for less in cluster.yaml, or wait longer (start_timeout_s), and run again"
            )
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + WAIT_LINE_S
            on_wait(cluster.describe())
        if everybody or waited_s < QUICK_S:  # later its own clock looks, as a queue may be asked for hours
            cluster.start()
        time.sleep(0.05 if waited_s < QUICK_S else 0.5)


@contextlib.contextmanager
def _stopped(start: Callable[[], GroupCluster], sweep: Callable[[], None]) -> Iterator[GroupCluster]:
    """Start the cluster and stop it; a process that is stuck in the kernel cannot be stopped, and must not keep this one from ending."""
    others = set(multiprocessing.active_children())
    try:
        with _without_interrupts():
            cluster = start()
    except RuntimeError as error:
        raise UsageError(
            f"the scheduler could not be started ({error}): nothing was started; check interface, dashboard and tls of the cluster"
        ) from error
    try:
        yield cluster
    finally:
        tornado = logging.getLogger("tornado.application")  # prints a traceback of the same error
        level = tornado.level
        try:
            tornado.setLevel(logging.CRITICAL)
            with _deaf():
                cluster.close()
        except (TimeoutError, AssertionError) as error:
            logger.warning("the cluster did not stop as it should: %s", error)
        finally:
            tornado.setLevel(level)
            sweep()
            for left in set(multiprocessing.active_children()) - others:
                left.kill()
                multiprocessing.process._children.discard(left)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let no Ctrl-C cut short what takes jobs and processes back; it takes a minute at most."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Dask's own lines below ERROR stay out of the terminal."""
    before = {name: logging.getLogger(name).level for name in ("distributed", "distributed.client", "distributed.gc")}
    for name, level in before.items():
        logging.getLogger(name).setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Threads and processes that start meanwhile never see SIGINT: a Ctrl-C at the terminal is for the driver alone, which drains."""
    resource_tracker.ensure_running()  # whose start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _connect_address(spec: AddressSpec) -> Iterator[Client]:
    client = Client.__new__(Client)  # in two steps, for what could not connect has to be closed
    try:
        client.__init__(spec.address, timeout=CONNECT_TIMEOUT_S, security=spec.tls and spec.tls.security())
    except (OSError, TimeoutError, ValueError, TypeError, AssertionError) as error:
        _close_unconnected(client)
        # Of a type when tls:// is asked for without certificates; an assertion when Dask's own thread did not start within 10 s.
        raise FeaturemapsError(
            f"no Dask scheduler answers at {spec.address} ({error}): nothing was started; check the address, that `dask scheduler` runs, "
            "and where it uses TLS (tls://) the certificates under tls"
        ) from error
    with client:
        yield client


def _close_unconnected(client: Client) -> None:
    """Close a client that could not connect, and end its thread.

    Dask does neither. Python's collector of garbage would close it some time, maybe in the thread that is to run the event loop of the next
    client, which would then wait for a lock of the one that starts it: 10 s, and an AssertionError.
    """
    with contextlib.suppress(Exception):
        client.close()
    client._loop_runner.stop()
