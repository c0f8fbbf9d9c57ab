"""Finds the image that kills its worker: computes suspects alone, one after another, so that no other image is blamed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pipeline.run.in_flight import BatchTask, Flight, ProbeTask, TrialTask
from pipeline.run.new_images import Intake
from pipeline.run.tasks import BatchResult, PieceResult, WorkPiece
from pipeline.source.fetch import Probed
from pipeline.store.schema import Status

GUILTY = (
    "crashed: its worker process died, or ran out of memory, every time that it was computed alone (a crash of the decoder, or too little "
    "memory for it)"
)


class HeaderTrial:
    """The headers of a block whose worker died several times.

    Parameters
    ----------
    block : int
        Its number.
    paths : sequence of str
    """

    def __init__(self, block: int, paths: Sequence[str]) -> None:
        self.block, self.paths = block, paths
        self.probed: list[Probed] = []
        """Results so far, in the order of the paths."""

    @property
    def n_images(self) -> int:
        """Always 0: these images are not in the store yet, and the driver counts them as not probed."""
        return 0

    def next(self) -> str | None:
        """One path, or None when all were tried."""
        return self.paths[len(self.probed)] if len(self.probed) < len(self.paths) else None

    def judge(self, probed: Sequence[Probed] | None) -> None:
        """Note what the last header says, or None if its worker died or ran out of memory."""
        self.probed += probed if probed is not None else [Probed(error=GUILTY)]


class Trial:
    """The images of a batch whose worker died several times.

    Parameters
    ----------
    pieces : sequence of WorkPiece
        The batch.
    n_before : int
        Earlier trials of the same batch that found no guilty image.
    """

    def __init__(self, pieces: Sequence[WorkPiece], n_before: int = 0) -> None:
        self.pieces, self.n_before = pieces, n_before
        self._suspects = [(piece, i) for piece in pieces for i in range(len(piece.rows))]
        self._guilty: list[tuple[WorkPiece, int]] = []
        self._next = 0

    @property
    def n_images(self) -> int:
        """Images of the batch."""
        return len(self._suspects)

    @property
    def n_guilty(self) -> int:
        """Images found guilty so far."""
        return len(self._guilty)

    def next(self) -> WorkPiece | None:
        """The next image as a piece of its own, or None when all were tried."""
        if self._next == len(self._suspects):
            return None
        piece, i = self._suspects[self._next]
        return _only(replace(piece, start=piece.rows[i], stop=piece.rows[i] + 1), [i])

    def judge(self, *, survived: bool) -> None:
        """Note whether the worker survived the image returned last."""
        if not survived:
            self._guilty.append(self._suspects[self._next])
        self._next += 1

    def innocent(self) -> list[WorkPiece]:
        """The batch without its guilty images."""
        kept = ((piece, [i for i in range(len(piece.rows)) if (piece, i) not in self._guilty]) for piece in self.pieces)
        return [_only(piece, indices) for piece, indices in kept if indices]

    def verdicts(self) -> list[PieceResult]:
        """Results that quarantine the guilty images, with the reason."""
        results = []
        for piece, i in self._guilty:
            status = np.array([Status.QUARANTINED], np.uint8)
            rows = (piece.rows[i],)
            paths = (piece.paths[i],)
            results.append(PieceResult(piece.layout, piece.start, piece.stop, rows, status, [""], [""], [GUILTY], paths=paths))
        return results


class CrashFinder:
    """Tries the suspects of each task that killed its worker several times, one after another, while nothing else runs.

    Parameters
    ----------
    flight : Flight
        The tasks in flight; a trial waits until there are none.
    intake : Intake
        Gets the results of headers.
    take_batch : callable
        Gets the results of batches.
    """

    def __init__(self, flight: Flight, intake: Intake, take_batch: Callable[[BatchResult], None]) -> None:
        self._flight, self._intake, self._take_batch = flight, intake, take_batch
        self._trials: deque[Trial | HeaderTrial] = deque()  # only the first one runs

    def __len__(self) -> int:
        """Trials that have not ended."""
        return len(self._trials)

    @property
    def n_images(self) -> int:
        """Images of the batches that are on trial."""
        return sum(trial.n_images for trial in self._trials)

    def suspect(self, task: ProbeTask | BatchTask) -> None:
        """Note a task whose worker died several times, or ran out of memory."""
        if isinstance(task, ProbeTask):
            self._trials.append(HeaderTrial(task.block, task.paths))
        else:
            self._trials.append(Trial(task.pieces, task.n_acquittals))

    def try_next(self) -> None:
        """Send the next suspect once nothing else is in flight; during a drain the suspects stay pending."""
        while self._trials and not len(self._flight):
            suspect = self._trials[0].next()
            if suspect is None:
                self._end(self._trials.popleft())
            else:
                self._flight.send(TrialTask(suspect))

    def judge(self, result: Any, *, survived: bool) -> None:
        """Note whether the suspect's worker survived, and its result."""
        trial = self._trials[0]
        if isinstance(trial, HeaderTrial):
            trial.judge(result if survived else None)
        else:
            trial.judge(survived=survived)

    def _end(self, trial: Trial | HeaderTrial) -> None:
        """Record the guilty images and send the others again."""
        if isinstance(trial, HeaderTrial):
            self._intake.take(trial.block, trial.probed)
            return
        result = BatchResult(trial.verdicts(), "none", {})
        if result.pieces:
            self._take_batch(result)
        if innocent := trial.innocent():
            self._flight.send(BatchTask(innocent, 0 if trial.n_guilty else trial.n_before + 1))


def _only(piece: WorkPiece, indices: Sequence[int]) -> WorkPiece:
    """The piece, reduced to some of its images."""
    return replace(
        piece,
        rows=tuple(piece.rows[i] for i in indices),
        paths=tuple(piece.paths[i] for i in indices),
        fingerprints=tuple(piece.fingerprints[i] for i in indices),
    )
