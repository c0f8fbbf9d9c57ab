"""Extraction by compiled code alone: one layer without a pool, stacks of wide layers, or any stack on small images.

It needs no torch, which takes a worker seconds to import. Small images of one size are computed together, because a call takes
longer than such an image.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from pipeline.extract import kernel
from pipeline.extract.compiled_stack import CompiledStack, is_small, pays
from pipeline.extract.stack import ImageByImage, Pooled, Stack, check_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pipeline.config import ExtractorSpec
    from pipeline.extract.layers import Array
    from pipeline.extract.quantise import StoredAs, StoredOutput

MOST_AT_ONCE = 48
"""Images that are computed in one call."""
_PIXELS_AT_ONCE, _VALUES_AT_ONCE = 1 << 18, 1 << 20  # values of these images, and of all their layers' maps
_scratch = threading.local()


class FirstLayer:
    """The compiled first layer, with its weights.

    Parameters
    ----------
    stack : Stack
    weights : dict of str to (filters, channel, y, x) and (filters,)
        Cross-correlation orientation.
    """

    def __init__(self, stack: Stack, weights: Mapping[str, Array]) -> None:
        self.spec, self.channels = stack.layers[0], stack.channels
        weight, self.bias = (np.array(weights[f"conv1_{part}"], np.float32, order="C") for part in ("weight", "bias"))
        self.weight = weight / np.float32(256)  # for pixels of 0 ... 255; exact, because it is a power of two

    def can_store(self, stored: StoredAs) -> bool:
        """Whether compiled code computes this layer, and knows how its maps are stored."""
        return kernel.has(self.spec) and kernel.is_available(stored)

    def compute(self, image: Array, stored: StoredAs, out: Array) -> Pooled:
        """Store the maps of an image (y, x, channel) uint8 in ``out`` (filters, y, x), which is contiguous along x."""
        return Pooled(*self.compute_all([np.ascontiguousarray(image)], stored, [out])[0])

    def compute_all(self, images: Sequence[Array], stored: StoredAs, out: Sequence[Array]) -> Array:
        """`compute` for contiguous images of one size, and maps of the same strides: (image, 4, filters) float32."""
        found = kernel.first_layers(images, self.weight, self.bias, self.spec.activation, stored, out)
        return found.astype(np.float32)

    def version(self) -> str:
        """What computes it, for the receipt; see `kernel.version`."""
        return kernel.version(self.channels, self.spec.kernel, self.spec.filters) if kernel.has(self.spec) else "torch"


class CompiledExtractor(ImageByImage):
    """Extractor of what compiled code `takes`: thread-safe, and a function of the image alone.

    Parameters
    ----------
    spec, weights, stored
        As for `cpu.Extractor`, whose maps these are.
    """

    def __init__(self, spec: ExtractorSpec, weights: Mapping[str, Array], stored: Iterable[StoredOutput] = ()) -> None:
        self.stack = Stack(spec, weights, stored)
        self.layer = FirstLayer(self.stack, weights)
        self.whole = CompiledStack(self.stack, weights)

    @property
    def _is_layer(self) -> bool:
        """Whether the compiled first layer is all of the stack."""
        return len(self.stack.layers) == 1 and self.layer.can_store(self.stack.stored["conv1"])

    @property
    def is_enough(self) -> bool:
        """Whether compiled code computes all of the stack, whatever the size of an image."""
        return self._is_layer or (pays(self.stack.layers, self.stack.channels) and self.whole.can_store())

    def takes(self, size: tuple[int, ...]) -> bool:
        """Whether compiled code computes all of the stack for images of a size, and for smaller ones."""
        return self.is_enough or (is_small(self.stack.layers, *size) and self.whole.can_store())

    def extract_into(self, image: Array, out: Mapping[str, Array]) -> dict[str, Pooled]:
        """Compute the maps of one image and store them; as `cpu.Extractor.extract_into`."""
        return self._extract_all([(image, out)])[0]

    def extract_each(
        self,
        size: tuple[int, int],  # noqa: ARG002 (as of `DeviceExtractor`)
        items: Iterable[tuple[Array, Mapping[str, Array]]],
    ) -> Iterator[dict[str, Pooled]]:
        """`extract_into` of several images in one call where they are small and alike; else of one after another."""
        group: list[tuple[Array, Mapping[str, Array]]] = []
        kind, n_at_once = None, 1
        for item in items:
            kind, before = _kind(*item), kind
            if group and kind != before:
                yield from self._extract_all(group)
                group = []
            group.append(item)
            if kind != before:
                n_at_once = self._n_at_once(item[0])
            if len(group) >= n_at_once:
                yield from self._extract_all(group)
                group = []
        if group:
            yield from self._extract_all(group)

    def _n_at_once(self, image: Array) -> int:
        n_values = self.whole.n_values(*image.shape[:2])
        return min(MOST_AT_ONCE, _PIXELS_AT_ONCE // max(1, image.size), _VALUES_AT_ONCE // max(1, n_values))

    def _extract_all(self, items: Sequence[tuple[Array, Mapping[str, Array]]]) -> list[dict[str, Pooled]]:
        """Of images that are alike."""
        shapes = self.stack.check(*items[0])
        images, out = [np.ascontiguousarray(image) for image, _ in items], [wanted for _, wanted in items]
        if not self._is_layer:
            return self.whole.compute(images, out)
        stored, wanted = self.stack.stored["conv1"], [maps["conv1"] for maps in out if "conv1" in maps]
        is_direct = bool(wanted) and wanted[0].strides[2] == wanted[0].itemsize
        direct = wanted if is_direct else [*scratch((len(images), *shapes["conv1"]), stored.dtype)]
        pooled = self.layer.compute_all(images, stored, direct)
        check_range("conv1", Pooled(*pooled.transpose(1, 0, 2)), stored)
        for to, maps in zip(wanted, direct, strict=False):
            if to is not maps:
                to[...] = maps
        return [{"conv1": Pooled(*found)} for found in pooled]

    def version(self, size: tuple[int, ...], most: tuple[int, int] | None = None) -> str:  # noqa: ARG002 (as of `MapExtractor`)
        """What computes the first layer of an image of a size, for the receipt."""
        if not self._is_layer and self.takes(size):
            return kernel.name_of(kernel.lanes())
        return self.layer.version()


def _kind(image: Array, out: Mapping[str, Array]) -> tuple[object, ...]:
    """What images must have in common to be computed together."""
    return image.shape, image.dtype, [(name, maps.shape, maps.dtype, maps.strides) for name, maps in out.items()]


def scratch(shape: tuple[int, ...], dtype: str) -> Array:
    """Scratch of this thread, contents undefined: one buffer, which grows to the largest request."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if n_bytes > len(getattr(_scratch, "buffer", b"")):
        _scratch.buffer = np.empty(n_bytes, np.uint8)
    found: Array = _scratch.buffer[:n_bytes].view(dtype).reshape(shape)
    return found
