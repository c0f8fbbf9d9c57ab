"""Extraction by compiled code alone: one layer without a pool. It needs no torch, which takes a worker seconds to import."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from pipeline.extract import kernel
from pipeline.extract.stack import ImageByImage, Pooled, Stack, check_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pipeline.config import ExtractorSpec
    from pipeline.extract.layers import Array
    from pipeline.extract.quantise import StoredAs, StoredOutput

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
        pixels = np.ascontiguousarray(image)
        found = kernel.first_layer(pixels, self.weight, self.bias, self.spec.activation, stored, out)
        return Pooled(*found.astype(np.float32))

    def version(self) -> str:
        """What computes it, for the receipt; see `kernel.version`."""
        return kernel.version(self.channels, self.spec.kernel, self.spec.filters) if kernel.has(self.spec) else "torch"


class CompiledExtractor(ImageByImage):
    """Extractor of a stack that `is_enough` for: thread-safe, and a function of the image alone.

    Parameters
    ----------
    spec, weights, stored
        As for `cpu.Extractor`, whose maps these are.
    """

    def __init__(self, spec: ExtractorSpec, weights: Mapping[str, Array], stored: Iterable[StoredOutput] = ()) -> None:
        self.stack = Stack(spec, weights, stored)
        self.layer = FirstLayer(self.stack, weights)

    @property
    def is_enough(self) -> bool:
        """Whether compiled code computes all of the stack."""
        return len(self.stack.layers) == 1 and self.layer.can_store(self.stack.stored["conv1"])

    def extract_into(self, image: Array, out: Mapping[str, Array]) -> dict[str, Pooled]:
        """Compute the maps of one image and store them; as `cpu.Extractor.extract_into`."""
        shape, stored = self.stack.check(image, out)["conv1"], self.stack.stored["conv1"]
        wanted = out.get("conv1")
        direct = wanted if wanted is not None and wanted.strides[2] == wanted.itemsize else scratch(shape, stored.dtype)
        pooled = self.layer.compute(image, stored, direct)
        check_range("conv1", pooled, stored)
        if wanted is not None and wanted is not direct:
            wanted[...] = direct
        return {"conv1": pooled}

    def version(self, size: tuple[int, int]) -> str:  # noqa: ARG002 (as of `DeviceExtractor`)
        """What computes the layer, for the receipt."""
        return self.layer.version()


def scratch(shape: tuple[int, int, int], dtype: str) -> Array:
    """Scratch of this thread, contents undefined: one buffer, which grows to the largest request."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if n_bytes > len(getattr(_scratch, "buffer", b"")):
        _scratch.buffer = np.empty(n_bytes, np.uint8)
    found: Array = _scratch.buffer[:n_bytes].view(dtype).reshape(shape)
    return found
