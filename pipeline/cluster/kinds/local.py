"""Workers as processes of this machine, on its cores or its GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import ByteSize, Field, model_validator

from pipeline.cluster import local
from pipeline.cluster.spec import GroupSpec, GroupsSpec, Name, StartedSpec, describe_groups, given_by
from pipeline.config import Positive
from pipeline.errors import UsageError
from pipeline.text import count
from pipeline.validation import Memory, validate_model

if TYPE_CHECKING:
    from pipeline.cluster.groups import Launch
    from pipeline.config import Job

PATIENCE_S = 120.0


class LocalGroupSpec(GroupSpec):
    """Worker processes of this machine."""

    processes_per_gpu: Positive = 1
    """Of the workers, how many share their GPUs; each takes its part of the memory there."""

    @model_validator(mode="after")
    def _has_gpus(self) -> LocalGroupSpec:
        if self.processes_per_gpu > 1 and not self.gpus:
            raise ValueError("processes_per_gpu is for workers with GPUs, and gpus is 0: set gpus, or leave it out")
        return self

    @property
    def resources(self) -> dict[str, float]:
        """Same as `GroupSpec.resources`, with a worker's share of a GPU."""
        return super().resources | ({"gpu": 1 / self.processes_per_gpu} if self.gpus else {})

    @property
    def n_sharing(self) -> int:
        """Sets of workers that share GPUs."""
        return -(-self.workers // self.processes_per_gpu)

    @property
    def n_gpus(self) -> int:
        """GPUs of all workers together."""
        return self.n_sharing * self.gpus


class ThisMachine(StartedSpec):
    """Processes of this machine."""

    is_here: ClassVar[bool] = True
    needs_gpu: ClassVar[bool] = False

    workers: Positive | None = None
    """Batches at work at once: worker processes, or with GPUs the threads of their processes. None means one per core."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """Number of GPUs. None means all that this process may use."""
    processes_per_gpu: Positive | None = None
    """Worker processes that share a GPU. None means one for every four of its cores, and at most eight."""
    memory: Memory | None = None
    """Memory of one worker. None shares the machine's memory among the workers."""

    @property
    def patience_s(self) -> float:
        """Processes of this machine arrive soon, or never."""
        return PATIENCE_S

    def group(self) -> LocalGroupSpec:
        """The worker processes: with GPUs as many for each, and the cores as their threads."""
        cores, gpus = local.local_workers(self.workers), local.local_gpus(self.gpus)
        if not gpus and self.needs_gpu:
            local.local_gpus(1)  # it raises the error that there is no GPU
        if not gpus:
            return LocalGroupSpec(workers=cores, memory=self.memory)
        n = local.processes_per_gpu(self.processes_per_gpu, cores // gpus)
        threads = max(1, cores // (gpus * n))
        return LocalGroupSpec(workers=gpus * n, threads=threads, gpus=1, processes_per_gpu=n, memory=self.memory)

    def worker_groups(self) -> Mapping[str, LocalGroupSpec]:
        """One group that does everything, with its memory."""
        return _with_memory({"local": self.group()})

    def launches(self, name: str) -> dict[str, Launch]:  # noqa: ARG002 (for batch systems)
        """The wanted processes."""
        from pipeline.cluster.local_workers import local_launches  # noqa: PLC0415 (imports Dask)

        return local_launches(self.worker_groups(), security=self.security)

    def show(self, job_name: str) -> str:  # noqa: ARG002 (for batch systems)
        """A line for each process."""
        from pipeline.cluster.local_workers import local_launches  # noqa: PLC0415 (imports Dask)

        groups = self.worker_groups()
        lines = ["# processes of this machine"]
        for name, launch in local_launches(groups, security=None).items():
            options = launch.options
            gpus = options["env"]["CUDA_VISIBLE_DEVICES"]
            lines.append(
                f"{name}: {count(options['nthreads'], 'thread')}, {options['memory_limit'] / 2**30:.1f} GiB of memory, "
                f"{f'GPU {gpus}' if gpus else 'no GPU'}, resources {groups[launch.group].resources_text}"
            )
        return "\n".join(lines)

    def require_usable(self) -> None:
        """Check that the GPUs are there."""
        self.worker_groups()

    def describe(self) -> str:
        """The groups on one line."""
        return describe_groups(self.worker_groups())

    def n_connections(self, job: Job | None) -> int:
        """As the job says, otherwise as the file says."""
        return local.local_workers(job.workers if job is not None and job.workers else self.workers)

    def for_job(self, job: Job) -> Self:
        """Apply the job's own settings for workers."""
        given = given_by(job)
        return validate_model(type(self), self.model_dump() | given, f"cluster {job.cluster!r} with {given}") if given else self


class LocalSpec(ThisMachine, GroupsSpec):
    """Worker processes on this machine: one per core with one thread each, or some for each GPU with the cores as their threads."""

    kind: Literal["local"] = "local"
    groups: dict[Name, LocalGroupSpec] = {}
    """Worker groups by name. Without groups, the keys workers, gpus, processes_per_gpu and memory define one group that reads and
    extracts."""

    @model_validator(mode="after")
    def _one_way(self) -> LocalSpec:
        if self.groups and (self.workers or self.gpus is not None or self.processes_per_gpu or self.memory):
            raise ValueError(
                "workers, gpus, processes_per_gpu and memory belong to each group when there are groups: move them there"
            )
        return self

    def worker_groups(self) -> Mapping[str, LocalGroupSpec]:
        """The groups of the file, each with its memory; without any, one group that does everything."""
        if not self.groups:
            return super().worker_groups()
        local.local_gpus(sum(group.n_gpus for group in self.groups.values()))
        return _with_memory(self.groups)

    def n_connections(self, job: Job | None) -> int:
        """All workers of the groups, if there are any."""
        return sum(group.n_workers for group in self.groups.values()) if self.groups else super().n_connections(job)

    def for_job(self, job: Job) -> Self:
        """Apply the job's own settings for workers, unless there are groups."""
        given = given_by(job)
        if self.groups and given:
            raise UsageError(
                f"cluster {job.cluster!r} has groups with workers, memory and GPUs of their own, and {', '.join(given)} were given for "
                "the run: nothing was started; leave them out, or write them into the groups"
            )
        return super().for_job(job)


class CudaSpec(ThisMachine):
    """Worker processes for each GPU of this machine, with the cores as their threads; without a GPU nothing is started."""

    needs_gpu: ClassVar[bool] = True

    kind: Literal["cuda"]
    workers: Positive | None = None
    """Batches at work at once over all GPUs. None means one per core."""
    gpus: Positive | None = None
    """Number of GPUs. None means all that this process may use."""


def _with_memory(groups: Mapping[str, LocalGroupSpec]) -> dict[str, LocalGroupSpec]:
    """Each group with the memory of its workers; workers without a limit share the machine's memory."""
    n_workers = sum(group.workers for group in groups.values())
    memory = {name: ByteSize(local.local_memory_bytes(n_workers, group.memory)) for name, group in groups.items()}
    return {name: group.model_copy(update={"memory": memory[name]}) for name, group in groups.items()}
