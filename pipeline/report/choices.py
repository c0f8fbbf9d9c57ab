"""What of a store a figure shows: layers, channels, images, a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UsageError
from pipeline.extract.layers import layer_names, receptive_field
from pipeline.report import arrays
from pipeline.text import count

if TYPE_CHECKING:
    import xarray as xr

    from pipeline.analysis.feature_store import FeatureStore
    from pipeline.report.arrays import Picture
    from pipeline.store.schema import StoredLayer

MAX_PANELS = 64
"""Maps, images, channels or filters of one figure."""
SHEET_SIDE = 600
"""Values of the longer side of a picture in a sheet of many."""


def map_layers(store: FeatureStore, chosen: str | Sequence[str] | None) -> list[str]:
    """Layers to draw, which have maps."""
    names = list(store.map_layers) if chosen is None else [chosen] if isinstance(chosen, str) else list(dict.fromkeys(chosen))
    pooled_only = [name for name in store.layers if name not in store.map_layers]
    kept = (
        f"of {', '.join(pooled_only)} only the pooled values were kept" if pooled_only else "of no other layer anything was kept"
    )
    if chosen is not None and not names:
        raise UsageError("no layer was chosen, so there is nothing to draw: name at least one, or leave `layers` out")
    names = names or list(store.layers)  # to say below that none of them has maps
    for name in names:
        if name not in store.map_layers:
            raise UsageError(
                f"layer {name!r} cannot be drawn: {store.path} has maps of {', '.join(store.map_layers) or 'no layer'}, and {kept}; "
                "name a layer that has maps, or run into another store with `outputs` that keep them"
            )
    return names


def channels_of(stored: StoredLayer, chosen: int | Sequence[int] | None) -> list[int]:
    """Channels to draw."""
    if chosen is None:
        return list(range(stored.channels))
    channels = [chosen] if isinstance(chosen, int | np.integer) else list(dict.fromkeys(chosen))
    if not channels:
        raise UsageError("no channel was chosen, so there is nothing to draw: name at least one, or leave `channels` out")
    for channel in channels:
        if not 0 <= channel < stored.channels:
            known = f"channels 0 to {stored.channels - 1}" if stored.channels > 1 else "one channel, 0"
            raise UsageError(
                f"channel {channel} of {stored.name} cannot be drawn: the layer has {known}; choose there, or name the layer that has it"
            )
    return channels


def stored_layer(store: FeatureStore, name: str) -> StoredLayer:
    """How a layer is stored."""
    return next(layer for layer in store.spec.layers if layer.name == name)


def map_picture(store: FeatureStore, maps: xr.Dataset, layer: str, channel: int, max_side: int) -> Picture:
    """One map of an image, as `FeatureStore.image` gives it."""
    names = layer_names(store.extractor.layers)
    field = receptive_field(store.extractor.layers, names.index(layer) + 1)
    values, y, x = maps[layer].values[channel], maps[f"{layer}_y"].values, maps[f"{layer}_x"].values
    return arrays.of_map(f"{layer}, channel {channel}", values, y, x, (field.stride_y, field.stride_x), max_side)


def crop_maps(maps: xr.Dataset, layers: Sequence[str], crop: Sequence[int]) -> xr.Dataset:
    """The values whose receptive fields are centred in a part of the image: left, top, width and height in input pixels.

    Raises
    ------
    UsageError
        When a layer has no value there.
    """
    left, top, width, height = crop
    for name in layers:
        for axis, start, n in (("y", top, height), ("x", left, width)):
            centres = maps[f"{name}_{axis}"].values
            inside = np.flatnonzero((centres >= start) & (centres < start + n))
            if not len(inside):
                raise UsageError(
                    f"crop {left} {top} {width} {height} (left, top, width, height in pixels) holds no value of layer {name!r}, "
                    f"whose {axis} goes from {centres[0]:g} to {centres[-1]:g}: nothing was drawn; move it, or make it larger"
                )
            maps = maps.isel({f"{name}_{axis}": inside})
    return maps


def check_one_path(path: object) -> None:
    """Raise `UsageError` if several paths were given."""
    if isinstance(path, Iterable) and not isinstance(path, str):
        raise UsageError(
            f"show draws one image, and several were given ({type(path).__name__}): nothing was drawn; give one path, or draw "
            "several images with figures.contact_sheet(store, paths)"
        )


def photograph(store: FeatureStore, path: str) -> Picture | None:
    """An image, small; None where it cannot be read."""
    pixels = store.pixels(path)
    return None if pixels is None else arrays.of_pixels(path, pixels, SHEET_SIDE)


def done_paths(store: FeatureStore) -> list[str]:
    """Paths of the images that have maps, sorted."""
    images = store.images
    done = sorted(set(images["path"][images["status"] == "done"]))
    if not done:
        counted = ", ".join(f"{n} {status}" for status, n in store.counts.items() if n) or "empty"
        raise UsageError(
            f"no image of {store.path} has maps that could be drawn: it is {counted}; `featuremaps run` computes them"
        )
    return done


def spread_paths(store: FeatureStore, n: int) -> list[str]:
    """As many paths as there are, evenly over the store."""
    if not isinstance(n, int | np.integer) or not 1 <= n <= MAX_PANELS:
        raise UsageError(f"n of {n} images cannot be drawn: a sheet holds 1 to {MAX_PANELS}; choose among these, or give paths")
    done = done_paths(store)
    return [done[i] for i in np.linspace(0, len(done) - 1, min(n, len(done))).round().astype(int)]


def first_of(n: int, total: int, things: str) -> str:
    """What a title says where not all are shown."""
    return f", the first {n} of {total} {things}".rstrip() if n < total else ""


def run_receipt(store: FeatureStore, chosen: str | Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The run to draw_charts."""
    receipts = [chosen] if isinstance(chosen, Mapping) else store.receipts
    if isinstance(chosen, str):
        receipts = [receipt for receipt in receipts if receipt["run_id"] == chosen]
        if not receipts:
            known = ", ".join(receipt["run_id"] for receipt in store.receipts[-3:]) or "none"
            raise UsageError(f"{store.path} has no receipt of a run {chosen!r}: the last ones are {known}; name one of them")
    for receipt in reversed(receipts):
        if sum(receipt["stage_s"].values()):
            return receipt
    raise UsageError(
        f"there are no times to draw: of {count(len(receipts), 'run')} of {store.path} that could be looked at none computed anything; "
        "`featuremaps run` leaves a receipt"
    )
