"""Objects under a URL: s3://, gs://, az:// and, for reading, https://. Only this module imports obstore.

The usual environment variables (AWS_*, GOOGLE_*, AZURE_*) give the location and the credentials of a bucket, on the driver and on
every worker. None of them is ever written down or sent.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from pipeline.errors import UsageError, needs_extra

BUCKETS = ("s3", "gs", "az")
WEB = ("https", "http")
CONCURRENCY = 32
"""Requests that one process makes at once."""
HEAD_BYTES = 64 * 1024
"""Bytes of an image to request first if only its header is wanted."""
MAX_WHOLE_BYTES = 64 * 1024**2
"""The most bytes to fetch for a header from a server that does not support ranges."""

FILE_URL = "file://"
"""Start of a URL of a local file; a store may be named so."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_OBJECT = re.compile(rf"({'|'.join(BUCKETS + WEB)})://", re.IGNORECASE)
_SECRET = re.compile(
    r"(?i)(^|[&_.-])(\w*signature|\w*token|\w*secret|\w*credential|password|passwd|auth|authorization|(\w*(api|access))?_?key(id)?|sig)="
)
_RETRIES = {
    True: {"max_retries": 6, "retry_timeout": timedelta(seconds=60)},
    False: {"max_retries": 0, "retry_timeout": timedelta(seconds=60)},
}
_TIMEOUTS = {
    True: {"connect_timeout": timedelta(seconds=10), "timeout": timedelta(seconds=120)},
    False: {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(seconds=20)},
}


def is_url(text: str) -> bool:
    """Whether a URL, not a path, names the source or store."""
    return _URL.match(text) is not None


def is_object(text: str) -> bool:
    """Whether an entry of a list is a URL that can be read; anything else is a path, however odd."""
    return _OBJECT.match(text) is not None


class ConflictError(Exception):
    """An object is not what a conditional put expected, because somebody else wrote it."""


class Meta(NamedTuple):
    """What a server tells about an object."""

    size_bytes: int
    modified: datetime
    """By the server's clock."""
    e_tag: str | None
    """As the server writes it."""
    version: str | None = None

    @property
    def condition(self) -> Any:
        """Condition for `Url.put`: the object is still this version."""
        return {key: value for key, value in (("e_tag", self.e_tag), ("version", self.version)) if value is not None}

    @property
    def identity(self) -> str:
        """ETag without quotes; without an ETag, the time in nanoseconds."""
        return (self.e_tag or "").removeprefix("W/").strip('"') or str(round(self.modified.timestamp() * 1e6) * 1000)


