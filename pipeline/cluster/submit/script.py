"""The job of a batch system that drives a whole run: what it is asked for, and its script."""

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
"""How long before it is preempted the driver's job wants to be told."""
JOB_ID_VARIABLES = {"slurm": "SLURM_JOB_ID", "pbs": "PBS_JOBID", "sge": "JOB_ID", "htcondor": "FEATUREMAPS_JOB_ID"}
"""Where a job finds its own id; HTCondor has no such variable, so the description sets one."""


@dataclass(frozen=True, slots=True)
class Order:
    """What ``featuremaps submit`` was asked for."""

    job: Job
    job_file: Path
    cluster_file: Path
    attempts: int = DEFAULT_ATTEMPTS
    """Attempts in a row that may end without one image more."""
    n_sample: int = 20
    """Images that are computed anew at the end."""
    verify: bool = True
    """Whether the store is audited at the end, within the time that the job has left."""

    @property
    def spec(self) -> BatchSpec:
        """The cluster.

        Raises
        ------
        UsageError
            When it is none of a batch system.
        """
        spec = load_cluster(self.job.cluster, self.cluster_file)
        if not isinstance(spec, BatchSpec):
            raise UsageError(
                f"cluster {self.job.cluster or 'local'!r} is of kind {spec.kind}, and only a batch system "
                f"({', '.join(batch_commands.SYSTEMS)}) can be handed a whole run: nothing was started; name one of its "
                "clusters with --cluster, or use `featuremaps run`"
            )
        return spec


def driver_script(order: Order) -> str:
    """The job script: the driver in place of the shell, so that signals reach it, with a walltime after which it comes back."""
    spec = order.spec
    name = f"{job_name(order.job.store)}-driver"
    if spec.kind == "htcondor":
        return _condor_description(order, name)
    directives, prefix = {"slurm": (_slurm, "#SBATCH"), "pbs": (_pbs, "#PBS"), "sge": (_sge, "#$")}[spec.kind]
    lines = [f"{prefix} {line}" for line in (*directives(spec, name), *spec.driver.options)]
    if spec.kind == "pbs":  # which keeps the output to itself until the job ends, and may not put the id into its name
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
        f"-o {spec.log_folder}/",  # what is said before the script's first line
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
    """Which shell: to PBS and Grid Engine the script's first line counts for nothing, and a user's or a queue's may be csh."""
    return [] if any("-S " in line for line in spec.driver.options) else ["-S /bin/bash"]


def _mebibytes(spec: BatchSpec) -> int:
    return int(spec.driver.memory) // 2**20


def _shell(order: Order) -> list[str]:
    return [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *order.spec.prologue, f"exec {shlex.join(attend_command(order))}"]


def _condor_description(order: Order, name: str) -> str:
    """HTCondor takes a description and not a script."""
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
    """Arguments of a shell that runs a script, comments and all.

    A description has no room for lines, so printf puts them back; a dollar before a parenthesis is HTCondor's own unless it is said
    otherwise.
    """
    text = "\n".join(script).replace("\\", "\\\\").replace("\n", "\\n")
    words = ["-c", 'eval "$(printf %b "$1")"', "driver", text]
    quoted = " ".join("'" + word.replace("'", "''") + "'" for word in words)
    return '"' + condor_text(quoted).replace('"', '""') + '"'


def report_page(order: Order) -> Path:
    """Where the page about the store is left at the end: beside the driver's log."""
    return Path(order.spec.log_folder) / f"{job_name(order.job.store)}-report.html"


def attend_command(order: Order) -> list[str]:
    """What runs in the driver's job."""
    command = [order.spec.python or sys.executable, "-P", "-m", "pipeline", "submit", str(order.job_file.absolute())]
    command += ["--cluster", str(order.job.cluster), "--cluster-file", str(order.cluster_file.absolute())]
    audit = ["--sample", str(order.n_sample), "--verify" if order.verify else "--no-verify"]
    return [*command, "--attempts", str(order.attempts), *audit, "--attend"]
