"""Starts a scheduler in this process, launches workers and waits for them; in the end, also after an error, stops all."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing import resource_tracker
from typing import Any, Protocol

import dask
from distributed import Client

from pipeline.cluster.groups import MAX_FALSE_STARTS, GroupCluster, Launch
from pipeline.cluster.spec import LOOPBACK, GroupSpec, StartedSpec
from pipeline.errors import FeaturemapsError, StoppedError, UsageError

logger = logging.getLogger(__name__)

FOR_DRIVER = (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a terminal or a batch system sends to all processes. Not SIGTERM: Dask ends workers with it."""
WAIT_LINE_S = 5.0
QUICK_S = 3.0
WITHIN = "inproc://"
"""The prefix of addresses that only this process reaches."""


class WorkerCluster(Protocol):
    """The interface of a cluster whose workers are waited for."""

    def start(self) -> None:
        """Begin to start the missing workers."""

    def counts(self) -> Mapping[str, tuple[int, int]]:
        """Per group, the number of workers that are there and the number wanted."""

    def is_hopeless(self, n_tries: int, *, everybody: bool) -> bool:
        """Whether starting failed ``n_tries`` times for all workers of a group, or (``everybody``) for any worker."""

    def describe_troubles(self) -> str:
        """Why workers could not be started."""

    def describe(self) -> str:
        """Per group, how many workers are there, and what is known about the missing ones."""


@contextlib.contextmanager
def start(
    spec: StartedSpec, name: str, stop: threading.Event | None, on_wait: Callable[[str], None], n_images: int | None = None
) -> Iterator[Client]:
    """Start scheduler and workers, wait for workers, yield a client and stop all; see `session.connect`."""
    groups, patience_s, security = spec.worker_groups(), spec.patience_s, spec.security
    launches = needed(spec.launches(name), groups, n_images)
    spec.take_back(name)

    def sweep() -> None:
        """Cancel jobs that were submitted without our knowledge, for instance because the batch system answered late."""
        with contextlib.suppress(FeaturemapsError):
            spec.take_back(name)

    settings: dict[str, Any] = {"distributed.scheduler.no-workers-timeout": f"{patience_s}s"}
    if not spec.dashboard:  # without a dashboard, Dask's pages about workers and tasks are off too
        settings["distributed.scheduler.http.routes"] = ["distributed.http.health"]
    listening: dict[str, Any] = {"port": 0, "protocol": spec.protocol} | spec.listening
    if security is None:  # beside the socket, a way for the client of this process
        listening = {name: [value, None] for name, value in listening.items()} | {"protocol": [spec.protocol, WITHIN]}
    options = {
        "security": security,
        "dashboard_address": spec.dashboard or LOOPBACK,  # without an address Dask would take a fixed port
        "dashboard": spec.dashboard is not None,
    } | listening
    with (
        dask.config.set(settings),
        quiet_dask(),
        _stopped(lambda: GroupCluster(launches, groups, options, patience_s, security), sweep) as cluster,
    ):
        wait_for_workers(cluster, patience_s, stop, on_wait, everybody=spec.is_here)
        with _client(cluster) as client:
            cluster.dashboard = client.dashboard_link if spec.dashboard else ""
            yield client


def _client(cluster: GroupCluster) -> Client:
    """Connect within the process where the scheduler listens there: a socket costs driver and scheduler 30 % more for each task."""
    within = [listener.contact_address for listener in cluster.scheduler.listeners if listener.contact_address.startswith(WITHIN)]
    if not within:
        return Client(cluster)
    client = Client(within[0], loop=cluster.loop)
    client.cluster = cluster
    return client


