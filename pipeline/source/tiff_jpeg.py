"""Checks that the JPEG data inside a TIFF are whole and match its header; each strip or tile is checked as a separate JPEG."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from pipeline.errors import ImageError
from pipeline.source.jpeg import tables_of
from pipeline.source.tiff import Layout, read_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_START, _END = b"\xff\xd8", b"\xff\xd9"
_SCAN, _CODES, _PROGRESSIVE, _FRAMES = 0xDA, 0xC4, 0xC2, {0xC0, 0xC1, 0xC2}
_NO_FRAME = {0xC4, 0xCC} | set(range(0xD9, 0xE0))
_JFIF, _ADOBE = 0xE0, 0xEE
_RGB, _CMYK, _YCBCR = 2, 5, 6


def check_jpegs(data: bytes, check_jpeg: Callable[[bytes], None]) -> None:
    """Refuse a TIFF with a strip or tile whose JPEG data are cut, damaged, or of another size than the TIFF says.

    libtiff fills what is missing with grey. It only warns of a frame that is too small.

    Parameters
    ----------
    data : bytes
        The whole file.
    check_jpeg : callable
        Takes a complete JPEG, including the tables of the tag JPEGTables, and raises `ImageError` unless all its pixels came.

    Raises
    ------
    ImageError
        ``truncated``, ``corrupt`` or ``unsupported_mode``, with the number of the strip or tile.
    """
    layout = read_layout(io.BytesIO(data), len(data))
    tables = layout.jpeg_tables
    shared = _check_shared(tables) if tables else set()
    first: set[tuple[int, int]] | None = None
    for block, (offset, n_bytes) in enumerate(zip(layout.offsets, layout.block_bytes, strict=True)):
        try:
            stored = data[offset : offset + n_bytes]
            own = _check_block(layout, stored, block, shared)
            first = own if first is None else first
            _check_same(own, first)
            check_jpeg(_START + tables[2:-2] + stored[2:])
        except ImageError as error:
            raise ImageError(error.code, f"strip or tile {block} of JPEG data: {error.text}") from error


def _check_shared(tables: bytes) -> set[tuple[int, int]]:
    """Names of the tables in a tag JPEGTables, which may contain only whole segments, and no picture."""
    segments = list(_segments(tables))
    if not tables.endswith(_END) or any(kind in _FRAMES | {_SCAN} for kind, _ in segments):
        raise ImageError("corrupt", "the image cannot be decoded (its tag JPEGTables is damaged)")
    return {name for kind, content in segments for name in tables_of(kind, content)}


def _check_block(layout: Layout, stored: bytes, block: int, shared: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """Compare the header of a strip or tile with what the TIFF says; return the names of the tables that it contains."""
    if not stored.rstrip(b"\0").endswith(_END):
        raise ImageError("truncated", "no end marker, so pixels are missing")
    segments = list(_segments(stored))
    frames = [(kind, content) for kind, content in segments if 0xC0 <= kind <= 0xCF and kind not in _NO_FRAME]
    if len(frames) != 1 or segments[-1][0] != _SCAN or len(frames[0][1]) < 6:
        raise ImageError("corrupt", "no picture, or several")
    kind, frame = frames[0]
    if kind not in _FRAMES:
        text = f"a frame of kind {kind - 0xC0}, whose end cannot be proven; save it with deflate or LZW"
        raise ImageError("unsupported_mode", text)
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    rows = layout.n_rows(block)
    is_full = layout.block_height == height >= rows  # some writers keep the full height for the last strip
    n_samples = 1 if layout.is_separate else layout.n_samples
    if (frame[0], width, frame[5]) != (layout.bits, layout.block_width, n_samples) or not (height == rows or is_full):
        found = f"{frame[5]} samples of {frame[0]} bits, {height} x {width} pixels"
        wanted = f"{n_samples} of {layout.bits} bits, {rows} x {layout.block_width}"
        raise ImageError("corrupt", f"{found}, where the TIFF says {wanted}")
    if n_samples > 1:
        _check_colours(layout.photometric, segments)
    own = {name for kind, content in segments for name in tables_of(kind, content)}
    scan = segments[-1][1]
    numbers = scan[2 : 2 + 2 * scan[0] : 2] if kind != _PROGRESSIVE else b""
    if not {(_CODES, table) for number in numbers for table in (number >> 4, 16 + (number & 15))} <= own | shared:
        raise ImageError("corrupt", "a table of codes is missing")  # libjpeg would use one of its own
    return own


def _check_same(own: set[tuple[int, int]], first: set[tuple[int, int]]) -> None:
    """Refuse strips with different tables, because libtiff keeps those of earlier strips."""
    if own != first:
        text = "it does not bring the same tables as the first strip or tile; save it with deflate or LZW"
        raise ImageError("unsupported_mode", text)


def _check_colours(photometric: int, segments: list[tuple[int, bytes]]) -> None:
    """Refuse a JPEG and a TIFF that name different colours: libtiff follows the TIFF, other decoders the JPEG."""
    marks = [content[11] for kind, content in segments if kind == _ADOBE and content.startswith(b"Adobe") and len(content) > 11]
    is_jfif = any(kind == _JFIF and content.startswith(b"JFIF") for kind, content in segments)
    expected = {_RGB: 0, _CMYK: 0, _YCBCR: 1}.get(photometric)
    if expected is not None and (any(mark != expected for mark in marks) or (is_jfif and not marks and photometric == _RGB)):
        raise ImageError("unsupported_mode", "the JPEG and the TIFF name different colours; save it with deflate or LZW")


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kind and content of each segment up to the first scan or the end; refuse bytes between them."""
    if not data.startswith(_START):
        raise ImageError("corrupt", "it does not begin as a JPEG does")
    place = 2
    while data[place : place + 2] != _END:
        while data[place : place + 2] == b"\xff\xff":
            place += 1
        kind, n_bytes = data[place + 1 : place + 2], int.from_bytes(data[place + 2 : place + 4], "big")
        if data[place : place + 1] != b"\xff" or kind < b"\xc0" or n_bytes < 2 or place + 2 + n_bytes > len(data):
            raise ImageError("corrupt", "a segment of the header is damaged")
        yield kind[0], data[place + 4 : place + 2 + n_bytes]
        if kind[0] == _SCAN:
            return
        place += 2 + n_bytes
