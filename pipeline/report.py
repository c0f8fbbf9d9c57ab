"""Figures from a store."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from pipeline.analysis import open_store
from pipeline.errors import UsageError
from pipeline.objects import Place
from pipeline.summary import printable

FORMATS = (".png", ".svg", ".pdf")
MAX_MAPS = 16
_COLUMNS = 4
_PANEL = 3.2  # inches of the longer side of a map
Pixels: TypeAlias = np.ndarray[Any, Any]


def show_image(store: Place, path: str, output: Path) -> None:
    """Draw an image with its maps below it, each titled with layer and channel.

    Parameters
    ----------
    store : Path or Url
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
    pixels = features.pixels(path)
    panels = [
        (f"{layer}, channel {channel}", maps[layer].values[channel])
        for layer in features.layers
        for channel in range(maps[layer].shape[0])
    ]
    _save(pixels, printable(path), panels[:MAX_MAPS], len(panels), output)


def _save(pixels: Pixels | None, title: str, panels: list[tuple[str, Pixels]], n_maps: int, output: Path) -> None:
    try:
        import matplotlib as mpl  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UsageError('figures need matplotlib, which is not installed: pip install "featuremaps[figures]"') from error
    try:
        # Titles stay text in an SVG; a name is no formula; a font may lack a glyph, which then is a box.
        with mpl.rc_context({"svg.fonttype": "none", "text.usetex": False}), warnings.catch_warnings(action="ignore"):
            _draw(pixels, title, panels, n_maps).savefig(output, dpi=150)
    except OSError as error:
        raise UsageError(f"figure {output} cannot be written ({error}): check its folder, permissions and space") from error


def _draw(pixels: Pixels | None, title: str, panels: list[tuple[str, Pixels]], n_maps: int) -> Any:
    from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    height, width = panels[0][1].shape
    ratio = height / width
    panel_width = max(_PANEL / max(ratio, 1.0), 1.5)  # room for a title over a narrow map
    panel_height = max(_PANEL * min(ratio, 1.0), 0.3)
    top = max(panel_height * min(columns, 2), min(panel_width * columns * ratio, _PANEL))
    below_height = rows * (panel_height + 0.4)
    figure_width = max(panel_width * columns + 0.4, _PANEL)
    figure = Figure(figsize=(figure_width, top + below_height + 0.5), layout="constrained")
    n_letters = int(figure_width / 0.11)
    parts: Any = figure.subfigures(2, 1, height_ratios=[top + 0.4, below_height])
    above, below = parts
    axes = above.subplots()
    axes.axis("off")
    axes.set_title(title if len(title) <= n_letters else f"...{title[3 - n_letters :]}", parse_math=False)
    if pixels is None:
        axes.text(0.5, 0.5, "the source image cannot be read any more", ha="center", va="center")
    else:
        axes.imshow(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], cmap="gray", vmin=0, vmax=255)
    grid = below.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, values) in zip(grid.flat, panels, strict=False):
        axes.imshow(values, cmap="gray")
        axes.set_title(name, fontsize="medium")
    if n_maps > len(panels):
        below.suptitle(f"the first {len(panels)} of {n_maps} maps", fontsize="small")
    return figure
