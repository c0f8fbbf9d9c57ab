"""Manifests for the operator of dask-kubernetes, as plain values; nothing is started, and no extra is needed."""

from __future__ import annotations

from typing import Any

from pipeline.cluster.dask_settings import DASK_SETTINGS, group_environment
from pipeline.cluster.groups import DEATH_TIMEOUT_S
from pipeline.cluster.kinds.kubernetes import KubernetesGroupSpec, KubernetesSpec
from pipeline.errors import UsageError

API_VERSION = "kubernetes.dask.org/v1"
IDLE_TIMEOUT_S = 1800
"""The operator deletes a cluster without tasks after this time plus the time to start: its driver is gone."""
MAX_LABEL = 63
"""Longest label in characters; a label with the group's name marks its pods."""
_SCHEDULER_PORT, _DASHBOARD_PORT = 8786, 8787


def manifests(spec: KubernetesSpec, name: str) -> list[dict[str, Any]]:
    """All manifests: a DaskCluster with the first group, and a DaskWorkerGroup for each other group.

    Parameters
    ----------
    spec : KubernetesSpec
    name : str
        Name of the cluster.

    Raises
    ------
    UsageError
        When names become too long for Kubernetes.
    """
    first, *others = ordered_groups(spec)
    return [cluster_manifest(spec, name, first), *(group_manifest(spec, name, group) for group in others)]


def ordered_groups(spec: KubernetesSpec) -> list[str]:
    """Names of the groups, "default" first if there is one: the operator gives this name to the group of the cluster itself."""
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
    """A fixed number of pods: the operator's autoscaling would remove pods of any group."""
    if len(f"{name}-{group}") > MAX_LABEL:
        raise UsageError(
            f"group {group!r} of the cluster {name} has a name of {len(group)} characters, and Kubernetes takes {MAX_LABEL} for both and a "
            f"hyphen: nothing was started; name the group with at most {MAX_LABEL - len(name) - 1}"
        )
    return {"replicas": spec.groups[group].workers, "spec": worker_pod(spec, spec.groups[group])}


def worker_pod(spec: KubernetesSpec, group: KubernetesGroupSpec) -> dict[str, Any]:
    """The spec of a worker's pod. It requests as much as its limit, so that no pod is evicted because another uses more."""
    resources = {"cpu": str(group.threads), "memory": _quantity(group.memory)}
    resources |= {"nvidia.com/gpu": str(group.gpus)} if group.gpus else {}
    container: dict[str, Any] = {
        "name": "worker",
        "image": spec.image,
        "args": worker_arguments(group),
        "env": _variables(group_environment(group)),
        "resources": {"requests": resources, "limits": dict(resources)},
    }
    if spec.volume_mounts:
        container["volumeMounts"] = [dict(mount) for mount in spec.volume_mounts]
    pod: dict[str, Any] = {"containers": [container], **_account(spec)}
    pod |= {"nodeSelector": dict(group.node_selector)} if group.node_selector else {}
    pod |= {"volumes": [dict(volume) for volume in spec.volumes]} if spec.volumes else {}
    return pod | group.options


def worker_arguments(group: KubernetesGroupSpec) -> list[str]:
    """Command of a worker's container; the operator passes name and scheduler as variables."""
    return [
        *("dask", "worker", "--name", "$(DASK_WORKER_NAME)", "--nthreads", str(group.threads)),
        *("--memory-limit", str(int(group.memory)), "--resources", group.resources_text),
        *("--nanny", "--death-timeout", str(DEATH_TIMEOUT_S), "--no-dashboard"),
    ]


def scheduler_environment(start_timeout_s: float) -> dict[str, str]:
    """Dask's settings for a scheduler outside this process.

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
    """In the form of Kubernetes. A dollar is doubled, because Kubernetes would expand what follows in parentheses."""
    return [{"name": key, "value": value.replace("$", "$$")} for key, value in environment.items()]


def _account(spec: KubernetesSpec) -> dict[str, str]:
    return {"serviceAccountName": spec.service_account} if spec.service_account else {}


def _quantity(n_bytes: int) -> str:
    return f"{n_bytes // 2**20}Mi" if n_bytes % 2**20 == 0 else str(int(n_bytes))
