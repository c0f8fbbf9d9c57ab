"""Typed ``cluster.yaml`` and the Dask cluster that it names."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import ssl
from collections.abc import Iterator, Mapping
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import dask
import psutil
from distributed import Client, LocalCluster
from distributed.security import Security
from pydantic import Field, model_validator

from pipeline.config import Job, Positive, StrictModel, read_yaml, validate_model
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.lock import WORKER_TTL_S

logger = logging.getLogger(__name__)

ROLES = ("read", "extract", "write")
CONNECT_TIMEOUT_S = 20.0
LOOPBACK = "127.0.0.1:0"
START_TRIES = 3

_DASK_CONFIG = {
    # A batch's data stay where they are, and a task without a worker fails instead of hanging.
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.no-workers-timeout": "120s",
    "distributed.scheduler.worker-ttl": f"{WORKER_TTL_S:.0f}s",
    # Every task that a dead worker held becomes suspicious, not only the guilty one: `pipeline.trial` tells them apart.
    "distributed.scheduler.allowed-failures": 3,
    # The window bounds memory; spilling would only hide a plan that is too large.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": 0.85,
    "distributed.worker.memory.terminate": 0.97,
    # A nanny has a new process soon: the cluster need not close it meanwhile, least of all while it replaces a stuck one.
    "distributed.deploy.lost-worker-timeout": "1h",
    "distributed.admin.large-graph-warning-threshold": "1GB",
    # Dask's looks at itself, 50 and 100 times a second by default, cost a tenth of the throughput of two cores.
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "1s",
    "distributed.worker.profile.interval": "200ms",
    "distributed.nanny.pre-spawn-environ": {
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "DASK_LOGGING__DISTRIBUTED": "error",
    },
}


class TlsSpec(StrictModel):
    """Certificates, PEM: scheduler, workers and client let nobody in who has none that the authority signed."""

    ca_file: str
    """Of the authority."""
    cert: str
    key: str
    """Without a password."""

    def security(self) -> Security:
        """As Dask wants it: one certificate for all roles, and no connection without."""
        roles = ("client", "scheduler", "worker")
        files = {f"tls_{role}_{part}": getattr(self, part) for role in roles for part in ("cert", "key")}
        return Security(tls_ca_file=self.ca_file, require_encryption=True, **files)


class LocalSpec(StrictModel):
    """Worker processes on this machine: one per core with one thread each, or one per GPU with the cores shared among them."""

    kind: Literal["local"] = "local"
    workers: Positive | None = None
    """Batches at work at once: processes, or with GPUs the threads of their processes; None is one per core."""
    gpus: Annotated[int, Field(ge=0)] | None = None
    """None is all that this process may use."""
    memory_limit_bytes: Positive | None = None
    """Of one worker; None shares the machine's memory among them."""
    dashboard: Annotated[str, Field(pattern=r"^.*:\d+$")] | None = LOOPBACK
    """HOST:PORT of Dask's dashboard, which asks nobody for a password; port 0 is any free one, None is no dashboard."""
    tls: TlsSpec | None = None
    """None lets every process of this machine in, also those of others."""


class AddressSpec(StrictModel):
    """A scheduler that runs already; its workers offer the resources read, extract and write."""

    kind: Literal["address"]
    address: str
    tls: TlsSpec | None = None
    """What the scheduler knows its clients by."""

    @model_validator(mode="after")
    def _encrypted(self) -> AddressSpec:
        if self.tls and not self.address.startswith("tls://"):
            raise ValueError(f"with tls, address {self.address!r} has to begin with tls://, else nothing would be encrypted")
        return self


ClusterSpec = Annotated[LocalSpec | AddressSpec, Field(discriminator="kind")]


class Clusters(StrictModel):
    """``cluster.yaml``: clusters by name."""

    clusters: dict[str, ClusterSpec]


