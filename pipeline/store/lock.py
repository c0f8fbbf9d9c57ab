"""The store's lock: it admits one run at a time, and lets late workers of a dead run see that they are late."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from dataclasses import asdict
from typing import Any

from pipeline.errors import FeaturemapsError, StaleWriterError, StoreBusyError
from pipeline.source.urls import ConflictError
from pipeline.store.lock_owner import LOCK_NAME, Holder, held, holds
from pipeline.store.objects import Place, fetch_dated, lock_object

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
WORKER_TTL_S = 60.0
LOCK_TTL_S = 3 * HEARTBEAT_S + WORKER_TTL_S
WATCH_S = 1.0
"""How often to look at a lock while waiting for a heartbeat."""


class _FromAheadError(StoreBusyError):
    """The last heartbeat is ahead of the clock, so the clock does not tell its age."""


class StoreLock:
    """Exclusive lock on a store, kept alive by a thread until `release` or the end of the ``with`` block.

    Parameters
    ----------
    folder : Path or Url
        The store's ``runs`` folder, which must exist.
    run_id : str
        Name of this run; its tasks carry it.
    sole_writer : bool
        Go on even if a bucket's server cannot keep two runs apart: the caller vouches that there is no other run.

    Raises
    ------
    StoreBusyError
        When another run holds the store; the message says who, where, and how long ago it was last heard.
    UsageError
        When the server of a bucket ignores conditional puts.
    """

    def __init__(self, folder: Place, run_id: str, *, sole_writer: bool = False) -> None:
        self.folder = folder
        self.run_id = run_id
        self.took_over = False
        self._lock = lock_object(folder / LOCK_NAME, sole_writer=sole_writer)
        self._stop = threading.Event()
        self._unheard: Any = None  # a heartbeat ahead of the clock that no later one followed
        held.add(run_id)
        try:
            self._take(asdict(Holder.current(run_id)))
        except BaseException:
            held.discard(run_id)
            raise
        self._thread = threading.Thread(target=self._beat, name="store-lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> StoreLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back, if it is still ours."""
        self._stop.set()
        self._thread.join()
        held.discard(self.run_id)
        with contextlib.suppress(OSError, ConflictError):
            self._lock.give_back()

    def _take(self, document: dict[str, Any]) -> None:
        """Take the lock; if the clock does not tell whether its holder lives, wait for a heartbeat."""
        try:
            self._lock.take(document, self._judge)
        except _FromAheadError as error:
            logger.warning("%s; waiting up to %.0f s for another heartbeat", error, LOCK_TTL_S)
            self._unheard, until_s = self._lock.stamp(), time.monotonic() + LOCK_TTL_S
            while time.monotonic() < until_s:
                time.sleep(min(WATCH_S, LOCK_TTL_S))
                if self._lock.stamp() not in {self._unheard, None}:
                    raise StoreBusyError(str(error)) from None
            self._lock.take(document, self._judge)

    def _judge(self, content: bytes, silent_s: float) -> None:
        """Refuse to take the lock unless its run is certainly over."""
        try:
            holder = Holder.parse(content)
        except (ValueError, TypeError, AttributeError) as error:
            raise FeaturemapsError(
                f"lock {self.folder / LOCK_NAME} cannot be parsed ({error}), so nobody can tell whether another run works on the "
                "store; make sure that none does, delete that file and run again"
            ) from error
        if holder is None:
            return
        is_ahead = silent_s < -HEARTBEAT_S
        is_silent = self._unheard == self._lock.stamp() if is_ahead else silent_s >= LOCK_TTL_S
        if not holder.is_dead() and not is_silent:
            job = f" (job {holder.job_id})" if holder.job_id else ""
            raise (_FromAheadError if is_ahead else StoreBusyError)(
                f"store {self.folder.parent} is held by run {holder.run_id}, process {holder.pid} on {holder.host}{job}, "
                f"{last_heard(silent_s)}: two runs on one store never mix, so this one did nothing; run again when it "
                f"has ended (a run that is silent for {LOCK_TTL_S:.0f} s is taken over)"
            )
        logger.warning("taking the store over from run %s of process %s on %s", holder.run_id, holder.pid, holder.host)
        self.took_over = True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError, ConflictError):
                self._lock.beat()


def last_holder(folder: Place) -> str:
    """The run that holds or last held the store with this ``runs`` folder; empty if there is no record."""
    try:
        return str(json.loads((folder / LOCK_NAME).read_bytes()).get("run_id", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def require_lock(folder: Place, run_id: str) -> None:
    """Raise if the run no longer holds the store.

    Raises
    ------
    StaleWriterError
    """
    if not holds(folder, run_id):
        raise StaleWriterError(
            f"run {run_id} no longer holds the store {folder.parent}: another run has taken it over, so this late task writes "
            "nothing; nothing is to be done, the other run does the work"
        )


def last_heard(silent_s: float) -> str:
    """How long ago the last heartbeat was, in words.

    Examples
    --------
    >>> last_heard(12), last_heard(-0.5)
    ('last heard 12 s ago', 'last heard 0 s ago')
    >>> last_heard(-259200)
    'last heard at an unknown time (its heartbeat is 259200 s ahead: a clock is or was wrong)'
    """
    if silent_s < -HEARTBEAT_S:
        return f"last heard at an unknown time (its heartbeat is {-silent_s:.0f} s ahead: a clock is or was wrong)"
    return f"last heard {max(0.0, silent_s):.0f} s ago"


def current_holder(store: Place) -> dict[str, Any] | None:
    """The run that works on a store, as far as visible from here, and the seconds since it was last heard.

    ``ahead_s`` is set if its heartbeat is ahead of this clock, and says by how much; then its age is unknown.
    """
    path = store / "runs" / LOCK_NAME
    try:
        content, modified_s = fetch_dated(path)
        holder = Holder.parse(content)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    silent_s = time.time() - modified_s
    if holder is None or holder.is_dead() or silent_s >= LOCK_TTL_S:
        return None
    return asdict(holder) | {"silent_s": max(0.0, silent_s), "ahead_s": max(0.0, -silent_s)}
