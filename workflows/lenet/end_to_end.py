"""Everything in order: train, run the pipeline, compare maps, probe, check; its result is one dictionary of plain values."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipeline
from pipeline.config import load_job
from pipeline.errors import FeaturemapsError
from pipeline.run import run_job
from workflows.lenet.data import Labelled
from workflows.lenet.probe import Probe, features, probe
from workflows.lenet.train import ACTIVATIONS, LeNet, accuracy, trained

HERE = Path(__file__).parent
LAYERS = ("conv1", "conv2", "conv3")
N_COMPARED = 200
"""Test images whose stored maps are compared with the network's own."""

LARGEST_DIFFERENCE = 1e-5
REACHED_WITHIN = 0.01
"""The probe on stored features of the last layer may be this much worse than the network itself."""
MARGIN = 0.04
"""By how much it has to beat logistic regression on raw pixels."""

Say = Callable[[str], None]


def end_to_end(
    images: Labelled, work: Path, seed: int, n_epochs: int, client: Any = None, say: Say = lambda _: None
) -> dict[str, Any]:
    """Do it all.

    Parameters
    ----------
    images : Labelled
    work : Path
        Where weights and stores are made. Networks that were trained before, by the same seed and settings, are not trained again; stores
        are made anew.
    seed : int
        Of the networks' first weights and of the order of the images.
    n_epochs : int
    client : distributed.Client, optional
        A Dask cluster to use; None has the pipeline start one for each job.
    say : callable
        Told what happens, a line at a time.

    Returns
    -------
    dict
        As it is written to results.json.
    """
    start = time.monotonic()
    networks = {activation: trained(images, activation, seed, n_epochs, work, say) for activation in ACTIVATIONS}
    right = {activation: accuracy(network, images, images.test) for activation, (network, _) in networks.items()}
    for activation, share in right.items():
        say(f"LeNet with {activation}: {share:.2%} of the test images right")
    runs = [
        run(job, images, work, client, say) | {"job": f"job-{job}.yaml", "dtype": "float32"}
        for job in ("random", "random-lenet", *ACTIVATIONS)
    ]
    runs.append(run("tanh", images, work, client, say, dtype="uint8") | {"job": "job-tanh.yaml --dtype uint8", "dtype": "uint8"})
    differences = {activation: compare(network, images, work) for activation, (network, _) in networks.items()}
    probes = []
    for found in all_probes(images, work):
        say(f"{found.name}: {found.accuracy:.2%} ({found.n_features} features, {found.elapsed_s:.0f} s)")
        probes.append(asdict(found))
    results = {
        "images": {
            "classes": list(images.classes),
            **{part: len(getattr(images, part)) for part in ("train", "validation", "test")},
        },
        "seed": seed,
        "networks": [asdict(training) | {"accuracy": right[training.activation]} for _, training in networks.values()],
        "runs": runs,
        "largest_differences": differences,
        "probes": probes,
        "elapsed_s": time.monotonic() - start,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "torch")},
    }
    return results | {"criteria": criteria(results)}


def run(job: str, images: Labelled, work: Path, client: Any, say: Say, dtype: str = "float32") -> dict[str, Any]:
    """Run a job file of this folder in the work folder: seconds, images per second, bytes of the store.

    Raises
    ------
    FeaturemapsError
        When the run ended before it was complete.
    """
    store = work / f"{job}{'' if dtype == 'float32' else f'-{dtype}'}.zarr"
    shutil.rmtree(store, ignore_errors=True)  # of a former training, with other weights
    changes: dict[str, Any] = {"source": str(images.folder), "store": str(store), "dtype": dtype}
    if job in ACTIVATIONS:
        changes["extractor"] = {"weights": str(work / f"{job}.safetensors")}
    summary = run_job(load_job(HERE / f"job-{job}.yaml", changes), client)
    if summary.outcome != "complete":
        raise FeaturemapsError(
            f"the run of job-{job}.yaml ended as {summary.outcome} ({summary.message}), so its store is not whole and no probe would be "
            "fair; run the command again"
        )
    size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    rate = summary.n_done_total / summary.elapsed_s
    say(f"pipeline, {store.name}: {summary.n_done_total} images in {summary.elapsed_s:.0f} s ({rate:.0f} a second), {size / 1e6:.0f} MB")
    return {"store": store.name, "n_done": summary.n_done_total, "elapsed_s": summary.elapsed_s, "images_per_s": rate, "bytes": size}


@torch.inference_mode()
def compare(network: LeNet, images: Labelled, work: Path) -> dict[str, float]:
    """Largest difference between stored maps and the network's own, per layer, over some test images."""
    rows = images.test[:: max(1, len(images.test) // N_COMPARED)]
    name = "tanh" if network.activation is torch.tanh else "sigmoid"
    store = pipeline.open_store(work / f"{name}.zarr")
    own = network.maps(torch.from_numpy(images.inputs[rows]))
    largest = dict.fromkeys(LAYERS, 0.0)
    for i, row in enumerate(rows):
        image = store.image(images.paths[row])
        for layer in LAYERS:
            largest[layer] = max(largest[layer], float(np.abs(image[layer].values - own[layer][i].numpy()).max()))
    return largest


def all_probes(images: Labelled, work: Path) -> Iterator[Probe]:
    """One after another; the maps of one layer at a time are in memory."""
    yield probe("raw pixels, logistic", pixels(images), images)
    yield probe("raw pixels, SVM", pixels(images), images, "svm")
    yield probe("random 9x9", features(pipeline.open_store(work / "random.zarr"), "conv1", images), images)
    for name in ("random-lenet", *ACTIVATIONS):
        store = pipeline.open_store(work / f"{name}.zarr")
        for layer in LAYERS:
            yield probe(f"{name}, {layer}", features(store, layer, images), images)
    yield probe("tanh, conv3, uint8", features(pipeline.open_store(work / "tanh-uint8.zarr"), "conv3", images), images)


def pixels(images: Labelled) -> Any:
    """Pixels as features: (image, y * x) float32."""
    return images.inputs.reshape(len(images.pixels), -1)


def criteria(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the results have to show: what, the value, its limit, and whether it holds."""
    of_probe = {found["name"]: found["accuracy"] for found in results["probes"]}
    found = []
    for network in results["networks"]:
        name = network["activation"]
        value, raw = of_probe[f"{name}, conv3"], of_probe["raw pixels, logistic"]
        own = network["accuracy"] - REACHED_WITHIN
        largest = max(results["largest_differences"][name].values())
        found += [
            {"what": f"{name}: the probe on conv3 reaches the network itself, less one point", "value": value, "at_least": own},
            {"what": f"{name}: the probe on conv3 beats raw pixels", "value": value - raw, "at_least": MARGIN},
            {"what": f"{name}: stored maps are the network's own", "value": largest, "at_most": LARGEST_DIFFERENCE},
        ]
    return [
        criterion | {"holds": bool(criterion.get("at_least", -np.inf) <= criterion["value"] <= criterion.get("at_most", np.inf))}
        for criterion in found
    ]
