"""What of this machine the embedded cluster uses: cores, GPUs, memory."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
from pydantic import ByteSize

from pipeline.cluster.config import CudaSpec, GroupSpec, LocalSpec
from pipeline.errors import UsageError


def local_workers(wanted: int | None) -> int:
    """Batches that the embedded cluster works on at once: one per core that this process may use."""
    return wanted or len(os.sched_getaffinity(0))


def local_gpus(wanted: int | None) -> int:
    """GPUs of the embedded cluster.

    Raises
    ------
    UsageError
        When there are fewer than wanted.
    """
    found = 0
    if wanted or (wanted is None and any(Path("/dev").glob("nvidia[0-9]*"))):
        from pipeline.extract.gpu import n_gpus  # noqa: PLC0415 (torch only where there may be a GPU)

        found = n_gpus()
    if wanted is not None and wanted > found:
        raise UsageError(
            f"{wanted} GPUs were asked for, and this installation of torch sees {found}: nothing was started; use what "
            "there is (no --gpus, kind local), or check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and that torch was installed with "
            "CUDA"
        )
    return found if wanted is None else wanted


def local_processes(spec: LocalSpec | CudaSpec) -> tuple[int, int, int]:
    """Worker processes of the embedded cluster, threads of each, and GPUs."""
    cores, gpus = local_workers(spec.workers), local_gpus(spec.gpus)
    if not gpus and isinstance(spec, CudaSpec):
        local_gpus(1)  # which says that there is none
    return (gpus, max(1, cores // gpus), gpus) if gpus else (cores, 1, 0)


def local_memory_bytes(workers: int, wanted: int | None) -> int:
    """Memory limit of one local worker: its share of nine tenths of the machine."""
    return wanted or int(0.9 * psutil.virtual_memory().total / workers)


def local_groups(spec: LocalSpec | CudaSpec) -> dict[str, GroupSpec]:
    """The worker groups of this machine, each with its memory; without any in the file it is one that does everything.

    Raises
    ------
    UsageError
        When GPUs are asked for that are not there.
    """
    if isinstance(spec, LocalSpec) and spec.groups:
        local_gpus(sum(group.workers * group.gpus for group in spec.groups.values()))
        groups = dict(spec.groups)
    else:
        processes, threads, gpus = local_processes(spec)
        groups = {"local": GroupSpec(workers=processes, threads=threads, gpus=1 if gpus else 0, memory=spec.memory)}
    n_workers = sum(group.workers for group in groups.values())
    memory = {name: ByteSize(local_memory_bytes(n_workers, group.memory)) for name, group in groups.items()}
    return {name: group.model_copy(update={"memory": memory[name]}) for name, group in groups.items()}
