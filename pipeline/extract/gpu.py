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
from pipeline.extract.cpu import Extractor, pixels
from pipeline.extract.gpu_sizes import GPU_STAGES, gpu_batch
from pipeline.extract.keeping import pool, quantise
from pipeline.extract.layers import Array, layer_names, output_sizes
from pipeline.extract.quantise import DTYPES
from pipeline.extract.stack import Pooled, check_range

if TYPE_CHECKING:
    from pipeline.config import ExtractorSpec
    from pipeline.extract.quantise import StoredOutput

MAX_DEVICE_BYTES = 1 << 32  # of the device's memory that a batch may take
_FLOAT_COPIES = 4  # of a layer's maps that are alive at once: its input, convolution, activation and what is stored
_TRANSPORT: dict[str, torch.dtype] = {name: getattr(torch, dtype.copied_as) for name, dtype in DTYPES.items()}

_launching = threading.Lock()  # the switches of cuDNN are those of the process, and count when a kernel is launched

Item = tuple[Array, Mapping[str, Array]]


def n_cuda_gpus() -> int:
    """GPUs that this installation of torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class DeviceExtractor:
    """Extracts in batches on a GPU; what it computes agrees with `Extractor` to 1e-5.

    Every batch has the same shape, the last one too, so that a result does not depend on what else is in the batch. The number of
    images in it is a power of two that follows from their size and the layers (`gpu_batch`, and 4 GiB of the device's memory); it
    is halved until all threads' batches fit half of the memory that was free at the start, and when memory runs out all the same.

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
        self._halving = threading.Lock()
        self._local = threading.local()

    def version(self, size: tuple[int, int]) -> str:
        """What computes the layers of images of a size, for the receipt."""
        name = torch.cuda.get_device_name(self.device) if self.is_gpu else "cpu"
        return f"{name}, batches of {self.batch_size(*size)}"

    def batch_size(self, height: int, width: int) -> int:
        """Images of this size in one batch."""
        size = height, width
        with self._halving:
            if size not in self._batch:
                limit = min(MAX_DEVICE_BYTES, self.free_bytes // 2 // (GPU_STAGES * self.threads))
                n = gpu_batch(height, width)
                while n > 1 and n * self._image_bytes(height, width) > limit:
                    n //= 2
                self._batch[size] = n
            return self._batch[size]

    def _image_bytes(self, height: int, width: int) -> int:
        """Memory of the device that one image of a batch takes."""
        layers = self.extractor.stack.layers
        sizes = output_sizes(layers, height, width)
        before = [spec.filters * math.prod(spec.pool) * h * w for spec, (h, w) in zip(layers, sizes, strict=True)]
        n_pixels: int = height * width * self.extractor.stack.channels
        return n_pixels * 5 + 4 * _FLOAT_COPIES * max(before)

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
        while chunk := list(islice(left, n := self.batch_size(*size))):
            if len(flying) == GPU_STAGES:
                yield from self._land(flying)
            try:
                flying.append(self._start(size, n, chunk))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                while flying:
                    yield from self._land(flying)
                self._halve(size, n, error)
                left = chain(chunk, left)
        while flying:
            yield from self._land(flying)

    def _start(self, size: tuple[int, int], n: int, chunk: list[Item]) -> _Stage:
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

    def _halve(self, size: tuple[int, int], n: int, error: Exception) -> None:
        """Make batches of a size smaller than those of ``n`` that failed; other threads may have done so already."""
        if n == 1:
            raise FeaturemapsError(
                f"one image of {size[0]} x {size[1]} pixels does not fit the memory of {self.device} ({error}): its maps were not "
                "computed; use a GPU with more memory, --gpus 0 for the processors, or a new store with --resize"
            ) from error
        with self._halving:
            self._batch[size] = min(self._batch[size], n // 2)
        self._local.idle = None, []
        if self.is_gpu:
            torch.cuda.empty_cache()


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device or its pinned memory is full; cuDNN says so by finding no way to compute."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "unable to find an engine" in text


class _Stage:
    """Buffers and a stream of one batch: images in, maps and statistics out, pinned where there is a GPU."""

    def __init__(self, extractor: Extractor, size: tuple[int, int], n: int) -> None:
        self.extractor, self.size, self.key = extractor, size, (size, n)
        stack = extractor.stack
        self.is_gpu = extractor.device.type == "cuda"
        sizes = dict(zip(stack.names, zip(stack.layers, output_sizes(stack.layers, *size), strict=True), strict=True))
        self.pixels = torch.zeros((n, *size, stack.channels), dtype=torch.uint8, pin_memory=self.is_gpu)
        self.maps = {
            name: torch.empty(
                (n, sizes[name][0].filters, *sizes[name][1]), dtype=_TRANSPORT[stored.dtype], pin_memory=self.is_gpu
            )
            for name, stored in stack.stored.items()
            if name in stack.spec.map_names
        }
        self.statistics = {name: torch.empty((n, 4, sizes[name][0].filters), pin_memory=self.is_gpu) for name in stack.stored}
        self.stream = torch.cuda.Stream(extractor.device) if self.is_gpu else None  # type: ignore[no-untyped-call]
        self.items: list[Item] = []

    @torch.inference_mode()
    def start(self, items: list[Item]) -> None:
        """Queue the copies and the computation of some images; nothing is waited for."""
        self.items = items
        for i, (image, out) in enumerate(items):
            self.extractor.stack.check(image, out)
            height, width = image.shape[:2]
            self.pixels[i, :height, :width] = pixels(image)
            self.pixels[i, height:] = 0  # valid outputs do not need it, but some algorithms let it touch their last bits
            self.pixels[i, :height, width:] = 0
        with self._running():
            x = self.pixels.to(self.extractor.device, non_blocking=True).permute(0, 3, 1, 2).float() / 256
            for name, layer in zip(self.extractor.stack.names, self.extractor.layers, strict=True):
                x = layer(x)
                if name in self.statistics:
                    self._measure(name, x)
                if name in self.maps:
                    self.maps[name].copy_(_storable(quantise(x, self.extractor.stack.stored[name])), non_blocking=True)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """On the stream, in full float32 unless TF32 was asked for, and the same result every time."""
        if self.stream is None:
            yield
            return
        with _launching, torch.cuda.stream(self.stream):
            self.extractor.set_precision()
            yield

    def _measure(self, name: str, maps: Tensor) -> None:
        """Statistics of each image's valid extent."""
        if all(image.shape[:2] == self.size for image, _ in self.items):
            found = pool(maps).transpose(0, 1).contiguous()
        else:
            at = layer_names(self.extractor.stack.layers).index(name)
            extents = (output_sizes(self.extractor.stack.layers, *image.shape[:2])[at] for image, _ in self.items)
            found = torch.stack([pool(maps[i, :, :height, :width]) for i, (height, width) in enumerate(extents)])
        self.statistics[name][: len(found)].copy_(found, non_blocking=True)

    def results(self) -> Iterator[dict[str, Pooled]]:
        """Wait, and hand out what was computed."""
        if self.stream:
            self.stream.synchronize()
        for i, (_, out) in enumerate(self.items):
            pooled: dict[str, Pooled] = {}
            for name, stored in self.extractor.stack.stored.items():
                pooled[name] = Pooled(*self.statistics[name][i].numpy().copy())
                check_range(name, pooled[name], stored)
            for name, values in out.items():
                stored = self.extractor.stack.stored[name]
                _, height, width = values.shape
                values[...] = self.maps[name][i].numpy().view(np.dtype(stored.dtype))[:, :height, :width]
            yield pooled
        self.items = []


def _storable(maps: Tensor) -> Tensor:
    """Sixteen unsigned bits as signed ones, which every device can copy."""
    return maps.to(torch.int16) if maps.dtype == torch.int32 else maps
