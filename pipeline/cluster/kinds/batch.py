"""Workers as jobs of a batch system: Slurm, PBS, Grid Engine, HTCondor."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ByteSize, Field, model_validator

from pipeline.cluster import batch_commands
from pipeline.cluster.finding import Finding
from pipeline.cluster.spec import GroupSpec, Name, RemoteSpec
from pipeline.config import Positive, StrictModel
from pipeline.errors import FeaturemapsError
from pipeline.store.objects import nearest_folder
from pipeline.validation import LINES, Memory, Walltime, Word

if TYPE_CHECKING:
    from pipeline.cluster.groups import Launch

logger = logging.getLogger(__name__)

BatchKind = Literal["slurm", "pbs", "sge", "htcondor"]
QUERIES = {
    "slurm": ["squeue", "--noheader", "--me"],
    "pbs": ["qstat"],
    "sge": ["qstat"],
    "htcondor": ["condor_q", "-totals"],
}
"""Commands that succeed only if the batch system works."""


def _queues(value: Any) -> Any:
    """Join a list of queues with commas, as the batch systems write it."""
    return ",".join(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else value


Queue = Annotated[Word, BeforeValidator(_queues)]
"""One queue, or several with commas between them."""


class BatchGroupSpec(GroupSpec):
    """Jobs of a batch system, one worker per job."""

    memory: Memory
    options: Annotated[tuple[str, ...], LINES] = ()
    """Further lines of the job script, in the batch system's own form, such as ``--constraint=a100``."""


class DriverSpec(StrictModel):
    """The job that ``featuremaps submit`` submits: the driver, which needs no GPU."""

    threads: Positive = 2
    """Cores that it asks for."""
    memory: Memory = ByteSize(4 * 2**30)
    """Memory in bytes, or as text such as ``4 GiB``."""
    walltime: Walltime | None = None
    """Walltime of the driver's job. None takes that of the workers."""
    queue: Queue | None = None
    """Queue of the driver's job. None takes that of the workers."""
    options: Annotated[tuple[str, ...], LINES] = ()
    """Further lines of the driver's script, in the batch system's own form."""


