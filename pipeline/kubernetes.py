"""Workers as pods of a Kubernetes cluster, started by the operator of dask-kubernetes from manifests that are made here."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from pipeline.cluster_spec import KubernetesGroupSpec, KubernetesSpec
from pipeline.dask_settings import DASK_SETTINGS, worker_environment
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.launch import DEATH_TIMEOUT_S, Launch, resources_text

logger = logging.getLogger(__name__)

API_VERSION = "kubernetes.dask.org/v1"
IDLE_TIMEOUT_S = 1800
"""After which, without a task and beyond the time to start, the operator deletes a cluster whose driver is gone."""
MAX_LABEL = 63
"""Characters of a label, which names a worker group on its pods."""
DELETE_TIMEOUT_S = 60.0
_SCHEDULER_PORT, _DASHBOARD_PORT = 8786, 8787


# -- manifests -------------------------------------------------------------------------------------------------------------------


def manifests(spec: KubernetesSpec, name: str) -> list[dict[str, Any]]:
    """All that is created: a DaskCluster with the first group, and a DaskWorkerGroup for each of the others.

    Parameters
    ----------
    spec : KubernetesSpec
    name : str
        Of the cluster.

    Raises
    ------
    UsageError
        When names become too long for Kubernetes.
    """
    first, *others = _ordered(spec)
    return [cluster_manifest(spec, name, first), *(group_manifest(spec, name, group) for group in others)]


def _ordered(spec: KubernetesSpec) -> list[str]:
    """The operator calls the group that comes with the cluster "default", so it has to be the one of that name if there is one."""
    return sorted(spec.groups, key=lambda group: group != "default")


def cluster_manifest(spec: KubernetesSpec, name: str, group: str) -> dict[str, Any]:
    """The DaskCluster: the scheduler, its service, and the workers of one group."""
    container = {
        "name": "scheduler",
        "image": spec.image,
        "args": ["dask", "scheduler", "--host", "0.0.0.0", "--port", str(_SCHEDULER_PORT)],  # noqa: S104 (in a pod of its own)
        "env": _variables(scheduler_environment(spec.start_timeout_s)),
        "ports": [
            {"name": "tcp-comm", "containerPort": _SCHEDULER_PORT, "protocol": "TCP"},
            {"name": "http-dashboard", "containerPort": _DASHBOARD_PORT, "protocol": "TCP"},
        ],
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "2", "memory": "4Gi"}},
        "readinessProbe": {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 2, "timeoutSeconds": 30},
        "livenessProbe": {
            "httpGet": {"port": "http-dashboard", "path": "/health"},
            "initialDelaySeconds": 30,
            "periodSeconds": 20,
            "timeoutSeconds": 30,
        },
    }
    ports = [
        {"name": "tcp-comm", "protocol": "TCP", "port": _SCHEDULER_PORT, "targetPort": "tcp-comm"},
        {"name": "http-dashboard", "protocol": "TCP", "port": _DASHBOARD_PORT, "targetPort": "http-dashboard"},
    ]
    selector = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    return {
        "apiVersion": API_VERSION,
        "kind": "DaskCluster",
        "metadata": {"name": name, "namespace": spec.namespace},
        "spec": {
            "idleTimeout": IDLE_TIMEOUT_S + int(spec.start_timeout_s),
            "scheduler": {
                "spec": {"containers": [container], **_account(spec)},
                "service": {"type": "ClusterIP", "selector": selector, "ports": ports},
            },
            "worker": _workers(spec, name, group),
        },
    }


def group_manifest(spec: KubernetesSpec, name: str, group: str) -> dict[str, Any]:
    """The DaskWorkerGroup of a further group."""
    return {
        "apiVersion": API_VERSION,
        "kind": "DaskWorkerGroup",
        "metadata": {"name": f"{name}-{group}", "namespace": spec.namespace},
        "spec": {"cluster": name, "worker": _workers(spec, name, group)},
    }


def _workers(spec: KubernetesSpec, name: str, group: str) -> dict[str, Any]:
    """A fixed number of pods: the operator's autoscaling would take those of any group away."""
    if len(f"{name}-{group}") > MAX_LABEL:
        raise UsageError(
            f"group {group!r} of the cluster {name} has a name of {len(group)} characters, and Kubernetes takes {MAX_LABEL} for both and a "
            f"hyphen: nothing was started; name the group with at most {MAX_LABEL - len(name) - 1}"
        )
    return {"replicas": spec.groups[group].workers, "spec": worker_pod(spec, spec.groups[group])}


