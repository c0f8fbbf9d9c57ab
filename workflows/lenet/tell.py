"""What came of it: tables, figures, and the README's part between its marks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pipeline
from workflows.lenet import draw
from workflows.lenet.data import Labelled
from workflows.lenet.end_to_end import LAYERS

MARKED = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)

FIXED = {
    "raw, logistic": "raw pixels: logistic regression",
    "raw, svm": "raw pixels: linear SVM",
    "random, conv1": "random first layer: the pipeline's own two filters of 9 x 9, sigmoid, seed 23455 (`job-random.yaml`)",
    "random-lenet, conv1": "random first layer: LeNet's 20 filters of 5 x 5 untrained, tanh, seed 23455 (`job-random-lenet.yaml`)",
}


def write(results: dict[str, Any], images: Labelled, work: Path, output: Path) -> None:
    """Write results.json, four figures, and the tables: into a README.md that the folder has, between its marks, or as results.md."""
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join((table(results), verdict(results), pipeline_table(results), machine(results))) + "\n"
    readme = output / "README.md"
    if readme.is_file():
        readme.write_text(MARKED.sub(lambda found: f"{found[1]}{text}{found[2]}", readme.read_text()))
    else:
        (output / "results.md").write_text(text)
    stores = {
        name: pipeline.open_store(work / f"{name}.zarr")
        for name in ("random-lenet", *(network["activation"] for network in results["networks"]))
    }
    draw.accuracies(results).savefig(output / "accuracies.png", dpi=100)
    draw.filters(stores).savefig(output / "filters.png", dpi=100)
    draw.layers(stores["tanh"], images, label=len(images.classes) - 1).savefig(output / "layers.png", dpi=100)
    draw.confusion(results).savefig(output / "confusion.png", dpi=100)


def table(results: dict[str, Any]) -> str:
    """Accuracy of every probe and network, as Markdown."""
    found = {probe["name"]: probe for probe in results["probes"]}
    lines = ["| A linear classifier on | features | test images right |", "|---|---|---|"]
    rows = list(FIXED.items())
    for network in results["networks"]:
        name = network["activation"]
        rows += [(f"{name}, {layer}", f"LeNet with {name}, trained: {layer} (`job-{name}.yaml`)") for layer in LAYERS]
    lines += [f"| {said} | {found[name]['n_features']:,} | {percent(found[name]['accuracy'])} |" for name, said in rows]
    lines += [
        f"| *LeNet with {network['activation']}, the network itself* | | *{percent(network['accuracy'])}* |"
        for network in results["networks"]
    ]
    return "\n".join(lines)


def verdict(results: dict[str, Any]) -> str:
    """What had to be shown and whether it was, and what is not as exact as the table looks."""
    lines = ["| what has to hold, or the command ends with 1 | measured | limit | |", "|---|---|---|---|"]
    for criterion in results["criteria"]:
        value = criterion["value"]
        limit = f"at least {percent(criterion['at_least'])}" if "at_least" in criterion else f"at most {criterion['at_most']:.0e}"
        measured = percent(value) if "at_least" in criterion else f"{value:.1e}"
        lines.append(f"| {criterion['what']} | {measured} | {limit} | {'holds' if criterion['holds'] else '**does not hold**'} |")
    found = {probe["name"]: probe for probe in results["probes"]}
    ended = [name for name, probe in found.items() if not probe["is_converged"]]
    n = results["images"]["test"]
    notes = [
        f"Chance alone moves 90 % of {n:,} test images by {196 * (0.9 * 0.1 / n) ** 0.5:.1f} points either way (95 %).",
        f"Stopped at the limit of steps before they had converged: {'; '.join(ended)}." if ended else "All probes converged.",
    ]
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def pipeline_table(results: dict[str, Any]) -> str:
    """What the pipeline took."""
    lines = ["| `featuremaps run` | images | seconds | images a second | store, MB |", "|---|---|---|---|---|"]
    for run in results["runs"]:
        rate = run["n_done"] / run["elapsed_s"]
        lines.append(f"| {run['job']} | {run['n_done']:,} | {run['elapsed_s']:.0f} | {rate:,.0f} | {run['bytes'] / 1e6:,.0f} |")
    return "\n".join(lines)


def machine(results: dict[str, Any]) -> str:
    """Where the time went, and with what."""
    trained = ", ".join(
        f"{network['activation']} {network['elapsed_s']:.0f} s (epoch {network['best_epoch']} of {network['n_epochs']} kept)"
        for network in results["networks"]
    )
    probed = sum(probe["elapsed_s"] for probe in results["probes"])
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return f"Training: {trained}. All probes: {probed:.0f} s. {results['cores']} cores; {versions}; seed {results['seed']}."


def percent(share: float) -> str:
    """A share as it stands in the tables."""
    return f"{100 * share:.2f} %"
