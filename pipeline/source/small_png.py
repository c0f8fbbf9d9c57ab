"""Small PNGs of the plainest kind, in a tenth of the time: no chunk that could change the pixels, all checksums right.

Whatever is unusual is left to `png`, which finds the words for it, so that nothing is read here that would be refused there.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.source.header_limits import HeaderStream, check_bytes, check_pixels
from pipeline.source.png import SIGNATURE

if TYPE_CHECKING:
    from pipeline.config import DecodeSpec

_HEAD_BYTES = 256  # of a file, in which the header is looked for
_MAX_BYTES = 1 << 16  # of unpacked pixels: they are unpacked twice, which costs more than it spares in larger ones
_MODES = {bytes((8, 0, 0, 0, 0)): "L", bytes((8, 2, 0, 0, 0)): "RGB"}  # depth, colour, compression, filter, interlace
_WITHOUT_EFFECT = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
"""Chunks that change no pixel, and their lengths."""


class SmallPng(NamedTuple):
    """What the header says; named as by Pillow."""

    size: tuple[int, int]
    """Width and height."""
    mode: str
    """``L`` or ``RGB``."""
    place: int
    """Where the first chunk of pixels begins."""
    format: str = "PNG"
    has_transparency_data: bool = False


def open_small(stream: HeaderStream, spec: DecodeSpec) -> SmallPng | None:
    """Read the header of a file; None if it is unusual, and the stream is at its beginning again.

    Raises
    ------
    ImageError
        ``too_many_pixels`` or ``too_large``.
    """
    found = _read_header(stream.read(_HEAD_BYTES)) if "PNG" in spec.formats else None
    if found:
        check_bytes(stream.size_bytes, spec.pixel_limit)
        check_pixels("the image has", *found.size[::-1], spec.pixel_limit)
    stream.seek(0)
    return found


def _read_header(data: bytes) -> SmallPng | None:
    """What a file, or its beginning, says."""
    if data[:8] != SIGNATURE or data[8:16] != b"\0\0\0\x0dIHDR":
        return None
    size, mode = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")), _MODES.get(data[24:29])
    if mode is None or not 0 < size[0] * size[1] * len(mode) <= _MAX_BYTES or not _is_sound(data, 8, 13):
        return None
    place = 33
    while (name := data[place + 4 : place + 8]) != b"IDAT":
        n_bytes = int.from_bytes(data[place : place + 4], "big")
        if _WITHOUT_EFFECT.get(name) != n_bytes or not _is_sound(data, place, n_bytes):
            return None
        place += 12 + n_bytes
    return SmallPng(size, mode, place)


def _is_sound(data: bytes, place: int, n_bytes: int) -> bool:
    """Whether the checksum of the chunk at ``place`` is there and right."""
    end = place + 8 + n_bytes
    return end + 4 <= len(data) and zlib.crc32(data[place + 4 : end]) == int.from_bytes(data[end : end + 4], "big")


def decode_small(data: bytes, spec: DecodeSpec, pillow: Any) -> np.ndarray | None:
    """Pixels (height, width, channel) uint8 of a file, by Pillow's decoder without what surrounds it; None if it is unusual.

    Parameters
    ----------
    data : bytes
        The whole file.
    spec : DecodeSpec
    pillow : module
        ``PIL.Image``.
    """
    header = _read_header(data) if "PNG" in spec.formats and len(data) <= 2 * _MAX_BYTES else None
    if header is None or (header.mode == "RGB" and spec.color == "grey"):
        return None
    (width, height), mode = header.size, header.mode
    if width * height > spec.pixel_limit or spec.resize not in {None, (height, width)}:
        return None
    packed = _packed(data, header.place)
    if packed is None or not _is_whole(packed, height * (1 + width * len(mode))):
        return None
    try:
        pixels = np.frombuffer(_unpack(pillow.core, packed, mode, header.size), np.uint8).reshape(height, width, len(mode))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (a filter that there is not, or another Pillow: the long way tells)
        return None
    if len(mode) == spec.channels:
        return pixels
    pixels = np.repeat(pixels, spec.channels, axis=2)
    pixels.flags.writeable = False
    return pixels


def _packed(data: bytes, place: int) -> bytes | None:
    """The compressed pixels; None if a checksum is wrong."""
    parts = []
    while data[place + 4 : place + 8] == b"IDAT":
        n_bytes = int.from_bytes(data[place : place + 4], "big")
        if not _is_sound(data, place, n_bytes):
            return None
        parts.append(data[place + 8 : place + 8 + n_bytes])
        place += 12 + n_bytes
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _is_whole(packed: bytes, n_bytes: int) -> bool:
    """Whether this is a zlib stream of so many bytes, with its checksum and nothing behind it."""
    inflate = zlib.decompressobj()
    try:
        n_found = len(inflate.decompress(packed, n_bytes + 1))
    except zlib.error:
        return False
    return inflate.eof and n_found == n_bytes and not inflate.unused_data


def _unpack(core: Any, packed: bytes, mode: str, size: tuple[int, int]) -> bytes:
    """Rows without their filters. What Pillow's Python code does around these calls takes ten times as long as they do."""
    image, box = core.new(mode, size), (0, 0, *size)
    decoder, encoder = core.zip_decoder(mode, mode), core.raw_encoder(mode, mode, 0, 1)
    decoder.setimage(image, box)
    n_used, error = decoder.decode(packed)
    encoder.setimage(image, box)
    n_bytes = size[0] * size[1] * len(mode)
    _, is_over, pixels = encoder.encode(n_bytes)
    if n_used >= 0 or error < 0 or is_over < 0 or len(pixels) != n_bytes:
        raise ValueError("Pillow's decoder found no end")
    found: bytes = pixels
    return found