def worker_pod(spec: KubernetesSpec, group: KubernetesGroupSpec) -> dict[str, Any]:
    """The spec of a worker's pod; it asks for as much as it may use, so that nobody is evicted for what another takes."""
    resources = {"cpu": str(group.threads), "memory": _quantity(group.memory)}
    resources |= {"nvidia.com/gpu": str(group.gpus)} if group.gpus else {}
    environment = worker_environment() | ({} if group.gpus else {"CUDA_VISIBLE_DEVICES": ""}) | group.environment
    container: dict[str, Any] = {
        "name": "worker",
        "image": spec.image,
        "args": worker_arguments(group),
        "env": _variables(environment),
        "resources": {"requests": resources, "limits": dict(resources)},
    }
    if spec.volume_mounts:
        container["volumeMounts"] = [dict(mount) for mount in spec.volume_mounts]
    pod: dict[str, Any] = {"containers": [container], **_account(spec)}
    pod |= {"nodeSelector": dict(group.node_selector)} if group.node_selector else {}
    pod |= {"volumes": [dict(volume) for volume in spec.volumes]} if spec.volumes else {}
    return pod | group.options


def worker_arguments(group: KubernetesGroupSpec) -> list[str]:
    """What a worker's container runs; the operator gives it name and scheduler as variables."""
    return [
        *("dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", str(group.threads)),
        *("--memory-limit", str(int(group.memory)), "--resources", resources_text(group)),
        *("--nanny", "--death-timeout", str(DEATH_TIMEOUT_S), "--no-dashboard"),
    ]


def scheduler_environment(start_timeout_s: float) -> dict[str, str]:
    """Dask's settings for a scheduler that is not in this process.

    Examples
    --------
    >>> scheduler_environment(600.0)["DASK_DISTRIBUTED__SCHEDULER__NO_WORKERS_TIMEOUT"]
    '600.0s'
    """
    settings = DASK_SETTINGS | {"distributed.scheduler.no-workers-timeout": f"{start_timeout_s}s"}
    return {
        f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
        for key, value in settings.items()
        if key.startswith(("distributed.scheduler.", "distributed.admin."))
    }


def _variables(environment: dict[str, str]) -> list[dict[str, str]]:
    """As Kubernetes wants them; a dollar is doubled, because it would expand what follows in parentheses."""
    return [{"name": key, "value": value.replace("$", "$$")} for key, value in environment.items()]


def _account(spec: KubernetesSpec) -> dict[str, str]:
    return {"serviceAccountName": spec.service_account} if spec.service_account else {}


def _quantity(n_bytes: int) -> str:
    return f"{n_bytes // 2**20}Mi" if n_bytes % 2**20 == 0 else str(int(n_bytes))


# -- the cluster -----------------------------------------------------------------------------------------------------------------


