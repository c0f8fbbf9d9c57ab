"""A run as a program of yours starts it: on a client of its own or on the job's cluster, and drained by a Ctrl-C."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.checks.user_script import require_guard
from pipeline.cluster.connection import connector
from pipeline.config import Job
from pipeline.errors import UsageError
from pipeline.run import lifecycle
from pipeline.run.summary import Progress, Summary
from pipeline.run.summary_text import headline

logger = logging.getLogger(__name__)


def run_job(
    job: Job,
    client: Any = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    cluster_file: Path = Path("cluster.yaml"),
) -> Summary:
    """Bring a store up to date with its source: the first run, a resumed one and tonight's are the same call.

    Parameters
    ----------
    job : Job
    client : distributed.Client, optional
        The cluster to use; it is left as it is. None starts the one that the job names, and only if there is work.
    on_progress : callable, optional
        Called about every second with the `Progress`. Without it nothing is printed.
    stop : threading.Event, optional
        Once set, the run finishes what is in flight, commits it and ends as ``stopped``. Without it a Ctrl-C does the same.
    cluster_file : Path
        Where ``job.cluster`` is looked up.

    Returns
    -------
    Summary
        Also left in the store as the run's receipt.

    Raises
    ------
    UsageError
        When source, settings, store, cluster or client do not fit; nothing was started.
    StoreBusyError
        When another run holds the store.
    FeaturemapsError
        When the run had to end early; what was committed stands and the same call goes on from there.
    KeyboardInterrupt
        After a Ctrl-C, once what was in flight is committed and the receipt is written. A second Ctrl-C does not wait for it.

    Examples
    --------
    >>> from distributed import Client
    >>> import pipeline
    >>> job = pipeline.load_job("job.yaml")  # doctest: +SKIP
    >>> with Client("tcp://scheduler:8786") as client:  # doctest: +SKIP
    ...     summary = pipeline.run_job(job, client)
    >>> summary.outcome, summary.n_done  # doctest: +SKIP
    ('complete', 28)
    """
    if client is not None:
        _check_client(client)
    elif job.cluster is None:
        require_guard("run_job")
    connect = connector(job, client, cluster_file)
    with _stop_on_interrupt(stop) as (stop_asked, interrupted):
        summary = lifecycle.run_job(job, connect, on_progress=on_progress, stop=stop_asked)
    if interrupted.is_set():  # a loop over jobs, or the next cell, must not go on as if nothing had happened
        raise KeyboardInterrupt(f"{headline(summary)}. What was computed is committed; run the job again to go on")
    return summary


def _check_client(client: Any) -> None:
    """Refuse what is no client, or one that gives coroutines where the run expects answers."""
    from distributed import Client  # noqa: PLC0415 (no Dask when there is nothing to do)

    if not isinstance(client, Client):
        raise UsageError(
            f"client must be a distributed.Client; got {type(client).__name__}: nothing was started; give Client(...) of the cluster or "
            "of its address, or no client"
        )
    if client.asynchronous:
        raise UsageError(
            "this client is asynchronous, and run_job waits for its answers: nothing was started; give a Client without "
            "asynchronous=True, or call `await asyncio.to_thread(pipeline.run_job, job, client)`"
        )


@contextmanager
def _stop_on_interrupt(stop: threading.Event | None) -> Iterator[tuple[threading.Event | None, threading.Event]]:
    """Have the first Ctrl-C ask for a drain and a second end at once.

    Whoever gives a ``stop``, handles SIGINT or calls from another thread decides about it: nothing is changed then.

    Yields
    ------
    (Event or None, Event)
        What asks the run to stop, and what says that a Ctrl-C did.
    """
    interrupted = threading.Event()
    is_main = threading.current_thread() is threading.main_thread()
    if stop is not None or not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stop, interrupted
        return

    def ask(_number: int, _frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        logger.warning("interrupted: finishing what is in flight; nothing is lost; interrupt again to end at once")

    signal.signal(signal.SIGINT, ask)
    try:
        yield interrupted, interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
