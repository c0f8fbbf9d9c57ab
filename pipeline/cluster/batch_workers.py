"""Workers as jobs of a batch system, one worker per job."""

from __future__ import annotations

import asyncio
import logging
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from pipeline.cluster import batch_commands
from pipeline.cluster.dask_settings import group_environment
from pipeline.cluster.groups import DEATH_TIMEOUT_S, Launch
from pipeline.cluster.kinds.batch import BatchSpec
from pipeline.cluster.spec import GroupSpec
from pipeline.errors import needs_extra

logger = logging.getLogger(__name__)

LOG_LINES = 5


def batch_launches(spec: BatchSpec, job_name: str) -> dict[str, Launch]:
    """The wanted jobs, by worker name.

    Raises
    ------
    UsageError
        When dask-jobqueue is not installed.
    """
    job_class = batch_job_class(spec.kind)
    launches: dict[str, Launch] = {}
    for group_name, group in spec.groups.items():
        options = batch_options(spec, group, f"{job_name}-{group_name}")
        launches |= {f"{group_name}-{i}": Launch(group_name, job_class, options) for i in range(group.workers)}
    return launches


def batch_job_class(kind: str) -> Any:
    """The job class of `dask_jobqueue` for a batch system, extended by a check whether the job is still there."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with needs_extra("batch", f"a cluster of kind {kind}"):
            from dask_jobqueue.htcondor import HTCondorJob  # noqa: PLC0415 (an extra)
            from dask_jobqueue.pbs import PBSJob  # noqa: PLC0415 (as above)
            from dask_jobqueue.sge import SGEJob  # noqa: PLC0415 (as above)
            from dask_jobqueue.slurm import SLURMJob  # noqa: PLC0415 (as above)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # importing dask_jobqueue replaces this handler
    base = {"slurm": SLURMJob, "pbs": PBSJob, "sge": SGEJob, "htcondor": HTCondorJob}[kind]
    return type(f"Tended{base.__name__}", (_BatchJob, base), {"kind": kind})


class _BatchJob:
    """Adds to a job of `dask_jobqueue` whether it waits, runs or is gone."""

    kind = ""
    job_id: str | None
    state = ""

    @classmethod
    async def find_gone(cls, jobs: Mapping[str, Any]) -> dict[str, str]:
        """Those of some jobs that have left the queue, each with the end of its output."""
        ids = [job.job_id for job in jobs.values() if job.job_id]
        try:
            found = await asyncio.to_thread(batch_commands.look, cls.kind, ids)
        except (OSError, subprocess.SubprocessError) as error:
            logger.info("the queue cannot be seen: %s", batch_commands.said(error))
            return {}
        gone = {}
        for name, job in jobs.items():
            known = found.get(job.job_id)
            job.state = str(known) if known else ""
            if known is None or known.is_over:
                gone[name] = f"{known or f'job {job.job_id} has left the queue'}{_end_of_log(job)}"
        return gone

    async def close(self) -> None:
        """Cancel the job; a batch system that does not answer must not keep the run from ending."""
        try:
            await asyncio.wait_for(super().close(), batch_commands.COMMAND_TIMEOUT_S)  # type: ignore[misc]
        except TimeoutError:
            logger.warning("job %s may still be in the queue: the batch system does not answer", self.job_id)

    @classmethod
    def explain(cls, error: Exception) -> str:
        """Why a job was refused, in the batch system's words."""
        text = str(error)
        if isinstance(error, FileNotFoundError):
            return batch_commands.refused(cls.kind, f"there is no such command: {error}")
        return batch_commands.refused(cls.kind, " ".join(text.rpartition("stderr:")[2].split()))


def _end_of_log(job: Any) -> str:
    """The last lines that a Slurm job printed; empty for other batch systems, which name their files differently."""
    path = f"{job.log_directory}/{job.job_name}-{job.job_id}.err"
    try:
        with open(path, errors="replace") as file:  # noqa: PTH123
            lines = [line.strip() for line in deque(file, LOG_LINES) if line.strip()]
    except OSError:
        return ""
    return f"; {path} ends with: {' / '.join(lines)}" if lines else ""


def batch_options(spec: BatchSpec, group: GroupSpec, job_name: str) -> dict[str, Any]:
    """Options for the jobs of `dask_jobqueue`."""
    arguments = ["--resources", shlex.quote(group.resources_text), "--no-dashboard", *lifetime(spec.walltime)]
    exports = [f"export {key}={shlex.quote(value)}" for key, value in group_environment(group).items()]
    options: dict[str, Any] = {
        "job_name": job_name,
        "cores": group.threads,
        "memory": f"{int(group.memory or 0)} B",
        "processes": 1,
        "interface": spec.interface,
        "security": spec.security,
        "protocol": "tls://" if spec.tls else None,
        "death_timeout": DEATH_TIMEOUT_S,
        "local_directory": spec.local_folder,
        "log_directory": spec.log_folder,
        "python": spec.python or sys.executable,
        "worker_extra_args": arguments,
        "job_script_prologue": [*spec.prologue, *exports],
    }
    own = {"slurm": _slurm, "pbs": _pbs, "sge": _sge, "htcondor": _htcondor}[spec.kind]
    return options | own(spec, group, options)


