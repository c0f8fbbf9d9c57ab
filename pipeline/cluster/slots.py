"""What the workers of a cluster would offer, before it is started."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.cluster.config import AddressSpec, ClusterSpec, CudaSpec, GroupSpec, LocalSpec
from pipeline.cluster.local import local_groups
from pipeline.run.slots import WorkerSlots, slots_of


def planned_slots(spec: ClusterSpec) -> list[WorkerSlots]:
    """What the workers of a cluster would offer; empty for a scheduler of its own, whose workers nobody knows before.

    Raises
    ------
    UsageError
        When GPUs are asked for that this machine has not.
    """
    if isinstance(spec, AddressSpec):
        return []
    groups: Mapping[str, GroupSpec] = local_groups(spec) if isinstance(spec, LocalSpec | CudaSpec) else spec.groups
    counts = {name: group.workers * len(getattr(group, "hosts", (1,))) for name, group in groups.items()}
    return [slots_of(group.resources, group.memory) for name, group in groups.items() for _ in range(counts[name])]
