"""Objects of a store, in a folder or under a URL, each written whole."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pipeline.errors import FeaturemapsError, StaleWriterError, UsageError
from pipeline.patterns import home
from pipeline.urls import CONCURRENCY, ConflictError, Meta, Url, is_url

Place: TypeAlias = Path | Url
"""A store, or an object or folder in it; joined with ``/``."""
T = TypeVar("T")
R = TypeVar("R")


def place(store: str | Place) -> Place:
    """Where a store is or will be; a leading ``~`` is the home folder.

    Raises
    ------
    UsageError
        When it is a URL that nothing can be written to.
    """
    if not isinstance(store, str) or not is_url(store):
        return store if isinstance(store, Url) else Path(home(store) if isinstance(store, str) else store)
    url = Url.parse(store)
    if not url.is_bucket or not url.key:
        raise UsageError(
            f"store {store!r} cannot be written to, so nothing was started; give a folder, or s3://, gs:// or az://BUCKET/NAME.zarr"
        )
    return url


def fetch(path: Place) -> tuple[bytes | None, Any]:
    """Content, None where there is no such object, and the condition under which `put` replaces just this one."""
    try:
        if isinstance(path, Url):
            content, meta = path.fetch()
            return content, meta.condition
        return path.read_bytes(), None
    except (FileNotFoundError, NotADirectoryError):
        return None, "create"


def condition_of(path: Place) -> Any:
    """The condition of `fetch`, without the content."""
    if not isinstance(path, Url):
        return None
    try:
        return path.stat().condition
    except FileNotFoundError:
        return "create"


def put(path: Place, *parts: bytes, durable: bool = False, only: Any = None) -> None:
    """Write one object whole: a reader sees the old bytes or the new ones, also after a kill, and if ``durable`` after a power cut.

    ``only`` is a condition from `fetch`, for a bucket: a put may be under way there for minutes, and meanwhile another run may take over.

    Raises
    ------
    StaleWriterError
        When the object has become another.
    """
    if isinstance(path, Url):
        _put_object(path, parts, only)
        return
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _put_object(url: Url, parts: Sequence[bytes], only: Any) -> None:
    try:
        url.put(*parts, only=only)
    except ConflictError:
        if fetch(url)[0] == b"".join(parts):  # ours, whose answer was lost, or another's that is the same
            return
        raise StaleWriterError(
            f"{url} was written by somebody else meanwhile: another run has taken the store over, so this late one writes nothing; "
            "nothing is to be done, the other run does the work"
        ) from None


def _sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_json(
    path: Place, document: Mapping[str, Any], indent: int | None = None, *, durable: bool = False, only: Any = None
) -> None:
    """`put` a JSON document; with an indent it takes ten times as long to make."""
    put(path, json.dumps(document, indent=indent, ensure_ascii=True).encode(), durable=durable, only=only)


def read_json(path: Place) -> dict[str, Any]:
    """Read a metadata document.

    Raises
    ------
    FeaturemapsError
        When it cannot be read or understood.
    """
    try:
        return parse_json(path, path.read_bytes())
    except OSError as error:
        raise _not_understood(path, error) from error


def parse_json(path: Place, content: bytes) -> dict[str, Any]:
    """`read_json` of what has been read."""
    try:
        document = json.loads(content)
    except ValueError as error:
        raise _not_understood(path, error) from error
    if not isinstance(document, dict):
        raise FeaturemapsError(f"metadata {path} holds {type(document).__name__}, not an object; restore it from a copy")
    return document


def _not_understood(path: Place, error: Exception) -> FeaturemapsError:
    return FeaturemapsError(
        f"metadata {path} cannot be read ({error}), so this store cannot be trusted as it is; check the disk and the "
        "permissions, or restore that file from a copy"
    )


def exists(path: Place) -> bool:
    """Whether there is such an object; storage that cannot tell raises, because what does not exist is cleared away."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size_bytes(path: Place) -> int:
    """Size of an object; 0 where there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return status.size_bytes if isinstance(status, Meta) else status.st_size


def children(path: Place) -> list[str]:
    """Names of the objects and folders in a folder, sorted; FileNotFoundError where there is none."""
    if isinstance(path, Url):
        return path.children()
    return sorted(entry.name for entry in path.iterdir())


def make_folder(path: Place, *, durable: bool = False) -> None:
    """Make a folder with its parents, if it is not there; under a URL there are none to make."""
    if isinstance(path, Url):
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    if durable:
        for folder in missing:
            _sync_folder(folder.parent)


def modified_s(path: Place) -> float:
    """When an object was written, in seconds since 1970, by the clock of the server that holds it."""
    status = path.stat()
    return status.modified.timestamp() if isinstance(status, Meta) else status.st_mtime


def delete(path: Place) -> None:
    """Delete an object, if there is one."""
    if isinstance(path, Url):
        path.unlink()
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Place) -> None:
    """Remove a folder with all that is in it, if it is there."""
    if isinstance(path, Url):
        each(lambda key: (path / key).unlink(), [key for key, _ in path.walk()], path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def each(function: Callable[[T], R], items: Iterable[T], where: Place) -> list[R]:
    """`map`, with many requests at once under a URL, where each takes long and costs little."""
    items = list(items)
    if isinstance(where, Path) or len(items) < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(min(CONCURRENCY, len(items))) as pool:
        return list(pool.map(function, items))


def free_bytes(path: Place) -> int | None:
    """Free space of the file system that a store is or will be on; None where nothing says."""
    if isinstance(path, Url):
        return None
    status = os.statvfs(nearest_folder(path))
    return status.f_bavail * status.f_frsize


def nearest_folder(path: Path) -> Path:
    """A folder, or the deepest that is there of those that it would be made in."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())
