"""Workers as pods of a Kubernetes cluster, started by the operator of dask-kubernetes."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from distributed import Client

from pipeline.cluster.groups import Launch
from pipeline.cluster.kinds.kubernetes import KubernetesSpec
from pipeline.cluster.kubernetes_manifests import API_VERSION, manifests, ordered_groups
from pipeline.cluster.starting import quiet_dask, wait_for_workers
from pipeline.errors import FeaturemapsError, needs_extra
from pipeline.run.slots import WorkerSlots, slots_of
from pipeline.text import count

logger = logging.getLogger(__name__)

DELETE_TIMEOUT_S = 60.0


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
        called = zip(ordered_groups(spec), ["default", *ordered_groups(spec)[1:]], strict=True)
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

    def is_hopeless(self, n_tries: int, *, everybody: bool) -> bool:  # noqa: ARG002 (as of `groups.GroupCluster`)
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

    def wanted(self) -> list[WorkerSlots]:
        """What each of the wanted workers offers, whether it is there or not."""
        groups = [self.groups[launch.group] for launch in self.launches.values()]
        return [slots_of(group.resources, group.memory) for group in groups]

    def describe_troubles(self) -> str:
        """As `describe`, as there are none that are known."""
        return self.describe()

    def describe(self) -> str:
        """What there is of each group, and what Kubernetes says of pods that do not run."""
        lines = [f"{group}: {n} of {count(wanted, 'worker')}" for group, (n, wanted) in self.counts().items()]
        return "; ".join([*lines, *_pod_troubles(self.name, self.namespace)])


@contextlib.contextmanager
def connect_pods(
    spec: KubernetesSpec, name: str, stop: threading.Event | None, on_wait: Callable[[str], None]
) -> Iterator[Client]:
    """Start a cluster of pods and wait for a worker of each group."""
    with quiet_dask(), kubernetes_cluster(spec, name) as pods:
        wait_for_workers(pods, spec.start_timeout_s, stop, on_wait, everybody=False)
        with Client(pods) as client:
            yield client


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
    with needs_extra("kubernetes", "a cluster of kind kubernetes"):
        from dask_kubernetes.operator import KubeCluster  # noqa: PLC0415 (an extra)
        from dask_kubernetes.operator.kubecluster.kubecluster import CreateMode  # noqa: PLC0415 (as above)
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
