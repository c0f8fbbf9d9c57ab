"""Extraction on a GPU: batches of one shape, quantised where they are computed, copied while others are computed."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import FeaturemapsError
from pipeline.extract.cpu import Extractor
from pipeline.extract.gpu_memory import Room, adjoining
from pipeline.extract.gpu_sizes import GPU_STAGES, gpu_batch
from pipeline.extract.keeping import pool_batch, quantise
from pipeline.extract.layers import Array, output_sizes
from pipeline.extract.quantise import DTYPES
from pipeline.extract.stack import Pooled, check_range

if TYPE_CHECKING:
    from pipeline.config import ExtractorSpec
    from pipeline.extract.quantise import StoredOutput

MAX_DEVICE_BYTES = 1 << 32  # of the device's memory that a batch may take
ALLOCATOR_SHARE = 0.75  # of a process's part of the device's memory, which torch may take; contexts of CUDA take the rest
_FLOAT_COPIES = 5  # of a layer's maps that are alive at once: its input, convolution, activation, what is stored and measured
_TRANSPORT: dict[str, torch.dtype] = {name: getattr(torch, dtype.copied_as) for name, dtype in DTYPES.items()}
_FULL = ("out of memory", "unable to find an engine", "status_alloc_failed")  # of CUDA, and of cuDNN in two ways

_launching = threading.Lock()  # the switches of cuDNN are those of the process, and count when a kernel is launched

Item = tuple[Array, Mapping[str, Array]]


def n_cuda_gpus() -> int:
    """GPUs that this installation of torch sees."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


