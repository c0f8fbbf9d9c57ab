"""The commands that draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.arguments import store_argument
from pipeline.errors import EXIT_COMPLETE, UsageError

if TYPE_CHECKING:
    from pipeline.store.objects import Place

_TAKES = {  # how many of each option a figure takes
    "maps": {"PATH": 1, "--overlay": 1, "--crop": 1, "--layer": 1000, "--channel": 1000},
    "contact": {"PATH": 1000, "--layer": 1, "--channel": 1, "-n": 1},
    "histogram": {"--layer": 1, "-n": 1},
    "filters": {"--layer": 1},
    "stages": {},
}


@click.command()
@store_argument
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Figure to write: .png, .svg or .pdf.")
@click.option("--figure", "kind", type=click.Choice(list(_TAKES)), help="What to draw (default: maps, of one PATH).")
@click.option("--overlay", is_flag=True, help="Lay the maps over the image, each at its true place.")
@click.option(
    "--layer", "layers", multiple=True, metavar="NAME", help="A layer; repeat for several (default: all, or the first)."
)
@click.option("--channel", "channels", type=int, multiple=True, metavar="K", help="A channel, from 0; repeat for several.")
@click.option(
    "--crop",
    type=click.IntRange(0),
    nargs=4,
    metavar="LEFT TOP WIDTH HEIGHT",
    help="Draw only this part of the image, in pixels.",
)
@click.option("-n", "n", type=int, metavar="N", help="Images of a contact sheet (default: 12) or of histograms (64).")
def show(
    store: Place,
    paths: tuple[str, ...],
    output: Path,
    kind: str | None,
    overlay: bool,
    layers: tuple[str, ...],
    channels: tuple[int, ...],
    crop: tuple[int, ...] | None,
    n: int | None,
) -> int:
    """Draw an image with its maps, or another figure of STORE.

    Without --figure it draws the image PATH with its maps.

    contact: a channel of many images, of each PATH or of N spread over the store. histogram: the values of a layer, channel by channel.
    filters: the weights of a layer. stages: where the time of the last run went.
    """
    from pipeline.analysis.feature_store import open_store
    from pipeline.report import figures

    figures.check_format(output)
    if kind is None and not paths:
        *others, last = list(_TAKES)[1:]
        raise UsageError(
            "an image is missing, and nothing was drawn: name one by its path, as `.images` of the store writes it, or draw the whole "
            f"store with --figure {', '.join(others)} or {last}"
        )
    kind = kind or "maps"
    given = {"PATH": len(paths), "--overlay": overlay, "--layer": len(layers), "--channel": len(channels)}
    given |= {"--crop": bool(crop), "-n": n is not None}
    _check(kind, given)
    of_maps = {"overlay": overlay, "layers": layers or None, "channels": channels or None, "crop": crop or None}
    known: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "maps": (figures.show, of_maps),
        "contact": (figures.contact_sheet, {"paths": paths or None, **_only(layer=layers, channel=channels, n=(n,))}),
        "histogram": (figures.histograms, _only(layer=layers, n_images=(n,))),
        "filters": (figures.filters, _only(layer=layers)),
        "stages": (figures.stage_times, {}),
    }
    draw, arguments = known[kind]
    figures.save(draw(open_store(store), *(paths if kind == "maps" else ()), **arguments), output)
    click.echo(f"wrote {output}")
    return EXIT_COMPLETE


@click.command()
@store_argument
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path("report.html"), show_default=True, help="Page to write."
)
@click.option("--samples", "n_samples", type=click.IntRange(0), default=6, show_default=True, metavar="N", help="Images to show.")
def report(store: Place, output: Path, n_samples: int) -> int:
    """Write one HTML page about STORE.

    The page shows what was run on what, how it went, the bad images, and some images with their maps.
    """
    from pipeline.report.page import write_report

    write_report(store, output, n_samples=n_samples)
    click.echo(f"wrote {output}")
    return EXIT_COMPLETE


def _check(kind: str, given: dict[str, int]) -> None:
    """Refuse options that the figure would ignore."""
    takes = _TAKES[kind]
    for name, n in given.items():
        if n > takes.get(name, 0):
            most = {0: f"takes no {name}", 1: f"takes one {name}, and there were {n}"}[takes.get(name, 0)]
            rest = ", ".join(takes) or "nothing but STORE and -o"
            raise UsageError(f"--figure {kind} {most}, so nothing was drawn: leave out the surplus; it takes {rest}")
    if kind == "contact" and given["PATH"] and given["-n"]:
        raise UsageError(
            f"--figure contact takes PATHs or -n, and there were both ({given['PATH']} and -n), so nothing was drawn: leave out -n to draw "
            "these images, or the PATHs to draw some that are spread over the store"
        )
    if kind == "maps" and not given["PATH"]:
        raise UsageError(
            "--figure maps needs the PATH of one image, as `.images` of the store writes it: nothing was drawn; name one"
        )


def _only(**options: tuple[Any, ...]) -> dict[str, Any]:
    """The options that were given, each with its only value; the others keep their defaults."""
    return {name: values[0] for name, values in options.items() if values and values[0] is not None}
