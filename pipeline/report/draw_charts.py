"""Draws numbers: histograms of maps, filters, and where the time of a run went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.extract.layers import Array
from pipeline.report.canvas import CATEGORIES, SIGNED_COLOURS, Canvas, blank, drawing, fit, grid, hide, n_columns
from pipeline.run.summary import STAGES, WAITING
from pipeline.text import rounded

_STAGE_COLOURS = dict(zip((*STAGES, WAITING), CATEGORIES.values(), strict=False))


@drawing
def histogram_panels(title: str, edges: Array, shares: Array, titles: Sequence[str]) -> Canvas:
    """One histogram per channel, all with the same axes.

    Parameters
    ----------
    title : str
    edges : (bin + 1,) float
    shares : (channel, bin) float
        Share of the channel's values in each bin; sums to 1.
    titles : sequence of str
        One per channel.
    """
    n = len(shares)
    columns = 1 if n <= 4 else n_columns(n)
    rows = -(-n // columns)
    width, height = {1: (7.0, 1.7), 3: (2.9, 1.8), 4: (2.6, 1.7)}.get(columns, (1.5, 1.2))
    size = "medium" if columns == 1 else "small" if columns <= 4 else "x-small"
    figure = blank(columns * width + 0.6, rows * height + 0.9)
    cells = grid(figure, rows, columns, sharex=True, sharey=True)
    for axes, values, text in zip(cells, 100 * shares, titles, strict=False):
        axes.stairs(values, edges, fill=True, color=CATEGORIES["blue"])
        axes.set_title(text, fontsize=size)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=size if columns > 1 else "small")
        axes.locator_params(axis="x", nbins=8 if columns == 1 else 3)
        axes.locator_params(axis="y", nbins=3)
    hide(cells[n:])
    for axes in cells[n - columns : n]:
        axes.tick_params(labelbottom=True)  # also above an empty cell
    cells[0].set_xlim(edges[0], edges[-1])
    cells[0].set_ylim(0)
    figure.suptitle(fit(title, figure.get_figwidth() - 0.3, "large"))
    figure.supxlabel("value", fontsize="medium")
    figure.supylabel("share of the channel's values (%)", fontsize="medium")
    return figure


@drawing
def filter_panels(title: str, note: str, filters: Array, biases: Array, inputs: Sequence[str]) -> Canvas:
    """Filters in one range of colours about 0, with the parts of a filter side by side.

    Parameters
    ----------
    title : str
    note : str
        Said below.
    filters : (filter, part, y, x) float
    biases : (filter,) float
    inputs : sequence of str
        Name of each part, for instance R, G and B.
    """
    n, n_parts, height, width = filters.shape
    columns = (1 if n <= 4 else 2 if n <= 10 else 4) if n_parts > 1 else n_columns(n)
    rows = -(-n // columns)
    montage_width = n_parts * width + (n_parts - 1) * _gap(width)
    cell_width = max(1.1, min(4.0 if n_parts > 1 else 2.2, 11 / columns))
    cell_height = min(cell_width * height / montage_width, 2.4)
    size = "medium" if columns <= 4 else "x-small"
    figure = blank(columns * cell_width + 1.2, rows * (cell_height + 0.45) + 0.9)
    figure.set_layout_engine("constrained", wspace=0.08)  # more than between the parts of a filter
    cells = grid(figure, rows, columns)
    hide(cells[n:])
    largest = float(np.abs(filters).max()) or 1.0
    drawn: Any = None
    for i, axes in enumerate(cells[:n]):
        drawn = axes.imshow(montage(filters[i]), cmap=SIGNED_COLOURS, vmin=-largest, vmax=largest, interpolation="nearest")
        axes.set_xticks([(width - 1) / 2 + k * (width + _gap(width)) for k in range(n_parts)], inputs)
        axes.set_yticks([])
        axes.tick_params(length=0, labelsize="small", pad=1)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{i}: bias {biases[i]:+.2g}", fontsize=size)
    bar = figure.colorbar(drawn, ax=cells, shrink=min(1.0, 3.5 / figure.get_figheight() + 0.2), aspect=25, panchor=False)
    bar.set_label("weight")
    figure.suptitle(fit(title, figure.get_figwidth() - 0.3, "large"))
    figure.supxlabel(fit(note, figure.get_figwidth() - 0.2, "small"), fontsize="small", color="0.35")
    return figure


def montage(parts: Array) -> Array:
    """The parts of a filter side by side with an empty gap between them, (y, x) float.

    Examples
    --------
    >>> montage(np.ones((2, 1, 3)))
    array([[ 1.,  1.,  1., nan,  1.,  1.,  1.]])
    """
    n, height, width = parts.shape
    step = width + _gap(width)
    result = np.full((height, n * step - _gap(width)), np.nan)
    for i, part in enumerate(parts):
        result[:, i * step : i * step + width] = part
    return result


def _gap(width: int) -> int:
    return max(1, width // 9)


@drawing
def stage_bars(title: str, note: str, seconds: Mapping[str, float]) -> Canvas:
    """Seconds of each stage as horizontal bars, with their share of the whole.

    Parameters
    ----------
    title : str
    note : str
        Said below.
    seconds : mapping of str to float
        Per stage, in order of time.
    """
    total = sum(seconds.values()) or 1.0
    longest = max(seconds.values(), default=0.0) or 1.0
    figure = blank(8.0, 0.42 * len(seconds) + 1.3)
    axes = figure.subplots()
    colours = [_STAGE_COLOURS.get(stage, CATEGORIES["vermillion"]) for stage in seconds]
    bars = axes.barh(list(seconds), list(seconds.values()), color=colours, height=0.7)
    axes.bar_label(bars, [f"{rounded(s)} s, {s / total:.0%}" for s in seconds.values()], padding=4)
    axes.set_xlim(0, longest * 1.22)
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds of one slot, summed over all slots")
    axes.set_title(fit(title, 7.6, "large"), loc="left")
    figure.supxlabel(fit(note, 7.8, "small"), fontsize="small", color="0.35")
    return figure
