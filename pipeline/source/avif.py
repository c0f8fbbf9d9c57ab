"""Finds AVIF transformations that Pillow or libavif apply wrongly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_TURNS = (b"irot", b"imir")


def check_avif(data: bytes, width: int, height: int) -> None:
    """Refuse an AVIF that is cropped (Pillow ignores that), or mirrored before it is turned (libavif reverses the order).

    Parameters
    ----------
    data : bytes
        The whole file.
    width, height : int
        Pixels, as stored.

    Raises
    ------
    ImageError
        ``unsupported_mode``.
    """
    for _, start, end in _boxes(data, 0, len(data), b"meta"):
        for _, begin, stop in _boxes(data, start + 4, end, b"iprp"):
            properties = [
                (kind, data[place:after])
                for _, first, last in _boxes(data, begin, stop, b"ipco")
                for kind, place, after in _boxes(data, first, last)
            ]
            for kind, content in properties:
                if kind == b"clap" and not _is_all(content, width, height):
                    raise ImageError("unsupported_mode", "an AVIF that is to be cropped, which Pillow ignores; save it cropped")
            for _, first, last in _boxes(data, begin, stop, b"ipma"):
                for numbers in _associated(data[first:last]):
                    turns = tuple(kind for n in numbers if 0 < n <= len(properties) and (kind := properties[n - 1][0]) in _TURNS)
                    if turns not in {(), _TURNS, _TURNS[:1], _TURNS[1:]}:
                        text = "an AVIF that is to be turned or mirrored in an order that libavif reverses; save it turned"
                        raise ImageError("unsupported_mode", text)
    for _, start, end in _boxes(data, 0, len(data), b"moov"):
        if b"clap" in data[start:end]:
            raise ImageError("unsupported_mode", "an AVIF that is to be cropped, which Pillow ignores; save it cropped")


def _boxes(data: bytes, place: int, end: int, wanted: bytes | None = None) -> Iterator[tuple[bytes, int, int]]:
    """Kind of each box, and begin and end of its content."""
    while place + 8 <= end:
        n_bytes, begin = int.from_bytes(data[place : place + 4], "big"), place + 8
        if n_bytes == 1:
            n_bytes, begin = int.from_bytes(data[place + 8 : place + 16], "big"), place + 16
        stop = place + n_bytes if n_bytes else end
        if stop < begin:
            return
        kind = data[place + 4 : place + 8]
        if wanted in (None, kind):
            yield kind, begin, min(stop, end)
        place = stop


def _is_all(content: bytes, width: int, height: int) -> bool:
    """Whether a crop keeps the whole image; it is given by fractions: width, height and two offsets from the centre."""
    fields = [int.from_bytes(content[place : place + 4], "big", signed=True) for place in range(0, 32, 4)]
    return fields[0] == width * fields[1] and fields[2] == height * fields[3] and fields[4] == fields[6] == 0


def _associated(content: bytes) -> Iterator[list[int]]:
    """Numbers of each item's properties, in their order."""
    version, is_wide = content[0], content[3] & 1
    place = 8
    for _ in range(int.from_bytes(content[4:8], "big")):
        place += 4 if version else 2
        if place >= len(content):
            return
        n, place, size = content[place], place + 1, 2 if is_wide else 1
        found = [int.from_bytes(content[place + i * size : place + (i + 1) * size], "big") for i in range(n)]
        yield [number & (0x7FFF if is_wide else 0x7F) for number in found]
        place += n * size
