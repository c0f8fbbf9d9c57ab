"""Workers as processes of this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from distributed import Nanny

from pipeline.cluster.groups import Launch
from pipeline.cluster.spec import GroupSpec


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


def local_launches(groups: Mapping[str, GroupSpec], *, security: Any) -> dict[str, Launch]:
    """The wanted processes of this machine, of groups whose memory is known; each sees its own GPUs only."""
    gpus = visible_gpus(sum(group.workers * group.gpus for group in groups.values()))
    launches: dict[str, Launch] = {}
    for group_name, group in groups.items():
        for i in range(group.workers):
            own = [next(gpus) for _ in range(group.gpus)]
            options = {
                "nthreads": group.threads,
                "memory_limit": int(group.memory or 0),
                "resources": group.resources,
                "env": {"CUDA_VISIBLE_DEVICES": ",".join(own), **group.environment},
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