class DeviceExtractor:
    """Extracts in batches on a GPU; what it computes agrees with `Extractor` to 1e-5.

    Every batch has the same shape, the last one too, so that a result does not depend on what else is in the batch. The number of
    images in it is a power of two that follows from their size and the layers (`gpu_batch`, and 4 GiB of the device's memory); it
    is halved until all threads' batches fit this process's part of the memory, and when memory runs out all the same. Batches under
    way take no more than that part: a thread that finds no room waits. An image that does not fit beside others is tried alone.

    Parameters
    ----------
    spec, weights, stored
        As for `Extractor`.
    device : str
        A torch device. On ``cpu`` it does the same without streams and pinned memory, which the tests use.
    threads : int
        Threads that extract at once and share the memory.
    share : float
        Part of the device that is this process's, above 0 and at most 1.
    """

    def __init__(
        self,
        spec: ExtractorSpec,
        weights: Mapping[str, Array],
        stored: Iterable[StoredOutput] = (),
        *,
        device: str,
        threads: int = 1,
        share: float = 1.0,
    ) -> None:
        self.extractor = Extractor(spec, weights, stored, device=device)
        self.device, self.threads = torch.device(device), threads
        self.is_gpu = self.device.type == "cuda"
        if self.is_gpu:
            torch.backends.cudnn.benchmark = False  # it chooses by timing, so results would change from run to run
            if share < 1:
                torch.cuda.set_per_process_memory_fraction(ALLOCATOR_SHARE * share, self.device)
        self.room = Room(int(share * _usable_bytes(self.device)))
        self._batch: dict[tuple[int, int], int] = {}
        self._alone: set[tuple[int, int]] = set()  # sizes of which one image did not fit beside other batches
        self._halving = threading.Lock()
        self._local = threading.local()

    def version(self, size: tuple[int, ...], most: tuple[int, int] | None = None) -> str:
        """What computes the layers of an image of a size, for the receipt; in a batch of images of at most ``most``."""
        name = torch.cuda.get_device_name(self.device) if self.is_gpu else "cpu"
        return f"{name}, batches of {self.batch_size(*(most or size))}"

    def batch_size(self, height: int, width: int) -> int:
        """Images of this size in one batch."""
        size = height, width
        with self._halving:
            if size not in self._batch:
                limit = min(MAX_DEVICE_BYTES, self.room.n_bytes // (GPU_STAGES * self.threads))
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

    def block(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory for maps, contents undefined, that a GPU writes to without a detour."""
        if not self.is_gpu:
            return np.empty(shape, dtype)
        found: Array = torch.empty(shape, dtype=_TRANSPORT[dtype], pin_memory=True).numpy().view(dtype)
        return found

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
        try:
            while chunk := list(islice(left, n := self.batch_size(*size))):
                is_alone = size in self._alone
                n_bytes = self.room.n_bytes if is_alone else n * self._image_bytes(*size)
                while len(flying) == GPU_STAGES or not self.room.take(n_bytes, wait=not flying):
                    yield from self._land(flying)
                error = self._start(size, n, n_bytes, chunk, flying)
                if error is not None:
                    while flying:
                        yield from self._land(flying)
                    self._halve(size, n, error, is_alone=is_alone)
                    left = chain(chunk, left)
            while flying:
                yield from self._land(flying)
        finally:  # also where nobody wants the rest: the device still writes to where their maps go
            with ExitStack() as ends:  # of all of them, also where waiting for one fails
                for stage in flying:
                    ends.callback(self.room.give, stage.n_bytes)
                    ends.callback(stage.wait)

    def _start(
        self, size: tuple[int, int], n: int, n_bytes: int, chunk: list[Item], flying: deque[_Stage]
    ) -> RuntimeError | None:
        """Begin a batch; return the error where memory has run out, without its frames, which hold tensors of the device."""
        key, idle = getattr(self._local, "idle", (None, []))
        if key != (size, n):
            idle = []
            self._local.idle = (size, n), idle
        try:
            stage = idle.pop() if idle else _Stage(self.extractor, size, n, self._stream(len(flying)))
            stage.start(chunk, n_bytes)
        except BaseException as error:
            self.room.give(n_bytes)
            if not isinstance(error, RuntimeError) or not _is_out_of_memory(error):
                raise
            return error.with_traceback(None)
        flying.append(stage)
        return None

    def _stream(self, i: int) -> torch.cuda.Stream | None:
        """One of this thread's own: torch keeps freed memory apart by stream, so new ones for each size would hoard it."""
        if not self.is_gpu:
            return None
        if not hasattr(self._local, "streams"):
            self._local.streams = [torch.cuda.Stream(self.device) for _ in range(GPU_STAGES)]  # type: ignore[no-untyped-call]
        found: torch.cuda.Stream = self._local.streams[i]
        return found

    def _land(self, flying: deque[_Stage]) -> Iterator[dict[str, Pooled]]:
        flying[0].wait()
        stage = flying.popleft()
        self.room.give(stage.n_bytes)
        yield from stage.results()
        key, idle = self._local.idle
        if key == stage.key:
            idle.append(stage)

    def _halve(self, size: tuple[int, int], n: int, error: Exception, *, is_alone: bool) -> None:
        """Make batches of a size smaller than those of ``n`` that failed; other threads may have done so already."""
        if n == 1 and is_alone:
            raise FeaturemapsError(
                f"one image of {size[0]} x {size[1]} pixels does not fit the memory of {self.device} ({error}): its maps were not "
                "computed; use a GPU with more memory, --gpus 0 for the processors, or a new store with --resize"
            ) from error
        with self._halving:
            if n == 1:
                self._alone.add(size)
            self._batch[size] = min(self._batch[size], max(1, n // 2))
        self._local.idle = None, []
        if self.is_gpu:
            torch.cuda.empty_cache()


def _usable_bytes(device: torch.device) -> int:
    """Memory of a device for the batches of all its processes: half of it, or most of what others leave."""
    if device.type != "cuda":
        return 1 << 32
    free, total = torch.cuda.mem_get_info(device)
    return min(total // 2, free * 3 // 4)


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device or its pinned memory is full; cuDNN says so by finding no way to compute."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _FULL)


class _Stage:
    """Buffers of one batch and its stream: images in, statistics out, maps out where they cannot go straight to their places.

    All is pinned where there is a GPU. Whoever drops a stage waits for it first; torch itself keeps its buffers until copies end.
    """

    def __init__(self, extractor: Extractor, size: tuple[int, int], n: int, stream: torch.cuda.Stream | None) -> None:
        self.extractor, self.size, self.key, self.stream = extractor, size, (size, n), stream
        stack, self.is_gpu = extractor.stack, stream is not None
        self.layer_sizes = dict(zip(stack.names, output_sizes(stack.layers, *size), strict=True))
        self.filters = {name: spec.filters for name, spec in zip(stack.names, stack.layers, strict=True)}
        self.pixels = torch.zeros((n, *size, stack.channels), dtype=torch.uint8, pin_memory=self.is_gpu)
        self.extents = torch.empty((len(stack.names), 2, n), dtype=torch.int64, pin_memory=self.is_gpu)
        self.statistics = {name: torch.empty((n, 4, self.filters[name]), pin_memory=self.is_gpu) for name in stack.stored}
        self.staged: dict[str, Tensor] = {}
        self.detours: dict[str, list[int]] = {}
        self.items: list[Item] = []
        self.n_bytes, self.is_whole = 0, True
        # Waiting for it leaves the core to others.
        self.done = torch.cuda.Event(blocking=True) if self.is_gpu else None  # type: ignore[no-untyped-call]

    def start(self, items: list[Item], n_bytes: int) -> None:
        """Queue the copies and the computation of some images; nothing is waited for."""
        self.items, self.n_bytes = items, n_bytes
        self._fill()
        try:
            with self._running():
                self._compute()
        except BaseException:
            if self.stream is not None:
                self.stream.synchronize()  # what was queued still writes to where maps go
            raise

    def _fill(self) -> None:
        """Place the images; a smaller one among zeros, because some algorithms let what lies beside it touch its last bits."""
        pixels, extents = self.pixels.numpy(), self.extents.numpy()
        extents[...] = np.array(list(self.layer_sizes.values()))[:, :, None]
        self.is_whole = True
        for i, (image, out) in enumerate(self.items):
            self.extractor.stack.check(image, out)
            height, width = image.shape[:2]
            pixels[i, :height, :width] = image
            if (height, width) != self.size:
                pixels[i, height:] = 0
                pixels[i, :height, width:] = 0
                self.is_whole = False
                extents[:, :, i] = output_sizes(self.extractor.stack.layers, height, width)

    @torch.inference_mode()
    def _compute(self) -> None:
        x = self.pixels.to(self.extractor.device, non_blocking=True).permute(0, 3, 1, 2)
        x = x.to(torch.float32, memory_format=torch.contiguous_format).div_(256)
        extents = self.extents.to(self.extractor.device, non_blocking=True)
        stack = self.extractor.stack
        for i, (name, layer) in enumerate(zip(stack.names, self.extractor.layers, strict=True)):
            x = layer(x)
            if name in self.statistics:
                self.statistics[name].copy_(pool_batch(x, *extents[i], is_whole=self.is_whole), non_blocking=True)
            if name in self.items[0][1]:
                self._send(name, _storable(quantise(x, stack.stored[name])))

    @contextmanager
    def _running(self) -> Iterator[None]:
        """On the stream, in full float32 unless TF32 was asked for, and the same result every time."""
        if self.stream is None or self.done is None:
            yield
            return
        with _launching, torch.cuda.stream(self.stream):
            self.extractor.set_precision()
            yield
            self.done.record()

    def _send(self, name: str, maps: Tensor) -> None:
        """Copy maps (n, channel, y, x) to their places, or into pinned memory where a place is not pinned or not in one piece."""
        self.detours[name] = []
        for first, place in adjoining([out[name] for _, out in self.items]):
            target = torch.from_numpy(place).view(maps.dtype)
            is_whole = place.flags.c_contiguous and place.shape[1:] == maps.shape[1:]
            if is_whole and (target.is_pinned() or not self.is_gpu):
                target.copy_(maps[first : first + len(place)], non_blocking=True)
            else:
                self.detours[name] += range(first, first + len(place))
        if self.detours[name]:
            if name not in self.staged:
                self.staged[name] = torch.empty(maps.shape, dtype=maps.dtype, pin_memory=self.is_gpu)
            self.staged[name].copy_(maps, non_blocking=True)

    def wait(self) -> None:
        """Wait until all is computed and copied."""
        if self.done is not None:
            self.done.synchronize()

    def results(self) -> Iterator[dict[str, Pooled]]:
        """Hand out what was computed, after `wait`."""
        items, self.items, stored = self.items, [], self.extractor.stack.stored
        statistics = {name: values.numpy()[: len(items)].copy() for name, values in self.statistics.items()}
        detours = {name: set(places) for name, places in self.detours.items() if places}
        for name, values in statistics.items():
            check_range(name, Pooled(*values.swapaxes(0, 1)), stored[name])
        for i, (_, out) in enumerate(items):
            pooled = {name: Pooled(*values[i]) for name, values in statistics.items()}
            for name, places in detours.items():
                if i in places:
                    _, height, width = out[name].shape
                    out[name][...] = self.staged[name][i].numpy().view(stored[name].dtype)[:, :height, :width]
            yield pooled


def _storable(maps: Tensor) -> Tensor:
    """Sixteen unsigned bits as signed ones, which every device can copy."""
    return maps.to(torch.int16) if maps.dtype == torch.int32 else maps
