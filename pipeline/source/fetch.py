"""Reads files: probes headers, reads bytes, and tells an image's own fault from one of the storage that may pass."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError, PassingFaultError
from pipeline.source import current, decoding
from pipeline.source.fingerprints import fingerprint_of
from pipeline.source.names import absolute_path, absolute_url
from pipeline.source.urls import Url, is_url

READ_AHEAD = 16
READ_AHEAD_BYTES = 32 * 1024**2
RETRY_PAUSES_S = (0.1, 0.5, 2.0)
_THE_IMAGE_IS_AT_FAULT = {
    errno.ENOENT: "missing",
    errno.EACCES: "permission_denied",
    errno.EPERM: "permission_denied",
    errno.EISDIR: "not_a_file",
    errno.ENOTDIR: "missing",
    errno.ELOOP: "missing",
    errno.ENAMETOOLONG: "missing",
    errno.ENXIO: "not_a_file",
    errno.EINVAL: "not_a_file",
}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    """Where the images are, and how to decode them."""

    root: str
    decode: DecodeSpec
    hung: frozenset[str] = frozenset()
    """Images that did not answer before the deadline; they are left to the next run."""


class Probed(NamedTuple):
    """Result of reading one header: sizes, or why the image is bad (``error``), or a fault that may pass (``fault``)."""

    source_height: int = 0
    source_width: int = 0
    input_height: int = 0
    input_width: int = 0
    error: str = ""
    fault: str = ""
    decode_bytes: int = 0
    dropped: tuple[str, ...] = ()
    """Same as `ImageSize.dropped`."""


class Patience:
    """How long to wait for the storage to recover. All images of a batch share this time; it does not start again for each."""

    def __init__(self) -> None:
        self.pauses_s: tuple[float, ...] = RETRY_PAUSES_S

    @property
    def is_left(self) -> bool:
        """Whether any time is left."""
        return bool(self.pauses_s)


class ProbedBlock(tuple[Probed, ...]):
    """The results of a block. It has its own type because Dask would send each item of a plain list or tuple separately."""

    __slots__ = ()


def probe_block(source: Source, paths: Sequence[str], needed: tuple[int, int]) -> ProbedBlock:
    """Read the headers of some images.

    Parameters
    ----------
    source : Source
    paths : sequence of str
        Relative and encoded.
    needed : (int, int)
        Smallest input height and width that leave at least one position of a map.
    """
    patience = Patience()
    probe = partial(_probe, source, needed, patience)
    return ProbedBlock(_for_each(probe, paths, source.root))


def _for_each(action: Callable[[str], T], paths: Sequence[str], root: str) -> Iterator[T]:
    """`map`, for a URL with several requests at once; this thread meanwhile notes which image it waits for."""
    if not is_url(root):
        yield from map(action, paths)
        return
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        results = pool.map(action, paths)
        for path in paths:
            current.note(path)
            yield next(results)


def _probe(source: Source, needed: tuple[int, int], patience: Patience, path: str) -> Probed:
    try:
        _begin(source, path)
        size = _retry(lambda: _probe_file(source, path, patience), source.root, path, patience)
    except ImageError as error:
        return Probed(error=str(error))
    except PassingFaultError as fault:
        return Probed(fault=str(fault))
    if size.input_height < needed[0] or size.input_width < needed[1]:
        text = (
            f"{size.input_height} x {size.input_width} pixels, smaller than the {needed[0]} x {needed[1]} that one output needs"
        )
        return Probed(error=str(ImageError("too_small", text)))
    sizes = size.source_height, size.source_width, size.input_height, size.input_width
    return Probed(*sizes, decode_bytes=size.decode_bytes, dropped=size.dropped)


def _begin(source: Source, path: str) -> None:
    """Note which image this thread begins, so that it is found if the storage never answers."""
    if path in source.hung:
        raise PassingFaultError(f"{path}: the storage did not answer, and the worker that waited for it was replaced")
    current.note(path)


def _probe_file(source: Source, path: str, patience: Patience) -> decoding.ImageSize:
    if is_url(source.root):
        with _url(source.root, path).open_header(patient=patience.is_left) as header:
            return decoding.probe(header, source.decode)
    with _open(source.root, path) as file:
        return decoding.probe(file, source.decode)


def _url(root: str, path: str) -> Url:
    return Url.parse(absolute_url(root, path))


def _open(root: str, path: str) -> Any:
    """Open a regular file for reading."""
    return os.fdopen(_descriptor(root, path)[0], "rb")


def _descriptor(root: str, path: str) -> tuple[int, os.stat_result]:
    """Open a regular file for reading; other files could block or never end."""
    descriptor = os.open(absolute_path(root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ImageError("not_a_file", "a folder, pipe, socket or device")
    return descriptor, status


def _retry(action: Callable[[], T], root: str, path: str, patience: Patience) -> T:
    """Call ``action``, again after faults that may pass; raise ImageError if the image is at fault."""
    pauses = iter(patience.pauses_s)
    while True:
        try:
            return action()
        except OSError as error:
            code = _THE_IMAGE_IS_AT_FAULT.get(error.errno or 0)
            if code is not None and not _source_is_gone(root):
                raise ImageError(code, error.strerror or str(error)) from error
            pause_s = next(pauses, None)
            if pause_s is None:
                patience.pauses_s = ()
                raise PassingFaultError(f"{path}: {error}") from error
            time.sleep(pause_s)


def _source_is_gone(root: str) -> bool:
    """Whether the source itself is missing or empty, like an unmounted disk."""
    try:
        if is_url(root):
            return not root.endswith("://") and Url.parse(root).is_empty()
        with os.scandir(root) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def read_bytes(source: Source, path: str, fingerprint: str, patience: Patience) -> bytes:
    """Read an image that was listed with a fingerprint.

    Raises
    ------
    ImageError
        When the image itself is at fault, or has changed since it was listed.
    PassingFaultError
        When the storage failed in a way that may pass.
    """
    _begin(source, path)
    return _retry(lambda: _read_file(source.root, path, fingerprint, patience), source.root, path, patience)


def _read_file(root: str, path: str, fingerprint: str, patience: Patience) -> bytes:
    if is_url(root):
        content, meta = _url(root, path).fetch(patient=patience.is_left)
        _check_unchanged(fingerprint, fingerprint_of(meta))
        return content
    descriptor, status = _descriptor(root, path)
    try:  # without a file object, which takes as long as a small file
        _check_unchanged(fingerprint, fingerprint_of(status))
        parts = []
        at_once = min(status.st_size or 1 << 16, READ_AHEAD_BYTES) + 1  # some file systems give 0 as the size of any file
        while part := os.read(descriptor, at_once):
            parts.append(part)
    finally:
        os.close(descriptor)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_ahead(
    source: Source, paths: Sequence[str], fingerprints: Sequence[str], patience: Patience
) -> Iterator[Callable[[], bytes]]:
    """Yield a callable for each image that reads it, as `read_bytes`; call each once. For a URL, the next images load meanwhile.

    At most `READ_AHEAD` files of together `READ_AHEAD_BYTES` are read ahead, or one larger file.
    """
    items = [partial(read_bytes, source, path, listed, patience) for path, listed in zip(paths, fingerprints, strict=True)]
    if not is_url(source.root):
        yield from items
        return
    sizes = [int(listed.partition("-")[0]) if listed[:1].isdigit() else 0 for listed in fingerprints]
    waiting: deque[Future[bytes]] = deque()
    pool = ThreadPoolExecutor(READ_AHEAD)
    try:
        n_sent = 0
        for i in range(len(items)):
            while n_sent < len(items) and (
                n_sent == i or (n_sent - i < READ_AHEAD and sum(sizes[i : n_sent + 1]) <= READ_AHEAD_BYTES)
            ):
                waiting.append(pool.submit(items[n_sent]))
                n_sent += 1
            current.note(paths[i])
            yield waiting.popleft().result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check_unchanged(listed: str, found: str) -> None:
    if found != listed:
        raise ImageError("changed", f"the file changed after it was listed (from {listed} to {found}); run again")


def _require_fingerprint(file: Any, fingerprint: str) -> None:
    _check_unchanged(fingerprint, fingerprint_of(os.fstat(file.fileno())))


class Digested(NamedTuple):
    """SHA-256 of an image's bytes, or why there is none (``error``), or a fault that may pass (``fault``)."""

    digest: str = ""
    error: str = ""
    fault: str = ""


