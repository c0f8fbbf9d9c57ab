"""The only home of matplotlib: figures that show themselves, and the look that all of them have.

Colours are chosen to be told apart by everybody: perceptually uniform maps for what grows, a red and blue one about 0 for what has a
sign, and the palette of Okabe and Ito, "Color Universal Design" (2008), for categories.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path

from pipeline.report.arrays import Picture

MAP_COLOURS = "gray"
OVERLAY_COLOURS = "plasma"
SIGNED_COLOURS = "RdBu_r"
CATEGORIES = {
    "blue": "#0072B2",
    "orange": "#E69F00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "grey": "#999999",
    "vermillion": "#D55E00",
}
NOTEBOOK_DPI = 100
MAX_ASPECT = 20
_Parameters = ParamSpec("_Parameters")
_Drawn = TypeVar("_Drawn")


class Canvas(Figure):
    """A matplotlib figure that no pyplot knows of, and that a notebook shows as the last value of a cell."""

    def savefig(self, *args: Any, **options: Any) -> None:
        """Write the figure, as matplotlib does; titles stay text in an SVG, and a letter that the font lacks becomes a box."""
        with _rules():
            super().savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        data = io.BytesIO()
        self.savefig(data, format="png", dpi=NOTEBOOK_DPI)
        return data.getvalue()


@contextmanager
def _rules() -> Iterator[None]:
    """A name is no formula; a font may lack a glyph."""
    settings = {"svg.fonttype": "none", "text.usetex": False, "text.parse_math": False}
    with rc_context(settings), warnings.catch_warnings(action="ignore"):
        yield


def drawing(function: Callable[_Parameters, _Drawn]) -> Callable[_Parameters, _Drawn]:
    """Have a function draw by the same rules as a figure is saved."""

    @wraps(function)
    def draw(*args: _Parameters.args, **options: _Parameters.kwargs) -> _Drawn:
        with _rules():
            return function(*args, **options)

    return draw


def blank(width: float, height: float) -> Canvas:
    """An empty figure, in inches, that arranges what it gets without overlaps."""
    return Canvas(figsize=(width, height), layout="constrained")


def n_columns(n: int) -> int:
    """Columns of a grid of ``n`` panels: few empty cells, and not many narrow ones.

    Examples
    --------
    >>> [n_columns(n) for n in (1, 2, 4, 5, 6, 9, 16, 20, 50, 64)]
    [1, 2, 4, 3, 3, 3, 4, 7, 8, 8]
    """
    if n <= 4:
        return max(n, 1)
    return min((4, 3) if n <= 16 else (8, 7), key=lambda columns: -n % columns)


def fit(text: str, width: float, size: str | float = "medium") -> str:
    """A text, shortened in the middle where it is wider than ``width`` inches in a font of this size.

    Examples
    --------
    >>> fit("photographs/of/a/long/journey/2026/cat.jpg", 2.0)
    'photograph...2026/cat.jpg'
    """
    font = FontProperties(size=size)

    def is_wide(part: str) -> bool:
        return bool(text_to_path.get_text_width_height_descent(part, font, ismath=False)[0] > 72 * width)

    if not is_wide(text):
        return text
    n = len(text) - 1
    while n > 2 and is_wide(short := f"{text[: n // 2]}...{text[len(text) - (n - n // 2) :]}"):
        n = min(n - 1, int(n * 0.97))
    return short


def place(axes: Any, picture: Picture, **options: Any) -> Any:
    """Draw a picture at its place in input pixels, to scale unless it would be a hairline."""
    axes.axis("off")
    aspect = picture.ratio / min(max(picture.ratio, 1 / MAX_ASPECT), MAX_ASPECT)
    return axes.imshow(picture.values, extent=picture.extent, aspect=aspect, **options)


def photograph(axes: Any, picture: Picture) -> Any:
    """Draw an image: colours as they are, or grey."""
    return place(axes, picture, cmap="gray", vmin=0, vmax=255)


def grid(figure: Any, rows: int, columns: int, **options: Any) -> list[Any]:
    """Axes row by row, all of them without a frame until something is drawn."""
    axes: list[Any] = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    return axes


def hide(axes: Sequence[Any]) -> None:
    """Leave cells of a grid empty."""
    for cell in axes:
        cell.axis("off")
