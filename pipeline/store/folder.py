"""Stores in a folder: objects are files, replaced by renaming; a hard link creates the lock. See `storage`."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pipeline.errors import UsageError
from pipeline.patterns import home
from pipeline.source.urls import FILE_URL
from pipeline.store.lock_owner import LOCK_NAME, holds, taken

IS_REMOTE = False


def parse(text: str) -> Path:
    """Parse a path: any text is one; a leading ``~`` is the home folder, and ``file://`` is allowed.

    Raises
    ------
    UsageError
        When a ``file://`` is not followed by a slash.

    Examples
    --------
    >>> parse("file:///data/my%20store.zarr").as_posix()
    '/data/my store.zarr'
    """
    if not text.startswith(FILE_URL):
        return Path(home(text))
    path = Path(unquote(text.removeprefix(FILE_URL).removeprefix("localhost")))
    if not path.is_absolute():
        raise UsageError(
            f"store {text!r} names another machine, so nothing was started; write file:///FOLDER, or the folder itself"
        )
    return path


def fetch(path: Path) -> tuple[bytes, None]:
    """Content; files have no conditions."""
    return path.read_bytes(), None


def fetch_dated(path: Path) -> tuple[bytes, float]:
    """Content and modification time."""
    return path.read_bytes(), path.stat().st_mtime


def condition_of(path: Path) -> None:  # noqa: ARG001 (as of a bucket)
    """None: files have no conditions."""
    return


def put(
    path: Path,
    parts: Iterable[bytes],
    *,
    durable: bool,
    only: Any,  # noqa: ARG001 (as of a bucket)
    check: Callable[[], None] | None,
) -> None:
    """Write a temporary file, then rename it; between the two, ``check``."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if check is not None:
            check()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Sync a folder, so that its names are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_bytes(path: Path) -> int:
    """Size of a file."""
    return path.stat().st_size


def modified_s(path: Path) -> float:
    """Modification time."""
    return path.stat().st_mtime


def children(path: Path) -> list[str]:
    """Names of files and folders, sorted."""
    return sorted(entry.name for entry in path.iterdir())


def litter(path: Path) -> list[Path]:
    """Temporary files of writes, anywhere in a store."""
    return [*path.rglob("*.partial")]


def make_folder(path: Path, *, durable: bool) -> None:
    """Make a folder and its parents, if missing."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if durable:
        for folder in missing:
            _sync_folder(folder.parent)


def nearest_folder(path: Path) -> Path:
    """The folder, or its deepest existing parent."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def delete(path: Path) -> None:
    """Delete a file, if it exists."""
    path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content, if it exists."""
    shutil.rmtree(path, ignore_errors=True)


def free_bytes(path: Path) -> int:
    """Free space of the file system on which a store is or will be."""
    status = os.statvfs(nearest_folder(path))
    return status.f_bavail * status.f_frsize


def object_store(path: Path) -> None:  # noqa: ARG001 (as of a bucket)
    """None: zarr reads files itself."""
    return


def lock(path: Path, *, sole_writer: bool) -> FileLock:  # noqa: ARG001 (as of a bucket)
    """The lock file at a path."""
    return FileLock(path)


class FileLock:
    """A lock file, created exclusively by a hard link; its modification time is the heartbeat."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self, document: dict[str, Any], judge: Callable[[bytes, float], None]) -> None:
        """See `storage.Lock`."""
        self.run_id = document["run_id"]
        temporary = self.path.with_name(f"{LOCK_NAME}.{uuid.uuid4().hex}.partial")
        with temporary.open("wb") as file:
            file.write(json.dumps(document).encode())
            file.flush()
            os.fsync(file.fileno())  # an empty lock would stop every later run
        try:
            with _guard(self.path.parent):
                now = temporary.stat().st_mtime  # by the file server's clock, like the heartbeat
                with contextlib.suppress(FileNotFoundError):
                    judge(self.path.read_bytes(), now - self.path.stat().st_mtime)
                    self.path.unlink()
                os.link(temporary, self.path)  # fails if the file exists: exclusive, also on file systems without flock
        except FileExistsError:
            raise taken(self.path) from None
        finally:
            temporary.unlink()

    def stamp(self) -> Any:
        """See `storage.Lock`."""
        try:
            return self.path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def beat(self) -> None:
        """See `storage.Lock`."""
        if holds(self.path.parent, self.run_id):
            os.utime(self.path)

    def give_back(self) -> None:
        """See `storage.Lock`."""
        with _guard(self.path.parent):
            if holds(self.path.parent, self.run_id):
                self.path.unlink()


@contextlib.contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Serialise the processes of one host while they check and replace the lock."""
    with (folder / "lock.guard").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
