"""The store's lock: one run at a time, and a sign by which late workers of a dead run know that they are late."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import FeaturemapsError, StaleWriterError, StoreBusyError

logger = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
WORKER_TTL_S = 60.0
LOCK_TTL_S = 3 * HEARTBEAT_S + WORKER_TTL_S
_NAME = "lock.json"
_held: set[str] = set()
"""Runs of this process that hold a store."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a store; the heartbeat is the modification time of the lock object."""

    run_id: str
    host: str
    boot_id: str
    """Changes when the host restarts; with the PID namespace, as containers share one boot."""
    pid: int
    process_started: int
    """Clock ticks since the boot, which no step of the clock moves, so that a reused pid is not taken for the holder."""
    job_id: str
    """Batch system's job id, or empty."""

    @classmethod
    def current(cls, run_id: str) -> Holder:
        """The holder that this process is."""
        return cls(run_id, socket.gethostname(), _boot_id(), os.getpid(), _start_ticks(os.getpid()), _job_id())

    def is_dead(self) -> bool:
        """Whether it ran on this host and boot and its process is gone; False when that cannot be known from here."""
        if (self.host, self.boot_id) != (socket.gethostname(), _boot_id()):
            return False
        if self.pid == os.getpid():  # which may not have been able to remove the lock of an earlier run
            return self.run_id not in _held
        try:
            return _start_ticks(self.pid) != self.process_started or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return not _is_there(self.pid)


def _start_ticks(pid: int) -> int:
    """When a process started; proc(5) counts the field behind the name, which may hold anything."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


def _is_there(pid: int) -> bool:
    """Whether a process exists, also where /proc hides those of others."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _boot_id() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _job_id() -> str:
    return next((os.environ[k] for k in ("SLURM_JOB_ID", "PBS_JOBID", "JOB_ID") if os.environ.get(k)), "")


class StoreLock:
    """Exclusive hold of a store, kept alive by a thread until `release` or the end of the ``with`` block.

    Parameters
    ----------
    folder : Path
        The store's ``runs`` folder, which exists.
    run_id : str
        Names this run; the tasks that it sends carry it.

    Raises
    ------
    StoreBusyError
        When another run holds the store; the message says who, where and since when it is silent.
    """

    def __init__(self, folder: Path, run_id: str) -> None:
        self.path = folder / _NAME
        self.run_id = run_id
        self.took_over = False
        self._stop = threading.Event()
        _held.add(run_id)
        try:
            self._acquire()
        except BaseException:
            _held.discard(run_id)
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
        _held.discard(self.run_id)
        with contextlib.suppress(OSError), _guard(self.path.parent):
            if holds(self.path.parent, self.run_id):
                self.path.unlink()

    def _acquire(self) -> None:
        temporary = self.path.with_name(f"{_NAME}.{uuid.uuid4().hex}.partial")
        temporary.write_text(json.dumps(asdict(Holder.current(self.run_id))), encoding="utf-8")
        try:
            with _guard(self.path.parent):
                self._clear_stale(temporary.stat().st_mtime)
                os.link(temporary, self.path)  # fails if the object exists: exclusive also where flock is not
        except FileExistsError:
            raise StoreBusyError(f"store {self.path.parent.parent} was taken by another run just now; run again later") from None
        finally:
            temporary.unlink()

    def _clear_stale(self, now: float) -> None:
        """Remove the lock of a run that is surely over, or refuse; ``now`` by the clock of the file server, as the heartbeat is."""
        try:
            holder = Holder(**json.loads(self.path.read_text(encoding="utf-8")))
            silent_s = now - self.path.stat().st_mtime
        except FileNotFoundError:
            return
        except (ValueError, TypeError) as error:
            raise FeaturemapsError(
                f"lock {self.path} cannot be understood ({error}), so nobody can tell whether another run works on the store; "
                "make sure that none does, delete that file and run again"
            ) from error
        if not holder.is_dead() and silent_s < LOCK_TTL_S:
            job = f" (job {holder.job_id})" if holder.job_id else ""
            raise StoreBusyError(
                f"store {self.path.parent.parent} is held by run {holder.run_id}, process {holder.pid} on {holder.host}{job}, last "
                f"heard {max(0.0, silent_s):.0f} s ago: two runs on one store never mix, so this one did nothing; run again when it "
                f"has ended (a run that is silent for {LOCK_TTL_S:.0f} s is taken over)"
            )
        logger.warning("taking the store over from run %s of process %s on %s", holder.run_id, holder.pid, holder.host)
        self.path.unlink()
        self.took_over = True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):
                if holds(self.path.parent, self.run_id):
                    os.utime(self.path)


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Serialise the contenders of one host while they look at the lock and replace it."""
    with (folder / "lock.guard").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def holds(folder: Path, run_id: str) -> bool:
    """Whether ``run_id`` holds the store whose ``runs`` folder this is."""
    try:
        return bool(json.loads((folder / _NAME).read_text(encoding="utf-8")).get("run_id") == run_id)
    except (OSError, ValueError):
        return False


def require_lock(folder: Path, run_id: str) -> None:
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


def current_holder(store: Path) -> dict[str, Any] | None:
    """Who works on a store now, as far as can be seen from here."""
    path = store / "runs" / _NAME
    try:
        holder = Holder(**json.loads(path.read_text(encoding="utf-8")))
        silent_s = time.time() - path.stat().st_mtime
    except (OSError, ValueError, TypeError):
        return None
    return None if holder.is_dead() or silent_s >= LOCK_TTL_S else asdict(holder)
