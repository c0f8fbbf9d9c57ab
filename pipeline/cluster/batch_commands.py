"""Commands of the batch systems: submit, query and cancel jobs."""

from __future__ import annotations

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
_PBS_GONE = re.compile(r"Unknown Job Id|has finished", re.IGNORECASE)
_COMMAND_SAYS = re.compile(r"(?:^|(?<=\s))[\w-]+: (?:error|fatal): ")
_PBS_GONE_CODES = {35, 153}  # 35 is of PBS Professional; 153 of both PBS Professional and Torque
_HTCONDOR = {"1": "idle", "2": "running", "3": "removed", "4": "completed", "5": "held"}


class BatchSystem(NamedTuple):
    """The commands of one batch system."""

    name: str
    submit: str
    cancel: str
    job_id: str
    """Regular expression that finds the job's id in the output of ``submit``."""


SYSTEMS = {
    "slurm": BatchSystem("Slurm", "sbatch", "scancel", r"(\d+)"),
    "pbs": BatchSystem("PBS", "qsub", "qdel", r"(\S+)"),
    "sge": BatchSystem("SGE", "qsub", "qdel", r"(\d+)"),
    "htcondor": BatchSystem("HTCondor", "condor_submit", "condor_rm", r"cluster (\d+)"),
}


class QueuedJob(NamedTuple):
    """A job, as the batch system reports it."""

    job_id: str
    name: str
    state: str
    reason: str
    """Why the job waits, if the batch system says so."""
    is_over: bool = False
    """Whether the job will never run (again), although it is still listed."""

    def __str__(self) -> str:
        name = f" ({self.name})" if self.name else ""
        return f"job {self.job_id}{name} {self.state}" + (f": {self.reason}" if self.reason not in {"", "None"} else "")


def require_commands(kind: str, where: str) -> None:
    """Check that this machine can submit jobs.

    Raises
    ------
    UsageError
    """
    system = SYSTEMS[kind]
    if not has_commands(kind):
        raise UsageError(
            f"{where} is of kind {kind}, and there is no {system.submit} on this machine's PATH, so no job can be submitted to "
            f"{system.name}: nothing was started; run on a login node, or use another cluster"
        )


def has_commands(kind: str) -> bool:
    """Whether this machine has the command to query the batch system."""
    return shutil.which(SYSTEMS[kind].submit) is not None


