"""Everything in order: train, run the pipeline, compare maps, probe, check; its result is one dictionary of plain values."""

from __future__ import annotations

import importlib.metadata
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pipeline
from pipeline.api import run_job
from pipeline.config import load_job
from pipeline.errors import FeaturemapsError
from workflows.lenet.data import Labelled
from workflows.lenet.probe import Probe, features, probe
from workflows.lenet.train import ACTIVATIONS, N_EPOCHS, Activation, LeNet, Training, accuracy, trained

HERE = Path(__file__).parent
LAYERS = ("conv1", "conv2", "conv3")
PROBES = (
    ("raw", "logistic"),
    ("raw", "svm"),
    ("random", "conv1"),
    ("random-lenet", "conv1"),
    *((activation, layer) for activation in ACTIVATIONS for layer in LAYERS),
)
"""What each probe sees: pixels, or a layer of the store of a job; and for pixels the kind of classifier."""
N_COMPARED = 200
"""Test images whose stored maps are compared with the network's own."""

LARGEST_DIFFERENCE = 1e-5
REACHED_WITHIN = 0.01
"""The probe on stored features of the last layer may be this much worse than the network itself."""
MARGIN = 0.04
"""By how much it has to beat logistic regression on raw pixels."""

Say = Callable[[str], None]


def work_folder(parent: Path, images: Labelled, seed: int, n_epochs: Mapping[Activation, int]) -> Path:
    """Where weights, stores and probes of these images, split, seed and epochs go, so that none is taken for that of others."""
    epochs = "-".join(str(n) for n in n_epochs.values())
    folder = parent / f"{images.digest()}-seed-{seed}-epochs-{epochs}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def end_to_end(
    images: Labelled,
    work: Path,
    seed: int,
    n_epochs: Mapping[Activation, int] = N_EPOCHS,
    *,
    client: Any = None,
    each: Callable[..., Iterable[Any]] = map,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Do it all, or what is left of it: networks, maps and probes that are in the work folder stand.

    Parameters
    ----------
    images : Labelled
    work : Path
        Where weights, stores and the results of each probe go.
    seed : int
        Of the networks' first weights and of the order in which they see the images.
    n_epochs : mapping
        Per activation.
    client : distributed.Client, optional
        A Dask cluster to use; None has the pipeline start one for each job.
    each : callable
        As ``map``; that of a pool of processes trains and probes two at a time.
    say : callable
        Told what happens, a line at a time.

    Returns
    -------
    dict
        As it is written to results.json.
    """
    trainings = each(partial(trained, images, work, seed), n_epochs.values(), n_epochs.keys())
    networks: dict[Activation, tuple[LeNet, Training]] = dict(zip(n_epochs, trainings, strict=True))
    right = {activation: accuracy(network, images, images.test) for activation, (network, _) in networks.items()}
    for activation, (_, training) in networks.items():
        say(f"LeNet with {activation}: {right[activation]:.2%} of the test images right; trained in {training.elapsed_s:.0f} s")
    runs = [run(job, images, work, client, say) for job in ("random", "random-lenet", *n_epochs)]
    differences = {activation: compare(network, activation, images, work) for activation, (network, _) in networks.items()}
    probes = []
    for found in each(partial(probed, images, work), PROBES):
        say(f"{found.name}: {found.accuracy:.2%} of the test images right ({found.n_features} features, {found.elapsed_s:.0f} s)")
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
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn", "torch")},
    }
    return results | {"criteria": criteria(results)}


def run(job: str, images: Labelled, work: Path, client: Any, say: Say) -> dict[str, Any]:
    """Run a job file of this folder in the work folder: seconds, images per second, bytes of the store.

    Raises
    ------
    FeaturemapsError
        When the run ended before it was complete.
    """
    path = work / f"{job}.zarr"
    changes: dict[str, Any] = {"source": str(images.folder), "store": str(path)}
    if job in ACTIVATIONS:
        changes["extractor"] = {"weights": str(work / f"{job}.safetensors")}
    summary = run_job(load_job(HERE / f"job-{job}.yaml", changes), client)
    if summary.outcome != "complete":
        raise FeaturemapsError(
            f"the run of job-{job}.yaml ended as {summary.outcome} ({summary.message}), so its store is not whole and no probe would be "
            "fair; run the command again, which goes on from there"
        )
    elapsed_s = sum(receipt["elapsed_s"] for receipt in pipeline.open_store(path).receipts if receipt["n_done"])
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    n_done = summary.n_done_total
    say(
        f"maps of {n_done} images in {path.name}: {elapsed_s:.0f} s, {n_done / elapsed_s:.0f} images a second, {size / 1e6:.0f} MB"
    )
    return {"job": f"job-{job}.yaml", "n_done": n_done, "elapsed_s": elapsed_s, "bytes": size}


@torch.inference_mode()
def compare(network: LeNet, activation: Activation, images: Labelled, work: Path) -> dict[str, float]:
    """Largest difference between stored maps and the network's own, per layer, over some test images."""
    rows = images.test[:: max(1, len(images.test) // N_COMPARED)]
    own = network.maps(torch.from_numpy(images.inputs[rows]))
    some = replace(images, paths=tuple(images.paths[row] for row in rows))
    store = pipeline.open_store(work / f"{activation}.zarr").select(list(some.paths))
    return {layer: float(np.abs(features(store, layer, some) - own[layer].flatten(1).numpy()).max()) for layer in LAYERS}


def probed(images: Labelled, work: Path, what: tuple[str, str]) -> Probe:
    """One of `PROBES`, unless it was done before: then what is in the work folder."""
    source, part = what
    record = work / f"probe-{source}-{part}.json"
    if record.is_file():
        return Probe(**json.loads(record.read_text()))
    if source == "raw":
        values, kind = images.inputs.reshape(len(images.paths), -1), part
    else:
        values, kind = features(pipeline.open_store(work / f"{source}.zarr"), part, images), "logistic"
    found = probe(f"{source}, {part}", values, images, kind)
    record.write_text(json.dumps(asdict(found)))
    return found


def criteria(results: dict[str, Any]) -> list[dict[str, Any]]:
    """What the results have to show: what, the value, its limit, and whether it holds."""
    of_probe = {found["name"]: found["accuracy"] for found in results["probes"]}
    found = []
    for network in results["networks"]:
        name = network["activation"]
        value, raw = of_probe[f"{name}, conv3"], of_probe["raw, logistic"]
        own = network["accuracy"] - REACHED_WITHIN
        largest = float(np.max(list(results["largest_differences"][name].values())))  # NaN if one is, unlike max()
        found += [
            {"what": f"{name}: the probe on conv3 reaches the network itself, less one point", "value": value, "at_least": own},
            {"what": f"{name}: the probe on conv3 beats raw pixels", "value": value - raw, "at_least": MARGIN},
            {"what": f"{name}: stored maps are the network's own", "value": largest, "at_most": LARGEST_DIFFERENCE},
        ]
    return [
        criterion | {"holds": bool(criterion.get("at_least", -np.inf) <= criterion["value"] <= criterion.get("at_most", np.inf))}
        for criterion in found
    ]
