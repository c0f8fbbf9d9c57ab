"""The kinds of clusters, one module each: its keys in ``cluster.yaml``, and how to start, show and check it.

Register a new kind here, with one line in `KINDS`.
"""

from __future__ import annotations

from importlib import import_module

from pipeline.cluster.spec import ClusterSpec

KINDS = (
    "local.LocalSpec",
    "local.CudaSpec",
    "batch.BatchSpec",
    "ssh.SshSpec",
    "kubernetes.KubernetesSpec",
    "address.AddressSpec",
)
"""Module and model of each kind. No module imports Dask before a cluster is started."""


def spec_types() -> tuple[type[ClusterSpec], ...]:
    """The models of all kinds."""
    parts = (name.split(".") for name in KINDS)
    return tuple(getattr(import_module(f"{__name__}.{module}"), model) for module, model in parts)