class BatchSpec(RemoteSpec):
    """Jobs of a batch system."""

    extra: ClassVar[tuple[str, str] | None] = ("dask_jobqueue", "batch")

    kind: BatchKind
    groups: Annotated[dict[Name, BatchGroupSpec], Field(min_length=1)]
    queue: Queue | None = None
    """Queue or partition; not for HTCondor, which has none."""
    account: Word | None = None
    """Account to charge; for Grid Engine, the project."""
    walltime: Walltime = 3600
    """Walltime of each job: ``8h``, ``HH:MM:SS`` or ``D-HH:MM:SS``. A worker retires before it ends, and another replaces it."""
    prologue: Annotated[tuple[str, ...], LINES] = ()
    """Shell lines to run before the worker starts, such as ``module load cuda``."""
    log_folder: str = "featuremaps-logs"
    """Folder for the jobs' output; a relative path starts at the folder of ``cluster.yaml``."""
    local_folder: str | None = None
    """Scratch folder of the workers on their own machine."""
    driver: DriverSpec = DriverSpec()
    """The job that ``featuremaps submit`` submits."""

    @model_validator(mode="after")
    def _names_apart(self) -> BatchSpec:
        if "driver" in self.groups:
            raise ValueError(
                "a group cannot be called 'driver', because the job that submit starts has this name: give it another name"
            )
        return self

    @model_validator(mode="after")
    def _condor(self) -> BatchSpec:
        if self.kind != "htcondor":
            return self
        if self.queue is not None:
            raise ValueError(
                f"HTCondor has no queues, and queue is {self.queue!r}: say which machines in options (requirements = ...)"
            )
        for line in (*self.driver.options, *(line for group in self.groups.values() for line in group.options)):
            if not re.fullmatch(r"\s*[+\w.]+\s*=.*", line):
                raise ValueError(f"option {line!r} is not a line of an HTCondor submit file: write it as 'key = value'")
        return self

    def launches(self, name: str) -> dict[str, Launch]:
        """The wanted jobs."""
        from pipeline.cluster.batch_workers import batch_launches  # noqa: PLC0415 (imports Dask)

        batch_commands.require_commands(self.kind, "the cluster")
        return batch_launches(self, name)

    def take_back(self, name: str) -> None:
        """Cancel jobs of this name: those of a dead run, and those that were submitted without our knowledge."""
        _take_back(self.kind, {f"{name}-{group}" for group in self.groups})

    def show(self, job_name: str) -> str:
        """The script of each group; without dask-jobqueue, the settings from which it would be made."""
        from pipeline.cluster.batch_workers import job_script, job_settings  # noqa: PLC0415 (imports Dask)

        command, write = batch_commands.SYSTEMS[self.kind].submit, job_script
        if find_spec("dask_jobqueue") is None:
            write = job_settings
        scripts = (
            f"# group {name}: {group.workers} of these are submitted with {command}\n{write(self, name, job_name)}"
            for name, group in self.groups.items()
        )
        return "\n".join(scripts).rstrip()

    def require_usable(self) -> None:
        """Check that this machine can submit jobs."""
        batch_commands.require_commands(self.kind, "it")

    def look_here(self) -> Iterator[Finding]:
        """Check the folder of logs too."""
        yield from super().look_here()
        yield _look_at_log_folder(Path(self.log_folder))

    def look_there(self) -> Iterator[Finding]:
        """Check that the batch system answers; for Slurm, check also that the queue exists."""
        system, query = batch_commands.SYSTEMS[self.kind], QUERIES[self.kind]
        for command in (system.submit, system.cancel):
            if shutil.which(command) is None:
                yield Finding("FAIL", system.name, f"there is no {command} on the PATH", "run on a login node, or extend PATH")
                return
        said = _said(query)
        if said is not None:
            remedy = "check that this machine is a login node, and whether the batch system is down"
            yield Finding("FAIL", system.name, f"{query[0]}: {said}", remedy)
            return
        yield Finding("ok", system.name, f"{query[0]} answers")
        if self.kind == "slurm" and self.queue is not None:
            yield from _look_at_partitions(self.queue.split(","))  # of several partitions, Slurm takes the first that is free

    def located(self, beside: Callable[[str], str]) -> dict[str, Any]:
        """The folder of logs."""
        return {"log_folder": beside(self.log_folder)}


def _take_back(kind: str, names: set[str]) -> None:
    """Cancel the jobs that a dead run left in the queue; no run can be alive, because the store is locked."""
    try:
        left = [job.job_id for name in names for job in batch_commands.jobs_named(kind, name) if job.name == name]
    except (OSError, subprocess.SubprocessError) as error:
        raise FeaturemapsError(
            f"{batch_commands.SYSTEMS[kind].name} does not answer ({batch_commands.said(error)}): nothing was started; check that this "
            "machine is a login node, or try again later"
        ) from error
    if left:
        logger.warning("taking back jobs that a run left in the queue: %s", ", ".join(left))
        batch_commands.cancel(kind, left)


def _look_at_log_folder(folder: Path) -> Finding:
    nearest = nearest_folder(folder)
    if os.access(nearest, os.W_OK):
        return Finding("ok", "log_folder", str(folder))
    remedy = "set log_folder to a folder that you may write to, on all machines"
    return Finding("FAIL", "log_folder", f"{folder} cannot be written, in {nearest}", remedy)


def _look_at_partitions(wanted: list[str]) -> Iterator[Finding]:
    done = _run(["sinfo", "--noheader", "--format=%R"])
    known = sorted(set(done.stdout.split()))
    unknown = [partition for partition in wanted if partition not in known]
    if unknown and not done.returncode:
        remedy = f"set queue to one of {', '.join(known)}"
        yield Finding("FAIL", "queue", f"Slurm has no partition {', '.join(unknown)}", remedy)


def _said(command: list[str]) -> str | None:
    """The error output of a command; None if it succeeded."""
    try:
        done = _run(command)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return (
        None if done.returncode == 0 else batch_commands.on_one_line(done.stderr or done.stdout) or f"exit code {done.returncode}"
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=batch_commands.COMMAND_TIMEOUT_S, check=False)  # noqa: S603
