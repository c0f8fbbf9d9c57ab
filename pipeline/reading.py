"""Reach files: probe headers, read bytes, and tell an image's own fault from one of the storage that may pass."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pipeline import decode
from pipeline.collection import fingerprint_of
from pipeline.config import DecodeSpec
from pipeline.errors import ImageError, PassingFaultError
from pipeline.paths import absolute_path

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
    """Where images come from and how they are decoded."""

    root: str
    decode: DecodeSpec


class Probed(NamedTuple):
    """What a header says of one image: sizes, or why it has none (``error``), or a fault that may pass (``fault``)."""

    source_height: int = 0
    source_width: int = 0
    input_height: int = 0
    input_width: int = 0
    error: str = ""
    fault: str = ""
    decode_bytes: int = 0


class Patience:
    """How long to wait for the storage to recover: for the first image of a batch that needs it, not for each again."""

    def __init__(self) -> None:
        self.pauses_s: tuple[float, ...] = RETRY_PAUSES_S


class ProbedBlock(tuple[Probed, ...]):
    """What the headers of a block say; a type of its own, because Dask sends each item of a plain list or tuple by itself."""

    __slots__ = ()


def probe_block(source: Source, paths: Sequence[str], needed: tuple[int, int]) -> ProbedBlock:
    """Read the headers of some images.

    Parameters
    ----------
    source : Source
    paths : sequence of str
        Relative, encoded.
    needed : (int, int)
        Smallest input height and width that leave a map.
    """
    patience = Patience()
    return ProbedBlock(_probe(source, path, needed, patience) for path in paths)


def _probe(source: Source, path: str, needed: tuple[int, int], patience: Patience) -> Probed:
    try:
        size, file_bytes = _retry(lambda: _probe_file(source, path), source.root, path, patience)
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
    return Probed(*sizes, decode_bytes=size.decode_bytes + file_bytes)


def _probe_file(source: Source, path: str) -> tuple[decode.ImageSize, int]:
    """What the header says, and the size of the file."""
    with _open(source.root, path) as file:
        return decode.probe(file, source.decode), os.fstat(file.fileno()).st_size


def _open(root: str, path: str) -> Any:
    """Open a regular file for reading; others would block or never end."""
    descriptor = os.open(absolute_path(root, path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ImageError("not_a_file", "a folder, pipe, socket or device")
    return os.fdopen(descriptor, "rb")


def _retry(action: Callable[[], T], root: str, path: str, patience: Patience) -> T:
    """Run ``action``, again after faults that may pass; sort out what the image is to blame for."""
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
    """Whether the source itself is missing or empty, as an unmounted disk is."""
    try:
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
    return _retry(lambda: _read_file(source.root, path, fingerprint), source.root, path, patience)


def _read_file(root: str, path: str, fingerprint: str) -> bytes:
    with _open(root, path) as file:
        _require_fingerprint(file, fingerprint)
        data: bytes = file.read()
        return data


def _require_fingerprint(file: Any, fingerprint: str) -> None:
    found = fingerprint_of(os.fstat(file.fileno()))
    if found != fingerprint:
        raise ImageError("changed", f"the file changed after it was listed (from {fingerprint} to {found}); run again")


class Digested(NamedTuple):
    """SHA-256 of an image's bytes, or why there is none (``error``), or a fault that may pass (``fault``)."""

    digest: str = ""
    error: str = ""
    fault: str = ""


class DigestedBlock(tuple[Digested, ...]):
    """The digests of a block; a type of its own, as `ProbedBlock`."""

    __slots__ = ()


def digest_block(root: str, images: Sequence[tuple[str, str]]) -> DigestedBlock:
    """Read some images, a piece at a time, for the digests of their bytes.

    Parameters
    ----------
    root : str
        Source root.
    images : sequence of (str, str)
        Path and fingerprint; an image of another fingerprint is an error.
    """
    patience = Patience()
    return DigestedBlock(_digest(root, path, fingerprint, patience) for path, fingerprint in images)


def _digest(root: str, path: str, fingerprint: str, patience: Patience) -> Digested:
    try:
        return Digested(_retry(lambda: _digest_file(root, path, fingerprint), root, path, patience))
    except ImageError as error:
        return Digested(error=str(error))
    except PassingFaultError as fault:
        return Digested(fault=str(fault))


def _digest_file(root: str, path: str, fingerprint: str) -> str:
    with _open(root, path) as file:
        _require_fingerprint(file, fingerprint)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        _require_fingerprint(file, fingerprint)  # else some of the bytes may be old and some new
        return digest


def read_current(source: Source, path: str) -> bytes:
    """Read an image as it is now, whatever it was when it was listed.

    Raises
    ------
    OSError
    ImageError
        When it is no regular file.
    """
    with _open(source.root, path) as file:
        data: bytes = file.read()
        return data
