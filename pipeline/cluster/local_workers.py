"""Workers as processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from distributed import Nanny

from pipeline.cluster.groups import Launch

if TYPE_CHECKING:
    from pipeline.cluster.kinds.local import LocalGroupSpec


class LocalWorker(Nanny):  # type: ignore[misc]
    """A worker process of this machine; its nanny is in this process and starts another where it dies."""

    @staticmethod
    async def find_gone(_: Mapping[str, Any]) -> dict[str, str]:
        """None ever is."""
        return {}

    @staticmethod
    def explain(error: Exception) -> str:
        """Why one did not start."""
        return f"{error}: {error.__cause__}"


def local_launches(groups: Mapping[str, LocalGroupSpec], *, security: Any) -> dict[str, Launch]:
    """The wanted processes of this machine, of groups whose memory is known; each sees its own GPUs only.

    Processes that share GPUs are dealt out in turn, so that a run of few images, which starts the first of them, uses all GPUs.
    """
    gpus = visible_gpus(sum(group.n_gpus for group in groups.values()))
    launches: dict[str, Launch] = {}
    for group_name, group in groups.items():
        owned = [[next(gpus) for _ in range(group.gpus)] for _ in range(group.n_sharing)]
        for i in range(group.workers):
            options = {
                "nthreads": group.threads,
                "memory_limit": int(group.memory or 0),
                "resources": group.resources,
                "env": {"CUDA_VISIBLE_DEVICES": ",".join(owned[i % len(owned)]), **group.environment},
                "host": "127.0.0.1",
                "dashboard": False,
                "protocol": "tls://" if security else "tcp://",
                "security": security,
                "silence_logs": False,
            }
            launches[f"{group_name}-{i}"] = Launch(group_name, LocalWorker, options)
    return launches


def visible_gpus(wanted: int) -> Iterator[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return iter(named.split(",") if named else map(str, range(wanted)))
