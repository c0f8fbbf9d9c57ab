"""Limits the cost of a header, and checks it before Pillow sees it: Pillow allocates memory while it opens some files."""

from __future__ import annotations

import io
import re
import struct
from typing import TYPE_CHECKING, BinaryIO

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_SIDE_LIMIT = (2**31 - 1) // 32  # Pillow's limit: longer rows end in a MemoryError, however much memory there is
# Limit of reads per header: real headers take a few hundred reads, and Pillow needs a microsecond for each.
_HEADER_READS = 1 << 18
# Bytes of a JPEG's header: Pillow joins its EXIF segments one by one. For others, the part of a file that may be other than pixels.
HEADER_BYTES = 16 * 1024**2
_GIF_RECORDS = {b",", b"!", b"\0"}  # zeros are skipped, because some writers add too many
_TO_RAISE = "raise pixel_limit (--pixel-limit) to read it"
_TOO_MANY = re.compile(r"too_many_pixels: .* pixels, the limit is (\d+)")
_TOO_LARGE = re.compile(r"too_large: .* needs (\d+),")
_OTHER_FORMAT = re.compile(r"(?:unsupported_format|not_an_image): the content is (\w+), which is not among the formats")
_JPEG_MARKER = re.compile(rb"\xff[^\0\xff\xd0-\xd7]")


class StorageFault(BaseException):
    """Carries a fault of the stream past every ``except Exception`` of Pillow and of this module."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


class HeaderStream:
    """The stream that Pillow reads from. It tells read faults from the image's faults, and limits the cost of the header."""

    def __init__(self, stream: BinaryIO) -> None:
        self._read, self.seek, self.tell = stream.read, stream.seek, stream.tell
        if isinstance(stream, io.BytesIO):
            self.getvalue = stream.getvalue  # saves libtiff a copy
        self.size_bytes = stream.seek(0, io.SEEK_END)
        self._reads_left, self._bytes_left, self._is_jpeg = _HEADER_READS, HEADER_BYTES, False
        self.seek(0)

    def read(self, size: int = -1) -> bytes:
        """Read, within the limits of a header."""
        try:
            data = self._read(size)
        except (MemoryError, OverflowError):  # only a damaged header asks for such a size
            raise
        except Exception as error:
            raise StorageFault(error) from error
        self._reads_left -= 1
        self._bytes_left -= len(data)
        if self._reads_left < 0 or (self._is_jpeg and self._bytes_left < 0):
            text = f"its header takes more than {_HEADER_READS} reads, or as a JPEG's more than {HEADER_BYTES} bytes"
            raise ImageError("corrupt", f"the image cannot be decoded ({text})")
        return data

    def begin_jpeg(self) -> None:
        """Limit the bytes of the header too."""
        self._is_jpeg = True

    def end_of_header(self) -> None:
        """Bound nothing any more."""
        self.read = self._read  # type: ignore[method-assign, assignment]


def check_bytes(size_bytes: int, pixel_limit: int) -> None:
    """Refuse a file that is larger than any image within the pixel limit could be."""
    largest_bytes = _largest_bytes(pixel_limit)
    if size_bytes > largest_bytes:
        text = f"and the largest image that may be read needs {largest_bytes}, uncompressed with 16 bits per channel; {_TO_RAISE}"
        raise ImageError("too_large", f"the file has {size_bytes} bytes, {text}")


def _largest_bytes(pixel_limit: int) -> int:
    return 8 * pixel_limit + HEADER_BYTES


def is_admitted_now(error: str, decode: DecodeSpec) -> bool:
    """Whether an image's error says that ``pixel_limit`` or ``formats`` kept it out, and the current limits admit it.

    Parameters
    ----------
    error : str
        As stored, by this version or an older one.
    decode : DecodeSpec
        The rules of the current run.

    Examples
    --------
    >>> text = "too_many_pixels: the image has 30 x 40 pixels, the limit is 1000"
    >>> is_admitted_now(text, DecodeSpec(pixel_limit=1001)), is_admitted_now(text, DecodeSpec(pixel_limit=1000))
    (True, False)
    """
    if found := _TOO_MANY.match(error):
        return decode.pixel_limit > int(found[1])
    if found := _TOO_LARGE.match(error):
        return _largest_bytes(decode.pixel_limit) > int(found[1])
    found = _OTHER_FORMAT.match(error)
    return found is not None and found[1] in decode.formats


def check_pixels(what: str, height: int, width: int, limit: int) -> None:
    """Refuse an image above the pixel limit, or with a side that Pillow cannot hold."""
    if height * width > limit:
        raise ImageError("too_many_pixels", f"{what} {height} x {width} pixels, the limit is {limit}; {_TO_RAISE}")
    if max(height, width) > _SIDE_LIMIT:
        raise ImageError("too_many_pixels", f"{what} {height} x {width} pixels, the limit of a side is {_SIDE_LIMIT}")


