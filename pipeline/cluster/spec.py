"""The interface of a kind of cluster, `ClusterSpec`, and the keys and answers that several kinds share.

Nothing here imports Dask, so that ``cluster.yaml`` is read quickly.
"""

from __future__ import annotations

import socket
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

import psutil
from pydantic import Field, model_validator

from pipeline.cluster.finding import Finding
from pipeline.config import Positive, StrictModel
from pipeline.errors import UsageError
from pipeline.text import count
from pipeline.validation import SECONDS, WORDS, Memory, Variables

if TYPE_CHECKING:
    from distributed.security import Security

    from pipeline.cluster.groups import Launch
    from pipeline.config import Job

Role = Literal["read", "extract"]

LOOPBACK = "127.0.0.1:0"
START_TIMEOUT_S = 3600.0

HostPort = Annotated[str, Field(pattern=r"^.*:\d+$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
"""Valid in file names, worker names and Kubernetes."""
Text = Annotated[str, Field(min_length=1)]


class TlsSpec(StrictModel):
    """Certificates in PEM format: scheduler, workers and client accept only peers whose certificate the authority signed."""

    ca_file: str
    """Of the authority."""
    cert: str
    """Certificate, signed by the authority."""
    key: str
    """Private key of the certificate, without a password."""

    def security(self) -> Security:
        """Dask's settings: one certificate for all roles, and only encrypted connections."""
        from distributed.security import Security  # noqa: PLC0415 (cluster.yaml is read without Dask)

        roles = ("client", "scheduler", "worker")
        files = {f"tls_{role}_{part}": getattr(self, part) for role in roles for part in ("cert", "key")}
        return Security(tls_ca_file=self.ca_file, require_encryption=True, **files)


class GroupSpec(StrictModel):
    """Workers of one kind within a cluster."""

    roles: Annotated[tuple[Role, ...], WORDS, Field(min_length=1)] = ("read", "extract")
    """What the workers do: ``read`` images and decode them, or ``extract`` maps and write them."""
    workers: Positive = 1
    """Number of worker processes. In a batch system each is a job; with ssh, this many run on each host."""
    threads: Positive = 1
    """Batches that each worker processes at once; also the number of cores that it requests."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of each worker; a worker of a group without GPUs sees none."""
    memory: Memory | None = None
    """Memory of each worker, in bytes or as text such as ``16 GiB``. With None, a local worker gets a share of the machine's."""
    environment: Variables = {}
    """Variables of each worker."""

    @property
    def resources(self) -> dict[str, float]:
        """Resources for the scheduler to assign tasks by. A worker that extracts also writes, so that no maps are sent around."""
        roles = {*self.roles, *(["write"] if "extract" in self.roles else [])}
        counts: dict[str, float] = {role: self.threads for role in ("read", "extract", "write") if role in roles}
        return counts | ({"gpu": 1} if self.gpus else {})

    @property
    def resources_text(self) -> str:
        """Resources of each worker, in the form of ``dask worker --resources``."""
        return " ".join(f"{name}={n:.4g}" for name, n in self.resources.items())

    @property
    def n_workers(self) -> int:
        """Processes in all."""
        return self.workers

    def describe(self, where: str = "") -> str:
        """The group on one line; ``where`` follows the number of workers."""
        gpus = f", {count(self.gpus, 'GPU')} each" if self.gpus else ""
        return f"{count(self.workers, 'worker')}{where}, {count(self.threads, 'thread')} each{gpus}, {' and '.join(self.roles)}"


class ClusterSpec(StrictModel):
    """An entry of ``cluster.yaml``, and the interface of a kind of cluster.

    A kind must implement `worker_groups`, `connect` and `show`. The other methods have defaults that suit most kinds. A kind with worker
    groups derives from `GroupsSpec`; one whose scheduler is in the driver's process from `StartedSpec`; one with both from `RemoteSpec`.
    """

    kind: str
    is_here: ClassVar[bool] = False
    """Whether the workers are processes of this machine; then a run waits for all of them."""
    runs_already: ClassVar[bool] = False
    """Whether the cluster runs already and nothing is started; then ``featuremaps doctor`` may connect unasked."""
    extra: ClassVar[tuple[str, str] | None] = None
    """The module that such a cluster needs, and the extra that installs it."""

    # -- what every kind must implement ----------------------------------------------------------------------------------------------

    @abstractmethod
    def worker_groups(self) -> Mapping[str, GroupSpec]:
        """Worker groups by name, as they would be started; empty if the workers are not known in advance.

        Raises
        ------
        UsageError
            When this machine cannot start them.
        """

    @abstractmethod
    def connect(
        self, name: str, stop: Event | None, on_wait: Callable[[str], None], n_images: int | None = None
    ) -> AbstractContextManager[Any]:
        """Start or find the cluster, wait for workers and yield a client; in the end, also after an error, stop what was started.

        Arguments and errors are those of `session.connect`.
        """

    @abstractmethod
    def show(self, job_name: str) -> str:
        """What a run whose jobs have this name would launch, as words, scripts, commands or manifests."""

    # -- defaults that suit most kinds -----------------------------------------------------------------------------------------------

    def require_usable(self) -> None:
        """Check that this machine can start such a cluster, as far as visible without an attempt; `extra` is checked elsewhere.

        Raises
        ------
        UsageError
        """

    def describe(self) -> str:
        """The cluster on one line."""
        return ""

    def look_here(self) -> Iterator[Finding]:
        """Check what such a cluster needs on this machine."""
        return iter(())

    def look_there(self) -> Iterator[Finding]:
        """Ask the other side what it can tell without starting anything."""
        return iter(())

    def n_connections(self, job: Job | None) -> int:  # noqa: ARG002 (for kinds whose scheduler is here)
        """Number of workers that connect to the driver's process; 0 if the scheduler is another process."""
        return 0

    def for_job(self, job: Job) -> Self:
        """The cluster with the job's own settings for workers; only clusters of this machine accept any.

        Raises
        ------
        UsageError
            When the job has settings that the cluster does not accept.
        """
        if given := given_by(job):
            raise UsageError(
                f"{', '.join(given)} were given for the run, and cluster {job.cluster!r} of kind {self.kind} has workers of its own: "
                "nothing was started; leave them out of the job file or command, or change the cluster's entry in cluster.yaml"
            )
        return self

    def located(self, beside: Callable[[str], str]) -> dict[str, Any]:  # noqa: ARG002 (for kinds that name files)
        """The keys whose paths ``beside`` makes absolute, with their new values; ``tls`` is not among them."""
        return {}

    def waiting_at_most(self, limit_s: float) -> Self:
        """The cluster with a shorter wait for its workers, if it has such a key."""
        own_s = getattr(self, "start_timeout_s", None)
        return self if own_s is None else self.model_copy(update={"start_timeout_s": min(own_s, limit_s)})


def given_by(job: Job) -> dict[str, int]:
    """A job's settings for workers, by the keys of a cluster of this machine."""
    sharing = job.processes_per_gpu
    wanted = {"workers": job.workers, "memory": job.memory_limit_bytes, "gpus": job.gpus, "processes_per_gpu": sharing}
    return {key: value for key, value in wanted.items() if value is not None}


class GroupsSpec(ClusterSpec):
    """A cluster of worker groups."""

    groups: Mapping[Name, GroupSpec] = {}
    """Worker groups by name; together they must have both roles."""

    @model_validator(mode="after")
    def _roles_filled(self) -> GroupsSpec:
        filled = {role for group in self.groups.values() for role in group.roles}
        for role in get_args(Role):
            if self.groups and role not in filled:
                raise ValueError(
                    f"no group has the role {role!r}, so its tasks would wait for ever: add it to the roles of a group"
                )
        return self

    def worker_groups(self) -> Mapping[str, GroupSpec]:
        """As they are in the file."""
        return self.groups

    def describe(self) -> str:
        """The groups on one line."""
        return describe_groups(self.groups)


def describe_groups(groups: Mapping[str, GroupSpec]) -> str:
    """Groups on one line."""
    return "; ".join(f"{name}: {group.describe()}" for name, group in groups.items())


class StartedSpec(ClusterSpec):
    """A cluster whose scheduler runs in the driver's process and launches the workers.

    A kind must implement `launches`, `patience_s` and `show`; `connect` then works.
    """

    dashboard: HostPort | None = LOOPBACK
    """HOST:PORT of Dask's dashboard, which needs no password. Port 0 takes any free port; None turns the dashboard off."""
    tls: TlsSpec | None = None
    """Certificates for encryption; the files must exist on every machine. Without them, everybody who reaches the scheduler's port can run
    code as you: on one machine, all its users."""

    @property
    def security(self) -> Security | None:
        """As Dask wants it."""
        return self.tls and self.tls.security()

    @property
    def protocol(self) -> str:
        """The prefix of the scheduler's address."""
        return "tls://" if self.tls else "tcp://"

    @property
    @abstractmethod
    def patience_s(self) -> float:
        """Seconds in which workers must arrive."""

    @property
    def listening(self) -> dict[str, str | None]:
        """Where the scheduler listens, as Dask's options."""
        return {"host": "127.0.0.1"}

    @abstractmethod
    def launches(self, name: str) -> dict[str, Launch]:
        """How to start each wanted worker, by its name; ``name`` is the name of the jobs.

        Raises
        ------
        UsageError
            When this machine cannot start them.
        """

    def take_back(self, name: str) -> None:
        """Cancel what a dead run of this name left; called before workers are launched, and after the scheduler was stopped.

        Raises
        ------
        FeaturemapsError
        """

    def connect(
        self, name: str, stop: Event | None, on_wait: Callable[[str], None], n_images: int | None = None
    ) -> AbstractContextManager[Any]:
        """Start the scheduler here and launch the workers."""
        from pipeline.cluster.starting import start  # noqa: PLC0415 (cluster.yaml is read without Dask)

        return start(self, name, stop, on_wait, n_images)

    def n_connections(self, job: Job | None) -> int:  # noqa: ARG002 (for this machine)
        """All workers."""
        return sum(group.n_workers for group in self.worker_groups().values())


class RemoteSpec(GroupsSpec, StartedSpec):
    """A cluster on other machines; its workers connect to the scheduler in the driver's process."""

    interface: str | None = None
    """Network interface through which scheduler and workers reach each other, such as ``ib0``. None takes that of the default route."""
    python: str | None = None
    """Python of the workers, with the same version of featuremaps. None takes the path of the driver's Python."""
    start_timeout_s: Annotated[float, SECONDS, Field(gt=0)] = START_TIMEOUT_S
    """Seconds that a run waits for a worker of each group, and for any worker after all were lost."""

    @property
    def patience_s(self) -> float:
        """As the file says."""
        return self.start_timeout_s

    @property
    def listening(self) -> dict[str, str | None]:
        """On the interface through which the workers reach this machine."""
        return {"interface": self.interface}

    def look_here(self) -> Iterator[Finding]:
        """Check the interface and whether connections are encrypted."""
        if self.interface is not None:
            yield _look_at_interface(self.interface)
        if self.tls is None:
            found = "no tls: whoever reaches the driver's port can run code as you"
            yield Finding("note", "encryption", found, "give tls, or use a network that you trust (docs/clusters.md)")


def _look_at_interface(name: str) -> Finding:
    addresses = psutil.net_if_addrs()
    found = [address.address for address in addresses.get(name, []) if address.family == socket.AF_INET]
    if found:
        return Finding("ok", "interface", f"{name} has {found[0]} here")
    reason = "has no IPv4 address" if name in addresses else "does not exist"
    remedy = f"set interface to one of {', '.join(sorted(addresses))}, or leave it out"
    return Finding("FAIL", "interface", f"{name} {reason} on this machine, where the scheduler would be", remedy)
