"""Batch systems: the commands that hand jobs in, look at them and take them back."""

from __future__ import annotations

import getpass
import logging
import re
import shutil
import subprocess
from collections.abc import Iterable
from typing import NamedTuple

from pipeline.errors import FeaturemapsError, UsageError

logger = logging.getLogger(__name__)

COMMAND_TIMEOUT_S = 60.0
_ENDING = {"COMPLETING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class BatchSystem(NamedTuple):
    """The commands of one batch system."""

    name: str
    submit: str
    cancel: str
    job_id: str
    """Regular expression of the job's id in what ``submit`` prints."""


SYSTEMS = {
    "slurm": BatchSystem("Slurm", "sbatch", "scancel", r"(\d+)"),
    "pbs": BatchSystem("PBS", "qsub", "qdel", r"(\S+)"),
    "sge": BatchSystem("SGE", "qsub", "qdel", r"(\d+)"),
    "htcondor": BatchSystem("HTCondor", "condor_submit", "condor_rm", r"cluster (\d+)"),
}


class QueuedJob(NamedTuple):
    """A job as the batch system sees it."""

    job_id: str
    name: str
    state: str
    reason: str
    """Why it waits, where the batch system says so."""

    def __str__(self) -> str:
        return f"job {self.job_id} ({self.name}) {self.state}" + (f": {self.reason}" if self.reason not in {"", "None"} else "")


def require_commands(kind: str, where: str) -> None:
    """Check that this machine can hand jobs in.

    Raises
    ------
    UsageError
    """
    system = SYSTEMS[kind]
    if not has_commands(kind):
        raise UsageError(
            f"{where} is of kind {kind}, and there is no {system.submit} on this machine's PATH, so no job can be handed to {system.name}: "
            f"nothing was started; run on a login node, or use another cluster"
        )


def has_commands(kind: str) -> bool:
    """Whether this machine can ask the batch system."""
    return shutil.which(SYSTEMS[kind].submit) is not None


def queue(kind: str, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Those of some jobs that wait or run, by id.

    Raises
    ------
    OSError, subprocess.SubprocessError
        When the batch system does not answer: then nothing is known.
    """
    wanted = set(job_ids)
    if not wanted:
        return {}
    if kind == "slurm":
        return {job.job_id: job for job in _slurm_jobs() if job.job_id in wanted}
    found = (_look(kind, job_id) for job_id in wanted)
    return {job.job_id: job for job in found if job is not None}


def _look(kind: str, job_id: str) -> QueuedJob | None:
    """One job of a batch system that is asked for one at a time; its words are its own."""
    if kind == "htcondor":
        state = _call(["condor_q", job_id, "-autoformat", "JobStatus"]).strip()
        return QueuedJob(job_id, "", f"JobStatus {state}", "") if state else None
    command = ["qstat", job_id] if kind == "pbs" else ["qstat", "-j", job_id]
    done = _run(command, check=False)
    lines = done.stdout.strip().splitlines()
    return QueuedJob(job_id, "", " ".join(lines[-1].split()), "") if done.returncode == 0 and lines else None


def jobs_named(kind: str, prefix: str) -> list[QueuedJob]:
    """Jobs that this user has waiting or running and whose names begin so; only Slurm is asked.

    Raises as `queue` does.
    """
    return [job for job in _slurm_jobs() if job.name.startswith(prefix)] if kind == "slurm" else []


def _slurm_jobs() -> list[QueuedJob]:
    lines = _call(["squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%i|%j|%T|%r"]).splitlines()
    jobs = [QueuedJob(*line.strip().split("|", 3)) for line in lines if line.count("|") >= 3]
    return [job for job in jobs if job.state not in _ENDING]


def submit(kind: str, script: str, *arguments: str) -> str:
    """Hand a job script in and return the job's id.

    Raises
    ------
    FeaturemapsError
        With the batch system's own words, when it refuses.
    """
    system = SYSTEMS[kind]
    try:
        out = _call([system.submit, *arguments], script)
    except (OSError, subprocess.SubprocessError) as error:
        raise FeaturemapsError(refused(kind, said(error))) from error
    match = re.search(system.job_id, out)
    if match is None:
        raise FeaturemapsError(refused(kind, f"it printed no job id but {out.strip()!r}"))
    return match[1]


def refused(kind: str, words: str) -> str:
    """The message about a job that was not taken."""
    system = SYSTEMS[kind]
    words = words.removeprefix(f"{system.submit}: ")
    return (
        f"{system.name} did not take the job ({system.submit}: {words}): no worker of it was started; correct the entry in cluster.yaml "
        "(queue, account, walltime, memory, gpus, options)"
    )


def cancel(kind: str, job_ids: Iterable[str]) -> None:
    """Take jobs back; those that have ended do not matter."""
    for job_id in job_ids:
        try:
            _call([SYSTEMS[kind].cancel, job_id])
        except (OSError, subprocess.SubprocessError) as error:
            logger.info("%s %s: %s", SYSTEMS[kind].cancel, job_id, said(error))


def requeue(job_id: str) -> None:
    """Put a running job of Slurm back into the queue; it ends where it runs.

    Raises
    ------
    FeaturemapsError
    """
    try:
        _call(["scontrol", "requeue", job_id])
    except (OSError, subprocess.SubprocessError) as error:
        raise FeaturemapsError(
            f"Slurm did not put job {job_id} back into the queue ({said(error)}): the run stopped, and what was committed stands; submit "
            "again to go on from there"
        ) from error


def said(error: BaseException) -> str:
    """What a command that failed said, on one line."""
    text = getattr(error, "stderr", "") or str(error)
    return " ".join(str(text).split())


def _call(command: list[str], stdin: str | None = None) -> str:
    return _run(command, stdin, check=True).stdout


def _run(command: list[str], stdin: str | None = None, *, check: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 (the batch system's own commands)
        command, input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=check
    )
