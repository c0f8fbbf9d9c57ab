"""Which extractor a process uses. It imports torch only where there may be a GPU, or where compiled code is not enough."""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from pipeline.extract import devices
from pipeline.extract.compiled import CompiledExtractor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from pipeline.config import ExtractorSpec
    from pipeline.extract.layers import Array
    from pipeline.extract.quantise import StoredOutput
    from pipeline.extract.stack import Pooled


class MapExtractor(Protocol):
    """What a worker computes maps with."""

    def extract_each(
        self, size: tuple[int, int], items: Iterable[tuple[Array, Mapping[str, Array]]]
    ) -> Iterator[dict[str, Pooled]]:
        """Compute the maps of one image after another and store them; see `gpu.DeviceExtractor.extract_each`."""

    def version(self, size: tuple[int, ...], most: tuple[int, int] | None = None) -> str:
        """What computes the layers of an image of a size, for the receipt, among images of at most ``most``."""

    def block(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory for maps, contents undefined, that this extractor writes to fastest."""


class CompiledFirst:
    """Compiled code for images that it `takes`; else another extractor, which is made when it is first needed: torch takes seconds.

    Parameters
    ----------
    compiled : CompiledExtractor
    make_other : callable
    """

    def __init__(self, compiled: CompiledExtractor, make_other: Callable[[], MapExtractor]) -> None:
        self.compiled, self._make_other = compiled, make_other
        self._making = threading.Lock()

    @cached_property
    def other(self) -> MapExtractor:
        """The other extractor."""
        return self._make_other()

    def _of(self, size: tuple[int, ...]) -> MapExtractor:
        if self.compiled.takes(size):
            return self.compiled
        with self._making:
            return self.other

    def extract_each(
        self, size: tuple[int, int], items: Iterable[tuple[Array, Mapping[str, Array]]]
    ) -> Iterator[dict[str, Pooled]]:
        """As of either, by the size that no image exceeds."""
        return self._of(size).extract_each(size, items)

    def version(self, size: tuple[int, ...], most: tuple[int, int] | None = None) -> str:
        """As of either, by the image's own size: the other extractor, too, leaves small images to compiled code."""
        return self._of(size).version(size, most)

    def block(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory of this process, for either."""
        return self.compiled.block(shape, dtype)


def best_extractor(
    spec: ExtractorSpec,
    weights: Mapping[str, Array],
    stored: Iterable[StoredOutput],
    worker: int,
    threads: int,
    gpu_share: float = 1.0,
) -> MapExtractor:
    """The extractor of a worker: on one of the GPUs that it sees, else on the CPU, by compiled code alone where that is enough.

    On the CPU, each of torch's calls in this process uses one core from now on: images are what runs in parallel.

    Parameters
    ----------
    spec, weights, stored
        As for `cpu.Extractor`.
    worker : int
        Number of the worker on its machine, or any other: workers that see several GPUs share them by it.
    threads : int
        Threads that extract at once.
    gpu_share : float
        Part of the GPU that is this worker's, where several processes share it.
    """
    stored, n = tuple(stored), devices.n_gpus()
    compiled = CompiledExtractor(spec, weights, stored)

    def by_torch() -> MapExtractor:
        from pipeline.extract.cpu import Extractor, use_one_thread  # noqa: PLC0415 (torch only where it computes)

        use_one_thread()
        return Extractor(spec, weights, stored)

    if not n and compiled.is_enough:
        return compiled
    if not n:
        return CompiledFirst(compiled, by_torch) if compiled.whole.can_store() else by_torch()
    from pipeline.extract.cpu import use_one_thread  # noqa: PLC0415 (as above)
    from pipeline.extract.gpu import DeviceExtractor  # noqa: PLC0415 (as above)

    use_one_thread()
    return DeviceExtractor(spec, weights, stored, device=devices.device_of(worker), threads=threads, share=gpu_share)
