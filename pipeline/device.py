"""Extraction on a GPU: batches of one shape, quantised where they are computed, copied while others are computed."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import FeaturemapsError
from pipeline.extractor import Extractor, Pooled, check_range, pixels, pool, quantise
from pipeline.layers import layer_names, output_sizes
from pipeline.weights import Array

if TYPE_CHECKING:
    from pipeline.config import ExtractorSpec
    from pipeline.weights import StoredOutput

BATCH_PIXELS = 1 << 23
"""Pixels that are computed at once; more do not make a large GPU faster."""
MAX_BATCH = 2048
STAGES = 2  # batches of one thread on their way: one is copied while the other is computed
_FLOAT_COPIES = 4  # of a layer's maps that are alive at once: its input, convolution, activation and what is stored
_TRANSPORT = {"float32": torch.float32, "float16": torch.float16, "uint16": torch.int16, "uint8": torch.uint8}

_launching = threading.Lock()  # the switches of cuDNN are those of the process, and count when a kernel is launched

Item = tuple[Array, Mapping[str, Array]]


def n_gpus() -> int:
    """GPUs that this process may use and that this installation of torch can."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def best_extractor(
    spec: ExtractorSpec, weights: Mapping[str, Array], stored: Iterable[StoredOutput], worker: int, threads: int
) -> Extractor | DeviceExtractor:
    """The extractor of a worker: on one of the GPUs that it sees, else on the CPU.

    Parameters
    ----------
    spec, weights, stored
        As for `Extractor`.
    worker : int
        Number of the worker on its machine; several share the GPUs evenly.
    threads : int
        Threads that extract at once.
    """
    n = n_gpus()
    if not n:
        return Extractor(spec, weights, stored)
    return DeviceExtractor(spec, weights, stored, device=f"cuda:{worker % n}", threads=threads)


