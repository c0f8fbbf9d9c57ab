"""Error messages for a failed run: what happened, what stands, what to do."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from concurrent.futures import CancelledError

from distributed import KilledWorker
from distributed.client import ClosedClientError
from distributed.comm import CommClosedError

from pipeline.errors import FeaturemapsError
from pipeline.run.tasks import WorkPiece
from pipeline.store.objects import Place
from pipeline.text import count

logger = logging.getLogger(__name__)

MAX_WARNINGS = 20
"""Bad images of a run that get a warning each."""


def scheduler_lost(error: BaseException | None) -> FeaturemapsError:
    """The error for a lost scheduler or connection."""
    failure = FeaturemapsError(
        f"the Dask scheduler or its connection was lost{f' ({error})' if error else ''}: what was committed stands, everything else is "
        "computed again; run the same command again to go on from there"
    )
    failure.__cause__ = error
    return failure


def why(error: BaseException, pieces: Sequence[WorkPiece], store: Place, *, is_connected: bool) -> FeaturemapsError:
    """Tell a lost scheduler from an error of a task or of the store."""
    is_lost = not is_connected or isinstance(error, CommClosedError | CancelledError | ClosedClientError)
    return scheduler_lost(error) if is_lost else explain(error, pieces, store)


def explain(error: BaseException | None, pieces: Sequence[WorkPiece], store: Place) -> FeaturemapsError:
    """Say what an error means for the run: an error of the store, or of a task that did ``pieces`` of a batch."""
    if isinstance(error, FeaturemapsError):
        return error
    if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
        text = (
            f"the disk of {store} is full ({error.strerror}): the run stopped, and what was committed stands; free space and run the "
            "same command again to go on from there"
        )
    elif isinstance(error, OSError):
        text = (
            f"store {store} cannot be written any more ({error}): the run stopped, and what was committed stands; check the disk and "
            "the permissions and run the same command again"
        )
    elif isinstance(error, KilledWorker | MemoryError) and pieces:
        text = (
            f"a batch of {sum(len(piece.paths) for piece in pieces)} images from {pieces[0].paths[0]!r} on killed its worker, or ran out "
            "of memory, every time, though each image alone did not: too little memory per worker, or something else kills the workers; "
            "what was committed stands; run again with more memory per worker (--workers, --memory-limit)"
        )
    else:
        text = (
            f"a task failed with an unexpected error ({type(error).__name__}: {error}): the run stopped, and what was committed "
            "stands; please report this with the log (-v), then run the same command again"
        )
    failure = FeaturemapsError(text)
    failure.__cause__ = error
    return failure


def warn_of_image(path: str, error: str, n_before: int) -> None:
    """Log one bad image: the first ones of a run as warnings, the others at level INFO, because a collection may be full of them."""
    level = logging.WARNING if n_before < MAX_WARNINGS else logging.INFO
    logger.log(level, "bad image %s: %s", path, error, extra={"path": path, "error": error})
    if n_before + 1 == MAX_WARNINGS:
        logger.warning(
            "%s so far: the next ones are logged at level INFO (-v), and status lists them all",
            count(MAX_WARNINGS, "bad image"),
        )
