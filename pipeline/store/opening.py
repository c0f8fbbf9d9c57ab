"""Reads the metadata of a store: its spec and its classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np

from pipeline.errors import FeaturemapsError, UsageError
from pipeline.store.layout import ClassLayout, LayerLayout, Size
from pipeline.store.objects import Place, children, each, exists, read_json
from pipeline.store.schema import CLASS_NAME, FORMAT, REJECTED, ShapeClass, StoredLayer, StoreSpec


def is_store(path: Place) -> bool:
    """Whether ``path`` holds a completely created store of any format."""
    try:
        (path / "zarr.json").stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UsageError(f"store {path} cannot be accessed ({error}): check its permissions; nothing was started") from error
    return True


def read_spec(path: Place) -> StoreSpec:
    """The spec of a store.

    Raises
    ------
    UsageError
        When there is no store, or it has another format.
    """
    if not is_store(path):
        raise UsageError(f"there is no store at {path}: check the path, or make one with `featuremaps run SOURCE {path}`")
    with understood(path):
        content = (read_json(path / "zarr.json").get("attributes") or {}).get("featuremaps")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else None
        raise UsageError(
            f"{path} is {'a store of format ' + repr(found) if found is not None else 'a Zarr group but no featuremaps store'}, and "
            f"this version reads and writes format {FORMAT} only: nothing was touched; give another folder or use the version that "
            "made it"
        )
    with understood(path):
        layers = tuple(
            StoredLayer(**{**layer, "fill_value": float("nan") if layer["fill_value"] is None else layer["fill_value"]})
            for layer in content["layers"]
        )
        for part, key in ((content["extractor"], "layers"), (content["decode"], "sha256")):
            part[key]  # raises KeyError if it is missing
        content.pop("sha256", None)  # older stores do not have it
        return StoreSpec(**{**content, "layers": layers, "excluded": tuple(content.get("excluded", ()))})


def read_classes(path: Place, spec: StoreSpec) -> dict[Size, ShapeClass]:
    """The classes of a store."""
    names = [name for name in children(path) if CLASS_NAME.fullmatch(name)]
    found = each(lambda name: _read_class(path / name, spec), names, path)
    return {c.size: c for c in found if c is not None}


def _read_class(folder: Place, spec: StoreSpec) -> ShapeClass | None:
    if not exists(folder / "zarr.json"):
        return None  # left by a crash while the class was created
    with understood(folder):
        attributes = read_json(folder / "zarr.json")["attributes"]
        shape = attributes["shape_class"]
        size = (int(shape["height"]), int(shape["width"]))
        length = int(read_json(folder / "status" / "zarr.json")["shape"][0])
        layers = tuple(_read_layout(folder, layer) for layer in spec.map_layers)
        shard_rows = int(shape["shard_rows"])
        return ShapeClass(size, length, ClassLayout(size, shard_rows, layers), str(shape["kind"]), attributes)


def _read_layout(folder: Place, layer: StoredLayer) -> LayerLayout:
    document = read_json(folder / layer.name / "zarr.json")
    _, channels, height, width = document["shape"]
    codec = document["codecs"][0]
    grid = codec["configuration"] if codec["name"] == "sharding_indexed" else document["chunk_grid"]["configuration"]
    rows, _, chunk_height, chunk_width = grid["chunk_shape"]
    return LayerLayout(layer.name, channels, height, width, np.dtype(layer.dtype).itemsize, rows, chunk_height, chunk_width)


def count_rejected(path: Place) -> int:
    """Rows of ``rejected``."""
    with understood(path / REJECTED):
        return int(read_json(path / REJECTED / "status" / "zarr.json")["shape"][0])


@contextlib.contextmanager
def understood(path: Place) -> Iterator[None]:
    """Turn errors of metadata that does not follow format 1 into a clear message."""
    try:
        yield
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise FeaturemapsError(
            f"metadata of {path} does not follow format {FORMAT} ({type(error).__name__}: {error}), so the meaning of its "
            "maps is not known; restore its zarr.json files from a copy"
        ) from error
