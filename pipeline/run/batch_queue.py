"""Rows of the store that wait for their maps, and the batches of them that may be sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.run.context import Context
from pipeline.run.ledger import Ledger
from pipeline.run.new_images import Appended
from pipeline.run.plan.memory import bucket_bytes, guess_decode_bytes, require_memory, require_space
from pipeline.run.tasks import WorkPiece
from pipeline.run.workers import Fleet
from pipeline.store.layout import Batch, ClassLayout, Piece, Size, class_name, cut_pieces, pack_batches
from pipeline.store.settings import cost_s, extractor_spec, scratch_of

Rows = np.ndarray[Any, np.dtype[np.int64]]


class BatchQueue:
    """Cuts rows into batches; rows that were in the store when the run began come first.

    Parameters
    ----------
    context : Context
    ledger : Ledger
    fleet : Fleet
        The workers that compute them.
    has_kernel : bool
        Whether all workers have the compiled code.

    Raises
    ------
    FeaturemapsError
        When the rows that are already in the store do not fit memory or disk.
    """

    def __init__(self, context: Context, ledger: Ledger, fleet: Fleet, *, has_kernel: bool = True) -> None:
        self.job, self.store, self.listing, self.ledger, self.fleet = context.job, context.store, context.listing, ledger, fleet
        self.spec, self.channels = extractor_spec(self.store.spec), self.job.decode.channels
        self.has_kernel = has_kernel
        self._ready: deque[Batch] = deque()
        self._image_of: dict[Size, dict[int, int]] = {}  # row that was not sent yet -> image of the listing
        self._waiting: dict[Size, list[int]] = {}  # rows that are in no batch yet
        self._kept: dict[Size, Rows] = {}  # rows of earlier runs whose maps must be kept
        self._decode_bytes = 0  # the most memory that decoding one image takes
        for size, shape_class in self.store.classes.items():
            rows = context.found.pending.get(shape_class.name, [])
            self._image_of[size] = dict(rows)
            if rows:
                self._kept[size] = ledger.rows_with_maps(shape_class.name)
                decode_bytes = guess_decode_bytes(size, max(self.listing.size_bytes[i] for _, i in rows))
                self._decode_bytes = max(self._decode_bytes, decode_bytes)
            self._waiting[size] = [row for row, _ in rows]
        self.check_capacity({}, {}, 0)

    def __len__(self) -> int:
        """Batches that may be sent."""
        return len(self._ready)

    @property
    def n_images(self) -> int:
        """Images that have a row but were not sent yet."""
        return sum(map(len, self._image_of.values()))

    def check_capacity(self, new: Mapping[Size, ClassLayout], n_new: Mapping[Size, int], decode_bytes: int) -> None:
        """Refuse what does not fit memory or disk; the error names the size that would fit.

        Parameters
        ----------
        new, n_new
            Layouts of the classes that get new images, and the number of these images.
        decode_bytes : int
            The most memory that decoding one of them takes.
        """
        self._decode_bytes = max(self._decode_bytes, decode_bytes)
        layouts = {size: self.store.classes[size].layout for size, rows in self._image_of.items() if rows} | dict(new)
        n_rows = {size: n_new.get(size, 0) + len(self._image_of.get(size, {})) for size in layouts}
        settings = self.spec, self.job.dtype
        scratch = {size: scratch_of(*settings, size, self.channels, has_kernel=self.has_kernel) for size in layouts}
        kind = self.fleet.kind._replace(bucket_bytes=bucket_bytes(self.listing.root, self.store.path))
        require_memory(layouts, self.channels, kind, self.fleet.memory_limit_bytes, self._decode_bytes, scratch)
        require_space(self.store.path, sum(n * layouts[size].row_bytes for size, n in n_rows.items()), sum(n_rows.values()))

    def add(self, appended: Appended) -> None:
        """Queue rows of new images."""
        for size, rows in appended.items():
            if size not in self._kept and rows[0][0]:  # an older class: its last shard may be half full
                self._kept[size] = self.ledger.rows_with_maps(class_name(size))
            self._image_of.setdefault(size, {}).update(rows)
            self._waiting.setdefault(size, []).extend(row for row, _ in rows)

    def plan(self, *, complete: bool) -> None:
        """Cut waiting rows into batches; the last shard of a class waits while the class may grow."""
        pieces = []
        for size, rows in self._waiting.items():
            shape_class = self.store.classes[size]
            image_s = cost_s(self.spec, shape_class.layout, self.channels)
            cut, self._waiting[size] = cut_pieces(
                shape_class.layout, rows, shape_class.length, image_s, self.channels, complete=complete
            )
            pieces += cut
        self._ready.extend(pack_batches(pieces, max(1, self.fleet.slots), is_whole=self.fleet.is_whole, complete=complete))

    @property
    def next_bytes(self) -> int:
        """The most bytes that the next batch writes, before compression."""
        pieces = self._ready[0].pieces
        return sum((piece.stop - piece.start) * self.store.classes[piece.size].layout.row_bytes for piece in pieces)

    def take(self) -> list[WorkPiece]:
        """Take the next batch, as it is sent."""
        return [self._work_piece(piece) for piece in self._ready.popleft().pieces]

    def _work_piece(self, piece: Piece) -> WorkPiece:
        """Add the paths of the images, and the rows of earlier runs in the same range, whose maps must be kept."""
        images = [self._image_of[piece.size].pop(row) for row in piece.rows]
        kept = self._kept.get(piece.size, np.empty(0, np.int64))
        return WorkPiece(
            self.store.classes[piece.size].layout,
            piece.start,
            piece.stop,
            piece.rows,
            tuple(self.listing.paths[i] for i in images),
            tuple(self.listing.fingerprints(images)),
            tuple(kept[slice(*np.searchsorted(kept, (piece.start, piece.stop)))].tolist()),
        )
