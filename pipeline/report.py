"""Figures from a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.analysis import FeatureStore, open_store
from pipeline.decode import decode
from pipeline.errors import ImageError, UsageError
from pipeline.reading import Source, read_current
from pipeline.settings import decode_spec

FORMATS = (".png", ".svg", ".pdf")
MAX_MAPS = 16
_COLUMNS = 4


def show_image(store: Path, path: str, output: Path) -> None:
    """Draw an image with its maps below it, each titled with layer and channel.

    Parameters
    ----------
    store : Path
    path : str
        As in `FeatureStore.images`.
    output : Path
        A .png, .svg or .pdf file.

    Raises
    ------
    UsageError
        When the path has no maps, or the figure cannot be drawn or written.
    """
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"figure {output} would be of an unknown kind {output.suffix!r}: name it .png, .svg or .pdf")
    features = open_store(store)
    maps = features.image(path)
    panels = [
        (f"{layer}, channel {channel}", maps[layer].values[channel])
        for layer in features.layers
        for channel in range(maps[layer].shape[0])
    ]
    figure = _draw(path, _source_pixels(features, path), panels[:MAX_MAPS], len(panels))
    try:
        figure.savefig(output, dpi=150)
    except OSError as error:
        raise UsageError(f"figure {output} cannot be written ({error}): check its folder, permissions and space") from error


def _source_pixels(features: FeatureStore, path: str) -> np.ndarray[Any, Any] | None:
    """The image as the extractor saw it, or None where the source cannot be read any more."""
    spec = decode_spec(features._store.spec)
    try:
        return decode(read_current(Source(features.source_root, spec), path), spec)
    except (ImageError, OSError):
        return None


def _draw(path: str, pixels: np.ndarray[Any, Any] | None, panels: list[tuple[str, Any]], n_maps: int) -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UsageError('figures need matplotlib, which is not installed: pip install "featuremaps[figures]"') from error
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height, width = panels[0][1].shape
    panel = 3.2
    ratio = min(max(height / width, 0.4), 2.0)
    top = panel * ratio * min(columns, 2)
    figure = Figure(figsize=(panel * columns + 0.4, top + rows * (panel * ratio + 0.4) + 0.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[top, rows * (panel * ratio + 0.4)])
    above, below = parts
    axes = above.subplots()
    axes.axis("off")
    axes.set_title(path if len(path) < 70 else f"...{path[-67:]}", parse_math=False)
    if pixels is None:
        axes.text(0.5, 0.5, "the source image cannot be read any more", ha="center", va="center")
    else:
        axes.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=255)
    grid = below.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (title, values) in zip(grid.flat, panels, strict=False):
        axes.imshow(values, cmap="gray")
        axes.set_title(title, fontsize="medium")
    if n_maps > len(panels):
        below.suptitle(f"the first {len(panels)} of {n_maps} maps", fontsize="small")
    return figure
