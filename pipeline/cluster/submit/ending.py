"""The end of a complete run: audit the store and write a report page, as long as the job has time."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

from pipeline.cluster import batch_commands
from pipeline.cluster.submit.clock import Clock
from pipeline.cluster.submit.script import Order, report_page
from pipeline.errors import EXIT_FAILED
from pipeline.run.bounded import bounded_process
from pipeline.run.summary import Summary

PAGE_S = 300.0
"""The longest time for the page at the end."""
_SAID_BYTES = 1000


def finish(order: Order, clock: Clock, summary: Summary, *, report: Callable[[Any], None], audit: Callable[[], Any]) -> int:
    """Audit the store if wanted, and write its page; return the exit code. The arguments are those of `inside_job.attend`."""
    code = _audit(order, clock, summary, report, audit) if order.verify else summary.exit_code
    _write_page(order, clock, report)
    return code


def _audit(order: Order, clock: Clock, summary: Summary, report: Callable[[Any], None], audit: Callable[[], Any]) -> int:
    timer = clock.timer(1, lambda: _end_without_audit(order, report))
    try:
        found = audit()
    finally:
        timer.cancel()
    report(found)
    return summary.exit_code if found.is_sound else EXIT_FAILED


def _end_without_audit(order: Order, report: Callable[[Any], None]) -> None:
    """End the process: nothing else stops an audit, and the audit only reads."""
    report(
        f"the store is complete, but the job's time ended before its audit did: nothing is known to be wrong, but not everything "
        f"was checked; run `featuremaps verify {order.job.store}`, or give the driver a longer walltime"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    for process in multiprocessing.active_children():
        process.kill()
    os._exit(EXIT_FAILED)


def _write_page(order: Order, clock: Clock, report: Callable[[Any], None]) -> None:
    """Write a report beside the driver's log, in a separate process, so that a failure does not affect the run."""
    page, store, driver = report_page(order), order.job.store, order.spec.driver
    command = [sys.executable, "-P", "-m", "pipeline", "report", store, "-o", str(page)]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        limit_s = max(1.0, min(PAGE_S, clock.left_s - clock.quarter_s))
        _run_apart(command, limit_s=limit_s, n_bytes=int(driver.memory) // 2, n_threads=driver.threads)
    except (OSError, subprocess.SubprocessError) as error:
        report(
            f"the page about the store was not written ({batch_commands.said(error)}): the run itself is not affected; `featuremaps report "
            f"{store}` writes it"
        )
    else:
        report(f"page about the store: {page}")


def _run_apart(command: list[str], *, limit_s: float, n_bytes: int, n_threads: int) -> None:
    """Run a command in its own session, with limits on its time and on the data of each of its processes.

    Raises
    ------
    subprocess.SubprocessError
        When it took too long or failed, with its output.
    """
    limits = {resource.RLIMIT_DATA: n_bytes}
    with tempfile.TemporaryFile() as said:  # no pipe: it might never be closed
        with bounded_process(command, n_threads=n_threads, limits=limits, stderr=said) as process:
            code = process.wait(limit_s)
        if code:
            said.seek(0)
            raise subprocess.CalledProcessError(code, command, stderr=said.read()[-_SAID_BYTES:].decode(errors="replace"))
