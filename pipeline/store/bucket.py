"""Stores in a bucket: objects and the lock are replaced by conditional puts. See `storage`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.errors import StaleWriterError, UsageError
from pipeline.source.urls import CONCURRENCY, FILE_URL, ConflictError, Url, connect, is_url
from pipeline.store.lock_owner import LOCK_NAME, taken
from pipeline.store.schema import RUNS

IS_REMOTE = True


def parse(text: str) -> Url | None:
    """Parse the URL of a place that can be written to; None for a path.

    Raises
    ------
    UsageError
        When the URL names a place that cannot be written to.
    """
    if not is_url(text) or text.startswith(FILE_URL):
        return None
    url = Url.parse(text)
    if not url.is_bucket or not url.key:
        raise UsageError(
            f"store {text!r} cannot be written to, so nothing was started; give a folder, or s3://, gs:// or az://BUCKET/NAME.zarr"
        )
    return url


def fetch(url: Url) -> tuple[bytes, Any]:
    """Content and its condition, in one request."""
    content, meta = url.fetch()
    return content, meta.condition


def fetch_dated(url: Url) -> tuple[bytes, float]:
    """Content and when it was written, in one request."""
    content, meta = url.fetch()
    return content, meta.modified.timestamp()


def condition_of(url: Url) -> Any:
    """The condition of `fetch`, without the content."""
    try:
        return url.stat().condition
    except FileNotFoundError:
        return "create"


def put(
    url: Url,
    parts: Iterable[bytes],
    *,
    durable: bool,  # noqa: ARG001 (a bucket always is)
    only: Any,
    check: Callable[[], None] | None,
) -> None:
    """Write an object, under a condition if one is given; before that, ``check``.

    Raises
    ------
    StaleWriterError
        When somebody else replaced the object meanwhile.
    """
    content = list(parts)
    if check is not None:
        check()
    try:
        url.put(*content, only=only)
    except ConflictError:
        if _content(url) == b"".join(content):  # our own put, whose answer was lost, or another's with the same content
            return
        raise StaleWriterError(
            f"{url} was written by somebody else meanwhile: another run has taken the store over, so this late one writes nothing; "
            "nothing is to be done, the other run does the work"
        ) from None


def _content(url: Url) -> bytes | None:
    try:
        return url.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def size_bytes(url: Url) -> int:
    """Size of an object."""
    return url.stat().size_bytes


def modified_s(url: Url) -> float:
    """Time of the last write, by the server's clock."""
    return url.stat().modified.timestamp()


def children(url: Url) -> list[str]:
    """Names directly in the folder, sorted."""
    return url.children()


def litter(url: Url) -> list[Url]:
    """Temporary objects of a store; only attempts to lock leave any."""
    return [url / RUNS / name for name in children(url / RUNS) if name.endswith(".partial")]


def make_folder(url: Url, *, durable: bool) -> None:
    """Do nothing: a bucket has no folders."""


def nearest_folder(url: Url) -> Url:
    """Return the URL itself: a bucket has no folders."""
    return url


def delete(url: Url) -> None:
    """Delete an object, if it exists."""
    url.unlink()


def remove_folder(url: Url) -> None:
    """Delete all objects below the URL, many at once."""
    keys = [key for key, _ in url.walk()]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        list(pool.map(lambda key: (url / key).unlink(), keys))


def free_bytes(url: Url) -> None:  # noqa: ARG001 (as of a folder)
    """Return None: a bucket does not tell."""
    return


def object_store(url: Url) -> Any:
    """The obstore store for everything below the URL."""
    return connect(str(url))


def lock(url: Url, *, sole_writer: bool) -> ObjectLock:
    """The lock object at a URL."""
    return ObjectLock(url, sole_writer)


class ObjectLock:
    """A lock object that is only created and replaced by conditional puts, never deleted; each heartbeat is such a put."""

    def __init__(self, url: Url, sole_writer: bool) -> None:
        self.url, self.sole_writer = url, sole_writer
        self.n_beats = 0

    def take(self, document: dict[str, Any], judge: Callable[[bytes, float], None]) -> None:
        """See `storage.Lock`."""
        self.document = document
        try:
            now_s = self.check_server()
            try:
                self._put("create")
            except ConflictError:
                content, meta = self.url.fetch()
                if not self._is_ours(content):  # else our own put, repeated after its answer was lost
                    judge(content, now_s - meta.modified.timestamp())
                self._put(meta.condition)
        except (ConflictError, FileNotFoundError):
            raise taken(self.url) from None

    def check_server(self) -> float:
        """The server's time in seconds since 1970; raise if the server ignores conditional puts."""
        probe = self.url.parent / f"{LOCK_NAME}.{uuid.uuid4().hex}.partial"
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
        self.n_beats += 1  # so that no two contents, and thus no two ETags, are equal
        content = json.dumps(self.document | {"n_beats": self.n_beats}).encode()
        self.condition = self.url.put(content, only=condition, patient=False)  # a heartbeat that comes late is useless

    def _is_ours(self, content: bytes) -> bool:
        return bool(json.loads(content).get("run_id") == self.document["run_id"])

    def stamp(self) -> Any:
        """See `storage.Lock`."""
        try:
            return self.url.fetch()[0]
        except FileNotFoundError:
            return None

    def beat(self) -> None:
        """See `storage.Lock`."""
        try:
            self._put(self.condition)
        except ConflictError:
            content, meta = self.url.fetch()
            if self._is_ours(content):
                self.condition = meta.condition

    def give_back(self) -> None:
        """See `storage.Lock`."""
        self.document = {"is_released": True}
        self._put(self.condition)


def _conflicts(url: Url, condition: Any) -> bool:
    try:
        url.put(b"3", only=condition)
    except ConflictError:
        return True
    return False


def server_clock_s(store: Url) -> float:
    """Time by the clock of a bucket's server, in seconds since 1970; writes an object for this and deletes it again.

    Raises
    ------
    UsageError
        When the server ignores conditional puts.
    """
    return ObjectLock(store / LOCK_NAME, sole_writer=False).check_server()