def load_cluster(name: str | None, path: Path = Path("cluster.yaml")) -> LocalSpec | AddressSpec:
    """Find a cluster by name; None is the embedded local one.

    Raises
    ------
    UsageError
        When the file or the name is missing, or the file holds something unknown.
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
    clusters = validate_model(Clusters, values, str(path)).clusters
    if name not in clusters:
        raise UsageError(f"{path} has no cluster {name!r}: nothing was started; it has {', '.join(sorted(clusters))}")
    spec = clusters[name]
    if spec.tls is None:
        return spec
    files = {key: str(path.absolute().parent / Path(file).expanduser()) for key, file in spec.tls.model_dump().items()}
    _check_certificates(f"cluster {name!r} of {path}", files)
    return spec.model_copy(update={"tls": TlsSpec(**files)})


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


def local_workers(wanted: int | None) -> int:
    """Batches that the embedded cluster works on at once: one per core that this process may use."""
    return wanted or len(os.sched_getaffinity(0))


def local_gpus(wanted: int | None) -> int:
    """GPUs of the embedded cluster.

    Raises
    ------
    UsageError
        When there are fewer than wanted.
    """
    found = 0
    if wanted or (wanted is None and any(Path("/dev").glob("nvidia[0-9]*"))):
        from pipeline.device import n_gpus  # noqa: PLC0415 (torch only where there may be a GPU)

        found = n_gpus()
    if wanted is not None and wanted > found:
        raise UsageError(
            f"{wanted} GPUs were asked for, and this installation of torch sees {found}: nothing was started; leave --gpus away for what "
            "there is, or check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and that torch was installed with CUDA"
        )
    return found if wanted is None else wanted


def local_processes(spec: LocalSpec) -> tuple[int, int, int]:
    """Worker processes of the embedded cluster, threads of each, and GPUs."""
    cores, gpus = local_workers(spec.workers), local_gpus(spec.gpus)
    return (gpus, max(1, cores // gpus), gpus) if gpus else (cores, 1, 0)


def local_memory_bytes(workers: int, wanted: int | None) -> int:
    """Memory limit of one local worker: its share of nine tenths of the machine."""
    return wanted or int(0.9 * psutil.virtual_memory().total / workers)


@contextlib.contextmanager
def connect(spec: LocalSpec | AddressSpec) -> Iterator[Client]:
    """Start or find the cluster; what was started is stopped on every way out.

    Raises
    ------
    FeaturemapsError
        When a given scheduler does not answer.
    """
    with dask.config.set(_DASK_CONFIG):
        if isinstance(spec, AddressSpec):
            with _connect_address(spec) as client:
                yield client
            return
        workers, threads, gpus = local_processes(spec)
        options: dict[str, Any] = {
            "n_workers": workers,
            "threads_per_worker": threads,
            "memory_limit": local_memory_bytes(workers, spec.memory_limit_bytes),
            "resources": dict.fromkeys(ROLES, threads) | ({"gpu": 1} if gpus else {}),
            "env": {} if gpus else {"CUDA_VISIBLE_DEVICES": ""},
            "host": "127.0.0.1",
            "dashboard_address": spec.dashboard or LOOPBACK,
            "scheduler_kwargs": {"dashboard": spec.dashboard is not None},  # with no address Dask would take a fixed port
            "security": spec.tls and spec.tls.security(),
            "silence_logs": False,  # it would change the level of handlers that are not its own
        }
        # Without a dashboard there are no pages about workers and tasks either, which are another part of Dask.
        pages = {} if spec.dashboard else {"distributed.scheduler.http.routes": ["distributed.http.health"]}
        with dask.config.set(pages), _quiet_dask(), _local_cluster(options) as cluster, Client(cluster) as client:
            if spec.dashboard:
                logger.info("Dask's dashboard: %s", client.dashboard_link)
            yield client


@contextlib.contextmanager
def with_client(job: Job, client: Client | None, cluster_file: Path) -> Iterator[Client]:
    """Yield the given client, or one of the cluster that the job names."""
    if client is not None:
        yield client
        return
    spec = load_cluster(job.cluster, cluster_file)
    if isinstance(spec, LocalSpec):
        wanted = {"workers": job.workers, "memory_limit_bytes": job.memory_limit_bytes, "gpus": job.gpus}
        spec = spec.model_copy(update={key: value for key, value in wanted.items() if value is not None})
    with connect(spec) as connected:
        yield connected


@contextlib.contextmanager
def _local_cluster(options: dict[str, Any]) -> Iterator[LocalCluster]:
    """Start the cluster and stop it; a process that is stuck in the kernel cannot be stopped, and must not keep this one from ending."""
    others = set(multiprocessing.active_children())
    cluster = _start_local(options)
    try:
        yield cluster
    finally:
        tornado = logging.getLogger("tornado.application")  # prints a traceback of the same error
        level = tornado.level
        try:
            tornado.setLevel(logging.CRITICAL)
            cluster.close()
        except TimeoutError as error:
            logger.info("the local cluster did not stop: %s", error)
        finally:
            tornado.setLevel(level)
        for left in set(multiprocessing.active_children()) - others:
            left.kill()
            multiprocessing.process._children.discard(left)  # type: ignore[attr-defined]


def _start_local(options: dict[str, Any]) -> LocalCluster:
    """Start the cluster, again where a worker process died before it was up."""
    for left in reversed(range(START_TRIES)):
        try:
            with _without_interrupts():
                return LocalCluster(**options)
        except RuntimeError as error:
            logger.info("the local cluster did not start: %s", error)
            if not left:
                raise FeaturemapsError(
                    f"the worker processes of this machine died {START_TRIES} times while they started ({error}: {error.__cause__}): "
                    "nothing was started; check the free memory and the limits of processes, or use fewer --workers"
                ) from error
    raise AssertionError  # not reached


@contextlib.contextmanager
def _quiet_dask() -> Iterator[None]:
    """Dask's own lines below ERROR stay out of the terminal."""
    before = {name: logging.getLogger(name).level for name in ("distributed", "distributed.client", "distributed.gc")}
    for name, level in before.items():
        logging.getLogger(name).setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Threads and processes that start meanwhile never see SIGINT: a Ctrl-C at the terminal is for the driver alone, which drains."""
    resource_tracker.ensure_running()  # whose start would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _connect_address(spec: AddressSpec) -> Iterator[Client]:
    client = Client.__new__(Client)  # in two steps, for what could not connect has to be closed
    try:
        client.__init__(spec.address, timeout=CONNECT_TIMEOUT_S, security=spec.tls and spec.tls.security())
    except (OSError, TimeoutError, ValueError, TypeError, AssertionError) as error:
        _close_unconnected(client)
        # Of a type when tls:// is asked for without certificates; an assertion when Dask's own thread did not start within 10 s.
        raise FeaturemapsError(
            f"no Dask scheduler answers at {spec.address} ({error}): nothing was started; check the address, that `dask scheduler` runs, "
            "and where it uses TLS (tls://) the certificates under tls"
        ) from error
    with client:
        yield client


def _close_unconnected(client: Client) -> None:
    """Close a client that could not connect, and end its thread.

    Dask does neither. Python's collector of garbage would close it some time, maybe in the thread that is to run the event loop of the next
    client, which would then wait for a lock of the one that starts it: 10 s, and an AssertionError.
    """
    with contextlib.suppress(Exception):
        client.close()
    client._loop_runner.stop()


class WorkerSlots(NamedTuple):
    """What one worker offers."""

    read: int
    """Batches that it reads at once."""
    extract: int
    """Batches that it extracts at once."""
    memory_limit_bytes: int
    """0 for none."""
    has_gpu: bool
    """Whether it says so, as a resource; whether it computes on one is for it to see."""
    is_whole: bool
    """Whether it can also read and write as many batches at once, so that one task may do all of a batch."""


def scheduler_workers(client: Client) -> dict[str, Any]:
    """What the scheduler knows of its workers, by address, asked just now: `Client.scheduler_info` may give what it asks for itself.

    Raises
    ------
    ConnectionError
        When the scheduler is gone.
    """
    if client.status != "running" or client.scheduler is None:
        raise ConnectionError(f"connection to {client} is {client.status}")
    workers: dict[str, Any] = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
    return workers


def worker_slots(client: Client) -> dict[str, WorkerSlots]:
    """What each worker offers, by address.

    Raises
    ------
    FeaturemapsError
        When a role has no worker.
    ConnectionError
        When the scheduler is gone.
    """
    workers = scheduler_workers(client)
    for role in ROLES:
        if not any(worker["resources"].get(role) for worker in workers.values()):
            raise FeaturemapsError(
                f"none of the {len(workers)} workers offers the resource {role!r}, so its tasks would wait for ever: start workers with "
                '--resources "read=1 extract=1 write=1"'
            )
    return {address: _slots(worker["resources"], worker["memory_limit"]) for address, worker in workers.items()}


def _slots(resources: Mapping[str, float], memory_limit_bytes: int | None) -> WorkerSlots:
    read, extract, write = (int(resources.get(role, 0)) for role in ROLES)
    return WorkerSlots(read, extract, int(memory_limit_bytes or 0), bool(resources.get("gpu")), min(read, write) >= extract)
