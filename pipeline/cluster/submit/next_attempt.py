"""Starts another attempt at the end of this one."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable
from typing import Any

from pipeline.cluster import batch_commands
from pipeline.cluster.submit.attempts import Attempts
from pipeline.cluster.submit.clock import Clock
from pipeline.cluster.submit.hand_in import hand_in, new_submission
from pipeline.cluster.submit.script import JOB_ID_VARIABLES, Order
from pipeline.errors import EXIT_FAILED, EXIT_RUN_AGAIN, FeaturemapsError

KILLED_S = 120.0
"""How long a requeued job waits for its end."""
VAIN_PAUSE_S = 30.0
LONGEST_VAIN_PAUSE_S = 600.0


class NextAttempt:
    """The next attempt: Slurm puts the same job back into its queue; to other batch systems a new job is submitted.

    Parameters
    ----------
    order : Order
    clock : Clock
    report : callable
        Called with text for the user.
    """

    def __init__(self, order: Order, clock: Clock, report: Callable[[Any], None]) -> None:
        self.order, self.clock, self.report = order, clock, report
        self.kind = order.spec.kind
        self.job_id = os.environ.get(JOB_ID_VARIABLES[self.kind], "")
        self.attempts = Attempts(order, clock, report)
        self._turn = threading.Lock()
        self._code: int | None = None

    def begin(self) -> None:
        """Read the record of this job."""
        self.attempts.begin(self.job_id)

    def come_back(self) -> int:
        """Start another attempt, unless too many made no progress or somebody cancelled the job; return the exit code.

        A second call, for instance because the time ends during the first, only returns the exit code.
        """
        with self._turn:
            if self._code is None:
                try:
                    self._code = self._on_slurm() if self.kind == "slurm" else self._elsewhere()
                except (FeaturemapsError, OSError, subprocess.SubprocessError) as error:
                    self.report(
                        f"{batch_commands.SYSTEMS[self.kind].name} did not start another attempt "
                        f"({batch_commands.said(error)}), so there is none: "
                        "nothing is lost; submit again to go on"
                    )
                    self._code = EXIT_FAILED
        return self._code

    def _on_slurm(self) -> int:
        if not self.clock.patiently(self._is_running):
            return self._is_ending()
        if self.attempts.lead_nowhere():
            return EXIT_FAILED
        self.report(f"job {self.job_id} goes back into the queue")
        if not self.clock.patiently(self._requeue):
            return self._is_ending()
        self.clock.wait(KILLED_S)  # Slurm ends this process; the sooner the better
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
        """Check first that the job still runs: an earlier request may have worked although its answer was lost."""
        if not self._is_running():
            return False
        self.clock.signalled.clear()  # a preemption may have set it; the next signal is the end
        batch_commands.requeue(self.job_id)
        return True

    def _elsewhere(self) -> int:
        if self.clock.signalled.is_set() or self.attempts.lead_nowhere():
            return self._is_taken_back() if self.clock.signalled.is_set() else EXIT_FAILED
        n_vain = self.attempts.n_vain
        if n_vain:
            pause_s = min(VAIN_PAUSE_S * 2.0 ** (n_vain - 1), LONGEST_VAIN_PAUSE_S)
            self.clock.wait(min(pause_s, self.clock.left_s - self.clock.quarter_s))
        job_id = self.clock.patiently(self._hand_in, unless=_is_unsure)
        if not job_id:
            return self._is_taken_back()
        self.report(f"another attempt was submitted as job {job_id}")
        return EXIT_RUN_AGAIN

    def _hand_in(self) -> str:
        return (
            "" if self.clock.signalled.is_set() else hand_in(self.order, self.attempts.known or new_submission(self.order)).job_id
        )

    def _is_taken_back(self) -> int:
        self.report("the job was asked to end: nothing is lost; submit again to go on")
        return EXIT_RUN_AGAIN


def _is_unsure(error: Exception) -> bool:
    """Whether the answer came too late, so that the job may exist."""
    return isinstance(error.__cause__, subprocess.TimeoutExpired)