class DigestedBlock(tuple[Digested, ...]):
    """The digests of a block; it has its own type for the same reason as `ProbedBlock`."""

    __slots__ = ()


def digest_block(root: str, images: Sequence[tuple[str, str]]) -> DigestedBlock:
    """Compute the digests of some images' bytes, reading them in pieces.

    Parameters
    ----------
    root : str
        Source root.
    images : sequence of (str, str)
        Path and fingerprint of each image; another fingerprint is an error.
    """
    digest = partial(_digest, root, dict(images), Patience())
    return DigestedBlock(_for_each(digest, [path for path, _ in images], root))


def _digest(root: str, fingerprints: Mapping[str, str], patience: Patience, path: str) -> Digested:
    current.note(path)
    try:
        return Digested(_retry(lambda: _digest_file(root, path, fingerprints[path], patience), root, path, patience))
    except ImageError as error:
        return Digested(error=str(error))
    except PassingFaultError as fault:
        return Digested(fault=str(fault))


def _digest_file(root: str, path: str, fingerprint: str, patience: Patience) -> str:
    if is_url(root):
        pieces, meta = _url(root, path).stream(patient=patience.is_left)
        _check_unchanged(fingerprint, fingerprint_of(meta))
        total = hashlib.sha256()
        for piece in pieces:
            total.update(piece)
        return total.hexdigest()
    with _open(root, path) as file:
        _require_fingerprint(file, fingerprint)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _require_fingerprint(file, fingerprint)  # else old and new bytes could be mixed
        return digest


def read_current(source: Source, path: str) -> bytes:
    """Read an image in its current state, whatever its fingerprint was when it was listed.

    Raises
    ------
    OSError
    ImageError
        When it is not a regular file.
    """
    if is_url(source.root):
        return _url(source.root, path).read_bytes()
    with _open(source.root, path) as file:
        data: bytes = file.read()
        return data
