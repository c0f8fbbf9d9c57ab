"""Linear probes: how well the simplest of classifiers tells the classes apart, from pixels or from the maps of a store."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, SGDClassifier
from threadpoolctl import threadpool_limits

from pipeline.errors import FeaturemapsError
from workflows.lenet.data import SIZE, Array, Labelled

Kind = Literal["logistic", "svm"]

STRENGTHS = (1e-3, 1e-2, 1e-1)
"""C, the weight of the data against that of the penalty; a larger one fits closer."""
N_CHOOSING = 5_000  # images to learn from while C is chosen
MAX_ITERATIONS: dict[Kind, int] = {"logistic": 500, "svm": 60}


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of one probe."""

    name: str
    kind: Kind
    n_features: int
    strength: float
    """C, as chosen on the images that validate."""
    n_iterations: int
    is_converged: bool
    accuracy: float
    """Share of the test images that are right."""
    confusion: tuple[tuple[int, ...], ...]
    """Test images by class (row) and what they were taken for (column)."""
    elapsed_s: float


def features(store: Any, layer: str, images: Labelled) -> Array:
    """One layer's maps of every image, flattened: (image, channel * y * x) float32, in the order of ``images``.

    Parameters
    ----------
    store : FeatureStore
        As `pipeline.open_store` opens it.
    layer : str
        For instance ``conv2``.
    images : Labelled

    Raises
    ------
    FeaturemapsError
        When the store lacks the maps of an image.
    """
    dataset = store.dataset(f"{SIZE}x{SIZE}")
    rows = pd.Index(dataset["path"].values[dataset["status"].values == 1]).get_indexer(pd.Index(images.paths))
    if (rows < 0).any():
        missing = [images.paths[i] for i in np.flatnonzero(rows < 0)[:3]]
        raise FeaturemapsError(
            f"{store.path} has no maps of {np.count_nonzero(rows < 0)} of {len(rows)} images ({', '.join(missing)}, ...), so a probe would "
            "learn from fewer images than the network did; run the command again, which goes on from there"
        )
    maps: Array = dataset[layer].values[dataset["status"].values == 1]
    return maps.reshape(len(maps), -1)[rows]


def probe(name: str, values: Array, images: Labelled, kind: Kind = "logistic", strengths: Sequence[float] = STRENGTHS) -> Probe:
    """Fit a linear classifier to the training images, and count how many of the test images it gets right.

    Features are brought to mean 0 and standard deviation 1 over the training images. C is the one of ``strengths`` with which a classifier
    that has seen some of the training images does best on those that validate; the test images choose nothing.

    Parameters
    ----------
    name : str
    values : (image, feature) float32
        Overwritten.
    images : Labelled
    kind : str
        ``logistic``: multinomial logistic regression, by L-BFGS. ``svm``: linear support vector machines, one per class against the rest,
        by averaged stochastic gradient descent (liblinear takes many times as long for the same accuracy).
    strengths : sequence of float
        Values of C to choose from; of one alone, nothing is chosen.
    """
    with threadpool_limits(1):  # threads that wait for each other on busy cores took many times as long
        return _probe(name, values, images, kind, strengths)


def _probe(name: str, values: Array, images: Labelled, kind: Kind, strengths: Sequence[float]) -> Probe:
    start = time.monotonic()
    values -= values[images.train].mean(0)
    deviation = values[images.train].std(0)
    values /= np.where(deviation > 0, deviation, 1)
    labels = images.labels
    some = np.random.default_rng(0).permutation(images.train)[:N_CHOOSING]
    scores = [
        _fit(kind, strength, values[some], labels[some]).score(values[images.validation], labels[images.validation])
        for strength in (strengths if len(strengths) > 1 else ())
    ]
    strength = strengths[int(np.argmax(scores)) if scores else 0]
    fitted = _fit(kind, strength, values[images.train], labels[images.train])
    found = fitted.predict(values[images.test])
    confusion = np.zeros((len(images.classes), len(images.classes)), int)
    np.add.at(confusion, (labels[images.test], found), 1)
    n_iterations = int(np.max(fitted.n_iter_))
    return Probe(
        name,
        kind,
        values.shape[1],
        strength,
        n_iterations,
        n_iterations < MAX_ITERATIONS[kind],
        float(np.mean(found == labels[images.test])),
        tuple(map(tuple, confusion.tolist())),
        time.monotonic() - start,
    )


def _fit(kind: Kind, strength: float, values: Array, labels: Array) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `Probe.is_converged` says it
        if kind == "logistic":
            return LogisticRegression(C=strength, max_iter=MAX_ITERATIONS[kind]).fit(values, labels)
        alpha = 1 / (strength * len(values))  # the same penalty, in this class's terms
        return SGDClassifier(alpha=alpha, average=True, max_iter=MAX_ITERATIONS[kind], random_state=0).fit(values, labels)
