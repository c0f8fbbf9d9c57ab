"""Typed ``cluster.yaml``: named clusters, each of worker groups, wherever they run."""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from distributed.security import Security
from pydantic import BeforeValidator, ByteSize, Field, model_validator

from pipeline.config import Positive, StrictModel, read_yaml, validate_model
from pipeline.errors import UsageError

Role = Literal["read", "extract"]
BatchKind = Literal["slurm", "pbs", "sge", "htcondor"]

LOOPBACK = "127.0.0.1:0"
START_TIMEOUT_S = 3600.0
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_WALLTIME = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")


def _seconds(value: Any) -> Any:
    """``HH:MM:SS`` or ``D-HH:MM:SS``; YAML itself reads 8:00:00, without a zero before it, as 28,800."""
    match = _WALLTIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return value
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


Memory = Annotated[ByteSize, Field(gt=0)]
"""Bytes, or text such as ``16 GiB``."""
Walltime = Annotated[Positive, BeforeValidator(_seconds)]
"""Seconds, or ``HH:MM:SS``."""
HostPort = Annotated[str, Field(pattern=r"^.*:\d+$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")]
"""As file names, worker names and Kubernetes have it."""
Text = Annotated[str, Field(min_length=1)]


class TlsSpec(StrictModel):
    """Certificates, PEM: scheduler, workers and client let nobody in who has none that the authority signed."""

    ca_file: str
    """Of the authority."""
    cert: str
    """Certificate, signed by the authority."""
    key: str
    """Private key of the certificate, without a password."""

    def security(self) -> Security:
        """As Dask wants it: one certificate for all roles, and no connection without."""
        roles = ("client", "scheduler", "worker")
        files = {f"tls_{role}_{part}": getattr(self, part) for role in roles for part in ("cert", "key")}
        return Security(tls_ca_file=self.ca_file, require_encryption=True, **files)


class GroupSpec(StrictModel):
    """Workers of one kind within a cluster."""

    roles: Annotated[tuple[Role, ...], Field(min_length=1)] = ("read", "extract")
    """What they do: ``read`` images and decode them, ``extract`` maps and write them."""
    workers: Positive = 1
    """Processes; in a batch system each is a job, with ssh that many run on each host."""
    threads: Positive = 1
    """Batches at work at once in each of them, and the cores that it asks for."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """Of each worker; those without see none."""
    memory: Memory | None = None
    """Of each worker, bytes or text such as ``16 GiB``; None, on this machine, is a share of it."""
    environment: dict[str, str] = {}
    """Variables of each worker."""

    @property
    def resources(self) -> dict[str, int]:
        """As the scheduler hands tasks out; who extracts also writes, so that no maps travel."""
        roles = {*self.roles, *(["write"] if "extract" in self.roles else [])}
        counts = {role: self.threads for role in ("read", "extract", "write") if role in roles}
        return counts | ({"gpu": 1} if self.gpus else {})


class BatchGroupSpec(GroupSpec):
    """Jobs of a batch system, a worker in each."""

    memory: Memory
    options: tuple[str, ...] = ()
    """Further lines of the job script, as the batch system wants them: ``--constraint=a100``."""


class SshGroupSpec(GroupSpec):
    """Workers on machines that are reached by ssh."""

    hosts: Annotated[tuple[Text, ...], Field(min_length=1)]
    """Names as of ``~/.ssh/config`` or DNS."""
    port: Positive | None = None
    """None is as ssh has it."""
    user: str | None = None
    """None is as ssh has it."""
    key_file: str | None = None
    """Private key; None is what the agent and ``~/.ssh`` hold."""
    known_hosts_file: str | None = None
    """None is ``~/.ssh/known_hosts``; a host that is not in it is refused."""


class DriverSpec(StrictModel):
    """The job that ``featuremaps submit`` hands in: the driver, which needs no GPU."""

    threads: Positive = 2
    """Cores that it asks for."""
    memory: Memory = ByteSize(4 * 2**30)
    """Bytes, or text such as ``4 GiB``."""
    walltime: Walltime | None = None
    """None is that of the workers."""
    queue: str | None = None
    """None is that of the workers."""
    options: tuple[str, ...] = ()
    """Further lines of its script, as the batch system wants them."""


class _Groups(StrictModel):
    """What clusters of worker groups have in common."""

    groups: Mapping[Name, GroupSpec] = {}
    """Worker groups by name; together they have to have both roles."""

    @model_validator(mode="after")
    def _roles_filled(self) -> _Groups:
        filled = {role for group in self.groups.values() for role in group.roles}
        for role in get_args(Role):
            if self.groups and role not in filled:
                raise ValueError(
                    f"no group has the role {role!r}, so its tasks would wait for ever: add it to the roles of a group"
                )
        return self


class LocalSpec(_Groups):
    """Worker processes on this machine: one per core with one thread each, or one per GPU with the cores shared among them."""

    kind: Literal["local"] = "local"
    groups: dict[Name, GroupSpec] = {}
    """Worker groups by name; without any there is one group that reads and extracts, of the three keys below."""
    workers: Positive | None = None
    """Batches at work at once: processes, or with GPUs the threads of their processes; None is one per core."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """None is all that this process may use."""
    memory: Memory | None = None
    """Of one worker; None shares the machine's memory among them."""
    dashboard: HostPort | None = LOOPBACK
    """HOST:PORT of Dask's dashboard, which asks nobody for a password; port 0 is any free one, None is no dashboard."""
    tls: TlsSpec | None = None
    """None lets every process of this machine in, also those of others."""

    @model_validator(mode="after")
    def _one_way(self) -> LocalSpec:
        if self.groups and (self.workers or self.gpus is not None or self.memory):
            raise ValueError("workers, gpus and memory are those of each group where there are groups: move them there")
        return self


