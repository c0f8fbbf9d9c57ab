"""A store: its classes and rows, and every change that the driver makes to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.errors import FeaturemapsError
from pipeline.extract.layers import Array
from pipeline.store.classes import create_class, mark_padded
from pipeline.store.columns import Ledger, read_array
from pipeline.store.layout import ClassLayout, Size
from pipeline.store.maps import StoredArray, open_array, read_maps, write_maps
from pipeline.store.objects import Place, children, put_json
from pipeline.store.opening import count_rejected, is_store, read_classes, read_spec
from pipeline.store.receipts import read_receipts, receipt_ids, write_receipt
from pipeline.store.repair import repair
from pipeline.store.schema import EXTRACTOR, REJECTED, Columns, ShapeClass, StoreSpec, root_document, widened

__all__ = ["Store", "is_store", "open_array", "read_maps", "receipt_ids", "write_maps"]


class Store:
    """An open store. Only the driver writes through it; everybody may read.

    Parameters
    ----------
    path : Path or Url
        An existing store; see `create_store`.
    durable : bool
        Whether each write is on the disk before a later one relies on it; see `Job.durability`.

    Raises
    ------
    UsageError
        When there is no store, or it has another format.
    """

    def __init__(self, path: Place, *, durable: bool = False) -> None:
        self.path = path
        self.spec = read_spec(path)
        self._ledger = Ledger(path, self.spec.layers, durable=durable)
        self.classes: dict[Size, ShapeClass] = {}
        self.reload()

    def reload(self) -> None:
        """Read the classes again."""
        self.classes = read_classes(self.path, self.spec)
        self.n_rejected = count_rejected(self.path)

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def length(self, group: str) -> int:
        """Rows of a class's group, or of ``rejected``."""
        return self.n_rejected if group == REJECTED else self.classes[_size(group)].length

    def column(self, group: str, name: str) -> Array:
        """One column of the ledger, whole: (image,) or, for pooled values, (image, channel)."""
        return self._ledger.read(group, name, self.length(group))

    def cell(self, group: str, name: str, row: int) -> Any:
        """The current value of one cell; reads one chunk."""
        return self._ledger.cell(group, name, row)

    def array(self, group: str, name: str) -> StoredArray:
        """Any array of a group, as stored; it may be longer than `length` after a crash."""
        return open_array(self.path / group / name)

    def weights(self) -> dict[str, Array]:
        """The weights as used: cross-correlation orientation, float32.

        Raises
        ------
        FeaturemapsError
            When they are damaged.
        """
        try:
            names = [name for name in children(self.path / EXTRACTOR) if name != "zarr.json"]
            return {name: read_array(self.path / EXTRACTOR / name, "float32") for name in names}
        except (FeaturemapsError, OSError, KeyError, TypeError, ValueError) as error:
            raise FeaturemapsError(
                f"the weights in {self.path} cannot be read ({error}): an object under extractor/ is damaged or out of reach; restore it "
                "from a copy, or create a new store"
            ) from error

    def receipts(self, n: int | None = None) -> list[dict[str, Any]]:
        """The receipts of the last ``n`` runs, or of all, newest first; skips receipts that a power cut left empty."""
        return read_receipts(self.path, n)

    def last_receipt(self) -> dict[str, Any] | None:
        """The newest run's receipt; None if there is none that can be read."""
        return next(iter(self.receipts(1)), None)

    def run_ids(self) -> list[str]:
        """Names of the runs that left a receipt, oldest first; the order does not depend on clocks."""
        return receipt_ids(self.path)

    # -- writing, by the driver --------------------------------------------------------------------------------------------------

    @property
    def durable(self) -> bool:
        """Whether each write is on the disk before a later one relies on it."""
        return self._ledger.durable

    @durable.setter
    def durable(self, durable: bool) -> None:
        self._ledger.durable = durable

    @property
    def fence(self) -> Callable[[], None]:
        """Called before columns or lengths of a group are written; raises if this process may no longer write."""
        return self._ledger.fence

    @fence.setter
    def fence(self, fence: Callable[[], None]) -> None:
        self._ledger.fence = fence

    def create_class(self, layout: ClassLayout, kind: str, columns: Columns) -> None:
        """Create a class with its first rows, all pending; it exists as soon as its group's metadata does.

        Raises
        ------
        FeaturemapsError
            When the class exists: its rows would be lost.
        """
        self.classes[layout.size] = create_class(self._ledger, self.spec, layout, kind, columns)

    def append(self, group: str, columns: Columns) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Append rows to a class or to ``rejected``. ``status`` grows last: after a crash before that, the rows are not visible.

        Every append to a group must have the same columns: leftovers of a crash behind the end are overwritten, not cleared.

        Returns
        -------
        (n,) int64
            The new rows.
        """
        old = self.length(group)
        new = old + len(columns["path"])
        rows = np.arange(old, new)
        self._ledger.write(group, rows, columns)
        self._ledger.resize(group, new)
        if group == REJECTED:
            self.n_rejected = new
        else:
            size = _size(group)
            self.classes[size] = replace(self.classes[size], length=new)
        return rows

    def mark_padded(self, size: Size) -> None:
        """Record that a class now holds images smaller than itself."""
        self.classes[size] = mark_padded(self.path, self.classes[size], durable=self.durable)

    def commit(self, group: str, rows: Array, columns: Columns) -> None:
        """Write columns of some rows, ``status`` last; the maps of the rows must be in the store already.

        ``maps_digest`` is written second to last: it tells that a removed row whose image returns is done.
        """
        self._ledger.write(group, rows, columns)

    def repair(self) -> None:
        """Undo what a crash left: arrays longer than ``status``, unfinished classes, temporary files; requires the lock."""
        groups = [*(c.name for c in self.classes.values()), REJECTED]
        repair(self._ledger, {group: self.length(group) for group in groups})

    def write_receipt(self, run_id: str, receipt: Mapping[str, Any]) -> None:
        """Write a run's receipt to ``runs/``."""
        write_receipt(self.path, run_id, receipt, durable=self.durable)

    def take_up(self, spec: StoreSpec) -> None:
        """Record the writing version, and limits wider than those of earlier runs, before anything depends on them."""
        spec = replace(widened(self.spec, spec), written_version=spec.written_version)
        if spec != self.spec:
            self.spec = spec
            put_json(self.path / "zarr.json", root_document(spec), durable=self.durable)


def _size(group: str) -> Size:
    height, width = group.split("x")
    return int(height), int(width)
