"""GPUs of this process. No torch where there cannot be one."""

from __future__ import annotations

import os
from pathlib import Path

DEVICE_FILES = ("nvidia[0-9]*", "dxg", "kfd", "nvhost-gpu")
"""Of NVIDIA's driver, of WSL, of AMD's driver, of Jetson boards: where none of them is, torch sees no GPU."""


def may_have_gpus(devices: Path = Path("/dev")) -> bool:
    """Whether this process may see a GPU: it has a device file, and CUDA_VISIBLE_DEVICES hides not all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(any(devices.glob(name)) for name in DEVICE_FILES)


def n_gpus() -> int:
    """GPUs that this process may use and that this installation of torch can."""
    if not may_have_gpus():
        return 0
    from pipeline.extract.gpu import n_cuda_gpus  # noqa: PLC0415 (torch only where there may be a GPU)

    return n_cuda_gpus()


def device_of(worker: int) -> str:
    """The GPU of a worker, in torch's words: workers that see several share them by their numbers."""
    return f"cuda:{worker % n_gpus()}"
