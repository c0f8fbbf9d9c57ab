"""The images that an analysis is about: all of a store, or a selection of them, with the columns that were joined."""

from __future__ import annotations

import copy
import difflib
import os
import reprlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from pipeline.analysis import selection
from pipeline.analysis.datasets import class_dataset, image_dataset
from pipeline.analysis.tables import Table, done, images_table, nullable, plain
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.store.contents import count_statuses
from pipeline.store.path_index import PathIndex, similar_names, stored_forms
from pipeline.store.schema import REJECTED, ShapeClass, Status, StoredLayer
from pipeline.store.store import Store


class Images:
    """Images of a store, found by path without a table of all, which is made when it is asked for.

    Parameters
    ----------
    store : Store
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.is_selection = False
        self.joined: dict[str, int] = {}
        self._index = PathIndex(store)
        self._table: Table | None = None
        self._n_lines: int | None = None  # of the whole store's table, where this is derived from it

    @property
    def table(self) -> Table:
        """The table of `tables.images_table`, joined and selected; do not change it."""
        if self._table is None:
            self._table = images_table(self.store)
        return self._table

    @property
    def done(self) -> Table:
        """The lines of the images that are done."""
        return done(self.table)

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of images per status."""
        names = [status.name.lower() for status in Status if status.is_live]
        if self._table is not None:
            found = self._table["status"].value_counts()
            return {name: int(found.get(name, 0)) for name in (*names, "rejected")}
        counts = count_statuses(self.store)
        return {name: counts[name] for name in (*names, "rejected")}

    def join(self, table: Table, on: str) -> Images:
        """See `FeatureStore.join`."""
        images, n_matched = selection.join(self.table, table, on, self.store.spec.layers, str(self.store.path))
        new = {str(name): n_matched for name in images.columns if name not in self.table.columns}
        return self._derive(images, self.joined | new, is_selection=self.is_selection)

    def select(self, where: Any, columns: dict[str, Any]) -> Images:
        """See `FeatureStore.select`."""
        images = selection.select(self.table, where, columns, str(self.store.path), self._n_lines or len(self.table))
        return self._derive(images, self.joined, is_selection=True)

    def _derive(self, table: Table, joined: dict[str, int], *, is_selection: bool) -> Images:
        derived = copy.copy(self)
        for name in ("counts", "_lines"):
            derived.__dict__.pop(name, None)
        derived._table, derived.joined, derived.is_selection = table, joined, is_selection
        derived._n_lines = self._n_lines or len(self.table)
        return derived

    @cached_property
    def _lines(self) -> pd.Series:
        """Line of the table that an image of a selection or join has, by path: the one that is done, where it has two."""
        ranked = self.table[["path"]].assign(is_done=self.table["status"] == "done")
        ranked = ranked.sort_values("is_done", kind="stable").drop_duplicates("path", keep="last")
        return pd.Series(ranked.index, pd.Index(ranked["path"]))

    def joined_values(self, name: str) -> dict[str, Any]:
        """What was joined of one image."""
        if not self.joined:
            return {}
        line = self._lines[name]  # cell by cell: a line as a whole would have one type, and integers become floats
        values = {column: self.table.at[line, column] for column in self.joined}
        return {column: np.nan if value is pd.NA else value for column, value in values.items()}

    def find(self, path: str | os.PathLike[str]) -> tuple[str, str, int]:
        """Name in the store, group and row of an image.

        Raises
        ------
        UsageError
            When it is none, none any more, or not of this selection.
        """
        where, path = self.store.path, self._text(path)
        for name in stored_forms(path):
            found = self._index.find(name)
            if found is None:
                continue
            if not self._index.status(found).is_live:
                raise UsageError(
                    f"{path!r} is not an image of {where} any more: it has left the source, or has been replaced or removed since "
                    "the store was opened; if a run was at work meanwhile, open the store again"
                )
            if self.is_selection and name not in self._lines:
                raise UsageError(
                    f"{path!r} is an image of {where}, but none of the {len(self.table):,} of this selection: ask the whole store, "
                    "or select it, too"
                )
            return name, *found
        near = similar_names(path, self.table["path"].tolist() if self.is_selection else self._index.names())
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        root = self.store.spec.source_root
        raise UsageError(f"{path!r} is not an image of {where}: paths are relative to {root}, as in `.images`{hint}")

    def _text(self, path: Any) -> str:
        if isinstance(path, str | os.PathLike):
            return os.fspath(path)
        raise UsageError(
            f"{reprlib.repr(path)} is no path of an image of {self.store.path}: give a path as text, as in `.images`; for the line with "
            "number 3, that is store.images.path[3]"
        )

    def find_done(self, path: str | os.PathLike[str]) -> tuple[str, str, int]:
        """`find` of an image that is done.

        Raises
        ------
        UsageError
            When it is not, with the reason.
        """
        name, group, row = self.find(path)
        status = self.status(group, row)
        if status != "done":
            reason = self.store.cell(group, "error", row) or "no run has reached it yet: run again"
            raise UsageError(f"{path!r} has no maps in {self.store.path}: it is {status} ({reason})")
        return name, group, row

    def status(self, group: str, row: int) -> str:
        """What the ledger says of a live row now, as in the table."""
        return "rejected" if group == REJECTED else self._index.status((group, row)).name.lower()

    def describe(self) -> str:
        """Where the store is, how far, and what is kept; several lines."""
        spec = self.store.spec
        progress = ", ".join(f"{n:,} {status}" for status, n in self.counts.items() if n) or "none yet"
        layers = ", ".join(f"{la.name} ({la.channels} channels{'' if la.has_maps else ', pooled only'})" for la in spec.layers)
        joined = "".join(f"\n  joined: {name} ({n:,} images have a line)" for name, n in self.joined.items())
        return (
            f"{self.store.path}{', a selection' if self.is_selection else ''}\n"
            f"  {sum(self.counts.values()):,} images in {len(self.store.classes)} shape classes: {progress}\n"
            f"  {spec.dtype}, layers {layers}{joined}"
        )

    # -- their maps ----------------------------------------------------------------------------------------------------------------

    def dataset(self, name: str, layers: Sequence[StoredLayer]) -> xr.Dataset:
        """See `FeatureStore.dataset`."""
        dataset = class_dataset(self.store, self._class(name), layers)
        if not (self.is_selection or self.joined):
            return dataset
        images = self.table[self.table["class"] == name]
        if self.is_selection:
            dataset = dataset.isel(image=images["row"].to_numpy())
        else:  # rows that stand for no image any more stay, as NaN
            images = nullable(images.set_index("row")[list(self.joined)]).reindex(np.arange(dataset.sizes["image"]))
        return dataset.assign_coords({column: ("image", plain(images[column])) for column in self.joined})

    def image(self, path: str, layers: Sequence[StoredLayer]) -> xr.Dataset:
        """See `FeatureStore.image`."""
        name, group, row = self.find_done(path)
        height, width = (int(self.store.cell(group, f"input_{side}", row)) for side in ("height", "width"))
        try:
            dataset = image_dataset(self.store, self._class(group), row, (height, width), layers)
        except (OSError, ValueError, RuntimeError) as error:
            raise FeaturemapsError(
                f"maps of {path!r} in {self.store.path} cannot be read ({error}): an object of class {group} is damaged or out of "
                "reach; check the disk, or restore it from a copy"
            ) from error
        return dataset.assign_coords(path=name, **self.joined_values(name))

    def _class(self, name: str) -> ShapeClass:
        classes = {shape_class.name: shape_class for shape_class in self.store.classes.values()}
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=3, cutoff=0.5)
            known = ", ".join([*classes][:10]) or "none yet"
            rest = f" and {len(classes) - 10} more, see `.classes`" if len(classes) > 10 else ""
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise UsageError(f"{self.store.path} has no shape class {name!r}; it has {known}{rest}{hint}")
        return classes[name]
