"""Inside the driver's job: run until the store is complete or the time is nearly over, and have the rest done by another attempt."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.cluster import batch_commands
from pipeline.cluster.batch_workers import margin_s
from pipeline.cluster.connection import connector
from pipeline.cluster.submit.hand_in import adopt, hand_in, n_settled, new_submission
from pipeline.cluster.submit.record import Submission, last_submission
from pipeline.cluster.submit.script import JOB_ID_VARIABLES, Order, report_page
from pipeline.errors import EXIT_FAILED, EXIT_RUN_AGAIN, FeaturemapsError, UsageError
from pipeline.run.lifecycle import run_job
from pipeline.run.summary import Progress, Summary
from pipeline.store.objects import place
from pipeline.store.run_ids import next_number
from pipeline.store.store import Store, is_store, receipt_ids

logger = logging.getLogger(__name__)
T = TypeVar("T")

KILLED_S = 120.0
"""How long a job that was requeued waits for its end."""
PATIENCE_S = 300.0
"""How long a batch system or a storage may fail to answer, as while its server is started anew."""
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
COUNT_S = 60.0
"""How long the ledger may take to be counted, where a storage hangs."""
PAGE_S = 300.0
"""How long the page at the end may take."""
_SAID_BYTES = 1000
VAIN_PAUSE_S = 30.0
LONGEST_VAIN_PAUSE_S = 600.0


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
        Set from outside, and from here, when the job is to end.
    signalled : threading.Event
        Set by a signal only.
    on_progress, report : callable
        Called with the `Progress`, and with what a person wants to read: the `Summary`, the audit, or text.
    audit : callable
        Looks through the store; what it returns says whether it ``is_sound``.

    Returns
    -------
    int
        Exit code of the job.
    """
    attempt = Attempt(order, signalled, report, audit)
    timers = [
        attempt.timer(4, stop.set),
        # A drain may take longer, where a storage hangs: then the batch system ends this process.
        attempt.timer(1, attempt.come_back),
    ]
    try:
        attempt.begin()
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
    return attempt.finish(summary) if is_complete else attempt.come_back()


