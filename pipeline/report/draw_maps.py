"""Draws images and maps: an image with its maps, maps over the image, a sheet of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.extract.layers import Array
from pipeline.report.arrays import Picture, value_limits
from pipeline.report.canvas import (
    MAP_COLOURS,
    MAX_ASPECT,
    OVERLAY_COLOURS,
    Canvas,
    blank,
    drawing,
    fit,
    grid,
    hide,
    n_columns,
    photograph,
    place,
)

_GONE = "the source image cannot be read any more"
_TITLE = 0.4  # inches that a row's title takes
_LIGHTER = 80  # of 255: dark colours of a map are seen on a dark image, too
_MIN_PANEL = 1.5  # room for a title over a narrow map


@drawing
def image_and_maps(title: str, image: Picture | None, layers: Sequence[Sequence[Picture]], note: str) -> Canvas:
    """An image with its maps below it, each in its own range of greys.

    Parameters
    ----------
    title : str
    image : Picture or None
        None where it cannot be read.
    layers : sequence of sequence of Picture
        The maps of each layer, one or more; a layer begins a row.
    note : str
        Said below, for instance what was left out.
    """
    rows = _rows(layers)
    columns = max(map(len, rows))
    n = sum(map(len, layers))
    panel = 4.8 if n == 1 else 3.2 if n <= 4 else 2.2 if columns <= 4 else 1.4
    width, height = _panel_size(layers[0][0], panel)
    below_height = len(rows) * (height + _TITLE) + 0.2
    total_width = max(width * columns + 0.4, 3.2)
    top = max(height * min(columns, 2), min((total_width - 0.4) * height / width, 2 * panel, 5.0))
    figure = blank(total_width, top + _TITLE + below_height + 0.1)
    parts: Any = figure.subfigures(2, 1, height_ratios=[top + _TITLE, below_height])
    above, below = parts
    _photograph_or_word(above.subplots(), image, fit(title, total_width - 0.3, "large"))
    cells = grid(below, len(rows), columns)
    hide(cells)
    for i, row in enumerate(rows):
        for axes, picture in zip(cells[i * columns :], row, strict=False):
            low, high = value_limits(picture.values)
            place(axes, picture, cmap=MAP_COLOURS, vmin=low, vmax=high)
            axes.set_title(picture.title, fontsize="medium" if panel > 3 else "small" if panel > 2 else "x-small")
    below.supxlabel(note, fontsize="small", color="0.35")
    return figure


def _rows(layers: Sequence[Sequence[Picture]]) -> list[Sequence[Picture]]:
    """Rows of the grid."""
    columns = n_columns(max(map(len, layers)))
    return [layer[i : i + columns] for layer in layers for i in range(0, len(layer), columns)]


def _panel_size(picture: Picture, longer: float) -> tuple[float, float]:
    """Width and height of a panel in inches."""
    return max(longer * min(picture.ratio, 1.0), min(_MIN_PANEL, longer)), max(longer / max(picture.ratio, 1.0), 0.3)


def _photograph_or_word(axes: Any, image: Picture | None, title: str) -> None:
    axes.axis("off")
    axes.set_title(title)
    if image is None:
        axes.text(0.5, 0.5, _GONE, ha="center", va="center", transform=axes.transAxes)
    else:
        photograph(axes, image)


@drawing
def maps_over_image(title: str, image: Picture | None, maps: Sequence[Picture], note: str) -> Canvas:
    """Maps over the image, each at its true place: the more a value differs from the map's median, the less transparent it is.

    Parameters
    ----------
    title : str
    image : Picture or None
        Drawn in grey, that all colour is the map's; None where it cannot be read.
    maps : sequence of Picture
        One or more.
    note : str
        Said below.
    """
    columns = n_columns(len(maps)) if len(maps) != 2 else 2
    rows = -(-len(maps) // columns)
    panel = 6.4 if len(maps) == 1 else 4.6 if len(maps) == 2 else 2.4 if columns <= 4 else 1.6
    width, height = _panel_size(image or maps[0], panel)
    figure = blank(columns * (width + 0.7) + 0.2, rows * (height + _TITLE) + 0.7)
    cells = grid(figure, rows, columns)
    hide(cells)
    for axes, picture in zip(cells, maps, strict=False):
        _overlay(figure, axes, image, picture, (width, height))
    figure.suptitle(fit(title, figure.get_figwidth() - 0.3, "large"))
    figure.supxlabel(note if image else f"{_GONE}; {note}", fontsize="small", color="0.35")
    return figure


def _overlay(figure: Any, axes: Any, image: Picture | None, picture: Picture, panel: tuple[float, float]) -> None:
    low, high = value_limits(picture.values)
    if image:
        place(axes, grey(image), cmap="gray", vmin=-_LIGHTER, vmax=255)
        limits = axes.get_xlim(), axes.get_ylim()
    drawn = place(axes, picture, cmap=OVERLAY_COLOURS, vmin=low, vmax=high, alpha=opacity(picture.values) if image else None)
    if image:  # whose border is outside the map
        axes.set_xlim(limits[0])
        axes.set_ylim(limits[1])
    axes.set_title(picture.title, fontsize="medium" if max(panel) > 2 else "x-small")
    _colour_bar(figure, axes, image or picture, drawn, panel)


def _colour_bar(figure: Any, axes: Any, framed: Picture, drawn: Any, panel: tuple[float, float]) -> None:
    """Just as high as what it is of, or below it where that is low."""
    ratio = min(max(framed.ratio, 1 / MAX_ASPECT), MAX_ASPECT)
    width = min(panel[0], panel[1] * ratio)
    height = width / ratio
    is_low = height < 0.8
    place_of = (0, -0.16 / height, 1, 0.1 / height) if is_low else (1 + 0.08 / width, 0, 0.12 / width, 1)
    bar = figure.colorbar(drawn, cax=axes.inset_axes(place_of), orientation="horizontal" if is_low else "vertical")
    bar.solids.set_alpha(1)
    bar.ax.tick_params(labelsize="small" if max(panel) > 2 else "x-small")
    bar.ax.locator_params(nbins=4)


def grey(image: Picture) -> Picture:
    """An image without its colours: the luma of ITU-R BT.601."""
    if image.values.ndim == 2:
        return image
    luma = image.values @ np.array([0.299, 0.587, 0.114], np.float32)
    return Picture(image.title, luma, image.extent)


def opacity(values: Array) -> Array:
    """How far a map covers the image, (y, x) like the map: not at all at its median, wholly at its extremes.

    Examples
    --------
    >>> opacity(np.array([[-1.0, 0.0, 0.0], [0.0, 0.0, 0.25]])).round(2).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.25]]
    """
    difference = np.abs(values - np.median(values))
    share: Array = np.clip(difference / value_limits(difference)[1], 0, 1)
    return share


@drawing
def sheet(title: str, pictures: Sequence[Picture | None], titles: Sequence[str], *, are_maps: bool) -> Canvas:
    """Pictures in equal cells.

    Parameters
    ----------
    title : str
        May be empty.
    pictures : sequence of Picture or None
        None where an image cannot be read.
    titles : sequence of str
        One for each, shortened in the middle where it is too long.
    are_maps : bool
        Draw them in one range of greys, with its colour bar; otherwise they are images.
    """
    columns = n_columns(len(pictures))
    rows = -(-len(pictures) // columns)
    cell = 3.0 if columns <= 2 else 2.4 if columns <= 4 else 1.5
    size = "small" if cell > 2 else "x-small"
    tallest = max((1 / picture.ratio for picture in pictures if picture), default=1.0)
    height = cell * min(max(tallest, 0.1), 1.0)
    figure = blank(columns * cell + (0.9 if are_maps else 0.1), rows * (height + 0.3) + (0.4 if title else 0.1))
    cells = grid(figure, rows, columns)
    hide(cells)
    low, high = _common_limits([picture.values for picture in pictures if picture])
    drawn = None
    for axes, picture, text in zip(cells, pictures, titles, strict=False):
        axes.set_title(fit(text, cell - 0.15, size), fontsize=size)
        axes.set_anchor("N")  # titles of a row at one height
        if picture is None:
            axes.text(0.5, 0.5, fit(_GONE, cell, size), ha="center", va="center", fontsize=size)
        elif are_maps:
            drawn = place(axes, picture, cmap=MAP_COLOURS, vmin=low, vmax=high)
        else:
            photograph(axes, picture)
    if drawn:
        figure.colorbar(
            drawn,
            ax=cells,
            shrink=min(1.0, 4 / (rows * height)),
            aspect=30,
            fraction=0.03,
            pad=0.02,
            panchor=False,
            extend="both",
        )
    if title:
        figure.suptitle(fit(title, figure.get_figwidth() - 0.3, "large"))
    return figure


def _common_limits(values: Sequence[Array]) -> tuple[float, float]:
    """One range for many maps; a map that is far from all others does not grey them."""
    lows, highs = zip(*map(value_limits, values), strict=True) if values else ((0.0,), (1.0,))
    return float(np.percentile(lows, 10)), float(np.percentile(highs, 90))