class CudaSpec(StrictModel):
    """One worker process for each GPU of this machine, with the cores shared among them; without a GPU nothing is started."""

    kind: Literal["cuda"]
    gpus: Positive | None = None
    """None is all that this process may use."""
    workers: Positive | None = None
    """Batches at work at once over all GPUs; None is one per core."""
    memory: Memory | None = None
    """Of one worker; None shares the machine's memory among them."""
    dashboard: HostPort | None = LOOPBACK
    """HOST:PORT of Dask's dashboard, which asks nobody for a password; port 0 is any free one, None is no dashboard."""
    tls: TlsSpec | None = None
    """None lets every process of this machine in, also those of others."""


class AddressSpec(StrictModel):
    """A scheduler that runs already; its workers offer the resources read, extract and write."""

    kind: Literal["address"]
    address: str
    """``tcp://HOST:PORT`` or ``tls://HOST:PORT``."""
    tls: TlsSpec | None = None
    """What the scheduler knows its clients by."""

    @model_validator(mode="after")
    def _encrypted(self) -> AddressSpec:
        if self.tls and not self.address.startswith("tls://"):
            raise ValueError(f"with tls, address {self.address!r} has to begin with tls://, else nothing would be encrypted")
        return self


class _Remote(_Groups):
    """What clusters on other machines have in common: the scheduler is in the driver's process, and workers connect to it."""

    interface: str | None = None
    """Network interface by which scheduler and workers reach each other, for instance ``ib0``; None is the default route's."""
    dashboard: HostPort | None = LOOPBACK
    """HOST:PORT of Dask's dashboard, which asks nobody for a password; port 0 is any free one, None is no dashboard."""
    tls: TlsSpec | None = None
    """Without, everybody who reaches the scheduler's port can run code as you; the files have to be there on every machine."""
    python: str | None = None
    """Python of the workers, with the same featuremaps; None is the driver's path."""
    start_timeout_s: Annotated[float, Field(gt=0)] = START_TIMEOUT_S
    """Seconds that a run waits for a worker of each group, and for any when all were lost."""


class BatchSpec(_Remote):
    """Jobs of a batch system."""

    kind: BatchKind
    groups: Annotated[dict[Name, BatchGroupSpec], Field(min_length=1)]
    queue: str | None = None
    """Queue or partition; HTCondor has none."""
    account: str | None = None
    """Whom it is charged to; for Grid Engine the project."""
    walltime: Walltime = 3600
    """Of each job, seconds or ``HH:MM:SS`` or ``D-HH:MM:SS``; its worker retires before, and another takes its place."""
    prologue: tuple[str, ...] = ()
    """Lines of shell before the worker starts, for instance ``module load cuda``."""
    log_folder: str = "featuremaps-logs"
    """Where the jobs' output goes; relative to the folder of ``cluster.yaml``."""
    local_folder: str | None = None
    """Scratch space of the workers on their machine."""
    driver: DriverSpec = DriverSpec()
    """The job that ``featuremaps submit`` hands in."""

    @model_validator(mode="after")
    def _names_apart(self) -> BatchSpec:
        if "driver" in self.groups:
            raise ValueError("a group cannot be called 'driver', as the job that submit hands in is: give it another name")
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
                raise ValueError(f"option {line!r} is no line of a submit file of HTCondor: write it as 'key = value'")
        return self


class SshSpec(_Remote):
    """Workers on machines that are reached by ssh."""

    kind: Literal["ssh"]
    groups: Annotated[dict[Name, SshGroupSpec], Field(min_length=1)]


