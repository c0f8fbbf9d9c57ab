"""Whether memory and disk hold what a run would put there, said before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import FeaturemapsError, UsageError
from pipeline.objects import free_bytes
from pipeline.plan import ClassLayout, Size, WorkerKind, worker_memory_bytes


def require_memory(
    layouts: Mapping[Size, ClassLayout],
    channels: int,
    worker: WorkerKind,
    limit_bytes: int,
    decode_bytes: int,
    layer_bytes: Mapping[Size, int],
) -> None:
    """Check that the largest images fit a worker of ``limit_bytes`` (0: no limit); see `worker_memory_bytes` for the others.

    Raises
    ------
    UsageError
        When they do not.
    """
    if not layouts or not limit_bytes:
        return
    needed = worker_memory_bytes(layouts.values(), channels, worker, decode_bytes, layer_bytes)
    if needed > limit_bytes:
        largest = max(layouts, key=lambda size: size[0] * size[1])
        raise UsageError(
            f"images of {largest[0]} x {largest[1]} pixels need up to {needed / 2**20:.0f} MiB per worker, and a worker may use "
            f"{limit_bytes / 2**20:.0f} MiB: it would be killed, so its images were not started; run with fewer workers "
            f"of at least {needed / 2**20:.0f} MiB each (--workers, --memory-limit), or into a new store with --resize or --dtype uint8"
        )


LEDGER_BYTES = 1 << 20  # which the last commit and the receipt may take


def require_room(path: Path, wanted_bytes: int) -> None:
    """Check that the batches at work, which put up to ``wanted_bytes``, and the ledger still find room, whoever else fills the disk.

    Raises
    ------
    FeaturemapsError
        When they may not.
    """
    free = free_bytes(path)
    if wanted_bytes + LEDGER_BYTES > free:
        raise FeaturemapsError(
            f"the disk of {path} has {free / 1e6:.0f} MB free, and the batches at work and the next one need up to "
            f"{wanted_bytes / 1e6:.0f} MB: it would run full, so the run stopped before that, and what was committed stands; free "
            "space and run the same command again to go on from there"
        )


def require_space(path: Path, wanted_bytes: int, n_images: int) -> None:
    """Check that the disk of ``path`` has ``wanted_bytes`` free.

    Raises
    ------
    FeaturemapsError
        When it has not.
    """
    free = free_bytes(path)
    if wanted_bytes > free:
        raise FeaturemapsError(
            f"the maps of {n_images} images need up to {wanted_bytes / 1e9:.2f} GB, and {path} has {free / 1e9:.2f} GB free: they were "
            f"not started, so that the disk does not run full in the middle; free {(wanted_bytes - free) / 1e9:.2f} GB, or use "
            "--limit, or a new store with --dtype uint8 or --resize"
        )