@dataclass(frozen=True, slots=True)
class Url:
    """One object, or the folder of all objects whose keys begin with this key and a slash; joined with ``/`` like paths.

    Methods raise `OSError` as a file system would: FileNotFoundError, PermissionError, and EIO for what may pass.
    """

    base: str
    """Scheme and bucket or host."""
    key: str = ""
    """Not percent-encoded."""
    query: str = ""
    """Of https:// only."""

    @classmethod
    def parse(cls, text: str) -> Url:
        """Parse a URL.

        Raises
        ------
        UsageError
            When its scheme is unknown, it has no bucket or host, or it contains a password.
        """
        match = _URL.match(text)
        scheme = match[1].lower() if match else ""
        if scheme not in BUCKETS + WEB:
            known = ", ".join(f"{s}://" for s in BUCKETS + WEB)
            raise UsageError(
                f"a URL that begins with '{scheme}://' is of an unknown kind, so nothing was started; known are {known}"
            )
        host, _, key = text[len(scheme) + 3 :].partition("/")
        if "@" in host:
            raise UsageError(
                f"a URL of {host.rpartition('@')[2]!r} carries a user or password, which would be written into the store, so nothing was "
                "started; leave it out, and give credentials by environment variables"
            )
        if not host:
            raise UsageError(f"URL {text!r} names no bucket or host, so nothing was started; write {scheme}://BUCKET/...")
        if scheme in WEB:
            split = urlsplit(text)
            if _SECRET.search(unquote(split.query)):
                raise UsageError(
                    f"URL {text.partition('?')[0]!r} carries a signature or key, which would be written into the store and is another "
                    "one tomorrow, so nothing was started; name the bucket (s3://, gs://, az://) and give credentials by "
                    "environment variables"
                )
            return cls(f"{scheme}://{host.partition('?')[0]}", unquote(split.path).strip("/"), split.query)
        return cls(f"{scheme}://{host}", key.strip("/"))

    def __str__(self) -> str:
        return f"{self.base}/{self.key}" if self.key else self.base

    def __truediv__(self, name: str) -> Url:
        return Url(self.base, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """Last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Url:
        """The folder that contains it."""
        return Url(self.base, self.key.rpartition("/")[0])

    def absolute(self) -> Url:
        """Return the URL itself: a URL is not relative to anything."""
        return self

    def resolve(self) -> Url:
        """Return the URL itself: a bucket has no links."""
        return self

    @property
    def is_bucket(self) -> bool:
        """Whether it can be listed and written."""
        return self.base.startswith(tuple(f"{scheme}://" for scheme in BUCKETS))

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def fetch(self, *, patient: bool = True) -> tuple[bytes, Meta]:
        """Content, and what the server tells about it, in one request; ``patient`` retries after faults that may pass."""
        with self._errors():
            store, key = self._target(patient)
            response = store.get(key)
            return bytes(response.bytes()), _meta(response.meta)

    def read_bytes(self) -> bytes:
        """Content."""
        return self.fetch()[0]

    def stream(self, *, patient: bool = True) -> tuple[Iterator[bytes], Meta]:
        """Content in pieces, and what the server tells about it."""
        with self._errors():
            store, key = self._target(patient)
            response = store.get(key)
            return self._pieces(response), _meta(response.meta)

    def _pieces(self, response: Any) -> Iterator[bytes]:
        with self._errors():
            for piece in response.stream():
                yield bytes(piece)

    def stat(self) -> Meta:
        """What the server tells about the object."""
        with self._errors():
            store, key = self._target()
            try:
                return _meta(store.head(key))
            except FileNotFoundError:
                raise
            except _exceptions().BaseError:
                if self.is_bucket:
                    raise
                return _meta(store.get(key).meta)  # some web servers do not answer HEAD

    def open_header(self, *, patient: bool = True) -> io.BytesIO | io.BufferedReader:
        """Open a stream to read a little of it, usually with one request."""
        with self._errors():
            store, key = self._target(patient)
            try:
                response = store.get(key, options={"range": (0, HEAD_BYTES)})
                size_bytes, head = int(response.meta["size"]), bytes(response.bytes())
            except _exceptions().BaseError as error:
                is_unknown = isinstance(error, _exceptions().NotSupportedError) or "non-partial response" in str(error)
                if not is_unknown and "416" not in str(error):
                    raise
                response = store.get(key)  # it is empty, or the server does not support ranges
                if response.meta["size"] > MAX_WHOLE_BYTES:
                    text = f"the server cannot send a part of an object, and this one has {response.meta['size']} bytes"
                    raise OSError(errno.EINVAL, text) from None
                return io.BytesIO(bytes(response.bytes()))
        if size_bytes <= len(head):
            return io.BytesIO(head)
        return io.BufferedReader(_Ranges(self, patient, size_bytes, head), HEAD_BYTES)

    def read_range(self, start: int, stop: int, *, patient: bool = True) -> bytes:
        """Bytes from ``start`` to before ``stop``."""
        with self._errors():
            store, key = self._target(patient)
            return bytes(store.get_range(key, start=start, end=stop))

    # -- listing ---------------------------------------------------------------------------------------------------------------

    def walk(self) -> Iterator[tuple[str, Meta]]:
        """Every object below it, with its key relative to this one, page by page; if one page fails, all fails."""
        with self._errors():
            store, prefix = connect(self.base), f"{self.key}/" if self.key else ""
            for page in store.list(prefix or None):
                for found in page:
                    if found["path"].startswith(prefix):
                        yield found["path"][len(prefix) :], _meta(found)

    def children(self) -> list[str]:
        """Names directly in the folder, sorted."""
        with self._errors():
            found = connect(self.base).list_with_delimiter(self.key or None)
            paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return sorted({path.rstrip("/").rpartition("/")[2] for path in paths} - {self.name if self.key in paths else ""})

    def is_empty(self) -> bool:
        """Whether there is nothing below it."""
        return self.is_bucket and next(self.walk(), None) is None

    # -- writing ---------------------------------------------------------------------------------------------------------------

    def put(self, *parts: bytes, only: Any = None, patient: bool = True) -> Any:
        """Write the whole object; ``only`` is ``"create"``, or a condition from `Meta.condition` or an earlier `put`.

        Raises
        ------
        ConflictError
            When the condition does not hold.
        """
        with self._errors():
            store, key = self._target(patient)
            try:
                result = store.put(key, b"".join(parts), use_multipart=False, **({} if only is None else {"mode": only}))
            except (_exceptions().AlreadyExistsError, _exceptions().PreconditionError, FileExistsError) as error:
                if only is None:  # another conditional put is in progress
                    raise OSError(errno.EIO, _without_secrets(str(error)), str(self)) from None
                raise ConflictError(str(self)) from None
        return {key: result[key] for key in ("e_tag", "version") if result[key] is not None}

    def unlink(self) -> None:
        """Remove it, if it is there."""
        try:
            with self._errors():
                store, key = self._target()
                store.delete(key)
        except FileNotFoundError:
            pass

    # -- internals -------------------------------------------------------------------------------------------------------------

    def _target(self, patient: bool = True) -> tuple[Any, str]:
        if self.query:
            return _connect(f"{self}?{self.query}", patient), ""  # a URL with a query is used only once
        return connect(self.base, patient), self.key

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of obstore into `OSError`; pass on only part of their text, which may contain signed URLs."""
        with errors(str(self)):
            yield


class _Ranges(io.RawIOBase):
    """A file whose beginning is in memory; the rest is requested when it is read."""

    def __init__(self, url: Url, patient: bool, size_bytes: int, head: bytes) -> None:
        self.url, self.patient, self.size_bytes, self.head = url, patient, size_bytes, head
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size_bytes}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "negative seek position")
        self.position = start + offset
        return self.position

    def readall(self) -> bytes:
        data = self.head[self.position :]
        start = self.position + len(data)
        rest = self.url.read_range(start, self.size_bytes, patient=self.patient) if start < self.size_bytes else b""
        self.position = max(self.position, self.size_bytes)
        return data + rest

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size_bytes)
        if stop <= self.position:
            return 0
        if self.position < len(self.head):
            data = self.head[self.position : stop]
        else:
            data = self.url.read_range(self.position, stop, patient=self.patient)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@lru_cache(maxsize=256)
