"""Figures of the README, in Okabe and Ito's colours, which the colour-blind can tell apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from workflows.lenet.data import Labelled

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#7F7F7F"
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # numbers that a line would cross
COLOURS = {"raw": GREEN, "random": GREY, "random-lenet": GREY, "tanh": BLUE, "sigmoid": ORANGE}
NAMES = {
    "random-lenet": "LeNet with random weights",
    "tanh": "LeNet with tanh, trained",
    "sigmoid": "LeNet with sigmoid, trained",
}


def accuracies(results: dict[str, Any]) -> Figure:
    """Bars: what each probe gets right; lines: the networks themselves."""
    figure = Figure((8.5, 4.4), layout="constrained")
    axes = figure.add_subplot()
    place, ticks, labels = 0.0, [], []
    lowest = 1.0
    for probe in results["probes"]:
        source, part = probe["name"].split(", ")
        place += 1.0 if part in {"svm", "conv2", "conv3"} or source == "random-lenet" else 1.6
        share = 100 * probe["accuracy"]
        lowest = min(lowest, probe["accuracy"])
        axes.bar(place, share, 0.85, color=COLOURS[source])
        axes.text(place, share + 0.15, f"{share:.1f}", ha="center", va="bottom", fontsize=9, bbox=ON_WHITE)
        ticks.append(place)
        labels.append(
            {"logistic": "logistic", "svm": "SVM"}.get(
                part, {"random": "2 of\n9 x 9", "random-lenet": "20 of\n5 x 5"}.get(source, part)
            )
        )
    for network in results["networks"]:
        name, share = network["activation"], 100 * network["accuracy"]
        axes.axhline(
            share,
            color=COLOURS[name],
            linestyle="--",
            linewidth=1.3,
            label=f"the network itself, {name}: {share:.1f} %",
            zorder=0,
        )
    for source, said in {
        "raw": "raw pixels",
        "random": "random first layer",
        "tanh": "LeNet with tanh",
        "sigmoid": "LeNet with sigmoid",
    }.items():
        axes.bar(0, 0, color=COLOURS[source], label=said)
    axes.set_xticks(ticks, labels)
    axes.set_xlim(ticks[0] - 0.8, ticks[-1] + 0.8)
    bottom = max(0, np.floor(20 * lowest) * 5 - 5)
    axes.set_ylim(bottom, min(100, 100 * max(probe["accuracy"] for probe in results["probes"]) + 4))
    axes.set_ylabel(f"test images right, % (from {bottom:.0f})")
    axes.set_title("A linear classifier on pixels, and on the maps of each layer")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def filters(stores: dict[str, Any]) -> Figure:
    """The 20 filters of the first layer, not trained and trained."""
    figure = Figure((8.5, 5.2), layout="constrained")
    for part, (name, store) in zip(figure.subfigures(len(stores), 1), stores.items(), strict=True):
        weights = np.asarray(store.weights["conv1_weight"])[:, 0]  # (20, 5, 5)
        part.suptitle(f"first layer of {NAMES[name]}", fontsize=10, x=0.01, ha="left")
        limit = np.abs(weights).max()
        for axes, weight in zip(part.subplots(2, 10).flat, weights, strict=True):
            image = axes.imshow(weight, "PuOr", vmin=-limit, vmax=limit)
            axes.set_axis_off()
        part.colorbar(image, ax=part.axes, fraction=0.02, pad=0.01, ticks=[-limit, 0, limit], format="%.1f")
    return figure


def layers(store: Any, images: Labelled, label: int, n_maps: int = 8) -> Figure:
    """The first test image of a class, and maps of it in each layer."""
    row = images.test[np.flatnonzero(images.labels[images.test] == label)[0]]
    image = store.image(images.paths[row])
    figure = Figure((8.5, 4.0), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 3.4])
    axes = left.subplots()
    axes.imshow(images.pixels[row], "gray")
    axes.set_title(f"{images.classes[label]}, 28 x 28 pixels", fontsize=10)
    axes.set_axis_off()
    parts = right.subfigures(3, 1, height_ratios=[1.2, 1.2, 1])
    for part, layer in zip(parts[:2], ("conv1", "conv2"), strict=True):
        maps = image[layer].values
        part.suptitle(
            f"{layer}: {len(maps)} maps of {maps.shape[1]} x {maps.shape[2]}, the first {n_maps}", fontsize=10, x=0.01, ha="left"
        )
        for place, values in zip(part.subplots(1, n_maps).flat, maps[:n_maps], strict=True):
            place.imshow(values, "viridis", vmin=maps.min(), vmax=maps.max())
            place.set_axis_off()
    hidden = image["conv3"].values.ravel()
    parts[2].suptitle(f"conv3: {len(hidden)} values, the hidden layer", fontsize=10, x=0.01, ha="left")
    place = parts[2].subplots()
    place.imshow(hidden.reshape(10, -1), "viridis", aspect="auto")
    place.set_axis_off()
    return figure


def confusion(results: dict[str, Any], name: str = "tanh, conv3") -> Figure:
    """What the test images of each class are taken for by one of the probes, in percent of the class."""
    classes = results["images"]["classes"]
    counts = np.array(next(probe["confusion"] for probe in results["probes"] if probe["name"] == name))
    shares = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure((6.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, "Blues", vmin=0, vmax=100)
    for (y, x), share in np.ndenumerate(shares):
        if round(share):
            axes.text(x, y, f"{share:.0f}", ha="center", va="center", fontsize=8, color="white" if share > 55 else "black")
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("taken for, % of the class")
    axes.set_ylabel("it is")
    axes.set_title(f"Probe on {name}")
    return figure