class DeviceExtractor:
    """Extracts in batches on a GPU; what it computes agrees with `Extractor` to 1e-5.

    Every batch has the same shape, the last one too, so that a result does not depend on what else is in the batch. The number of
    images in it is a power of two: `BATCH_PIXELS` at most, and what fits into half of the memory that was free at the start;
    halved when memory runs out all the same.

    Parameters
    ----------
    spec, weights, stored
        As for `Extractor`.
    device : str
        A torch device. On ``cpu`` it does the same without streams and pinned memory, which the tests use.
    threads : int
        Threads that extract at once and share the memory.
    """

    def __init__(
        self,
        spec: ExtractorSpec,
        weights: Mapping[str, Array],
        stored: Iterable[StoredOutput] = (),
        *,
        device: str,
        threads: int = 1,
    ) -> None:
        self.extractor = Extractor(spec, weights, stored, device=device)
        self.device, self.threads = torch.device(device), threads
        self.is_gpu = self.device.type == "cuda"
        self.free_bytes = torch.cuda.mem_get_info(self.device)[0] if self.is_gpu else 1 << 33
        self._batch: dict[tuple[int, int], int] = {}
        self._local = threading.local()

    @property
    def version(self) -> str:
        """What computes the layers, for the receipt."""
        name = torch.cuda.get_device_name(self.device) if self.is_gpu else "cpu"
        return f"{name}, batches of {' or '.join(map(str, sorted(set(self._batch.values())))) or '?'}"

    def batch_size(self, height: int, width: int) -> int:
        """Images of this size in one batch."""
        size = height, width
        if size not in self._batch:
            fitting = self.free_bytes // 2 // (STAGES * self.threads * self._image_bytes(height, width))
            most = max(1, min(BATCH_PIXELS // (height * width), fitting, MAX_BATCH))
            self._batch[size] = 1 << (most.bit_length() - 1)
        return self._batch[size]

    def _image_bytes(self, height: int, width: int) -> int:
        """Memory of the device that one image of a batch takes."""
        layers = self.extractor.specs
        sizes = output_sizes(layers, height, width)
        before = [spec.filters * math.prod(spec.pool) * h * w for spec, (h, w) in zip(layers, sizes, strict=True)]
        return height * width * self.extractor.channels * 5 + 4 * _FLOAT_COPIES * max(before)

    def extract_each(self, size: tuple[int, int], items: Iterable[Item]) -> Iterator[dict[str, Pooled]]:
        """Compute the maps of one image after another and store them; thread-safe.

        Parameters
        ----------
        size : (int, int)
            Height and width that no image exceeds.
        items : iterable of ((y, x, channel) uint8, mapping of str to (channel, y, x))
            Images and where their maps go, as `Extractor.extract_into` takes them; taken as there is room.

        Yields
        ------
        dict of str to Pooled
            As `Extractor.extract_into` returns, in the order of the items; only then the maps are there.

        Raises
        ------
        FeaturemapsError
            When one image alone does not fit the memory of the device; else as `Extractor.extract_into`.
        """
        left, flying = iter(items), deque[_Stage]()
        while chunk := list(islice(left, self.batch_size(*size))):
            if len(flying) == STAGES:
                yield from self._land(flying)
            try:
                flying.append(self._start(size, chunk))
            except torch.OutOfMemoryError as error:
                while flying:
                    yield from self._land(flying)
                self._halve(size, error)
                left = chain(chunk, left)
        while flying:
            yield from self._land(flying)

    def _start(self, size: tuple[int, int], chunk: list[Item]) -> _Stage:
        n = self.batch_size(*size)
        key, idle = getattr(self._local, "idle", (None, []))
        if key != (size, n):
            idle = []
            self._local.idle = (size, n), idle
        stage = idle.pop() if idle else _Stage(self.extractor, size, n)
        stage.start(chunk)
        return stage

    def _land(self, flying: deque[_Stage]) -> Iterator[dict[str, Pooled]]:
        stage = flying.popleft()
        yield from stage.results()
        key, idle = self._local.idle
        if key == stage.key:
            idle.append(stage)

    def _halve(self, size: tuple[int, int], error: Exception) -> None:
        n = self.batch_size(*size)
        if n == 1:
            raise FeaturemapsError(
                f"one image of {size[0]} x {size[1]} pixels does not fit the memory of {self.device} ({error}): its maps were not "
                "computed; use a GPU with more memory, --gpus 0 for the processors, or a new store with --resize"
            ) from error
        self._batch[size] = n // 2
        self._local.idle = None, []
        if self.is_gpu:
            torch.cuda.empty_cache()


class _Stage:
    """Buffers and a stream of one batch: images in, maps and statistics out, pinned where there is a GPU."""

    def __init__(self, extractor: Extractor, size: tuple[int, int], n: int) -> None:
        self.extractor, self.size, self.key = extractor, size, (size, n)
        self.is_gpu = extractor.device.type == "cuda"
        sizes = dict(zip(extractor.names, zip(extractor.specs, output_sizes(extractor.specs, *size), strict=True), strict=True))
        self.pixels = torch.zeros((n, *size, extractor.channels), dtype=torch.uint8, pin_memory=self.is_gpu)
        self.maps = {
            name: torch.empty(
                (n, sizes[name][0].filters, *sizes[name][1]), dtype=_TRANSPORT[stored.dtype], pin_memory=self.is_gpu
            )
            for name, stored in extractor.stored.items()
        }
        self.statistics = {name: torch.empty((4, n, sizes[name][0].filters), pin_memory=self.is_gpu) for name in extractor.stored}
        self.stream = torch.cuda.Stream(extractor.device) if self.is_gpu else None  # type: ignore[no-untyped-call]
        self.items: list[Item] = []

    @torch.inference_mode()
    def start(self, items: list[Item]) -> None:
        """Queue the copies and the computation of some images; nothing is waited for."""
        self.items = items
        for i, (image, out) in enumerate(items):
            self.extractor.check(image, out)
            self.pixels[i, : image.shape[0], : image.shape[1]] = pixels(image)  # what lies beyond is of no consequence
        with self._running():
            x = self.pixels.to(self.extractor.device, non_blocking=True).permute(0, 3, 1, 2).float() / 256
            for name, layer in zip(self.extractor.names, self.extractor.layers, strict=True):
                x = layer(x)
                if name in self.maps:
                    self._measure(name, x)
                    self.maps[name].copy_(_storable(quantise(x, self.extractor.stored[name])), non_blocking=True)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """On the stream, in full float32 unless TF32 was asked for, and the same result every time."""
        if self.stream is None:
            yield
            return
        with _launching, torch.cuda.stream(self.stream):
            torch.backends.cudnn.allow_tf32 = self.extractor.spec.tf32
            torch.backends.cudnn.deterministic = True
            yield

    def _measure(self, name: str, maps: Tensor) -> None:
        """Statistics of each image's valid extent."""
        if all(image.shape[:2] == self.size for image, _ in self.items):
            self.statistics[name].copy_(pool(maps), non_blocking=True)
            return
        at = layer_names(self.extractor.specs).index(name)
        for i, (image, _) in enumerate(self.items):
            height, width = output_sizes(self.extractor.specs, *image.shape[:2])[at]
            self.statistics[name][:, i].copy_(pool(maps[i, :, :height, :width]), non_blocking=True)

    def results(self) -> Iterator[dict[str, Pooled]]:
        """Wait, and hand out what was computed."""
        if self.stream:
            self.stream.synchronize()
        for i, (_, out) in enumerate(self.items):
            pooled: dict[str, Pooled] = {}
            for name, values in out.items():
                stored = self.extractor.stored[name]
                pooled[name] = Pooled(*self.statistics[name][:, i].numpy().copy())
                check_range(name, pooled[name], stored)
                _, height, width = values.shape
                values[...] = self.maps[name][i].numpy().view(np.dtype(stored.dtype))[:, :height, :width]
            yield pooled
        self.items = []


def _storable(maps: Tensor) -> Tensor:
    """Sixteen unsigned bits as signed ones, which every device can copy."""
    return maps.to(torch.int16) if maps.dtype == torch.int32 else maps