class PodCluster:
    """What a run asks of a cluster of groups, of one whose workers Kubernetes starts, and starts again where they are lost.

    Parameters
    ----------
    cluster : dask_kubernetes.operator.KubeCluster
    spec : KubernetesSpec
    name : str
    """

    def __init__(self, cluster: Any, spec: KubernetesSpec, name: str) -> None:
        self.cluster, self.name, self.namespace = cluster, name, spec.namespace
        self.groups, self.patience_s = spec.groups, spec.start_timeout_s
        self.launches = {
            f"{group}-{i}": Launch(group, None, {}) for group, wanted in spec.groups.items() for i in range(wanted.workers)
        }
        """The wanted workers by name; here nobody but the operator starts any."""
        called = zip(_ordered(spec), ["default", *_ordered(spec)[1:]], strict=True)
        self._patterns = {group: re.compile(rf"{re.escape(f'{name}-{suffix}')}-worker-[0-9a-f]+") for group, suffix in called}

    @property
    def scheduler_address(self) -> str:
        """Where a client finds the scheduler."""
        return str(self.cluster.scheduler_address)

    @property
    def dashboard_link(self) -> str:
        """Of Dask's dashboard."""
        return str(self.cluster.dashboard_link)

    @property
    def status(self) -> Any:
        """As `distributed.deploy.Cluster` has it."""
        return self.cluster.status

    def __await__(self) -> Iterator[Any]:
        """A client awaits its cluster; this one has started."""

        async def itself() -> PodCluster:
            return self

        return itself().__await__()

    def start(self) -> None:
        """Kubernetes has been told already."""

    def is_hopeless(self, n_tries: int, *, everybody: bool) -> bool:  # noqa: ARG002 (as of `launch.GroupCluster`)
        """It never gives up, and whether a pod still waits for room or in vain it cannot say either."""
        return False

    def counts(self) -> dict[str, tuple[int, int]]:
        """Of each group, how many workers are there, and how many are wanted."""
        try:
            workers = self.cluster.sync(self.cluster.scheduler_comm.identity, n_workers=-1)["workers"].values()
        except OSError as error:
            logger.info("the scheduler does not answer: %s", error)
            workers = []
        names = [str(worker["name"]) for worker in workers]
        return {
            group: (sum(pattern.fullmatch(name) is not None for name in names), self.groups[group].workers)
            for group, pattern in self._patterns.items()
        }

    def describe(self) -> str:
        """What there is of each group, and what Kubernetes says of pods that do not run."""
        lines = [f"{group}: {n} of {wanted} workers" for group, (n, wanted) in self.counts().items()]
        return "; ".join([*lines, *_pod_troubles(self.name, self.namespace)])


@contextlib.contextmanager
def kubernetes_cluster(spec: KubernetesSpec, name: str) -> Iterator[PodCluster]:
    """Have the operator start scheduler and workers; all of it is deleted on every way out.

    What a dead run of the same name left is deleted first: whoever calls this holds the store.

    Parameters
    ----------
    spec : KubernetesSpec
    name : str

    Yields
    ------
    PodCluster
        Its scheduler is there, its workers may still be on their way.

    Raises
    ------
    UsageError
        When dask-kubernetes is not installed, or a name is too long.
    FeaturemapsError
        When Kubernetes or the operator does not start the scheduler.
    """
    kube_cluster, create_mode = _library()
    first, *others = manifests(spec, name)
    cluster = None
    try:
        with _explained(spec, name):
            _delete(name, spec.namespace)
            cluster = _within(
                spec.start_timeout_s,
                lambda: kube_cluster(
                    custom_cluster_spec=first,
                    namespace=spec.namespace,
                    create_mode=create_mode.CREATE_ONLY,
                    resource_timeout=int(min(60.0, spec.start_timeout_s)),
                    shutdown_on_close=False,  # that is done below, however far this got
                    quiet=True,
                ),
            )
            for manifest in others:
                group = manifest["metadata"]["name"].removeprefix(f"{name}-")
                cluster.add_worker_group(group, custom_spec=manifest["spec"]["worker"])
        yield PodCluster(cluster, spec, name)
    finally:
        try:
            if cluster is not None:
                cluster.close()
            _delete(name, spec.namespace)
        except Exception as error:  # noqa: BLE001 (of three libraries; what is under way must not be hidden by it)
            logger.warning(
                "the DaskCluster %s in namespace %s was not deleted (%s): kubectl -n %s delete daskcluster %s",
                *(name, spec.namespace, error, spec.namespace, name),
            )


