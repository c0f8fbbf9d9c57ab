"""New images on their way into the store: probed in blocks, appended in the order of the listing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.run.context import Context
from pipeline.run.failures import warn_of_image
from pipeline.run.ledger import Ledger
from pipeline.source import fetch
from pipeline.source.health import SourceWatch
from pipeline.store.layout import ClassLayout, Size, assign_classes
from pipeline.store.lock import require_lock
from pipeline.store.schema import REJECTED, RUNS
from pipeline.store.settings import extractor_spec, layout_of

PROBE_BLOCK = 512
FIRST_APPEND = 2048
APPEND_GROWTH = 4
MAX_APPEND = 65_536

Item = tuple[int, fetch.Probed]
"""An image of the listing and the result of its probe."""
Appended = dict[Size, list[tuple[int, int]]]
"""Per class: (row, image of the listing)."""
CheckCapacity = Callable[[Mapping[Size, ClassLayout], Mapping[Size, int], int], None]


class Intake:
    """The images of ``found.new`` until they have rows.

    Parameters
    ----------
    context : Context
        Its summary and progress are updated as images are rejected or cannot be reached.
    ledger, watch
        The ledger gets the images. The watch judges the source by the result of each probe.
    """

    def __init__(self, context: Context, ledger: Ledger, watch: SourceWatch) -> None:
        self.listing, self.found, self.channels = context.listing, context.found, context.job.decode.channels
        self.store, self.summary, self.progress = context.store, context.summary, context.progress
        self.ledger, self.watch = ledger, watch
        self.summary.n_changed = len(self.found.replaces)
        self.summary.n_retried = len(self.found.retried & set(self.found.replaces.values()))
        self.spec = extractor_spec(self.store.spec)
        self._next_probe = self._next_append = 0  # blocks
        self._n_appended = 0
        self._probed: dict[int, Sequence[fetch.Probed]] = {}
        self._buffer: list[Item] = []  # in the order of the listing, not appended yet

    @property
    def n_blocks(self) -> int:
        """Blocks of images to probe."""
        return -(-len(self.found.new) // PROBE_BLOCK)

    @property
    def is_complete(self) -> bool:
        """Whether all images were probed."""
        return self._next_append == self.n_blocks

    @property
    def n_left(self) -> int:
        """Images that are not in the store."""
        return len(self.found.new) - min(self._next_append * PROBE_BLOCK, len(self.found.new)) + len(self._buffer)

    def next_block(self) -> int | None:
        """The next block to probe; None when all were sent."""
        if self._next_probe == self.n_blocks:
            return None
        self._next_probe += 1
        return self._next_probe - 1

    def paths(self, block: int) -> list[str]:
        """The images of a block."""
        return [self.listing.paths[i] for i in self._images(block)]

    def _images(self, block: int) -> list[int]:
        return self.found.new[block * PROBE_BLOCK : (block + 1) * PROBE_BLOCK]

    def take(self, block: int, probed: Sequence[fetch.Probed]) -> None:
        """Keep the headers of a block until all earlier blocks are here."""
        self._probed[block] = probed

    def is_due(self) -> bool:
        """Whether to append now. The amount grows, because each append rewrites the metadata of the classes that it touches."""
        while self._next_append in self._probed:
            self._buffer += zip(self._images(self._next_append), self._probed.pop(self._next_append), strict=True)
            self._next_append += 1
        enough = min(max(APPEND_GROWTH * self._n_appended, FIRST_APPEND), MAX_APPEND)
        return bool(self._buffer) and (self.is_complete or len(self._buffer) >= enough)

    def append(self, check_capacity: CheckCapacity) -> Appended:
        """Append what is due; new classes are created first.

        Parameters
        ----------
        check_capacity : callable
            Called before anything is written: with the layout of each class, the number of its new images, and the most memory
            that decoding one of them takes.

        Raises
        ------
        FeaturemapsError
            When the source failed, memory or disk are too small, or another run holds the store; nothing was appended.
        """
        due, self._buffer = self._buffer, []
        probed = [self._doubt(i, p) for i, p in due if not (p.error and self._is_known(i, p))]
        self._look_for_faults(probed)
        good = [(i, p) for i, p in probed if not p.error and not p.fault]
        groups: dict[Size, list[Item]] = {}
        sizes = assign_classes(((p.input_height, p.input_width) for _, p in good), self.store.classes)
        for size, item in zip(sizes, good, strict=True):
            groups.setdefault(size, []).append(item)
        layouts = {size: self._layout(size) for size in groups}
        decode_bytes = max((p.decode_bytes for _, p in good), default=0)
        check_capacity(layouts, {size: len(items) for size, items in groups.items()}, decode_bytes)
        require_lock(self.store.path / RUNS, self.summary.run_id)
        self.summary.note_dropped(code for _, p in good for code in p.dropped)
        appended: Appended = {}
        for size, items in groups.items():
            rows = self.ledger.append(size, layouts[size], items)
            appended[size] = list(zip(rows, (i for i, _ in items), strict=True))
        self._reject([(i, p) for i, p in probed if p.error])
        replaces = self.found.replaces
        self.ledger.supersede(replaces[i] for i, p in probed if i in replaces and not p.fault)
        self._n_appended += len(good)
        return appended

    def _look_for_faults(self, probed: Sequence[Item]) -> None:
        """Leave images that cannot be read now to the next run; raise if the source, not the images, is at fault."""
        faults = [p.fault for _, p in probed if p.fault]
        if faults or any(p.error for _, p in probed):
            for _, p in probed:
                self.watch.note(p.error, is_fault=bool(p.fault))
        else:
            self.watch.note_good(len(probed))
        self.watch.check()
        self.summary.faults = (self.summary.faults + faults)[:20]
        self.summary.n_pending += len(faults)

    def _reject(self, rejected: Sequence[Item]) -> None:
        """Record images that cannot be computed, with their reason."""
        if not rejected:
            return
        self.ledger.append_rejected(rejected)
        for n_before, (i, p) in enumerate(rejected, self.summary.n_rejected + self.summary.n_quarantined):
            warn_of_image(self.listing.paths[i], p.error, n_before)
            self.summary.note_bad(self.listing.paths[i], p.error)
        self.summary.n_rejected += len(rejected)
        self.progress.n_quarantined += len(rejected)
        self.progress.n_finished += len(rejected)

    def _doubt(self, i: int, found: fetch.Probed) -> Item:
        """Leave an image to the next run if it was unreachable when listed but can be read now: it has no fingerprint."""
        if self.listing.is_unreadable(i) and not found.error and not found.fault:
            found = fetch.Probed(fault=f"{self.listing.paths[i]}: could not be accessed when the source was listed")
        return i, found

    def _is_known(self, i: int, found: fetch.Probed) -> bool:
        """Whether a rejected image that was tried again is rejected for the reason on record; then the entry stands."""
        entry = self.found.replaces.get(i)
        known = entry is not None and entry.group == REJECTED and self.ledger.is_rejected(entry, i, found.error)
        self.summary.n_unchanged += known
        self.progress.n_finished += known
        return known

    def _layout(self, size: Size) -> ClassLayout:
        if size in self.store.classes:
            return self.store.classes[size].layout
        return layout_of(size, self.spec, np.dtype(self.store.spec.dtype).itemsize, self.channels)
