"""Reads and writes objects of a store, each as a whole, in any kind of place; `storage` is the interface of a kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from pipeline.errors import FeaturemapsError
from pipeline.source.urls import CONCURRENCY, Url
from pipeline.store import bucket, folder
from pipeline.store.storage import Lock, Storage

Place: TypeAlias = Path | Url
"""A store, or an object or folder in it; joined with ``/``."""
P = TypeVar("P", bound=Path | Url)
T = TypeVar("T")
R = TypeVar("R")

KINDS: dict[type[Any], Storage] = {Url: bucket, Path: folder}
"""The kinds of places, by the type of their paths; the first one that can parse a user's text is used."""


def _storage(path: Place) -> Storage:
    return next(kind for of, kind in KINDS.items() if isinstance(path, of))


def place(store: str | Place) -> Place:
    """Place where a store is or will be; a leading ``~`` is the home folder.

    Raises
    ------
    UsageError
        When it is a URL that cannot be written to.
    """
    if isinstance(store, str):
        return next(found for kind in KINDS.values() if (found := kind.parse(store)) is not None)  # type: ignore[no-any-return]
    return store


def is_remote(path: Place) -> bool:
    """Whether each request has a high latency and costs little."""
    return _storage(path).IS_REMOTE


def fetch(path: Place) -> tuple[bytes | None, Any]:
    """Content (None if there is no such object), and the condition under which `put` replaces exactly this version."""
    try:
        return _storage(path).fetch(path)
    except (FileNotFoundError, NotADirectoryError):
        return None, "create"


def fetch_dated(path: Place) -> tuple[bytes, float]:
    """Content of an object that must exist, and when it was written, as in `modified_s`."""
    return _storage(path).fetch_dated(path)


def condition_of(path: Place) -> Any:
    """The condition of `fetch`, without the content."""
    return _storage(path).condition_of(path)


def put(path: Place, *parts: bytes, durable: bool = False, only: Any = None) -> None:
    """Write one object as a whole. A reader sees the old bytes or the new ones, even after a kill; if ``durable``, after a power cut.

    ``only`` is a condition from `fetch`, for buckets: a put may take minutes there, and another run may take over meanwhile.

    Raises
    ------
    StaleWriterError
        When somebody else replaced the object meanwhile.
    """
    put_parts(path, parts, durable=durable, only=only)


def put_parts(
    path: Place,
    parts: Iterable[bytes],
    *,
    durable: bool = False,
    only: Any = None,
    check: Callable[[], None] | None = None,
) -> None:
    """`put` parts as they come, so that they need not be in memory together; a bucket takes them all first.

    ``check`` is called when all is written but the object's name. If it raises, or making a part does, there is no object, or still the
    old one.
    """
    _storage(path).put(path, parts, durable=durable, only=only, check=check)


def put_json(
    path: Place, document: Mapping[str, Any], indent: int | None = None, *, durable: bool = False, only: Any = None
) -> None:
    """`put` a JSON document; with an indent, encoding takes ten times as long."""
    put(path, json.dumps(document, indent=indent, ensure_ascii=True).encode(), durable=durable, only=only)


def read_json(path: Place) -> dict[str, Any]:
    """Read a metadata document.

    Raises
    ------
    FeaturemapsError
        When it cannot be read or parsed.
    """
    try:
        return parse_json(path, path.read_bytes())
    except OSError as error:
        raise _not_understood(path, error) from error


def parse_json(path: Place, content: bytes) -> dict[str, Any]:
    """Parse the content for `read_json`."""
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
    """Whether the object exists. If the storage cannot tell, raise: callers clear away what does not exist."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size_bytes(path: Place) -> int:
    """Size of an object; 0 if it does not exist."""
    try:
        return _storage(path).size_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0


def children(path: Place) -> list[str]:
    """Names of the objects and folders in a folder, sorted; FileNotFoundError if there is no such folder."""
    return _storage(path).children(path)


def litter(path: Place) -> list[Place]:
    """Temporary objects in a store, from writes that are in progress or were killed."""
    return _storage(path).litter(path)


def make_folder(path: Place, *, durable: bool = False) -> None:
    """Make a folder and its parents, if missing; a bucket needs none."""
    _storage(path).make_folder(path, durable=durable)


def nearest_folder(path: P) -> P:
    """The folder, or its deepest existing parent; for a URL, the URL itself."""
    found: P = _storage(path).nearest_folder(path)
    return found


def modified_s(path: Place) -> float:
    """Time of an object's last write, in seconds since 1970, by the clock of the server that holds it."""
    return _storage(path).modified_s(path)


def delete(path: Place) -> None:
    """Delete an object, if it exists."""
    _storage(path).delete(path)


def remove_folder(path: Place) -> None:
    """Remove a folder and its content, if it exists."""
    _storage(path).remove_folder(path)


def each(function: Callable[[T], R], items: Iterable[T], where: Place) -> list[R]:
    """`map`, with many requests at once for a URL, where each has a high latency and costs little."""
    items = list(items)
    if not is_remote(where) or len(items) < 2:
        return list(map(function, items))
    with ThreadPoolExecutor(min(CONCURRENCY, len(items))) as pool:
        return list(pool.map(function, items))


def free_bytes(path: Place) -> int | None:
    """Free space of the file system on which a store is or will be; None if unknown."""
    return _storage(path).free_bytes(path)


def object_store(path: Place) -> Any:
    """The obstore store through which zarr reads a folder; None if zarr reads the files itself."""
    return _storage(path).object_store(path)


def lock_object(path: Place, *, sole_writer: bool = False) -> Lock:
    """The lock object at a path, not yet taken; see `lock.StoreLock`."""
    return _storage(path).lock(path, sole_writer=sole_writer)