def _library() -> tuple[Any, Any]:
    try:
        from dask_kubernetes.operator import KubeCluster  # noqa: PLC0415 (an extra)
        from dask_kubernetes.operator.kubecluster.kubecluster import CreateMode  # noqa: PLC0415 (as above)
    except ImportError as error:
        raise UsageError(
            "a cluster of kind kubernetes needs dask-kubernetes, which is not installed: nothing was started; pip install "
            "'featuremaps[kubernetes]'"
        ) from error
    return KubeCluster, CreateMode


@contextlib.contextmanager
def _explained(spec: KubernetesSpec, name: str) -> Iterator[None]:
    """Say in a paragraph what went wrong, whichever of three libraries says it."""
    try:
        yield
    except FeaturemapsError:
        raise
    except Exception as error:
        known = "; ".join([f"{type(error).__name__}: {' '.join(str(error).split())}", *_pod_troubles(name, spec.namespace)])
        raise FeaturemapsError(
            f"Kubernetes did not start the Dask cluster {name} in namespace {spec.namespace} ({known}): nothing was computed, and what was "
            "started is deleted; check that `kubectl get daskclusters` works there, that the operator of dask-kubernetes runs (helm "
            "install dask-kubernetes-operator), that you may create DaskClusters, and image and service_account in cluster.yaml"
        ) from error


def _within(timeout_s: float, start: Callable[[], Any]) -> Any:
    """Call a function that may wait for ever, as for a pod that finds no room; its thread is then left behind.

    Raises
    ------
    TimeoutError
    """
    outcome: list[Any] = []

    def call() -> None:
        try:
            outcome.append((start(), None))
        except BaseException as error:  # noqa: BLE001 (raised again below)
            outcome.append((None, error))

    thread = threading.Thread(target=call, name="start-kubernetes-cluster", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise TimeoutError(f"the scheduler was not there within {timeout_s:.0f} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def cluster_kind() -> Any:
    """What kr8s knows a DaskCluster by."""
    from kr8s.objects import new_class  # noqa: PLC0415 (comes with the extra)

    return new_class("DaskCluster", API_VERSION, asyncio=False)


def _delete(name: str, namespace: str) -> None:
    """Delete a DaskCluster, if it is there, with all that it owns, and wait until it is gone."""
    import kr8s  # noqa: PLC0415 (comes with the extra)

    found = cluster_kind()({"metadata": {"name": name, "namespace": namespace}})
    try:
        found.delete(propagation_policy="Foreground")
    except kr8s.NotFoundError:
        return
    started = time.monotonic()
    while found.exists():
        if time.monotonic() - started > DELETE_TIMEOUT_S:
            raise TimeoutError(f"it is still there {DELETE_TIMEOUT_S:.0f} s later")
        time.sleep(0.5)


def _pod_troubles(name: str, namespace: str) -> list[str]:
    """Why pods do not run, in the words of Kubernetes, each reason once."""
    try:
        import kr8s  # noqa: PLC0415 (comes with the extra)

        pods = list(kr8s.get("pods", namespace=namespace, label_selector={"dask.org/cluster-name": name}))
    except Exception as error:  # noqa: BLE001 (it only adds to what is said)
        logger.info("the pods cannot be seen: %s", error)
        return []
    return list(dict.fromkeys(reason for pod in pods for reason in pod_reasons(pod.raw)))[:4]


def pod_reasons(pod: dict[str, Any]) -> Iterator[str]:
    """Why a pod does not run, if it says so.

    Parameters
    ----------
    pod : dict
        As the API of Kubernetes has it.
    """
    component = pod["metadata"].get("labels", {}).get("dask.org/component", "pod")
    status = pod.get("status", {})
    for condition in status.get("conditions", []):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            yield f"{component}: {condition.get('reason', '')}: {condition.get('message', '')}"
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") != "ContainerCreating":
            yield f"{component}: {waiting.get('reason', '')}: {waiting.get('message', '')}"