def needed(launches: Mapping[str, Launch], groups: Mapping[str, GroupSpec], n_images: int | None) -> Mapping[str, Launch]:
    """Per group, as many workers as get an image for each of their threads; all of them if the number of images is unknown."""
    if n_images is None:
        return launches
    by_group = {group: [name for name, launch in launches.items() if launch.group == group] for group in groups}
    most = {group: max(1, -(-n_images // spec.threads)) for group, spec in groups.items()}
    return {name: launches[name] for group, names in by_group.items() for name in names[: most[group]]}


def wait_for_workers(
    cluster: WorkerCluster,
    patience_s: float,
    stop: threading.Event | None,
    on_wait: Callable[[str], None],
    *,
    everybody: bool,
) -> None:
    """Start the workers, and wait for one of each group, or for all if ``everybody``.

    Raises
    ------
    StoppedError
        When ``stop`` was set before the workers were there.
    FeaturemapsError
        When the workers cannot be started, or did not come in time.
    """
    started = time.monotonic()
    # Processes of this machine come at once, so there is nothing to report at first.
    next_line = started + (WAIT_LINE_S if everybody else 0.0)
    cluster.start()
    while True:
        counts = cluster.counts()
        if all(n == wanted if everybody else n for n, wanted in counts.values()):
            return
        if stop is not None and stop.is_set():
            raise StoppedError("stopped while waiting for workers: nothing was computed, nothing is lost; run again to go on")
        waited_s = time.monotonic() - started
        _require_hope(cluster, counts, waited_s, patience_s, everybody=everybody)
        if time.monotonic() >= next_line:
            next_line = time.monotonic() + WAIT_LINE_S
            on_wait(cluster.describe())
        if everybody or waited_s < QUICK_S:  # later the cluster's own timer looks, because a queue may be asked for hours
            cluster.start()
        time.sleep(0.05 if waited_s < QUICK_S else 0.5)


def _require_hope(
    cluster: WorkerCluster, counts: Mapping[str, tuple[int, int]], waited_s: float, patience_s: float, *, everybody: bool
) -> None:
    """Raise FeaturemapsError if the workers cannot be started, or did not come in time."""
    if cluster.is_hopeless(MAX_FALSE_STARTS, everybody=everybody):
        raise FeaturemapsError(
            f"workers could not be started, in {MAX_FALSE_STARTS} tries each ({cluster.describe_troubles()}): nothing was computed, "
            "what was started was stopped, and what was committed stands; correct what is named there, or ask for less in cluster.yaml, "
            "and run again"
        )
    if waited_s > patience_s:
        absent = ", ".join(repr(group) for group, (n, wanted) in counts.items() if n < (wanted if everybody else 1))
        raise FeaturemapsError(
            f"no worker of group {absent} came within {waited_s:.0f} s ({cluster.describe()}): nothing was computed, what was started "
            "was stopped, and what was committed stands; ask for less in cluster.yaml, or wait longer (start_timeout_s), and run again"
        )


@contextlib.contextmanager
def _stopped(start: Callable[[], GroupCluster], sweep: Callable[[], None]) -> Iterator[GroupCluster]:
    """Start the cluster and stop it in the end. A process that is stuck in the kernel cannot be stopped, and must not block this one."""
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
        with _deaf():
            _close(cluster, sweep)
            for left in set(multiprocessing.active_children()) - others:
                left.kill()
                multiprocessing.process._children.discard(left)  # type: ignore[attr-defined]


def _close(cluster: GroupCluster, sweep: Callable[[], None]) -> None:
    """Stop the cluster, and cancel jobs that it does not know of."""
    tornado = logging.getLogger("tornado.application")  # it prints a traceback of the same error
    level = tornado.level
    try:
        tornado.setLevel(logging.CRITICAL)
        cluster.close()
    except (TimeoutError, AssertionError) as error:
        logger.warning("the cluster did not stop as it should: %s", error)
    finally:
        tornado.setLevel(level)
        sweep()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Block signals while jobs and processes are being stopped, which takes a minute at most.

    A Ctrl-C during this time is lost. Any other signal that the program handles reaches its handler afterwards.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    handled = {number for number in (*FOR_DRIVER, signal.SIGTERM) if callable(signal.getsignal(number))}
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in handled | {signal.SIGINT}}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for again in dict.fromkeys(heard):
            if again != signal.SIGINT:
                signal.raise_signal(again)


@contextlib.contextmanager
def quiet_dask() -> Iterator[None]:
    """Keep Dask's log lines below ERROR off the terminal."""
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
    """Hide these signals from threads and processes that start meanwhile: only the driver handles them, by draining."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_DRIVER)
    resource_tracker.ensure_running()  # it unblocks SIGINT as it starts
    signal.pthread_sigmask(signal.SIG_BLOCK, FOR_DRIVER)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
