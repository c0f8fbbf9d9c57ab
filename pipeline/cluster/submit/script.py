"""The script of the job that drives a whole run, and the order from which it is made."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from pipeline.cluster import batch_commands
from pipeline.cluster.batch_workers import clock, condor_text
from pipeline.cluster.config import load_cluster
from pipeline.cluster.kinds.batch import BatchSpec
from pipeline.cluster.session import job_name
from pipeline.config import Job
from pipeline.errors import UsageError

DEFAULT_ATTEMPTS = 5
WARNING_S = 60
"""How long before a preemption the driver's job is to be warned."""
JOB_ID_VARIABLES = {"slurm": "SLURM_JOB_ID", "pbs": "PBS_JOBID", "sge": "JOB_ID", "htcondor": "FEATUREMAPS_JOB_ID"}
"""Variables with a job's own id. HTCondor has none, so the submit description sets one."""


@dataclass(frozen=True, slots=True)
class Order:
    """The arguments of ``featuremaps submit``."""

    job: Job
    job_file: Path
    cluster_file: Path
    attempts: int = DEFAULT_ATTEMPTS
    """Attempts in a row that may end without one more image."""
    n_sample: int = 20
    """Images that the audit computes again at the end."""
    verify: bool = True
    """Whether to audit the store at the end, within the time that the job has left."""

    @property
    def spec(self) -> BatchSpec:
        """The cluster.

        Raises
        ------
        UsageError
            When its kind is no batch system, or the job has settings for workers.
        """
        spec = load_cluster(self.job.cluster, self.cluster_file).for_job(self.job)
        if not isinstance(spec, BatchSpec):
            raise UsageError(
                f"cluster {self.job.cluster or 'local'!r} is of kind {spec.kind}, and only a batch system "
                f"({', '.join(batch_commands.SYSTEMS)}) can be handed a whole run: nothing was started; name one of its "
                "clusters with --cluster, or use `featuremaps run`"
            )
        return spec


def driver_script(order: Order) -> str:
    """The job script. It replaces the shell by the driver, so that signals reach the driver; after the walltime the job is repeated."""
    spec = order.spec
    name = f"{job_name(order.job.store)}-driver"
    if spec.kind == "htcondor":
        return _condor_description(order, name)
    directives, prefix = {"slurm": (_slurm, "#SBATCH"), "pbs": (_pbs, "#PBS"), "sge": (_sge, "#$")}[spec.kind]
    lines = [f"{prefix} {line}" for line in (*directives(spec, name), *spec.driver.options)]
    if spec.kind == "pbs":  # PBS holds the output back until the job ends, and cannot put the id into its name
        lines.append(f'exec >>{shlex.quote(f"{spec.log_folder}/{name}-")}"$PBS_JOBID".log 2>&1')
    return "\n".join(["#!/usr/bin/env bash", *lines, *_shell(order)]) + "\n"


def _slurm(spec: BatchSpec, name: str) -> list[str]:
    queue = spec.driver.queue or spec.queue
    return [
        f"--job-name={name}",
        f"--output={spec.log_folder}/{name}-%j.log",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:TERM@{WARNING_S}",
        "--ntasks=1",
        f"--cpus-per-task={spec.driver.threads}",
        f"--mem={_mebibytes(spec)}M",
        f"--time={clock(spec.driver.walltime or spec.walltime)}",
        *([f"--partition={queue}"] if queue else []),
        *([f"--account={spec.account}"] if spec.account else []),
    ]


def _pbs(spec: BatchSpec, name: str) -> list[str]:
    queue = spec.driver.queue or spec.queue
    return [
        f"-N {name}",
        *_shell_of_the_job(spec),
        "-j oe",
        f"-o {spec.log_folder}/",  # output before the script's first line
        f"-l select=1:ncpus={spec.driver.threads}:mem={_mebibytes(spec)}mb",
        f"-l walltime={clock(spec.driver.walltime or spec.walltime)}",
        *([f"-q {queue}"] if queue else []),
        *([f"-A {spec.account}"] if spec.account else []),
    ]


def _sge(spec: BatchSpec, name: str) -> list[str]:
    driver, queue = spec.driver, spec.driver.queue or spec.queue
    return [
        f"-N {name}",
        *_shell_of_the_job(spec),
        "-j y",
        f"-o {spec.log_folder}/{name}-$JOB_ID.log",
        f"-l h_rt={clock(driver.walltime or spec.walltime)}",
        f"-l h_vmem={_mebibytes(spec) // driver.threads}M",
        *([f"-pe smp {driver.threads}"] if driver.threads > 1 else []),
        *([f"-q {queue}"] if queue else []),
        *([f"-P {spec.account}"] if spec.account else []),
    ]


def _shell_of_the_job(spec: BatchSpec) -> list[str]:
    """The job's shell: PBS and Grid Engine ignore the script's first line, and a user's or a queue's shell may be csh."""
    return [] if any("-S " in line for line in spec.driver.options) else ["-S /bin/bash"]


def _mebibytes(spec: BatchSpec) -> int:
    return int(spec.driver.memory) // 2**20


def _shell(order: Order) -> list[str]:
    return [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *order.spec.prologue, f"exec {shlex.join(attend_command(order))}"]


def _condor_description(order: Order, name: str) -> str:
    """The submit description: HTCondor takes no script."""
    spec, driver = order.spec, order.spec.driver
    log = f"{spec.log_folder}/{name}"
    lines = {
        "executable": "/bin/sh",
        "arguments": _condor_arguments(_shell(order)),
        "environment": f'"{JOB_ID_VARIABLES["htcondor"]}=$(ClusterId)"',
        "batch_name": name,
        "output": f"{log}-$(ClusterId).out",
        "error": f"{log}-$(ClusterId).err",
        "log": f"{log}-$(ClusterId).log",
        "request_cpus": str(driver.threads),
        "request_memory": f"{_mebibytes(spec)}MB",
        "stream_output": "true",
        "stream_error": "true",
        "periodic_remove": f"(JobStatus == 2) && (time() - EnteredCurrentStatus > {driver.walltime or spec.walltime})",
        **({"accounting_group": spec.account} if spec.account else {}),
    }
    given = (line.split("=", 1) for line in driver.options)
    lines |= {key.strip(): value.strip() for key, value in given}
    return "\n".join([*(f"{key} = {value}" for key, value in lines.items()), "queue"]) + "\n"


def _condor_arguments(script: list[str]) -> str:
    """Arguments of a shell that runs a script, including its comments.

    A description has no line breaks, so printf adds them. A dollar before a parenthesis is escaped, because HTCondor would expand it.
    """
    text = "\n".join(script).replace("\\", "\\\\").replace("\n", "\\n")
    words = ["-c", 'eval "$(printf %b "$1")"', "driver", text]
    quoted = " ".join("'" + word.replace("'", "''") + "'" for word in words)
    return '"' + condor_text(quoted).replace('"', '""') + '"'


def report_page(order: Order) -> Path:
    """Path of the page about the store: beside the driver's log."""
    return Path(order.spec.log_folder) / f"{job_name(order.job.store)}-report.html"


def attend_command(order: Order) -> list[str]:
    """The command that runs in the driver's job."""
    command = [order.spec.python or sys.executable, "-P", "-m", "pipeline", "submit", str(order.job_file.absolute())]
    command += ["--cluster", str(order.job.cluster), "--cluster-file", str(order.cluster_file.absolute())]
    audit = ["--sample", str(order.n_sample), "--verify" if order.verify else "--no-verify"]
    return [*command, "--attempts", str(order.attempts), *audit, "--attend"]
