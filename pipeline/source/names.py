"""Converts names to the form that is stored: relative paths of bytes, percent-encoded where they are not UTF-8."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import unquote_to_bytes

from pipeline.errors import UsageError

_ESCAPED = re.compile("[\udc80-\udcff]")


def encode_path(relative: bytes) -> str:
    r"""Turn the bytes of a path into text: valid UTF-8 stays, other bytes and ``%`` become ``%XX``.

    Examples
    --------
    >>> encode_path(b"caf\xc3\xa9/50%\xff.jpg")
    'café/50%25%FF.jpg'
    >>> decode_path("café/50%25%FF.jpg")
    b'caf\xc3\xa9/50%\xff.jpg'
    """
    text = relative.replace(b"%", b"%25").decode("utf-8", "surrogateescape")
    return text if text.isascii() else _ESCAPED.sub(lambda match: f"%{ord(match[0]) - 0xDC00:02X}", text)


def decode_path(path: str) -> bytes:
    """Return the bytes from which `encode_path` made a path."""
    return unquote_to_bytes(path)


def absolute_path(root: str, path: str) -> bytes:
    """Join a listing's root and one of its paths to the path that a worker opens."""
    return os.path.join(os.fsencode(root), decode_path(path))


def absolute_url(root: str, path: str) -> str:
    """`absolute_path` for a root that is a URL."""
    return (
        f"{root.removesuffix('/')}/{decode_path(path).decode()}"
        if not root.endswith("://")
        else root + decode_path(path).decode()
    )


def suffix_of(name: str | bytes) -> str:
    """Lower-case suffix of a name."""
    return os.path.splitext(os.fsdecode(name))[1].lower()


def nothing_listed(what: str, unreadable: Sequence[str] = ()) -> UsageError:
    """The error for a source without images."""
    also = f" (folders that could not be read: {len(unreadable)}, first {unreadable[0]!r})" if unreadable else ""
    return UsageError(
        f"{what}{also}, so there is nothing to do: its disk may not be mounted. Nothing was marked as removed; check the path"
    )