def queue(kind: str, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Those of the given jobs that wait or run, by id.

    Raises
    ------
    OSError, subprocess.SubprocessError
        When the batch system does not answer: then nothing is known about the jobs.
    """
    return {job_id: job for job_id, job in look(kind, job_ids).items() if not job.is_over}


def look(kind: str, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
    """Those of the given jobs that the batch system knows, by id, including jobs that will never run; takes one command.

    Raises as `queue` does.
    """
    wanted = sorted(set(job_ids))
    if not wanted:
        return {}
    if kind == "slurm":
        return {job.job_id: job for job in _slurm_jobs() if job.job_id in wanted}
    return {"pbs": _pbs_jobs, "sge": _sge_jobs, "htcondor": _htcondor_jobs}[kind](wanted)


def _pbs_jobs(wanted: list[str]) -> dict[str, QueuedJob]:
    """Parse the table of ``qstat``, which cuts long ids: only the number identifies a job."""
    command = ["qstat", *wanted]
    done = _run(command, check=False)
    said = [line for line in done.stderr.splitlines() if line.strip()]
    is_known = all(_PBS_GONE.search(line) for line in said) if said else done.returncode in _PBS_GONE_CODES
    if done.returncode and not is_known:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    rows = {row[0].partition(".")[0]: row for row in map(str.split, done.stdout.splitlines()) if len(row) >= 5}
    found = {job_id: rows[number] for job_id in wanted if (number := job_id.partition(".")[0]) in rows}
    return {job_id: QueuedJob(job_id, row[1], row[-2], "", row[-2] in {"C", "F"}) for job_id, row in found.items()}


def _sge_jobs(wanted: list[str]) -> dict[str, QueuedJob]:
    """All jobs except those that Grid Engine says it does not have."""
    command = ["qstat", "-j", ",".join(wanted)]
    done = _run(command, check=False)
    _, words, gone = (done.stderr + done.stdout).partition("do not exist")
    if done.returncode and not words:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    unknown = set(re.findall(r"^[\s,]*(\d+)[\s,]*$", gone, re.MULTILINE)) if words else set()
    states = {}
    for block in re.split(r"^job_number:", done.stdout, flags=re.MULTILINE)[1:]:
        state = re.search(r"^job_state\s+\d+:\s*(\S+)", block, re.MULTILINE)  # not every version prints this line
        states[block.split()[0]] = state[1] if state else ""
    return {job_id: QueuedJob(job_id, "", states.get(job_id, ""), "") for job_id in wanted if job_id not in unknown}


def _htcondor_jobs(wanted: list[str]) -> dict[str, QueuedJob]:
    """Jobs in ``condor_q``. A held job counts as over: it does not run until somebody corrects it."""
    lines = _call(["condor_q", *wanted, "-autoformat", "ClusterId", "ProcId", "JobStatus", "HoldReason"]).splitlines()
    found: dict[str, QueuedJob] = {}
    for cluster, process, status, *words in (line.split(maxsplit=3) for line in lines if len(line.split()) >= 3):
        job_id = next((known for known in (f"{cluster}.{process}", cluster) if known in wanted), "")
        reason = "".join(words) if status == "5" else ""
        if job_id:
            found[job_id] = QueuedJob(job_id, "", _HTCONDOR.get(status, f"JobStatus {status}"), reason, status in {"3", "4", "5"})
    return found


def jobs_named(kind: str, prefix: str) -> list[QueuedJob]:
    """Waiting or running jobs of the current user whose names start with a prefix; works for Slurm only.

    Raises as `queue` does.
    """
    return [job for job in _slurm_jobs() if job.name.startswith(prefix)] if kind == "slurm" else []


def _slurm_jobs() -> list[QueuedJob]:
    lines = _call(["squeue", "--noheader", "--me", "--format=%i|%j|%T|%r"]).splitlines()
    rows = (line.strip().split("|", 3) for line in lines if line.count("|") >= 3)
    jobs = [QueuedJob(job_id, name, state, reason) for job_id, name, state, reason in rows]
    return [job for job in jobs if job.state not in _ENDING]


def submit(kind: str, script: str, *arguments: str) -> str:
    """Submit a job script and return the job's id.

    Raises
    ------
    FeaturemapsError
        With the batch system's own message, when it refuses.
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
    """The error message for a job that was refused."""
    system = SYSTEMS[kind]
    words = words.removeprefix(f"{system.submit}: ")
    return (
        f"{system.name} did not take the job ({system.submit}: {words}): it was not started; correct the entry in cluster.yaml (queue, "
        "account, walltime, memory, gpus, options)"
    )


def cancel(kind: str, job_ids: Iterable[str]) -> None:
    """Cancel jobs; those that have ended are ignored."""
    for job_id in job_ids:
        try:
            _call([SYSTEMS[kind].cancel, job_id])
        except (OSError, subprocess.SubprocessError) as error:
            logger.info("%s %s: %s", SYSTEMS[kind].cancel, job_id, said(error))


def requeue(job_id: str) -> None:
    """Put a running job of Slurm back into the queue; Slurm ends the running process.

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
    """The output of a failed command, on one line."""
    return on_one_line(str(getattr(error, "stderr", "") or error))


def on_one_line(text: str) -> str:
    """The output of a command without ``squeue: error:`` before each of its lines, and each line once."""
    parts = (part.strip() for part in _COMMAND_SAYS.split(" ".join(text.split())))
    return "; ".join(dict.fromkeys(filter(None, parts)))


def _call(command: list[str], stdin: str | None = None) -> str:
    return _run(command, stdin, check=True).stdout


def _run(command: list[str], stdin: str | None = None, *, check: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 (the batch system's own commands)
        command, input=stdin, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=check
    )
