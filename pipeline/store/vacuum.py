"""Frees the space of dead rows, whose image has left the source or was replaced. Rows keep their numbers."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.errors import FeaturemapsError
from pipeline.extract.layers import Array
from pipeline.store.layout import ClassLayout, LayerLayout, group_by_shard
from pipeline.store.lock import StoreLock, require_lock
from pipeline.store.named import named_store
from pipeline.store.objects import Place, delete, size_bytes
from pipeline.store.run_ids import new_run_id
from pipeline.store.schema import RUNS, STATISTICS, ShapeClass, Status, StoredLayer, encode_rows, object_keys, stack
from pipeline.store.store import Store, read_maps, write_maps
from pipeline.text import count, human_size


@dataclass(slots=True)
class Vacuumed:
    """What was freed, or would be freed."""

    store: str
    is_dry_run: bool
    n_dead: int = 0
    """Removed and superseded rows."""
    n_deleted: int = 0
    """Objects without any needed row."""
    n_rewritten: int = 0
    """Objects with some needed rows."""
    n_damaged: int = 0
    """Shards left unchanged, because maps that are needed cannot be read."""
    freed_bytes: int = 0

    def describe(self) -> str:
        """For a person."""
        would = "would be " if self.is_dry_run else ""
        lines = [
            (
                f"{self.store}: {human_size(self.freed_bytes)} {would}freed of "
                f"{count(self.n_dead, 'row that is', 'rows that are')} removed or superseded: "
                f"{count(self.n_deleted, 'object')} {would}deleted, {self.n_rewritten} {would}rewritten"
            )
        ]
        if self.n_damaged:
            lines.append(
                f"{self.n_damaged} shards hold damaged maps that are needed and were left as they are: featuremaps verify "
                f"{self.store} --repair has these computed again, then run vacuum again"
            )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def vacuum_store(store: str | Place, *, dry_run: bool = False, sole_writer: bool = False) -> Vacuumed:
    """Delete or overwrite the maps of dead rows.

    The ledger goes first: it drops ``maps_digest`` of removed rows, so an image that comes back is computed again. Then the maps go.
    After a kill at any moment the store is sound, and the same command continues.

    Parameters
    ----------
    store : str, Path or Url
        A folder, or a bucket's address.
    dry_run : bool
        Only report what would be freed; nothing is locked or changed.
    sole_writer : bool
        Vouch that nobody else writes to a store in a bucket; see `StoreLock`.

    Raises
    ------
    UsageError
        When there is no store of this format.
    StoreBusyError
        When a run works on it.
    """
    path = named_store(store)
    opened, run_id = Store(path, durable=True), new_run_id()
    result = Vacuumed(str(path), dry_run)
    with contextlib.nullcontext() if dry_run else StoreLock(path / RUNS, run_id, sole_writer=sole_writer):
        if not dry_run:
            opened.reload()  # it may have changed before the lock was taken
            opened.fence = partial(require_lock, path / RUNS, run_id)
            opened.repair()
        for shape_class in opened.classes.values():
            status = opened.column(shape_class.name, "status")
            dead = np.flatnonzero((status == Status.REMOVED) | (status == Status.SUPERSEDED))
            result.n_dead += len(dead)
            if not dry_run:
                _clear_claims(opened, shape_class.name, dead)
            for shard, _ in group_by_shard(dead.tolist(), shape_class.layout.shard_rows):
                _free_shard(opened, run_id, shape_class, shard, status, result)
    return result


def _clear_claims(store: Store, group: str, dead: Array) -> None:
    """Clear what the ledger claims about the maps of dead rows, first the claim that would revive them."""
    revivable = dead[store.column(group, "maps_digest")[dead] != ""]
    store.commit(group, revivable, {"maps_digest": stack([""] * len(revivable))})
    pooled = [f"{layer.name}_{statistic}" for layer in store.spec.layers for statistic in STATISTICS]
    for name in pooled:
        values = store.column(group, name)
        left = dead[~np.isnan(values[dead]).all(1)]
        store.commit(group, left, {name: np.full((len(left), values.shape[1]), np.nan, np.float32)})


def _free_shard(store: Store, run_id: str, shape_class: ShapeClass, shard: int, status: Array, result: Vacuumed) -> None:
    """Keep the done rows of one shard. A run computes pending rows; other rows have no maps."""
    layout = shape_class.layout
    start = shard * layout.shard_rows
    needed = status[start : start + layout.shard_rows] == Status.DONE
    for layer, stored in zip(layout.layers, store.spec.map_layers, strict=True):
        folder = store.path / shape_class.name / layer.name
        paths = [folder / key for key in object_keys(layout, layer, start)]
        before = sum(map(size_bytes, paths))
        if not before:
            continue
        if not needed.any():
            result.n_deleted += sum(size_bytes(path) > 0 for path in paths)
            if not result.is_dry_run:
                store.fence()
                for path in paths:
                    delete(path)
            result.freed_bytes += before
            continue
        try:
            block = _only_needed(store.path, layout, layer, start, needed, stored)
        except FeaturemapsError:
            result.n_damaged += 1
            continue
        if block is None:
            continue
        if result.is_dry_run:
            after = sum(len(part) for _, parts in encode_rows(layout, layer, start, block, stored.fill_value) for part in parts)
        else:
            after = write_maps(store.path, run_id, layout, layer, start, block, stored.fill_value, durable=True)
        result.n_rewritten += len(paths)
        result.freed_bytes += before - after


def _only_needed(
    path: Place, layout: ClassLayout, layer: LayerLayout, start: int, needed: Array, stored: StoredLayer
) -> Array | None:
    """The rows of a shard, with fill in place of unneeded ones; None if this is already stored."""
    try:
        block = read_maps(path, layout, layer.name, start, start + len(needed))
    except FeaturemapsError:  # some chunk is damaged, maybe of rows that nobody needs
        block = np.full((len(needed), layer.channels, layer.height, layer.width), stored.fill_value, stored.dtype)
        for row in np.flatnonzero(needed).tolist():
            block[row] = read_maps(path, layout, layer.name, start + row, start + row + 1)[0]
        return block
    others = np.flatnonzero(~needed).tolist()
    if all(np.array_equal(block[row], np.full_like(block[row], stored.fill_value), equal_nan=True) for row in others):
        return None
    block[~needed] = stored.fill_value
    return block
