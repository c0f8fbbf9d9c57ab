"""Draw what `python -m benchmarks.end_to_end --json FILE` and `python -m benchmarks.scaling WHAT --json FILE` measured.

python -m benchmarks.plot end_to_end.json end_to_end.png
python -m benchmarks.plot images.json workers.json sizes.json scaling.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def end_to_end(measured: dict[str, Any]) -> Figure:
    """Images per second of each job, a panel per dtype."""
    dtypes = list(dict.fromkeys(result["dtype"] for result in measured["results"]))
    figure = Figure(figsize=(9, 0.9 + 2.2 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), 1, squeeze=False)[:, 0]
    for axes, dtype in zip(panels, dtypes, strict=True):
        results = [result for result in measured["results"] if result["dtype"] == dtype]
        names = [r["job"] + (" with our extractor" if r["kind"] == "ours" and r["job"] != "featuremaps" else "") for r in results]
        colours = [
            "tab:red" if r["job"] == "featuremaps" else "tab:gray" if r["kind"] == "plain" else "tab:blue" for r in results
        ]
        bars = axes.barh(names[::-1], [r["images_per_s"] for r in results][::-1], color=colours[::-1])
        axes.bar_label(bars, fmt="%.0f", padding=3)
        axes.set_title(f"{dtype} maps", loc="left", fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.1)
    panels[-1].set_xlabel(f"images of 639 x 516 per second, {measured['n_images']} images ({measured['machine'].split(';')[0]})")
    return figure


def scaling(all_measured: list[dict[str, Any]]) -> Figure:
    """Time and memory against the number of images, of workers and of pixels: a column for each file."""
    figure = Figure(figsize=(4 * len(all_measured), 5.5), layout="constrained")
    panels = figure.subplots(2, len(all_measured), squeeze=False)
    for (above, below), measured in zip(panels.T, all_measured, strict=True):
        results, what = measured["results"], measured["what"]
        x = [r["height"] * r["width"] / 1e6 if what == "sizes" else r["n"] for r in results]
        key, label = {
            "images": ("ms_per_image", "ms an image"),
            "workers": ("images_per_s", "images/s"),
            "sizes": ("ms_per_megapixel", "ms a megapixel"),
        }[what]
        draw(above, x, {label: [r[key] for r in results]}, label)
        memory = {name: [r[f"{name}_bytes"] / 2**20 for r in results] for name in ("driver", "worker")}
        draw(below, x, {"driver with scheduler": memory["driver"], "largest worker": memory["worker"]}, "peak memory, MiB")
        below.legend(frameon=False)
        below.set_xlabel({"images": "images of 96 x 96", "workers": "workers", "sizes": "megapixels of an image"}[what])
        for axes in (above, below):
            axes.set_xscale("log", base=2 if what == "workers" else 10)
            axes.set_xticks(x, [f"{value:,.3g}" if value < 1000 else f"{value:,}" for value in x], minor=False, rotation=30)
            axes.minorticks_off()
    figure.suptitle(all_measured[0]["machine"].split(";")[0], fontsize="medium")
    return figure


def draw(axes: Axes, x: list[float], lines: dict[str, list[float]], label: str) -> None:
    for (name, y), style in zip(lines.items(), ("o-", "s--"), strict=False):
        axes.plot(x, y, style, label=name)
        for at, value in zip(x, y, strict=True):
            axes.annotate(f"{value:.3g}", (at, value), textcoords="offset points", xytext=(0, 6), ha="center", fontsize="small")
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.2 * max(max(y) for y in lines.values()))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    *sources, output = map(Path, sys.argv[1:])
    measured = [json.loads(source.read_text()) for source in sources]
    figure = scaling(measured) if "what" in measured[0] else end_to_end(measured[0])
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
