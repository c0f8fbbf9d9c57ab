"""Holds what finished batches report, until it is in the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from pipeline.run import tasks
from pipeline.run.context import Context
from pipeline.run.failures import warn_of_image
from pipeline.run.ledger import Ledger, has_inaccessible
from pipeline.run.plan.changes import Entry
from pipeline.source.health import SourceWatch, is_inaccessible
from pipeline.store.layout import class_name
from pipeline.store.schema import Status
from pipeline.text import count

logger = logging.getLogger(__name__)


class Outcomes:
    """Results of batches that are not committed yet.

    Parameters
    ----------
    context : Context
        Its summary and progress are updated as outcomes are committed.
    ledger, watch
        The ledger gets the outcomes. The watch judges the source by each of them.
    """

    def __init__(self, context: Context, ledger: Ledger, watch: SourceWatch) -> None:
        self.found, self.summary, self.progress = context.found, context.summary, context.progress
        self.ledger, self.watch = ledger, watch
        self._results: list[tasks.BatchResult] = []

    def take(self, result: tasks.BatchResult) -> None:
        """Keep a result for the next commit.

        Raises
        ------
        FeaturemapsError
            When the source, not the images, is at fault; the result is kept all the same.
        """
        for piece in result.pieces:
            if (piece.status == Status.DONE).all():
                self.watch.note_good(len(piece.rows))
                continue
            group = class_name(piece.layout.size)
            for row, is_fault, error in zip(piece.rows, (piece.status == Status.PENDING).tolist(), piece.error, strict=True):
                if is_fault and not error:
                    continue  # not begun, because the run is stopping
                if not (
                    is_inaccessible(error) and Entry(group, row) in self.found.retried
                ):  # it could not be reached before either
                    self.watch.note(error, is_fault=is_fault)
        self._results.append(result)
        self.watch.check()

    def commit(self, *, last: bool = False) -> None:
        """Write what was reported. Results with unreachable images wait until the source is known to be readable, or the run ends.

        Raises
        ------
        OSError
            When the ledger cannot be written; the next run computes these images again.
        """
        is_held = self.watch.is_undecided and not last
        held: list[tasks.BatchResult] = []
        results: list[tasks.BatchResult] = []
        for result in self._results:
            (held if is_held and has_inaccessible(result.pieces) else results).append(result)
        if not results:
            return
        self._results = held
        pieces = [piece for result in results for piece in result.pieces]
        self.ledger.commit(pieces, source_failed=self.watch.failed)
        self.progress.last_commit_s = time.time()
        for result in results:
            self._account(result)

    def _account(self, result: tasks.BatchResult) -> None:
        summary = self.summary
        n_done = 0
        for piece in result.pieces:
            done = piece.status == Status.DONE
            n_done += int(done.sum())
            if done.all():
                continue
            bad = np.flatnonzero(piece.status == Status.QUARANTINED)
            for n_before, i in enumerate(bad, summary.n_rejected + summary.n_quarantined):
                if not (self.watch.failed and is_inaccessible(piece.error[i])):  # the ledger records none of these
                    warn_of_image(piece.paths[i], piece.error[i], n_before)
                    summary.note_bad(piece.paths[i], piece.error[i])
            n_quarantined = len(bad)
            summary.n_quarantined += n_quarantined
            self.progress.n_quarantined += n_quarantined
            self.progress.n_finished += n_quarantined
            pending = np.flatnonzero(piece.status == Status.PENDING)
            summary.n_pending += len(pending)
            summary.faults = (summary.faults + [piece.error[i] for i in pending if piece.error[i]])[:20]
        summary.n_done += n_done
        self.progress.n_finished += n_done
        if n_done:
            summary.hosts[result.host] = summary.hosts.get(result.host, 0) + n_done
        for kernel, n_images in result.kernels.items():
            summary.kernels[kernel] = summary.kernels.get(kernel, 0) + n_images
        summary.pixels += result.pixels
        summary.bytes_read += result.bytes_read
        summary.bytes_written += result.bytes_written
        for stage, seconds in result.stage_s.items():
            summary.stage_s[stage] += seconds


def note_batch(key: str, pieces: Sequence[tasks.WorkPiece], result: tasks.BatchResult) -> None:
    """Fill in the paths, which do not travel with the result of a batch, and log the batch; it is committed about a second later."""
    for outcome, piece in zip(result.pieces, pieces, strict=True):
        outcome.paths = piece.paths
    if not logger.isEnabledFor(logging.INFO):
        return
    n_images = sum(len(piece.rows) for piece in result.pieces)
    n = {status: sum(int((piece.status == status).sum()) for piece in result.pieces) for status in Status}
    found = [f"{n[Status.DONE]} of {count(n_images, 'image')} done"]
    found += [f"{n[Status.QUARANTINED]} quarantined"] if n[Status.QUARANTINED] else []
    found += [f"{n[Status.PENDING]} left to the next run"] if n[Status.PENDING] else []
    found += [f"{stage} {seconds:.2f} s" for stage, seconds in result.stage_s.items()]
    logger.info(
        "batch %s on %s: %s",
        key,
        result.host,
        ", ".join(found),
        extra={
            "batch": key,
            "host": result.host,
            "n_images": n_images,
            "n_done": n[Status.DONE],
            "n_quarantined": n[Status.QUARANTINED],
            "n_pending": n[Status.PENDING],
            "bytes_read": result.bytes_read,
            "bytes_written": result.bytes_written,
            "stage_s": {stage: round(seconds, 4) for stage, seconds in result.stage_s.items()},
        },
    )