def _slurm(spec: BatchSpec, group: GroupSpec, _: dict[str, Any]) -> dict[str, Any]:
    gres = [f"--gres=gpu:{group.gpus}"] if group.gpus else []
    return {"account": spec.account} | _queued(spec, [*gres, *_lines(group)])


def _pbs(spec: BatchSpec, group: GroupSpec, _: dict[str, Any]) -> dict[str, Any]:
    mebibytes = -(-int(group.memory or 0) // 2**20)
    select = f"select=1:ncpus={group.threads}:mem={mebibytes}mb" + (f":ngpus={group.gpus}" if group.gpus else "")
    return {"account": spec.account, "resource_spec": select} | _queued(spec, _lines(group))


def _sge(spec: BatchSpec, group: GroupSpec, _: dict[str, Any]) -> dict[str, Any]:
    """Options for Grid Engine. Each site names its resources; these are the usual names, unless the options give others."""
    lines = _lines(group)

    def unless(pattern: str, line: str) -> list[str]:
        return [] if any(re.search(rf"(?:^|\s){pattern}", given) for given in lines) else [line]

    usual = unless("-S ", "-S /bin/bash")  # Grid Engine ignores the script's first line, and a queue's shell may be csh
    usual += unless("-pe ", f"-pe smp {group.threads}") if group.threads > 1 else []
    mebibytes = -(-int(group.memory or 0) // 2**20)
    usual += unless(r"-l\s+\S*(?:mem|virtual_free)", f"-l mem_free={mebibytes}M")
    usual += unless(r"-l\s+\S*gpu", f"-l gpu={group.gpus}") if group.gpus else []
    return {"project": spec.account} | _queued(spec, [*usual, *lines])


def _htcondor(spec: BatchSpec, group: GroupSpec, options: dict[str, Any]) -> dict[str, Any]:
    """Options for HTCondor: each is ``key = value``, and HTCondor expands a dollar before a parenthesis unless it is escaped."""
    directives = {"batch_name": options["job_name"]}
    directives |= {"accounting_group": spec.account} if spec.account else {}
    directives |= {"request_gpus": str(group.gpus)} if group.gpus else {}
    directives["periodic_remove"] = f"(JobStatus == 2) && (time() - EnteredCurrentStatus > {spec.walltime})"
    given = (line.split("=", 1) for line in _lines(group))
    directives |= {key.strip(): value.strip() for key, value in given}
    prologue = [condor_text(line) for line in options["job_script_prologue"]]
    return {"disk": "1 GB", "job_extra_directives": directives, "job_script_prologue": prologue}


def condor_text(text: str) -> str:
    """Escape each dollar before a parenthesis, so that the shell expands it and not HTCondor.

    Examples
    --------
    >>> condor_text("echo $(hostname) $HOME")
    'echo $(DOLLAR)(hostname) $HOME'
    """
    return re.sub(r"\$(?=\w*\()", "$(DOLLAR)", text)


def _lines(group: GroupSpec) -> list[str]:
    return list(getattr(group, "options", ()))


def _queued(spec: BatchSpec, lines: list[str]) -> dict[str, Any]:
    return {"queue": spec.queue, "walltime": clock(spec.walltime), "job_extra_directives": lines}


def job_script(spec: BatchSpec, group_name: str, job_name: str) -> str:
    """The script that would be submitted for a group's first worker, without the scheduler's address, which is not known yet.

    Raises
    ------
    UsageError
        When dask-jobqueue is not installed.
    """
    job_class = batch_job_class(spec.kind)
    with tempfile.TemporaryDirectory() as folder:  # creating a job makes this folder, and nothing may be left behind
        options = batch_options(
            spec.model_copy(update={"log_folder": folder}), spec.groups[group_name], f"{job_name}-{group_name}"
        )
        script: str = job_class(f"{spec.protocol}DRIVER:PORT", f"{group_name}-0", **options).job_script()
    return script.replace(folder, spec.log_folder)


def job_settings(spec: BatchSpec, group_name: str, job_name: str) -> str:
    """The settings from which dask-jobqueue would make `job_script`, for machines without dask-jobqueue."""
    options = batch_options(spec, spec.groups[group_name], f"{job_name}-{group_name}")
    shown = {key: value for key, value in options.items() if value not in (None, [], {}) and key != "security"}
    lines = [f"{key}: {' '.join(value) if key == 'worker_extra_args' else value}" for key, value in shown.items()]
    reason = (
        "dask-jobqueue writes the script and is not installed (pip install 'featuremaps[batch]'); it would be made from this:"
    )
    return "\n".join([f"# {reason}", *lines])


def lifetime(walltime_s: int) -> list[str]:
    """Options that make a worker retire before its walltime; the times vary, so that not all workers retire at once."""
    margin = min(margin_s(walltime_s), walltime_s / 2)
    return ["--lifetime", f"{walltime_s - margin:.0f}s", "--lifetime-stagger", f"{margin / 3:.0f}s"]


def margin_s(walltime_s: int) -> float:
    """Seconds before the walltime at which a job starts to finish."""
    return min(600.0, max(20.0, walltime_s / 4))


def clock(seconds: int) -> str:
    """Seconds as HH:MM:SS.

    Examples
    --------
    >>> clock(100_000)
    '27:46:40'
    """
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
