"""Inside the driver's job: run until the store is complete or the time is nearly over; then start another attempt."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from pipeline.cluster.connection import connector
from pipeline.cluster.submit.clock import Clock
from pipeline.cluster.submit.ending import finish
from pipeline.cluster.submit.next_attempt import NextAttempt
from pipeline.cluster.submit.script import Order
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.run.lifecycle import run_job
from pipeline.run.summary import Progress


def attend(
    order: Order,
    *,
    stop: threading.Event,
    signalled: threading.Event,
    on_progress: Callable[[Progress], None],
    report: Callable[[Any], None],
    audit: Callable[[], Any],
) -> int:
    """Make one attempt.

    Parameters
    ----------
    order : Order
    stop : threading.Event
        Set by the caller or by this function when the job has to end.
    signalled : threading.Event
        Set only by a signal.
    on_progress, report : callable
        Called with the `Progress`, and with reports for the user: the `Summary`, the audit, or text.
    audit : callable
        Audits the store; its result tells whether the store ``is_sound``.

    Returns
    -------
    int
        Exit code of the job.
    """
    clock = job_clock(order, signalled)
    next_attempt = NextAttempt(order, clock, report)
    timers = [
        clock.timer(4, stop.set),
        # A drain may take longer, where a storage hangs: then the batch system ends this process.
        clock.timer(1, next_attempt.come_back),
    ]
    try:
        next_attempt.begin()
        connect = connector(order.job, cluster_file=order.cluster_file)
        summary = run_job(order.job, connect, on_progress=on_progress, stop=stop)
        report(summary)
        is_complete = summary.outcome == "complete"
    except UsageError:
        raise
    except (FeaturemapsError, OSError) as error:
        report(str(error))
        is_complete = False
    finally:
        for timer in timers:
            timer.cancel()
    return finish(order, clock, summary, report=report, audit=audit) if is_complete else next_attempt.come_back()


def job_clock(order: Order, signalled: threading.Event) -> Clock:
    """The time of the driver's job."""
    return Clock(order.spec.driver.walltime or order.spec.walltime, signalled)
