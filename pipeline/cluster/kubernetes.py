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
    """Gives a run the interface of `groups.GroupCluster`, for workers that Kubernetes starts and replaces.

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
        """The wanted workers by name; empty, because only the operator starts any."""
        called = zip(ordered_groups(spec), ["default", *ordered_groups(spec)[1:]], strict=True)
        self._patterns = {group: re.compile(rf"{re.escape(f'{name}-{suffix}')}-worker-[0-9a-f]+") for group, suffix in called}

    @property
    def scheduler_address(self) -> str:
        """Address at which a client finds the scheduler."""
        return str(self.cluster.scheduler_address)

    @property
    def dashboard_link(self) -> str:
        """Of Dask's dashboard."""
        return str(self.cluster.dashboard_link)

    @property
    def status(self) -> Any:
        """Same as in `distributed.deploy.Cluster`."""
        return self.cluster.status

    def __await__(self) -> Iterator[Any]:
        """For a client, which awaits its cluster; this one has started."""

        async def itself() -> PodCluster:
            return self

        return itself().__await__()

    def start(self) -> None:
        """Do nothing: Kubernetes starts the workers."""

    def is_hopeless(self, n_tries: int, *, everybody: bool) -> bool:  # noqa: ARG002 (as of `groups.GroupCluster`)
        """Always False: Kubernetes never gives up, and does not tell whether a pod will ever find room."""
        return False

    def counts(self) -> dict[str, tuple[int, int]]:
        """Per group, the number of workers that are there and the number wanted."""
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
        """What each wanted worker offers, started or not."""
        groups = [self.groups[launch.group] for launch in self.launches.values()]
        return [slots_of(group.resources, group.memory) for group in groups]

    def describe_troubles(self) -> str:
        """Same as `describe`: no other troubles are known."""
        return self.describe()

    def describe(self) -> str:
        """Per group, how many workers are there, and what Kubernetes says about pods that do not run."""
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
    """Have the operator start scheduler and workers; all of it is deleted in the end, also after an error.

    Leftovers of a dead run of the same name are deleted first: the caller holds the lock of the store.

    Parameters
    ----------
    spec : KubernetesSpec
    name : str

    Yields
    ------
    PodCluster
        Its scheduler runs; its workers may still be starting.

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
                    shutdown_on_close=False,  # done below, also after an error
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
        except Exception as error:  # noqa: BLE001 (of three libraries; it must not hide the error in progress)
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
    """Turn the errors of three libraries into one message."""
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
    """Call a function that may never return, for instance because a pod finds no room; then leave its thread behind.

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
    """The class by which kr8s knows a DaskCluster."""
    from kr8s.objects import new_class  # noqa: PLC0415 (comes with the extra)

    return new_class("DaskCluster", API_VERSION, asyncio=False)


def _delete(name: str, namespace: str) -> None:
    """Delete a DaskCluster and all that it owns, and wait until it is gone; ignore one that does not exist."""
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
    """Why pods do not run, in the words of Kubernetes; each reason once."""
    try:
        import kr8s  # noqa: PLC0415 (comes with the extra)

        pods = list(kr8s.get("pods", namespace=namespace, label_selector={"dask.org/cluster-name": name}))
    except Exception as error:  # noqa: BLE001 (it only adds to the message)
        logger.info("the pods cannot be seen: %s", error)
        return []
    return list(dict.fromkeys(reason for pod in pods for reason in pod_reasons(pod.raw)))[:4]


def pod_reasons(pod: dict[str, Any]) -> Iterator[str]:
    """Why a pod does not run, if it says so.

    Parameters
    ----------
    pod : dict
        As returned by the API of Kubernetes.
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