class KubernetesGroupSpec(GroupSpec):
    """Pods of a Kubernetes cluster, a worker in each."""

    memory: Memory
    node_selector: dict[str, str] = {}
    """Labels of the nodes that its pods may be on."""
    options: dict[str, Any] = {}
    """Merged into the pod's spec, for instance ``tolerations``."""

    @model_validator(mode="after")
    def _no_clash(self) -> KubernetesGroupSpec:
        ours = {"containers", "nodeSelector", "serviceAccountName", "volumes"} & set(self.options)
        if ours:
            raise ValueError(
                f"options has {', '.join(sorted(ours))}, which would replace what the other keys make: use image, node_selector, "
                "service_account, volumes and volume_mounts"
            )
        return self


class KubernetesSpec(_Groups):
    """Pods that the operator of dask-kubernetes starts."""

    kind: Literal["kubernetes"]
    image: Text
    """Container image with featuremaps, for scheduler and workers."""
    groups: Annotated[dict[Name, KubernetesGroupSpec], Field(min_length=1)]
    namespace: Text = "default"
    """Where the pods are."""
    service_account: str | None = None
    """Of scheduler and workers; None is the namespace's."""
    volumes: tuple[dict[str, Any], ...] = ()
    """Volumes of the pods, as Kubernetes has them."""
    volume_mounts: tuple[dict[str, Any], ...] = ()
    """Where the images and the store are: the same paths as the driver's."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds that a run waits for a worker of each group, and for any when all were lost."""


ClusterSpec = LocalSpec | CudaSpec | BatchSpec | SshSpec | KubernetesSpec | AddressSpec


class Clusters(StrictModel):
    """``cluster.yaml``: clusters by name."""

    clusters: dict[str, Annotated[ClusterSpec, Field(discriminator="kind")]]


def load_cluster(name: str | None, path: Path = Path("cluster.yaml")) -> ClusterSpec:
    """Find a cluster by name; None is the embedded local one. What is wrong with the others does not matter.

    Raises
    ------
    UsageError
        When the file or the name is missing, or the entry holds something unknown.
    """
    if name is None or (name == "local" and not path.exists()):
        return LocalSpec()
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise UsageError(
            f"cluster {name!r} is looked up in {path}, which cannot be read ({error}): nothing was started; run from the folder that "
            "holds cluster.yaml, or leave --cluster away for this machine"
        ) from error
    entries = values.get("clusters") if isinstance(values, dict) else None
    if isinstance(entries, dict):
        if name not in entries:
            raise UsageError(
                f"{path} has no cluster {name!r}: nothing was started; it has {', '.join(sorted(entries)) or 'none'}"
            )
        values = values | {"clusters": {name: _expand(entries[name], f"cluster {name!r} of {path}")}}
    spec = validate_model(Clusters, values, str(path)).clusters[name]
    return _resolve(spec, f"cluster {name!r} of {path}", path.absolute().parent)


def _expand(value: Any, where: str) -> Any:
    """Replace ``${NAME}`` in every text by the variable of the environment."""
    if isinstance(value, dict):
        return {key: _expand(inner, where) for key, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, where) for inner in value]
    return _VARIABLE.sub(partial(_variable, where), value) if isinstance(value, str) else value


def _variable(where: str, match: re.Match[str]) -> str:
    try:
        return os.environ[match[1]]
    except KeyError:
        raise UsageError(
            f"{where} uses {match[0]}, and the environment has no {match[1]!r}: nothing was started; export it, or write the value"
        ) from None


def _resolve(spec: ClusterSpec, where: str, folder: Path) -> ClusterSpec:
    """Make paths absolute: a relative one is beside the file that names it."""

    def beside(file: str) -> str:
        return str(folder / Path(file).expanduser())

    changed: dict[str, Any] = {}
    if isinstance(spec, BatchSpec):
        changed["log_folder"] = beside(spec.log_folder)
    if isinstance(spec, SshSpec):
        keys = ("key_file", "known_hosts_file")
        changed["groups"] = {
            name: group.model_copy(update={key: beside(getattr(group, key)) for key in keys if getattr(group, key)})
            for name, group in spec.groups.items()
        }
    tls = None if isinstance(spec, KubernetesSpec) else spec.tls
    if tls is not None:
        files = {key: beside(file) for key, file in tls.model_dump().items()}
        _check_certificates(where, files)
        changed["tls"] = TlsSpec(**files)
    return spec.model_copy(update=changed) if changed else spec


def _check_certificates(where: str, files: dict[str, str]) -> None:
    """Refuse what Dask would only find when the first connection fails, or would ask a password for."""
    for key, file in files.items():
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise UsageError(
                f"{where} names the {key} {file}, which cannot be read ({error.strerror}): nothing was started; correct the path (a "
                "relative one is beside the file that names it) or its permissions"
            ) from error
    try:
        context = ssl.create_default_context(cafile=files["ca_file"])
        context.load_cert_chain(files["cert"], files["key"], password="")
    except (ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"{where} names certificates that cannot be used ({error}): nothing was started; ca_file, cert and key have to be PEM files, "
            "the key that of the certificate and without a password"
        ) from error
