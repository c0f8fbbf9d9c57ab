"""Who holds a store, and whether that process still exists."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from pipeline.errors import StoreBusyError

if TYPE_CHECKING:
    from pipeline.source.urls import Url

LOCK_NAME = "lock.json"
"""Name of the lock object in ``runs/``."""
held: set[str] = set()
"""Runs of this process that hold a store."""


@dataclass(frozen=True, slots=True)
class Holder:
    """The holder of a store; the heartbeat is the modification time of the lock object."""

    run_id: str
    host: str
    boot_id: str
    """Changes when the host restarts. Contains the PID namespace, because containers share one boot."""
    pid: int
    process_started: int
    """Clock ticks from boot to the start of the process. Clock changes do not affect it, so it exposes a reused pid."""
    job_id: str
    """Batch system's job id, or empty."""

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """Parse a lock object; None if its run gave the store back.

        Raises
        ------
        ValueError, TypeError, AttributeError
            When the object is not a lock.
        """
        document = json.loads(content)
        document.pop("n_beats", None)
        return None if document.get("is_released") else cls(**document)

    @classmethod
    def current(cls, run_id: str) -> Holder:
        """The current process, as holder."""
        return cls(run_id, socket.gethostname(), _boot_id(), os.getpid(), _start_ticks(os.getpid()), _job_id())

    def is_dead(self) -> bool:
        """Whether it ran on this host since its last boot and its process is gone; False if that cannot be known from here."""
        if (self.host, self.boot_id) != (socket.gethostname(), _boot_id()):
            return False
        if self.pid == os.getpid():  # this process may have failed to remove the lock of an earlier run
            return self.run_id not in held
        try:
            return _start_ticks(self.pid) != self.process_started or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
            return not _is_there(self.pid)


def holds(folder: Path | Url, run_id: str) -> bool:
    """Whether ``run_id`` holds the store whose ``runs`` folder this is."""
    try:
        return bool(json.loads((folder / LOCK_NAME).read_bytes()).get("run_id") == run_id)
    except (FileNotFoundError, NotADirectoryError, ValueError, AttributeError):
        return False


def taken(lock: Path | Url) -> StoreBusyError:
    """The error for a lock that another run took at the same moment."""
    return StoreBusyError(f"store {lock.parent.parent} was just taken by another run; run again later")


def _start_ticks(pid: int) -> int:
    """When a process started, from /proc/PID/stat. Counts fields after the process name, which may contain anything."""
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])


def _is_there(pid: int) -> bool:
    """Whether a process exists, also where /proc hides other users' processes."""
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
