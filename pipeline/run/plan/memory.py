"""Checks, before a run starts, whether memory and disk hold what it would put there."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import NamedTuple

from pipeline.errors import FeaturemapsError, UsageError
from pipeline.extract.gpu_sizes import GPU_STAGES, gpu_batch
from pipeline.source.decoding import plain_decode_bytes
from pipeline.source.fetch import READ_AHEAD_BYTES
from pipeline.source.urls import is_url
from pipeline.store.layout import BATCH_BYTES, SHARD_BYTES, ClassLayout, LayerLayout, Size
from pipeline.store.objects import Place, free_bytes, is_remote
from pipeline.store.settings import Scratch

# Memory of a worker without any image: interpreter, dask, zarr (which only a worker imports that keeps rows of an earlier run), and
# torch unless compiled code computes everything. Measured with torch's build for processors; the CUDA builds need more, even without a
# GPU.
COMPILED_BASE_BYTES = 110 * 1024**2
TORCH_BASE_BYTES = 300 * 1024**2 if version("torch").endswith("+cpu") else 450 * 1024**2
GPU_BASE_BYTES = 1536 * 1024**2  # with CUDA's context and libraries: an assumption, because no GPU has been measured
# Scratch memory of the convolution for images of any size: where maps are not stored; and with compiled code for a single layer.
BAND_BYTES = 32 * 1024**2
COMPILED_BYTES = 8 * 1024**2
# Share of its limit that a worker may use: from 80 % on Dask pauses it, for ever, because the memory is kept for the next batch.
USABLE_SHARE = 0.8


class WorkerKind(NamedTuple):
    """The properties of a worker that decide how much memory it needs."""

    threads: int
    """Batches that it extracts and writes at once."""
    window: int = 0
    """Batches in flight whose images may be in its memory; 0 if one task does all stages of a batch, image by image."""
    has_gpu: bool = False
    bucket_bytes: int = 0
    """Additional memory per thread for requests to buckets; see `bucket_bytes`."""


def worker_memory_bytes(
    layouts: Iterable[ClassLayout],
    channels: int,
    worker: WorkerKind,
    decode_bytes: int = 0,
    scratch: Mapping[Size, Scratch] | None = None,
) -> int:
    """Projected peak memory of one worker, without a GPU's own: between 1 and 1.75 times the measured peak.

    The sum of:

    - the interpreter and its libraries;
    - the decoded images of all batches in flight, if separate tasks read and extract;
    - per thread, the maps of one batch (of one shard, if one task does all stages) and the scratch memory of one image;
    - per thread, the larger of two phases: an image is decoded beside the previous one, or a chunk is compressed beside the previous
      one, which is written;
    - with a GPU, per thread, the pinned pixels and maps of two batches, as torch rounds them, and the images of three.

    Parameters
    ----------
    layouts : iterable of ClassLayout
    channels : int
        Channels of the decoded image.
    worker : WorkerKind
    decode_bytes : int
        The most memory that decoding one image takes, including its file.
    scratch : mapping of (int, int) to Scratch, optional
        Per class, what computes an image and the memory that this takes; see `settings.scratch_of`.
    """
    known = scratch or {}
    needed = (
        _class_memory_bytes(layout, channels, worker, decode_bytes, known.get(layout.size, Scratch())) for layout in layouts
    )
    base = GPU_BASE_BYTES if worker.has_gpu else base_bytes(has_torch=any(each.has_torch for each in known.values()))
    return base + max(needed, default=0)


def base_bytes(*, has_torch: bool) -> int:
    """Memory of a worker without any image."""
    return TORCH_BASE_BYTES if has_torch else COMPILED_BASE_BYTES


def bucket_bytes(root: str, store: Place) -> int:
    """Memory that a thread holds for requests: files that are being read, and an object that is sent whole, in parts and joined."""
    return (READ_AHEAD_BYTES if is_url(root) else 0) + (2 * SHARD_BYTES if is_remote(store) else 0)


def guess_decode_bytes(size: Size, file_bytes: int) -> int:
    """Memory to decode an image of a class that an earlier run probed; transparency or a resize may need more."""
    return plain_decode_bytes(*size, file_bytes)


def _class_memory_bytes(layout: ClassLayout, channels: int, worker: WorkerKind, decode_bytes: int, known: Scratch) -> int:
    image = layout.size[0] * layout.size[1] * channels
    shard = layout.shard_rows * (image + layout.row_bytes)
    n_images = layout.shard_rows * (max(1, BATCH_BYTES // shard) if worker.window else 1)
    scratch = known.n_bytes + (BAND_BYTES if known.n_bytes else COMPILED_BYTES)
    if worker.has_gpu:
        n = gpu_batch(*layout.size)
        maps = 4 * sum(layer.channels * layer.height * layer.width for layer in layout.layers)
        scratch = 2 * maps + known.n_bytes + BAND_BYTES
        pinned = GPU_STAGES * n * (image + layout.row_bytes)
        scratch += 2 * pinned + n_images * layout.row_bytes  # torch rounds pinned memory up to powers of two, that of a shard too
        scratch += (GPU_STAGES + 1) * n * image
    decoding = decode_bytes + (image if layout.shard_rows > 1 else 0)
    scratch += worker.bucket_bytes
    per_thread = (
        n_images * layout.row_bytes + scratch + max([decoding, *(_encode_bytes(layout, layer) for layer in layout.layers)])
    )
    return worker.window * n_images * image + worker.threads * per_thread


def _encode_bytes(layout: ClassLayout, layer: LayerLayout) -> int:
    """Bytes of a chunk of incompressible data, twice while it is compressed; of several, also a copy and the one before it."""
    chunk = layer.chunk_rows * layer.channels * layer.chunk_height * layer.chunk_width * layer.itemsize
    is_whole = layer.chunk_rows == layout.shard_rows and (layer.chunk_height, layer.chunk_width) == (layer.height, layer.width)
    return (2 if is_whole else 4) * chunk


def require_memory(
    layouts: Mapping[Size, ClassLayout],
    channels: int,
    worker: WorkerKind,
    limit_bytes: int,
    decode_bytes: int,
    scratch: Mapping[Size, Scratch],
) -> None:
    """Check that the largest images fit a worker of ``limit_bytes`` (0: no limit); `worker_memory_bytes` explains the others.

    Raises
    ------
    UsageError
        When they do not.
    """
    if not layouts or not limit_bytes:
        return
    needed = worker_memory_bytes(layouts.values(), channels, worker, decode_bytes, scratch)
    if needed > usable_bytes(limit_bytes):
        largest = max(layouts, key=lambda size: size[0] * size[1])
        raise UsageError(
            f"images of {largest[0]} x {largest[1]} pixels need up to {needed / 2**20:.0f} MiB per worker, and a worker of "
            f"{limit_bytes / 2**20:.0f} MiB may use {usable_bytes(limit_bytes) / 2**20:.0f} MiB: it would be paused or killed, so its "
            f"images were not started; run with fewer workers of at least {wanted_limit_bytes(needed) / 2**20:.0f} MiB each (--workers, "
            "--memory-limit; of a cluster `memory` of all its groups in cluster.yaml), or into a new store with --resize, --dtype uint8 or "
            "a job file whose decode.pixel_limit rejects the largest images"
        )


def usable_bytes(limit_bytes: int) -> int:
    """Memory that a worker may use before Dask pauses it."""
    return int(USABLE_SHARE * limit_bytes)


def wanted_limit_bytes(needed_bytes: int) -> int:
    """Memory limit, in whole MiB, of a worker that needs this much."""
    return math.ceil(needed_bytes / USABLE_SHARE / 2**20) * 2**20


LEDGER_BYTES = 1 << 20  # for the last commit and the receipt


def require_room(path: Place, wanted_bytes: int) -> None:
    """Check that the disk still holds the ledger and the batches in flight, which write up to ``wanted_bytes``.

    Others may have filled the disk meanwhile.

    Raises
    ------
    FeaturemapsError
        When it may not.
    """
    free = free_bytes(path)
    if free is not None and wanted_bytes + LEDGER_BYTES > free:
        raise FeaturemapsError(
            f"the disk of {path} has {free / 1e6:.0f} MB free, and the batches at work and the next one need up to "
            f"{wanted_bytes / 1e6:.0f} MB: it would run full, so the run stopped before that, and what was committed stands; free "
            "space and run the same command again to go on from there"
        )


def require_space(path: Place, wanted_bytes: int, n_images: int) -> None:
    """Check that the disk of ``path`` has ``wanted_bytes`` free. A bucket has no known limit.

    Raises
    ------
    FeaturemapsError
        When it has not.
    """
    free = free_bytes(path)
    if free is not None and wanted_bytes > free:
        raise FeaturemapsError(
            f"the maps of {n_images} images need up to {wanted_bytes / 1e9:.2f} GB, and {path} has {free / 1e9:.2f} GB free: they were "
            f"not started, so that the disk does not run full in the middle; free {(wanted_bytes - free) / 1e9:.2f} GB, or use "
            "--limit, or a new store with --dtype uint8 or --resize"
        )