class Attempt:
    """One job, its time, and what is to become of the run after it."""

    def __init__(self, order: Order, signalled: threading.Event, report: Callable[[Any], None], audit: Callable[[], Any]) -> None:
        self.order, self.signalled, self.report, self.audit = order, signalled, report, audit
        self.kind = order.spec.kind
        self.job_id = os.environ.get(JOB_ID_VARIABLES[self.kind], "")
        walltime_s = order.spec.driver.walltime or order.spec.walltime
        self.quarter_s = margin_s(walltime_s) / 4
        self.end_s = time.monotonic() + walltime_s
        self.known: Submission | None = None
        self._number = sys.maxsize  # that a run of this attempt must have, at least
        self._turn = threading.Lock()
        self._code: int | None = None

    def begin(self) -> None:
        """See what is known of this job."""
        adopt(self.order, self.job_id)
        self.known = last_submission(place(self.order.job.store))
        self._number = next_number(receipt_ids(place(self.order.job.store)))

    def timer(self, n_quarters: int, function: Callable[[], Any]) -> threading.Timer:
        """Start one that ends some quarters of the margin before the walltime."""
        timer = threading.Timer(max(0.0, self._left_s() - n_quarters * self.quarter_s), function)
        timer.daemon = True
        timer.start()
        return timer

    def _left_s(self) -> float:
        return self.end_s - time.monotonic()

    def finish(self, summary: Summary) -> int:
        """Audit the store, if that is wanted, and write its page, as long as there is time."""
        code = self._audit(summary) if self.order.verify else summary.exit_code
        self._write_page()
        return code

    def _audit(self, summary: Summary) -> int:
        timer = self.timer(1, self._end_without_audit)
        try:
            audit = self.audit()
        finally:
            timer.cancel()
        self.report(audit)
        return summary.exit_code if audit.is_sound else EXIT_FAILED

    def _end_without_audit(self) -> None:
        """End the process, as nothing else ends an audit; it only reads."""
        self.report(
            f"the store is complete, and the job's time is up before its audit came to an end: nothing is known to be wrong, and not all "
            f"was looked at; run `featuremaps verify {self.order.job.store}`, or give the driver a longer walltime"
        )
        sys.stdout.flush()
        sys.stderr.flush()
        for process in multiprocessing.active_children():
            process.kill()
        os._exit(EXIT_FAILED)

    def _write_page(self) -> None:
        """Leave a report beside the driver's log, by a process of its own: whatever becomes of it, the run is none the worse."""
        page, store = report_page(self.order), self.order.job.store
        command = [sys.executable, "-P", "-m", "pipeline", "report", store, "-o", str(page)]
        driver = self.order.spec.driver
        try:
            page.parent.mkdir(parents=True, exist_ok=True)
            limit_s = max(1.0, min(PAGE_S, self._left_s() - self.quarter_s))
            _run_apart(command, limit_s=limit_s, n_bytes=int(driver.memory) // 2, n_threads=driver.threads)
        except (OSError, subprocess.SubprocessError) as error:
            self.report(
                f"the page about the store was not written ({batch_commands.said(error)}): "
                f"the run is none the worse; `featuremaps report {store}` "
                "writes it"
            )
        else:
            self.report(f"page about the store: {page}")

    def come_back(self) -> int:
        """Have the batch system start another attempt, unless these lead nowhere or somebody took the job back.

        Called once more, as when the time is up while this is at work, it only returns the exit code.
        """
        with self._turn:
            if self._code is None:
                try:
                    self._code = self._on_slurm() if self.kind == "slurm" else self._elsewhere()
                except (FeaturemapsError, OSError, subprocess.SubprocessError) as error:
                    self.report(
                        f"{batch_commands.SYSTEMS[self.kind].name} was asked for another attempt in vain "
                        f"({batch_commands.said(error)}), so there is none: "
                        "nothing is lost; submit again to go on"
                    )
                    self._code = EXIT_FAILED
        return self._code

    def _on_slurm(self) -> int:
        if not self._patiently(self._is_running):
            return self._is_ending()
        if self._leads_nowhere():
            return EXIT_FAILED
        self.report(f"job {self.job_id} goes back into the queue")
        if not self._patiently(self._requeue):
            return self._is_ending()
        self._wait(KILLED_S)  # Slurm ends this process, and the sooner it goes the better
        return EXIT_RUN_AGAIN

    def _is_running(self) -> bool:
        own = batch_commands.queue("slurm", [self.job_id]).get(self.job_id)
        return own is not None and own.state == "RUNNING"

    def _is_ending(self) -> int:
        self.report(
            f"Slurm is ending job {self.job_id}: nothing is lost; requeued it goes on by itself, cancelled it waits for another submit"
        )
        return EXIT_RUN_AGAIN

    def _requeue(self) -> bool:
        """Ask again first: an answer that was lost may have been a yes."""
        if not self._is_running():
            return False
        self.signalled.clear()  # that of a preemption, say; the next one is the end
        batch_commands.requeue(self.job_id)
        return True

    def _elsewhere(self) -> int:
        if self.signalled.is_set() or self._leads_nowhere():
            return self._is_taken_back() if self.signalled.is_set() else EXIT_FAILED
        n_vain = self.known.n_vain if self.known is not None else 0
        if n_vain:
            pause_s = min(VAIN_PAUSE_S * 2.0 ** (n_vain - 1), LONGEST_VAIN_PAUSE_S)
            self._wait(min(pause_s, self._left_s() - self.quarter_s))
        job_id = self._patiently(self._hand_in)
        if not job_id:
            return self._is_taken_back()
        self.report(f"another attempt was handed in as job {job_id}")
        return EXIT_RUN_AGAIN

    def _hand_in(self) -> str:
        return "" if self.signalled.is_set() else hand_in(self.order, self.known or new_submission(self.order)).job_id

    def _is_taken_back(self) -> int:
        self.report("the job was asked to end: nothing is lost; submit again to go on")
        return EXIT_RUN_AGAIN

    # -- attempts in vain --------------------------------------------------------------------------------------------------------

    def _leads_nowhere(self) -> bool:
        """Count this attempt, and say so where it is the last of too many."""
        n, spec = self._n_vain(), self.order.spec
        if n < self.order.attempts:
            return False
        self.report(
            f"{n} attempts in a row ended without one image more, so there is no further one: what was committed stands; see why in "
            f"`featuremaps status {self.order.job.store}` and in {spec.log_folder}, then submit again"
        )
        return True

    def _n_vain(self) -> int:
        """Attempts without progress; where a storage hangs this one does not count, since it took all of its time."""
        errors: list[Exception] = []

        def count() -> None:
            try:
                self._patiently(self._count)
            except (FeaturemapsError, OSError) as error:
                errors.append(error)

        thread = threading.Thread(target=count, name="count-attempts", daemon=True)
        thread.start()
        thread.join(min(COUNT_S + PATIENCE_S, max(1.0, self._left_s() / 2)))
        if not errors:
            return self.known.n_vain if self.known is not None else 0
        logger.warning("the attempts cannot be counted in the store: %s", errors[0])
        if self.kind == "slurm":
            return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
        raise errors[0]  # a job after the other that nobody counts is worse than none

    def _count(self) -> None:
        store = place(self.order.job.store)
        before = last_submission(store) or self.known or new_submission(self.order)
        n, n_checked = n_settled(store), self._n_checked()
        has_progress = n > before.n_settled or n_checked > before.n_checked
        known = replace(
            before,
            n_vain=0 if has_progress else before.n_vain + 1,
            n_settled=max(n, before.n_settled),
            n_checked=max(n_checked, before.n_checked),
        )
        known.write(store)
        self.known = known

    def _n_checked(self) -> int:
        """Images that this attempt compared with their digests, by its receipt; 0 when it left none."""
        store = place(self.order.job.store)
        receipt = Store(store).last_receipt() if is_store(store) else None
        return int(receipt["n_checked"]) if receipt is not None and receipt.get("number", 0) >= self._number else 0

    # -- time --------------------------------------------------------------------------------------------------------------------

    def _patiently(self, action: Callable[[], T]) -> T:
        """Try again, with growing pauses, as long as there are patience and time; but not where the answer came too late."""
        until_s = min(time.monotonic() + PATIENCE_S, self.end_s - 5)
        pause_s = FIRST_PAUSE_S
        while True:
            try:
                return action()
            except (FeaturemapsError, OSError, subprocess.SubprocessError) as error:
                is_unsure = action == self._hand_in and isinstance(error.__cause__, subprocess.TimeoutExpired)
                if is_unsure or time.monotonic() + pause_s > until_s:
                    raise
                logger.warning("trying again in %.0f s: %s", pause_s, batch_commands.said(error))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _wait(self, seconds: float) -> None:
        """Until a signal comes; an event that is waited for must not be set by a handler of the same thread."""
        until_s = time.monotonic() + seconds
        while not self.signalled.is_set() and time.monotonic() < until_s:
            time.sleep(0.1)


def _run_apart(command: list[str], *, limit_s: float, n_bytes: int, n_threads: int) -> None:
    """Run a command in a session of its own, with bounds for its time and for the data of each of its processes.

    Once the time is over the session is killed and not waited for, since what waits for a file system that hangs cannot be ended.

    Raises
    ------
    subprocess.SubprocessError
        When it took too long, or failed; with what it said.
    """
    threads = {"OMP_NUM_THREADS": str(n_threads), "OPENBLAS_NUM_THREADS": str(n_threads), "MALLOC_ARENA_MAX": "2"}
    with tempfile.TemporaryFile() as said:  # and no pipe, whose end might never come
        process = subprocess.Popen(  # noqa: S603 (this program)
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
            env=os.environ | threads,
        )
        with contextlib.suppress(ProcessLookupError):  # it is over already
            resource.prlimit(process.pid, resource.RLIMIT_DATA, (n_bytes, n_bytes))
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        if code:
            said.seek(0)
            raise subprocess.CalledProcessError(code, command, stderr=said.read()[-_SAID_BYTES:].decode(errors="replace"))
