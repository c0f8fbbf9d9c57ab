"""The store's lock: one run at a time, and a sign by which late workers of a dead run know that they are late."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import FeaturemapsError, StaleWriterError, StoreBusyError, UsageError
from pipeline.store.lock_owner import Holder, held
from pipeline.store.objects import Place
from pipeline.urls import ConflictError, Url

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
WORKER_TTL_S = 60.0
LOCK_TTL_S = 3 * HEARTBEAT_S + WORKER_TTL_S
WATCH_S = 1.0
"""How often a lock is looked at while a heartbeat is waited for."""
_NAME = "lock.json"


class _FromAheadError(StoreBusyError):
    """The last heartbeat lies ahead of the clock, which therefore does not tell how old it is."""


class StoreLock:
    """Exclusive hold of a store, kept alive by a thread until `release` or the end of the ``with`` block.

    Parameters
    ----------
    folder : Path or Url
        The store's ``runs`` folder, which exists.
    run_id : str
        Names this run; the tasks that it sends carry it.
    sole_writer : bool
        Go on although a server cannot tell two runs apart: whoever says so vouches that there is no other.

    Raises
    ------
    StoreBusyError
        When another run holds the store; the message says who, where and since when it is silent.
    UsageError
        When the server of a bucket ignores conditional puts.
    """

    def __init__(self, folder: Place, run_id: str, *, sole_writer: bool = False) -> None:
        self.folder = folder
        self.run_id = run_id
        self.took_over = False
        self._lock = _ObjectLock(folder / _NAME, sole_writer) if isinstance(folder, Url) else _FileLock(folder / _NAME)
        self._stop = threading.Event()
        self._unheard: Any = None  # a heartbeat that lies ahead, and that no other followed
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
        """Give the store back, if it is still ours."""
        self._stop.set()
        self._thread.join()
        held.discard(self.run_id)
        with contextlib.suppress(OSError, ConflictError):
            self._lock.give_back()

    def _take(self, document: dict[str, Any]) -> None:
        """Take the lock; where the clock does not tell whether its holder lives, wait for a heartbeat."""
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
        """Refuse unless the lock is that of a run that is surely over."""
        try:
            holder = Holder.parse(content)
        except (ValueError, TypeError, AttributeError) as error:
            raise FeaturemapsError(
                f"lock {self.folder / _NAME} cannot be understood ({error}), so nobody can tell whether another run works on the store; "
                "make sure that none does, delete that file and run again"
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


def _taken(path: Place) -> StoreBusyError:
    return StoreBusyError(f"store {path.parent.parent} was taken by another run just now; run again later")


class _FileLock:
    """Created by a hard link, exclusively; its modification time is the heartbeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, document: dict[str, Any], judge: Callable[[bytes, float], None]) -> None:
        self.run_id = document["run_id"]
        temporary = self.path.with_name(f"{_NAME}.{uuid.uuid4().hex}.partial")
        with temporary.open("wb") as file:
            file.write(json.dumps(document).encode())
            file.flush()
            os.fsync(file.fileno())  # an empty lock would stop every later run
        try:
            with _guard(self.path.parent):
                now = temporary.stat().st_mtime  # by the clock of the file server, as the heartbeat is
                with contextlib.suppress(FileNotFoundError):
                    judge(self.path.read_bytes(), now - self.path.stat().st_mtime)
                    self.path.unlink()
                os.link(temporary, self.path)  # fails if the object exists: exclusive also where flock is not
        except FileExistsError:
            raise _taken(self.path) from None
        finally:
            temporary.unlink()

    def stamp(self) -> Any:
        """What each heartbeat changes; None where there is no lock."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def beat(self) -> None:
        if holds(self.path.parent, self.run_id):
            os.utime(self.path)

    def give_back(self) -> None:
        with _guard(self.path.parent):
            if holds(self.path.parent, self.run_id):
                self.path.unlink()


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Serialise the contenders of one host while they look at the lock and replace it."""
    with (folder / "lock.guard").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _ObjectLock:
    """Created and replaced by conditional puts only, never deleted; each heartbeat is one of them."""

    def __init__(self, url: Url, sole_writer: bool) -> None:
        self.url, self.sole_writer = url, sole_writer
        self.n_beats = 0

    def take(self, document: dict[str, Any], judge: Callable[[bytes, float], None]) -> None:
        self.document = document
        try:
            now_s = self._check_server()
            try:
                self._put("create")
            except ConflictError:
                content, meta = self.url.fetch()
                if not self._is_ours(content):  # a put that was tried again after its answer was lost
                    judge(content, now_s - meta.modified.timestamp())
                self._put(meta.condition)
        except (ConflictError, FileNotFoundError):
            raise _taken(self.url) from None

    def _check_server(self) -> float:
        """Time by the server's clock, in seconds since 1970; raises when it does not honour conditions."""
        probe = self.url.parent / f"{_NAME}.{uuid.uuid4().hex}.partial"
        try:
            first = probe.put(b"1", only="create")
            if not (_conflicts(probe, "create") and probe.put(b"2", only=first) and _conflicts(probe, first)):
                self._refuse()
            return probe.stat().modified.timestamp()
        finally:
            probe.unlink()

    def _refuse(self) -> None:
        if not self.sole_writer:
            raise UsageError(
                f"the server of {self.url.base} ignores the conditions of puts (If-None-Match, If-Match), so two runs on one store "
                "could not be kept apart: nothing was started; put the store on a server that honours them, or, if nobody else ever "
                "writes to this store, say so with --sole-writer"
            )

    def _put(self, condition: Any) -> None:
        self.n_beats += 1  # so that no two contents, and no two ETags, are equal
        content = json.dumps(self.document | {"n_beats": self.n_beats}).encode()
        self.condition = self.url.put(content, only=condition, patient=False)  # a late heartbeat is none

    def _is_ours(self, content: bytes) -> bool:
        return bool(json.loads(content).get("run_id") == self.document["run_id"])

    def stamp(self) -> Any:
        """What each heartbeat changes; None where there is no lock."""
        try:
            return self.url.fetch()[0]
        except FileNotFoundError:
            return None

    def beat(self) -> None:
        try:
            self._put(self.condition)
        except ConflictError:
            content, meta = self.url.fetch()
            if self._is_ours(content):
                self.condition = meta.condition

    def give_back(self) -> None:
        self.document = {"is_released": True}
        self._put(self.condition)


