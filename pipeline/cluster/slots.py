"""What the workers of a cluster would offer, known before it starts."""

from __future__ import annotations

from pipeline.cluster.spec import ClusterSpec
from pipeline.run.slots import WorkerSlots, slots_of


def planned_slots(spec: ClusterSpec) -> list[WorkerSlots]:
    """What the workers of a cluster would offer; empty for a scheduler given by its address, whose workers are unknown.

    Raises
    ------
    UsageError
        When the cluster needs GPUs that this machine does not have.
    """
    groups = spec.worker_groups().values()
    return [slots_of(group.resources, group.memory) for group in groups for _ in range(group.n_workers)]
