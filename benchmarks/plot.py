"""Draw what `python -m benchmarks.end_to_end --json FILE` measured.

python -m benchmarks.plot end_to_end.json end_to_end.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main() -> None:
    source, output = map(Path, sys.argv[1:3])
    measured = json.loads(source.read_text())
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
    figure.savefig(output, dpi=120)


if __name__ == "__main__":
    main()
