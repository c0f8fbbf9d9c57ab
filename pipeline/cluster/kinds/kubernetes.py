"""Workers as pods of a Kubernetes cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from threading import Event
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from pipeline.cluster.finding import Finding
from pipeline.cluster.spec import GroupSpec, GroupsSpec, Name, Text
from pipeline.validation import SECONDS, Memory, Word


class KubernetesGroupSpec(GroupSpec):
    """Pods of a Kubernetes cluster, one worker per pod."""

    memory: Memory
    node_selector: dict[str, Word] = {}
    """Labels of the nodes on which the pods may run."""
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


class KubernetesSpec(GroupsSpec):
    """Pods that the operator of dask-kubernetes starts."""

    extra: ClassVar[tuple[str, str] | None] = ("dask_kubernetes", "kubernetes")

    kind: Literal["kubernetes"]
    image: Text
    """Container image with featuremaps, for scheduler and workers."""
    groups: Annotated[dict[Name, KubernetesGroupSpec], Field(min_length=1)]
    namespace: Text = "default"
    """Where the pods are."""
    service_account: str | None = None
    """Service account of scheduler and workers. None takes the namespace's default."""
    volumes: tuple[dict[str, Any], ...] = ()
    """Volumes of the pods, in the form of Kubernetes."""
    volume_mounts: tuple[dict[str, Any], ...] = ()
    """Mount points of the images and the store: the same paths as the driver's."""
    start_timeout_s: Annotated[float, SECONDS, Field(gt=0)] = 600.0
    """Seconds that a run waits for a worker of each group, and for any worker after all were lost."""

    def connect(
        self,
        name: str,
        stop: Event | None,
        on_wait: Callable[[str], None],
        n_images: int | None = None,  # noqa: ARG002 (Kubernetes starts whole groups)
    ) -> AbstractContextManager[Any]:
        """Have the operator start scheduler and workers."""
        from pipeline.cluster.kubernetes import connect_pods  # noqa: PLC0415 (imports Dask)

        return connect_pods(self, name, stop, on_wait)

    def show(self, job_name: str) -> str:
        """The manifests."""
        from pipeline.cluster.kubernetes_manifests import manifests  # noqa: PLC0415 (imports Dask)

        return yaml.safe_dump_all(manifests(self, job_name), sort_keys=False).rstrip()

    def look_there(self) -> Iterator[Finding]:
        """Check that Kubernetes answers, and that it has DaskClusters."""
        import kr8s  # noqa: PLC0415 (comes with the extra)

        from pipeline.cluster.kubernetes import cluster_kind  # noqa: PLC0415 (as above)

        try:
            found = kr8s.api().version()
        except Exception as error:  # noqa: BLE001 (two libraries may raise it)
            remedy = "make `kubectl version` work: KUBECONFIG, its context, and the network"
            yield Finding("FAIL", "Kubernetes", f"it does not answer ({type(error).__name__}: {error})", remedy)
            return
        yield Finding("ok", "Kubernetes", str(found.get("gitVersion", found)))
        try:
            n = len(list(cluster_kind().list(namespace=self.namespace)))
        except Exception as error:  # noqa: BLE001 (as above)
            remedy = "install the operator (helm install dask-kubernetes-operator), and get the right to create DaskClusters"
            yield Finding("FAIL", "DaskClusters", f"they cannot be listed in namespace {self.namespace} ({error})", remedy)
            return
        yield Finding("ok", "DaskClusters", f"{n} in namespace {self.namespace}")
