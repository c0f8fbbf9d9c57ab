"""Figures of a store, for notebooks and files. Each is a matplotlib figure that shows itself as the last value of a cell.

Examples
--------
>>> import pipeline
>>> from pipeline import figures
>>> store = pipeline.open_store("features.zarr")  # doctest: +SKIP
>>> figures.show(store, "cats/tom.jpg", overlay=True)  # doctest: +SKIP
>>> figures.contact_sheet(store, n=20).savefig("sheet.png", dpi=150)  # doctest: +SKIP
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import UsageError, needs_extra
from pipeline.extract.layers import layer_names
from pipeline.report import arrays, choices
from pipeline.report.choices import MAX_PANELS
from pipeline.run.summary import WAITING
from pipeline.text import count, printable, rounded

if TYPE_CHECKING:
    from pipeline.analysis.feature_store import FeatureStore
    from pipeline.report.canvas import Canvas
    from pipeline.store.schema import StoredLayer

FORMATS = (".png", ".svg", ".pdf")
FILE_DPI = 150
_SEED = 23455
_OWN_GREYS = "greys: each map's own range, without its 0.5 % lowest and highest values"
_MAX_PARTS = 8


def show(
    store: FeatureStore,
    path: str,
    *,
    overlay: bool = False,
    layers: str | Sequence[str] | None = None,
    channels: int | Sequence[int] | None = None,
    crop: Sequence[int] | None = None,
) -> Canvas:
    """An image with its maps: below it, or laid over it.

    Parameters
    ----------
    store : FeatureStore
    path : str
        As in `FeatureStore.images`.
    overlay : bool
        Lay each map over the image at its true place, which is smaller than the image by the receptive field. The image is grey then,
        and the map the less transparent the more a value differs from its median.
    layers : str or sequence of str, optional
        Layers whose maps are stored; all by default.
    channels : int or sequence of int, optional
        Channels of each of these layers, from 0; all by default. Of more than 64 maps the first are drawn.
    crop : sequence of int, optional
        The part to draw, in input pixels: left, top, width, height. A large image is shrunk to be drawn, a part of it need not be.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError
        When the path is not one path or has no maps, when there is no such layer or channel, when the image has changed since, or
        without matplotlib.
    """
    choices.check_one_path(path)
    with needs_extra("figures", "a figure"):
        from pipeline.report import draw_maps
    names = choices.map_layers(store, layers)
    chosen = [(name, channel) for name in names for channel in choices.channels_of(choices.stored_layer(store, name), channels)]
    maps = store.image(path, names)
    pixels = store.pixels(path)
    left, top, width, height = crop or (0, 0, None, None)
    if crop:
        maps = choices.crop_maps(maps, names, crop)
        pixels = None if pixels is None else pixels[top:][:height, left:][:, :width]
    title = printable(path)
    image = None if pixels is None else arrays.of_pixels(title, pixels, origin=(left, top))
    side = arrays.MAX_SIDE if len(chosen) <= 4 else arrays.MAX_SIDE // 2
    kept = chosen[:MAX_PANELS]
    drawn = [[choices.map_picture(store, maps, name, channel, side) for n, channel in kept if n == name] for name in names]
    drawn = [layer for layer in drawn if layer]
    left_out = f"; the first {MAX_PANELS} of {len(chosen)} maps" if len(chosen) > MAX_PANELS else ""
    if overlay:
        note = f"a map covers the image where it is far from its median{left_out}"
        return draw_maps.maps_over_image(title, image, [picture for layer in drawn for picture in layer], note)
    return draw_maps.image_and_maps(title, image, drawn, f"{_OWN_GREYS}{left_out}")


def contact_sheet(
    store: FeatureStore,
    paths: str | Iterable[str] | None = None,
    *,
    n: int = 12,
    layer: str | None = None,
    channel: int | None = 0,
) -> Canvas:
    """One channel's maps of many images in equal cells, all in one range of greys; or the images themselves.

    Parameters
    ----------
    store : FeatureStore
    paths : str or iterable of str, optional
        Which images, in this order; by default ``n`` that are done, spread evenly over the store by path.
    n : int
        1 to 64.
    layer : str, optional
        A layer whose maps are stored; the first by default.
    channel : int or None
        From 0; None draws the images instead.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError
        When an image has no maps, when none is done, when there is no such layer or channel, or without matplotlib.
    """
    with needs_extra("figures", "a figure"):
        from pipeline.report import draw_maps
    name = None if channel is None else choices.map_layers(store, layer)[0]
    if name is not None:
        (channel,) = choices.channels_of(choices.stored_layer(store, name), channel)
    chosen = choices.spread_paths(store, n) if paths is None else [paths] if isinstance(paths, str) else list(paths)
    if not 1 <= len(chosen) <= MAX_PANELS:
        raise UsageError(
            f"a sheet of {count(len(chosen), 'image')} was asked for, and one holds 1 to {MAX_PANELS}: nothing was drawn; "
            "give fewer paths, or draw several sheets"
        )
    if name is None:
        title = ""
        drawn = [choices.photograph(store, path) for path in chosen]
    else:
        title = f"{name}, channel {channel}"
        drawn = [choices.map_picture(store, store.image(path, name), name, channel or 0, choices.SHEET_SIDE) for path in chosen]
    return draw_maps.sheet(title, drawn, [printable(path) for path in chosen], are_maps=name is not None)


def histograms(store: FeatureStore, layer: str | None = None, *, n_images: int = 64) -> Canvas:
    """How often each value occurs in the maps of a layer, channel by channel.

    Images are read one by one. The range is that of the pooled minimum and maximum, and each bin holds equally many of the levels
    that the store's dtype has, so that none of its steps looks like one of the data.

    Parameters
    ----------
    store : FeatureStore
    layer : str, optional
        A layer whose maps are stored; the first by default. Of more than 64 channels the first are drawn.
    n_images : int
        Images to take, drawn at random with a fixed seed: the same ones each time.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError
        When no image is done, when there is no such layer, or without matplotlib.
    """
    with needs_extra("figures", "a figure"):
        from pipeline.report import draw_charts
    name = choices.map_layers(store, layer)[0]
    stored = choices.stored_layer(store, name)
    done = choices.done_paths(store)
    if not isinstance(n_images, int | np.integer) or n_images < 1:
        raise UsageError(f"histograms of {n_images} images were asked for: nothing was drawn; take a whole number, 1 or more")
    sample = _sample(done, n_images)
    counted = _empty_histogram(store, stored, sample)
    for path in sample:
        counted.add(store.image(path, name)[name].values)
    n = len(counted.counts)
    few = 4 < n <= 16  # room for the numbers alone
    titles = [
        f"channel {i}: mean {m:.3g}, standard deviation {s:.2g}" if n <= 4 else f"{i}: {m:.2g} ± {s:.1g}" if few else str(i)
        for i, (m, s) in enumerate(zip(counted.mean, counted.std, strict=True))
    ]
    title = f"{name}, {len(sample)} of {count(len(done), 'image')}" + choices.first_of(n, stored.channels, "channels")
    title += ": mean ± standard deviation of each channel" if few else ""
    return draw_charts.histogram_panels(title, counted.edges, counted.shares, titles)


def filters(store: FeatureStore, layer: str | None = None) -> Canvas:
    """The filters of a layer, red where a weight is positive and blue where it is negative, with their biases.

    A filter of up to 8 input channels is drawn part by part, of more as the mean over them.

    Parameters
    ----------
    store : FeatureStore
    layer : str, optional
        Any layer of the extractor, stored or not; the first by default. Of more than 64 filters the first are drawn.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError
        When there is no such layer, or without matplotlib.
    """
    with needs_extra("figures", "a figure"):
        from pipeline.report import draw_charts
    known = layer_names(store.extractor.layers)
    name = known[0] if layer is None else layer
    if name not in known:
        raise UsageError(f"{name!r} is not a layer of the extractor of {store.path}: it has {', '.join(known)}; name one of them")
    weights, biases = store.weights[f"{name}_weight"], store.weights[f"{name}_bias"]
    n_filters, n_inputs, height, width = weights.shape
    shown = weights[:MAX_PANELS]
    note = f"{height} x {width} weights, as they lie over the image"
    if n_inputs > _MAX_PARTS:
        shown, names = shown.mean(1, keepdims=True), [""]
        note += f"; the mean over {n_inputs} input channels"
    elif name == known[0]:
        names = ["R", "G", "B"] if n_inputs == 3 else [""]
    else:
        names = [str(i) for i in range(n_inputs)]
        note += "; numbers below: input channels"
    title = f"{name}: {count(n_filters, 'filter')}" + choices.first_of(len(shown), n_filters, "")
    return draw_charts.filter_panels(title, note, shown, biases[:MAX_PANELS], names)


def stage_times(store: FeatureStore, receipt: str | Mapping[str, Any] | None = None) -> Canvas:
    """Where the time of a run went: read, decode, extract and write, and the time in which a slot had no batch.

    Parameters
    ----------
    store : FeatureStore
    receipt : str or mapping, optional
        One of `FeatureStore.receipts`, or the ``run_id`` of one; the last run that computed anything by default.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    UsageError
        When there is no such run, when it computed nothing, or without matplotlib.
    """
    with needs_extra("figures", "a figure"):
        from pipeline.report import draw_charts
    found = choices.run_receipt(store, receipt)
    stages = found["stage_s"]
    slot_s = max(found.get("slot_s", 0.0), sum(stages.values()))
    seconds = stages | {WAITING: slot_s - sum(stages.values())}
    speed = f"{rounded(found['compute_s'])} s, {rounded(found['images_per_s'])} images/s"
    title = f"{count(found['n_done'], 'image')} in {speed}"
    note = f"run {found['run_id']} ({found['outcome']}), {count(found['slots'], 'slot')}; waiting: a slot had no batch"
    return draw_charts.stage_bars(title, note, seconds)


def check_format(output: Path) -> None:
    """Raise `UsageError` if the file is of none of `FORMATS`, before anything is read."""
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"figure {output} would be of an unknown kind {output.suffix!r}: name it .png, .svg or .pdf")


def save(figure: Canvas, output: str | os.PathLike[str]) -> None:
    """Write a figure; ``output`` ends in .png, .svg or .pdf.

    Raises
    ------
    UsageError
        When it is of an unknown kind, or cannot be written.
    """
    output = Path(output).expanduser()
    check_format(output)
    try:
        figure.savefig(output, dpi=FILE_DPI)
    except OSError as error:
        raise UsageError(f"figure {output} cannot be written ({error}): check its folder, permissions and space") from error


def _sample(paths: Sequence[str], n: int) -> list[str]:
    """Some of the paths, always the same ones, sorted."""
    drawn = np.random.default_rng(_SEED).choice(len(paths), min(n, len(paths)), replace=False)
    return sorted(paths[i] for i in drawn.tolist())  # an array of the paths would give each as much room as the longest takes


def _empty_histogram(store: FeatureStore, stored: StoredLayer, sample: Sequence[str]) -> arrays.Histogram:
    """Bins for the values of these images."""
    pooled = store.pooled(stored.name, ("min", "max")).loc[list(sample)]
    low = pooled.filter(regex="_min_").to_numpy().min()
    high = pooled.filter(regex="_max_").to_numpy().max()
    return arrays.Histogram.over(stored, float(low), float(high), MAX_PANELS)
