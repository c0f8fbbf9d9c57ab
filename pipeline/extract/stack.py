"""What every extractor shares, without torch: the layers, how outputs are stored, what is pooled, image after image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.errors import FeaturemapsError, ImageError
from pipeline.extract.layers import Array, layer_names, output_sizes, receptive_field
from pipeline.extract.quantise import StoredAs, quantisation, storable_range

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pipeline.config import ExtractorSpec
    from pipeline.extract.quantise import StoredOutput

AS_FLOAT32 = quantisation((0, 0), "float32")


class Stack:
    """The layers that are computed, and their outputs.

    Parameters
    ----------
    spec : ExtractorSpec
    weights : dict of str to (filters, channel, y, x) and (filters,)
    stored : iterable of StoredOutput
        How each of the outputs is stored; float32 where nothing is said.
    """

    def __init__(self, spec: ExtractorSpec, weights: Mapping[str, Array], stored: Iterable[StoredOutput] = ()) -> None:
        self.spec = spec
        self.names = layer_names(spec.layers)[: int(spec.output_names[-1].removeprefix("conv"))]
        self.layers = spec.layers[: len(self.names)]  # what follows the last output is not computed
        self.channels = weights["conv1_weight"].shape[1]
        self.stored: dict[str, StoredAs] = dict.fromkeys(spec.output_names, AS_FLOAT32)
        self.stored |= {layer.name: layer for layer in stored}

    def shapes(self, height: int, width: int, channels: int) -> dict[str, tuple[int, int, int]]:
        """Shapes (filters, y, x) of all layers' maps of an image.

        Raises
        ------
        ImageError
            When the image is too small for the layers (code ``too_small``).
        """
        if channels != self.channels:
            raise ValueError(f"image has {channels} channels, but the weights are for {self.channels}; decode it in that colour")
        sizes = output_sizes(self.layers, height, width)
        if 0 in sizes[-1]:
            field = receptive_field(self.layers)
            raise ImageError(
                "too_small",
                f"{height} x {width} pixels leave no maps; at least {field.height} x {field.width} (height x width) do",
            )
        return {name: (layer.filters, *size) for name, layer, size in zip(self.names, self.layers, sizes, strict=True)}

    def check(self, image: Array, out: Mapping[str, Array]) -> dict[str, tuple[int, int, int]]:
        """Refuse what would be computed or stored wrongly in silence; return `shapes`."""
        if image.dtype != np.uint8:
            raise ValueError(f"image is of type {image.dtype}, but pixels are uint8; decode it first")
        shapes = self.shapes(*image.shape)
        for name, values in out.items():
            if name not in self.stored:
                raise ValueError(f"{name} is not an output of this extractor; its outputs are {list(self.stored)}")
            if (values.shape, values.dtype) != (shapes[name], self.stored[name].dtype):
                raise ValueError(
                    f"destination of {name} is {values.shape} {values.dtype}, but the maps of this image are {shapes[name]} "
                    f"{self.stored[name].dtype}; crop the row to their extent"
                )
        return shapes

    def empty(self, image: Array) -> dict[str, Array]:
        """Arrays (channel, y, x) for the outputs of an image, as they are stored."""
        shapes = self.shapes(*image.shape)
        return {name: np.empty(shapes[name], stored.dtype) for name, stored in self.stored.items()}


class ImageByImage:
    """What follows from `extract_into` for an extractor that takes one image after another."""

    stack: Stack

    def extract_into(self, image: Array, out: Mapping[str, Array]) -> dict[str, Pooled]:
        """Compute the maps of one image and store them; see `cpu.Extractor.extract_into`."""
        raise NotImplementedError

    def extract(self, image: Array) -> dict[str, Array]:
        """Compute the maps (channel, y, x) of one uint8 image (y, x, channel), as they are stored; see `extract_into`."""
        out = self.stack.empty(image)
        self.extract_into(image, out)
        return out

    def block(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Memory for maps, contents undefined."""
        return np.empty(shape, dtype)

    def extract_each(
        self,
        size: tuple[int, int],  # noqa: ARG002 (as of `DeviceExtractor`)
        items: Iterable[tuple[Array, Mapping[str, Array]]],
    ) -> Iterator[dict[str, Pooled]]:
        """`extract_into` one image after another."""
        for image, out in items:
            yield self.extract_into(image, out)


class Pooled(NamedTuple):
    """Statistics of one image's maps of a layer, (channel,) float32 each, over y and x."""

    mean: Array
    std: Array
    """Population standard deviation (ddof 0)."""
    min: Array
    max: Array


def check_range(name: str, pooled: Pooled, q: StoredAs) -> None:
    """Raise a `FeaturemapsError` where maps left the bounds that their dtype was chosen for."""
    low, high = storable_range(q)
    if not (low <= pooled.min.min() and pooled.max.max() <= high and np.isfinite(pooled.mean).all()):  # also when they are NaN
        raise FeaturemapsError(
            f"{name} ranges over [{pooled.min.min()}, {pooled.max.max()}], but {q.dtype} was chosen for [{low:g}, {high:g}], so "
            "its values would be stored as others; the weights are not those of the store, or overflow float32: use theirs"
        )
