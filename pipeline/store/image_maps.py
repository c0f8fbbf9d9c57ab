"""Maps of one image: their sizes, and their values as float32, read without the rest of their shard."""

from __future__ import annotations

import numpy as np

from pipeline.extract.layers import Array, layer_names, output_sizes
from pipeline.extract.quantise import dequantise
from pipeline.source import urls
from pipeline.store.layout import Size
from pipeline.store.schema import StoredLayer, StoreSpec
from pipeline.store.settings import extractor_spec
from pipeline.store.store import Store


def map_sizes(spec: StoreSpec, height: int, width: int) -> dict[str, Size]:
    """Height and width of every layer's maps, by layer name, for an input height and width."""
    layers = extractor_spec(spec).layers
    return dict(zip(layer_names(layers), output_sizes(layers, height, width), strict=True))


def image_maps(store: Store, group: str, layer: StoredLayer, row: int, size: Size) -> Array:
    """Maps of one done row, cropped to ``size``, the height and width that follow from the image.

    Returns
    -------
    (channel, y, x) float32

    Raises
    ------
    OSError
        When they cannot be read.
    RuntimeError
        When a checksum does not match.
    ValueError
        When values are NaN, which data never are: an object is missing.
    """
    with urls.errors(str(store.path)):
        stored = np.asarray(store.array(group, layer.name)[row, :, : size[0], : size[1]])
    return decoded(stored, layer)


def decoded(stored: Array, layer: StoredLayer) -> Array:
    """Stored maps of a done image as float32, without padding.

    Raises
    ------
    ValueError
        When values are NaN, which data never are: an object is missing.
    """
    maps = dequantise(stored, layer)
    if np.isnan(maps).any():
        raise ValueError("the ledger says done, but there are no values: an object is missing")
    return maps
