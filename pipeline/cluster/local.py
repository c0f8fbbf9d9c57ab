"""What of this machine the embedded cluster uses: cores, GPUs, memory."""

from __future__ import annotations

import os

import psutil

from pipeline.errors import UsageError
from pipeline.extract import devices

CORES_PER_PROCESS = 4
"""Of processes that share a GPU. Python's lock lets the threads of one process run Python in turn; more than about four would wait."""
MAX_PROCESSES_PER_GPU = 8
"""Unless more are asked for: each holds some hundred MB of the GPU's memory before the first image."""


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
    found = 0 if wanted == 0 else devices.n_gpus()
    if wanted is not None and wanted > found:
        raise UsageError(
            f"{wanted} GPUs were asked for, and this installation of torch sees {found}: nothing was started; use what "
            "there is (no --gpus, kind local), or check the driver (nvidia-smi), CUDA_VISIBLE_DEVICES and that torch was installed with "
            "CUDA"
        )
    return found if wanted is None else wanted


def processes_per_gpu(wanted: int | None, cores: int) -> int:
    """Processes that share a GPU to which so many cores belong.

    Examples
    --------
    >>> [processes_per_gpu(None, cores) for cores in (1, 4, 7, 8, 16, 64)], processes_per_gpu(3, 16)
    ([1, 1, 1, 2, 4, 8], 3)
    """
    return wanted or min(max(1, cores // CORES_PER_PROCESS), MAX_PROCESSES_PER_GPU)


def local_memory_bytes(workers: int, wanted: int | None) -> int:
    """Memory limit of one local worker: its share of nine tenths of the machine."""
    return wanted or int(0.9 * psutil.virtual_memory().total / workers)
