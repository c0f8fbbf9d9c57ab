"""What decoding drops of an image: further pages or frames, further channels, low bits. Found from the header alone."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

MAX_PAGES, MAX_FAR_PAGES = 100, 2
"""TIFF directories that are examined, in a file and in a bucket; in a bucket each one takes a request."""
GIF_BYTES = 1 << 18
"""How many bytes of a GIF are searched for its second frame."""
_SUBFILE, _BITS, _PHOTOMETRIC, _SAMPLES, _EXTRA = 254, 258, 262, 277, 338
_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # samples of a pixel per photometric interpretation
_ALPHA = {1, 2}
_KEPT_BITS = 8
_LARGER_FORMATS = {"TIFF", "PNG", "GIF", "WEBP", "AVIF", "PPM"}


class Stream(Protocol):
    """What is needed of a file."""

    def read(self, size: int = -1, /) -> bytes:
        """Same as for a binary file."""

    def seek(self, offset: int, /) -> Any:
        """As of a binary file."""


def dropped(image: Any, stream: Stream, *, is_far: bool = False) -> tuple[str, ...]:
    """Codes of what is dropped: ``pages:5``, ``frames:12``, ``frames:2+``, ``channels:5/3`` (3 of 5 are used), ``bits:16``.

    Parameters
    ----------
    image : PIL.Image.Image
        As opened, not loaded.
    stream : Stream
        The same file; its position is changed.
    is_far : bool
        Whether each read at another position takes a request.
    """
    if image.format not in _LARGER_FORMATS:
        return ()
    try:
        return tuple(_dropped(image, stream, is_far))
    except Exception:  # noqa: BLE001 (an odd header: the decoder judges it)
        return ()


def _dropped(image: Any, stream: Stream, is_far: bool) -> Iterator[str]:
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.format == "TIFF":
        n, is_more = n_pages(stream, MAX_FAR_PAGES if is_far else MAX_PAGES)
        if n > 1:
            yield f"pages:{n}{'+' * is_more}"
        yield from channels(int(tags.get(_SAMPLES, 1)), tags.get(_PHOTOMETRIC, 1), tags.get(_EXTRA, ()))
        bits = max(tags.get(_BITS, (1,)))
    else:
        yield from _frames(image, stream)
        bits = _bits(image)
    if bits > _KEPT_BITS:
        yield f"bits:{bits}"


def is_far(file: object) -> bool:
    """Whether a file is in a bucket, so that each read at another position takes a request."""
    raw = getattr(file, "raw", None)
    return isinstance(raw, io.RawIOBase) and not isinstance(raw, io.FileIO)


def channels(n: int, photometric: int, extra: tuple[int, ...]) -> Iterator[str]:
    """What is dropped of the samples of a TIFF: those beyond its colours that are not alpha.

    Examples
    --------
    >>> list(channels(5, 2, (0, 0))), list(channels(4, 2, (2,))), list(channels(2, 1, (0,)))
    (['channels:5/3'], [], ['channels:2/1'])
    """
    n_used = _COLOURS.get(photometric, n) + bool(_ALPHA.intersection(extra))
    if n > n_used:
        yield f"channels:{n}/{n_used}"


def _frames(image: Any, stream: Stream) -> Iterator[str]:
    if image.format == "GIF":
        if has_second_frame(stream):
            yield "frames:2+"
    elif image.format in {"PNG", "WEBP", "AVIF"} and getattr(image, "n_frames", 1) > 1:
        yield f"frames:{image.n_frames}"


def _bits(image: Any) -> int:
    """Bits per channel of a PNG or a PNM, from what Pillow will unpack; other formats are not deeper, or nothing tells."""
    if image.format not in {"PNG", "PPM"} or not image.tile:
        return 0
    given = image.tile[0][3]
    raw_mode, *others = given if isinstance(given, tuple) else (given,)
    most = next((value for value in others if image.format == "PPM" and isinstance(value, int)), 0)  # PNM: the value of white
    return 16 if ";16" in str(raw_mode) else most.bit_length()


def n_pages(stream: Stream, most: int = MAX_PAGES) -> tuple[int, bool]:
    """Pages among the first ``most`` directories of a TIFF, and whether more follow; thumbnails and masks do not count."""
    stream.seek(0)
    head = stream.read(16)
    order, is_big = "<>"[head[:1] == b"M"], b"\x2b" in head[2:4]
    offset, count, entry = (struct.Struct(order + form) for form in (("Q", "Q", "HHQQ") if is_big else ("I", "H", "HHII")))
    n, place, seen = 0, head[8 if is_big else 4 :][: offset.size], set[bytes]()
    while len(place) == offset.size and any(place) and place not in seen and len(seen) < most:
        seen.add(place)
        stream.seek(*offset.unpack(place))
        number = stream.read(count.size)
        n_tags = min(*count.unpack(number), 65536) if len(number) == count.size else 0
        directory = stream.read(n_tags * entry.size + offset.size)
        place = directory[n_tags * entry.size :]
        if not n_tags:
            break
        n += n == 0 or not _is_smaller_or_mask(directory[: n_tags * entry.size], entry, order)
    return n, len(place) == offset.size and any(place) and place not in seen


def _is_smaller_or_mask(directory: bytes, entry: struct.Struct, order: str) -> bool:
    """Whether NewSubfileType marks a smaller version or a mask; the tags of a directory ascend."""
    for place in range(0, len(directory) - entry.size + 1, entry.size):
        tag, kind, _, _ = entry.unpack_from(directory, place)
        if tag >= _SUBFILE:
            (value,) = struct.unpack_from(order + ("H" if kind == 3 else "I"), directory, place + (12 if entry.size == 20 else 8))
            return bool(tag == _SUBFILE and value & 5)
    return False


def has_second_frame(stream: Stream) -> bool:
    """Whether a GIF has a second frame within its first `GIF_BYTES`."""
    stream.seek(0)
    data = stream.read(GIF_BYTES)
    end, data = len(data), data + bytes(1024)  # so that a header at the end is complete
    place, n = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0), 0
    while place < end and n < 2:
        kind = data[place : place + 1]
        if kind == b",":
            n += 1
            flags = data[place + 9]
            place += 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        elif kind == b"!":
            place += 2
        else:
            break
        while place < end and (length := data[place]):
            place += length + 1
        place += 1
    return n == 2


# -- descriptions ------------------------------------------------------------------------------------------------------------------


def describe_dropped(counts: Mapping[str, int]) -> list[str]:
    """One line per kind of what was dropped.

    Parameters
    ----------
    counts : mapping of str to int
        Images per code of `dropped`.

    Examples
    --------
    >>> for line in describe_dropped({"pages:5": 99, "pages:7": 1, "bits:16": 12, "channels:5/3": 3, "frames:2+": 1}):
    ...     print(line)
    100 images have 5 to 7 pages: only the first is used; no setting keeps the others yet
    1 image has 2 or more frames: only the first is used; no setting keeps the others yet
    3 images have 5 channels: the first 3 are used; no setting keeps the others yet
    12 images have 16 bits per channel: the low 8 bits are dropped; no setting keeps them yet
    """
    lines = []
    for kind in ("pages", "frames", "channels", "bits"):
        values = {code.partition(":")[2]: n for code, n in counts.items() if code.startswith(f"{kind}:")}
        n = sum(values.values())
        if n:
            lines.append(f"{n} image{'s have' if n > 1 else ' has'} {_said(kind, list(values))}")
    return lines


def _said(kind: str, values: list[str]) -> str:
    first = [value.partition("/")[0] for value in values]
    if kind == "bits":
        low = _span([str(int(value) - _KEPT_BITS) for value in first])
        return f"{_span(first)} bits per channel: the low {low} bits are dropped; no setting keeps them yet"
    if kind == "channels":
        used = _span([value.partition("/")[2] for value in values])
        are = "is" if used == "1" else "are"
        return f"{_span(first)} channels: the first {f'{used} ' * (used != '1')}{are} used; no setting keeps the others yet"
    return f"{_span(first)} {kind}: only the first is used; no setting keeps the others yet"


def _span(values: list[str]) -> str:
    """The range of some numbers, in words.

    Examples
    --------
    >>> _span(["5"]), _span(["7", "5"]), _span(["2+", "3"]), _span(["2+"])
    ('5', '5 to 7', '2 or more', '2 or more')
    """
    numbers = sorted({int(value.rstrip("+")) for value in values})
    if any(value.endswith("+") for value in values):
        return f"{numbers[0]} or more"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
