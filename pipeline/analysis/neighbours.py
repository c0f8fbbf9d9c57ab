"""Which images of an analysis have pooled values that are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.analysis import distances as similarity
from pipeline.analysis import selection, tables
from pipeline.analysis.images import Images
from pipeline.analysis.tables import Table
from pipeline.errors import UsageError
from pipeline.extract.layers import Array


class Neighbours:
    """Standardised pooled values of the images that are done; those of the last call are kept.

    Parameters
    ----------
    images : Images
    """

    def __init__(self, images: Images) -> None:
        self._images = images
        self._vectors: tuple[Any, pd.Index, Array] | None = None

    def nearest(self, path: str, n: int, layer: str | Sequence[str] | None, statistics: str | Sequence[str]) -> Table:
        """See `FeatureStore.nearest`."""
        selection.require_number(n, "neighbours")
        name = self._images.find_done(path)[0]
        paths, vectors = self._standardised(layer, statistics)
        found = np.flatnonzero(paths == name)
        if not len(found) or not np.isfinite(vectors[found[0]]).all():
            raise UsageError(
                f"{path!r} has no finite pooled values in {self._images.store.path} as it was when it was first read: open the store "
                "again; if that does not help, have `featuremaps verify` look at it"
            )
        rows, distances = similarity.nearest(vectors, int(found[0]), n)
        return pd.DataFrame({"path": paths[rows], "distance": distances})

    def most_alike(self, n: int, layer: str | Sequence[str] | None, statistics: str | Sequence[str]) -> Table:
        """See `FeatureStore.most_alike`."""
        selection.require_number(n, "pairs")
        paths, vectors = self._standardised(layer, statistics)
        pairs = similarity.closest_pairs(vectors, n)
        rows = np.array([pair[:2] for pair in pairs], int).reshape(-1, 2)
        distances = np.array([distance for _, _, distance in pairs], float)
        return pd.DataFrame({"path": paths[rows[:, 0]], "other": paths[rows[:, 1]], "distance": distances})

    def _standardised(self, layer: str | Sequence[str] | None, statistics: str | Sequence[str]) -> tuple[pd.Index, Array]:
        """Paths and vectors."""
        images, store = self._images, self._images.store
        layers = selection.choose_layers(store.spec, layer, str(store.path))
        key = [la.name for la in layers], selection.choose_statistics(statistics)
        if self._vectors is None or self._vectors[0] != key:
            table = tables.pooled(store, images.done, layers, key[1])
            self._vectors = key, table.index, similarity.standardise(table.to_numpy())
        return self._vectors[1], self._vectors[2]
