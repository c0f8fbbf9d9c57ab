"""What the driver writes about images: entries when they are probed, outcomes when their maps are in the store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from pipeline.extract.layers import Array
from pipeline.run.plan.changes import Entry
from pipeline.run.tasks import PieceResult
from pipeline.source.fetch import Probed
from pipeline.source.fingerprints import Listing
from pipeline.source.health import is_inaccessible
from pipeline.store.layout import ClassLayout, Size, class_name
from pipeline.store.schema import REJECTED, STATISTICS, Status, StoredLayer, stack
from pipeline.store.store import Store


def has_inaccessible(pieces: Iterable[PieceResult]) -> bool:
    """Whether an image of these pieces could not be reached."""
    return any(is_inaccessible(error) for piece in pieces for error in piece.error if error)


class Ledger:
    """The ledger of a store, addressed by the images of a listing.

    Parameters
    ----------
    store : Store
    listing : Listing
    """

    def __init__(self, store: Store, listing: Listing) -> None:
        self.store, self.listing = store, listing

    def append(self, size: Size, layout: ClassLayout, items: list[tuple[int, Probed]]) -> list[int]:
        """Append probed images to a class, and create the class if it is new; return their rows.

        Each item is an index in the listing and what the probe found.
        """
        columns = self._listed_columns([i for i, _ in items])
        names = ("source_height", "source_width", "input_height", "input_width")
        sides = np.array([p[:4] for _, p in items], np.int32)
        columns |= zip(names, sides.T, strict=True)
        padded = bool((sides[:, 2:] != size).any())
        if size not in self.store.classes:
            self.store.create_class(layout, "padded" if padded else "exact", columns)
            return list(range(len(items)))
        if padded and self.store.classes[size].kind == "exact":
            self.store.mark_padded(size)
        return list(self.store.append(class_name(size), columns).tolist())

    def _listed_columns(self, images: list[int]) -> dict[str, Array]:
        return {
            "path": stack([self.listing.paths[i] for i in images]),
            "size_bytes": np.array([self.listing.size_bytes[i] for i in images], np.int64),
            "fingerprint": stack(self.listing.fingerprints(images)),
        }

    def append_rejected(self, rejected: Sequence[tuple[int, Probed]]) -> None:
        """Append images that cannot be computed, with their reason."""
        columns = self._listed_columns([i for i, _ in rejected])
        columns["error"] = stack([p.error for _, p in rejected])
        columns["status"] = np.full(len(rejected), Status.QUARANTINED, np.uint8)
        self.store.append(REJECTED, columns)

    def is_rejected(self, entry: Entry, image: int, error: str) -> bool:
        """Whether an entry of ``rejected`` has the image's current fingerprint and this error."""
        known = (self._rejected[name][entry.row] for name in ("fingerprint", "error"))
        return tuple(known) == (self.listing.fingerprint(image), error)

    @cached_property
    def _rejected(self) -> dict[str, Array]:
        """The columns as they were when the run began."""
        return {name: self.store.column(REJECTED, name) for name in ("fingerprint", "error")}

    def rows_with_maps(self, group: str) -> Array:
        """Rows that are done, and removed rows that would be done if their image came back."""
        status = self.store.column(group, "status")
        removed = status == Status.REMOVED
        if removed.any():
            removed &= self.store.column(group, "maps_digest") != ""
        return np.flatnonzero((status == Status.DONE) | removed)

    def supersede(self, entries: Iterable[Entry]) -> None:
        """Mark entries as superseded, because others replace them."""
        old: dict[str, list[int]] = {}
        for entry in entries:
            old.setdefault(entry.group, []).append(entry.row)
        for group, rows in old.items():
            self.store.commit(group, np.array(rows), {"status": np.full(len(rows), Status.SUPERSEDED, np.uint8)})

    def commit(self, pieces: Sequence[PieceResult], *, source_failed: bool) -> None:
        """Write what tasks reported, ``status`` last. If the source failed, write nothing about images out of reach."""
        for size in sorted({piece.layout.size for piece in pieces}):
            self._commit_class(class_name(size), [piece for piece in pieces if piece.layout.size == size], source_failed)

    def _commit_class(self, group: str, pieces: list[PieceResult], source_failed: bool) -> None:
        status = np.concatenate([piece.status for piece in pieces])
        errors = [error for piece in pieces for error in piece.error]
        inaccessible = np.array([is_inaccessible(error) for error in errors])
        keep = (status != Status.PENDING) & ~(inaccessible & source_failed)
        if not keep.any():
            return
        rows = np.concatenate([piece.rows for piece in pieces])
        columns: dict[str, Array] = {
            "digest": stack([digest for piece in pieces for digest in piece.digest]),
            "maps_digest": stack([digest for piece in pieces for digest in piece.maps_digest]),
            "error": stack(errors),  # also where there is none: an earlier try may have left one
        }
        for layer in self.store.spec.layers:
            pooled = np.concatenate([_pooled(piece, layer) for piece in pieces])
            columns |= {f"{layer.name}_{name}": pooled[:, i] for i, name in enumerate(STATISTICS)}
        columns["status"] = status
        self.store.commit(group, rows[keep], {name: values[keep] for name, values in columns.items()})


def _pooled(piece: PieceResult, layer: StoredLayer) -> Array:
    """Pooled values of a piece's rows (n, statistic, channel); NaN where nothing was computed."""
    if layer.name in piece.pooled:
        return piece.pooled[layer.name]
    return np.full((len(piece.rows), len(STATISTICS), layer.channels), np.nan, np.float32)
