"""What the workers of a cluster would offer, before it is started."""

from __future__ import annotations

from pipeline.cluster.spec import ClusterSpec
from pipeline.run.slots import WorkerSlots, slots_of


def planned_slots(spec: ClusterSpec) -> list[WorkerSlots]:
    """What the workers of a cluster would offer; empty for a scheduler of its own, whose workers nobody knows before.

    Raises
    ------
    UsageError
        When GPUs are asked for that this machine has not.
    """
    groups = spec.worker_groups().values()
    return [slots_of(group.resources, group.memory) for group in groups for _ in range(group.n_workers)]