def connect(base: str, patient: bool = True) -> Any:
    """The obstore store for everything below a URL, with its connections."""
    return _connect(base, patient)


def _connect(base: str, patient: bool) -> Any:
    with needs_extra("cloud", base):
        from obstore.store import from_url  # noqa: PLC0415 (an extra)
    endpoint = next((os.environ[k] for k in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") if os.environ.get(k)), "")
    plain = base.startswith("http://") or (base.startswith("s3://") and endpoint.startswith("http://"))
    options = _TIMEOUTS[patient] | ({"allow_http": True} if plain else {})
    with errors(base):
        return from_url(base, client_options=options, retry_config=_RETRIES[patient])


def _exceptions() -> Any:
    from obstore import exceptions  # noqa: PLC0415 (an extra)

    return exceptions


@contextmanager
def errors(where: str) -> Iterator[None]:
    """Turn errors of obstore into `OSError`."""
    try:
        yield
    except (OSError, UsageError, ConflictError) as error:
        if isinstance(error, FileNotFoundError) and not error.errno:
            raise FileNotFoundError(errno.ENOENT, "there is no such object", where) from None
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("Could not parse path"):  # an error of Python, not of obstore
            raise OSError(errno.EINVAL, "obstore cannot ask for an object of such a name", where) from None
        known: Any = sys.modules.get("obstore.exceptions")  # if it was never imported, no error can come from it
        if known is None or not isinstance(error, known.BaseError):
            raise
        text = _without_secrets(str(error))
        if isinstance(error, known.PermissionDeniedError | known.UnauthenticatedError):
            raise PermissionError(errno.EACCES, text, where) from None
        code = errno.EINVAL if isinstance(error, known.InvalidPathError) else errno.EIO
        raise OSError(code, text, where) from None


def _without_secrets(text: str) -> str:
    """The error on one line, without queries of URLs, which may contain signatures, and without the server's error page."""
    code = re.search(r"<Code>(\w+)</Code>", text)
    cause = re.search(r'(?:error|message): "([^"]+)"', text)  # obstore's own sentence leaves these out: a name, a connection
    line = " ".join(re.split(r"\n\nDebug source|: <[?!\w]", text)[0].split()) + (
        f" ({code[1]})" if code else f" ({cause[1]})" if cause else ""
    )
    if code and code[1] == "NoSuchBucket":
        line += ": there is no such bucket, create it first"
    return re.sub(r"\?\S*", "", re.sub(r"//[^/\s]*@", "//", line))[:400]


def _meta(found: Any) -> Meta:
    return Meta(int(found["size"]), found["last_modified"], found["e_tag"], found["version"])