def server_clock_s(store: Url) -> float:
    """Time by the clock of the server that holds a bucket, in seconds since 1970; what is written for it is deleted again.

    Raises
    ------
    UsageError
        When the server ignores conditional puts.
    """
    return _ObjectLock(store / _NAME, sole_writer=False)._check_server()


def _conflicts(url: Url, condition: Any) -> bool:
    try:
        url.put(b"3", only=condition)
    except ConflictError:
        return True
    return False


def holds(folder: Place, run_id: str) -> bool:
    """Whether ``run_id`` holds the store whose ``runs`` folder this is."""
    try:
        return bool(json.loads((folder / _NAME).read_bytes()).get("run_id") == run_id)
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False


def last_holder(folder: Place) -> str:
    """The run that holds or held the store, alive or not, whose ``runs`` folder this is; empty where that is not on record."""
    try:
        return str(json.loads((folder / _NAME).read_bytes()).get("run_id", ""))
    except (OSError, ValueError, AttributeError):
        return ""


def require_lock(folder: Place, run_id: str) -> None:
    """Refuse to go on for a run that no longer holds the store.

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
    """When a heartbeat was, for a person.

    Examples
    --------
    >>> last_heard(12), last_heard(-0.5)
    ('last heard 12 s ago', 'last heard 0 s ago')
    >>> last_heard(-259200)
    'last heard nobody knows when (its heartbeat lies 259200 s ahead: a clock is or was wrong)'
    """
    if silent_s < -HEARTBEAT_S:
        return f"last heard nobody knows when (its heartbeat lies {-silent_s:.0f} s ahead: a clock is or was wrong)"
    return f"last heard {max(0.0, silent_s):.0f} s ago"


def current_holder(store: Place) -> dict[str, Any] | None:
    """Who works on a store now, as far as can be seen from here, and for how many seconds nothing was heard of it.

    ``ahead_s`` is how far its heartbeat lies ahead of this clock, if it does; then nobody knows how old it is.
    """
    path = store / "runs" / _NAME
    try:
        if isinstance(path, Url):
            content, meta = path.fetch()
            modified_s = meta.modified.timestamp()
        else:
            content, modified_s = path.read_bytes(), path.stat().st_mtime
        holder = Holder.parse(content)
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    silent_s = time.time() - modified_s
    if holder is None or holder.is_dead() or silent_s >= LOCK_TTL_S:
        return None
    return asdict(holder) | {"silent_s": max(0.0, silent_s), "ahead_s": max(0.0, -silent_s)}