def gif_size(stream: HeaderStream) -> tuple[int, int]:
    """Height and width of a GIF's canvas. As in Pillow, a first frame beyond the canvas enlarges it."""
    stream.seek(6)
    width, height, flags, background = struct.unpack("<HHBBx", stream.read(7))
    is_clear = False
    controls: set[bytes] = set()
    palette = stream.read(6 << (flags & 7)) if flags & 0x80 else b""
    while (kind := stream.read(1)) and kind != b";":
        if kind not in _GIF_RECORDS:
            raise _broken_gif()
        if kind == b",":  # the first frame
            left, top, frame_width, frame_height, frame_flags = struct.unpack("<4HB", stream.read(9))
            _check_gif_colours(stream, palette, frame_flags, controls)
            height, width = max(height, top + frame_height), max(width, left + frame_width)
            is_whole = (left, top, frame_width, frame_height) == (0, 0, width, height)
            if not (is_whole or is_clear) and (background or frame_flags & 0x80 or not flags & 0x80):
                text = "a GIF whose first picture leaves a part of the canvas to a background that Pillow misreads"
                raise ImageError("unsupported_mode", f"{text}; save it with a picture of the whole canvas, or as PNG")
            return height, width
        if kind == b"!":  # an extension: its label, then blocks that start with their length
            label = stream.read(1)
            while (length := stream.read(1)) > b"\0":
                block = stream.read(length[0])
                if label == b"\xf9" and block:
                    is_clear = bool(block[0] & 1)
                    controls.add(block[3:4] if is_clear else b"")
                elif label == b"\x01" and controls:  # a text, which uses up the graphic control before it
                    controls |= {b"", b"text"}
    return height, width


def check_gif_blocks(data: bytes, place: int) -> None:
    """Refuse a GIF whose blocks, from the pixels of the first picture at ``place`` on, do not lead to another record or the end."""
    while place < len(data) and data[place]:
        place += 1 + data[place]
    rest = data[place:].lstrip(b"\0")[:1]
    if place > len(data):
        raise ImageError("truncated", "the file ends before the image does (its last block is cut)")
    if rest not in {b"", b";", *_GIF_RECORDS}:
        raise _broken_gif()


def _broken_gif() -> ImageError:
    return ImageError("corrupt", "the image cannot be decoded (there are bytes between its blocks)")


def _check_gif_colours(stream: HeaderStream, palette: bytes, frame_flags: int, controls: set[bytes]) -> None:
    """Refuse a first picture for which Pillow uses the wrong palette or transparent colour; the stream is at its palette."""
    text = ""
    if frame_flags & 0x80:
        own = stream.read(6 << (frame_flags & 7))
        if palette and own == _greys(own) and palette != _greys(palette):
            text = "a GIF whose first picture has a palette of greys beside a global one, which Pillow takes instead"
    elif not palette:
        text = "a GIF without any palette, whose colours are not known"
    if len(controls) > 1:
        text = "a GIF whose first picture has several transparent colours"
    if text:
        raise ImageError("unsupported_mode", f"{text}; save it as PNG")


def _greys(palette: bytes) -> bytes:
    """A palette of the same length, in which each colour is the grey of its index."""
    return b"".join(bytes([index] * 3) for index in range(len(palette) // 3))


def check_webp(head: bytes, found_bytes: int, limit: int) -> None:
    """Refuse a WebP whose canvas is too large, or that is cut short: libwebp would say only that it failed."""
    size_bytes = 8 + int.from_bytes(head[4:8], "little")
    if found_bytes < size_bytes:
        raise ImageError("truncated", f"the file ends before the image does ({found_bytes} of {size_bytes} bytes)")
    sides = (0, 0)
    if head[12:16] == b"VP8X":
        sides = 1 + int.from_bytes(head[24:27], "little"), 1 + int.from_bytes(head[27:30], "little")
    elif head[12:16] == b"VP8 ":
        sides = int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    elif head[12:16] == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        sides = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    check_pixels("the image has", sides[1], sides[0], limit)


def check_webp_chunks(data: bytes) -> None:
    """Refuse a WebP whose header contradicts its chunks about transparency, or whose canvas Pillow fills with black."""
    if data[12:16] != b"VP8X":
        return
    is_clear, kinds = bool(data[20] & 0x10), set()
    for kind, start, n_bytes in _webp_chunks(data, 30, len(data)):
        if kind == b"ANMF":  # the first frame: two positions, then two sides, as in the header
            if not is_clear and (any(data[start : start + 6]) or data[start + 6 : start + 12] != data[24:30]):
                text = "a WebP without transparency whose first frame leaves a part of the canvas out"
                raise ImageError("unsupported_mode", f"{text}; save that frame as PNG")
            parts = list(_webp_chunks(data, start + 16, start + n_bytes))
            has_alpha = any(
                kind == b"ALPH" or (kind == b"VP8L" and data[place + 4 : place + 5] > b"\x0f" and data[place + 4] & 0x10)
                for kind, place, _ in parts
            )
            if has_alpha and not is_clear:
                raise _alpha_in_doubt()
            return
        kinds.add(kind)
        if kind == b"VP8 ":
            break
    if b"VP8 " in kinds and is_clear != (b"ALPH" in kinds):
        raise _alpha_in_doubt()


def _alpha_in_doubt() -> ImageError:
    text = "its header and its chunks disagree on whether it has an alpha channel"
    return ImageError("corrupt", f"the image cannot be decoded ({text})")


def _webp_chunks(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Kind, position and size of each chunk."""
    while place + 8 <= min(end, len(data)):
        n_bytes = int.from_bytes(data[place + 4 : place + 8], "little")
        yield data[place : place + 4], place + 8, n_bytes
        place += 8 + n_bytes + n_bytes % 2


def n_scans(data: bytes, n_colours: int) -> int:
    """Number of scans in a JPEG that libjpeg reads, up to its end; after it anything may follow, for instance a video.

    A scan with all ``n_colours`` completes the picture. With 0 none does: in a progressive JPEG no scan has everything.
    """
    n, place = 0, 2
    while (found := _JPEG_MARKER.search(data, place)) and found[0] != b"\xff\xd9":
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        if found[0] == b"\xff\xda":
            n += 1
            if n_colours and data[found.end() + 2 : found.end() + 3] == bytes([n_colours]):
                break
    return n
