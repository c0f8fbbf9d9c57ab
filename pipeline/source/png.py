"""Checks a PNG for damage: the checksums of chunks and of pixels, and the number of bytes of its pixels.

Pillow refuses a PNG for any broken chunk before the pixels, but checks no checksum of the pixels. This module does the opposite.
"""

from __future__ import annotations

import io
import zlib
from collections import deque
from typing import IO, TYPE_CHECKING, Any, Protocol

from pipeline.errors import ImageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DECISIVE = (b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS")  # chunks that affect the pixels
_ORDER = (b"IHDR", b"PLTE", b"tRNS")
_KEPT = frozenset(_ORDER)
_TURNING_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0")  # keywords of texts from which Pillow reads an orientation
_PASSES = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)  # the passes of Adam7: y, x, steps
_MARK = (165, 90, 60, 195)  # marks rows that the decoder has not written
_PIECE_BYTES = 1 << 16
_END_BYTES = 64
_CRC_OF_IDAT = zlib.crc32(b"IDAT")
_OUTPUT_BYTES = 1 << 20


class Header(Protocol):
    """A seekable stream of known size."""

    size_bytes: int

    read: Callable[[int], bytes]
    seek: Callable[..., int]


def open_png(open_image: Callable[[IO[bytes]], Any], stream: Any) -> Any:
    """Open a PNG by ``open_image``; if that fails, try again without broken chunks that are not needed.

    Raises
    ------
    ImageError
        ``corrupt`` or ``truncated``: a chunk that affects the pixels is broken, or the header has no end.
    Exception
        What ``open_image`` raised, if no chunk is the reason.
    """
    try:
        return open_image(stream)
    except (ImageError, MemoryError):
        raise
    except Exception:
        for data in _mended(stream):
            try:
                return open_image(io.BytesIO(data))
            except (ImageError, MemoryError):
                raise
            except Exception:  # noqa: BLE001, S112 (the first failure is the one to report)
                continue
        raise


def load_png(image: Any, *, keep_spare_row: bool) -> None:
    """Let Pillow decode the pixels of a PNG, and refuse them if the file's own checksums do not match.

    Pillow stops at the last row. So it is given an image with a spare row below. Where the compressed stream does not end with the
    last row, Pillow asks for more data, or the spare row changes. Then, and only then, the stream is unpacked a second time.

    Parameters
    ----------
    image : PngImageFile
        Opened from bytes in memory, not loaded.
    keep_spare_row : bool
        Keep the spare row in ``image.im`` (``image.size`` leaves it out); this saves a copy, unless a colour is transparent.

    Raises
    ------
    ImageError
        ``corrupt``: a checksum is wrong, or the data are damaged, too long or too short. ``truncated``: the file ends too early.
    """
    data, place, height = image.fp.getvalue(), image.tile[0].offset, image.height
    _check_order(data, place)
    n_bytes, is_interlaced = _check_header(data, place, image)
    pieces, asked_again = _merged(_pieces(data, place)), []

    def read(_: int) -> bytes:
        piece = next(pieces, b"")
        if not piece:
            asked_again.append(True)
        return piece

    image.load_read, image.load_end = read, lambda: None  # what follows the pixels does not matter
    failure, is_sure = None, False
    try:
        is_sure = _load(image, n_spare_rows=0 if is_interlaced else 1)
        deque(pieces, 0)  # check the chunks that Pillow did not need
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (an error of Pillow, or a wrong checksum)
        failure = error
    if failure or not is_sure:
        try:
            check_stream(b"".join(_pieces(data, place)), n_bytes, is_cut=_is_cut(data, place))
        except ImageError as found:
            raise found from failure
    if failure and not asked_again:
        raise failure
    image.tile, image._size = [], (image.width, height)
    if not is_interlaced and not (keep_spare_row and "transparency" not in image.info):
        image.im = image.im.crop((0, 0, *image.size))


def check_stream(stream: bytes, n_bytes: int, *, is_cut: bool) -> None:
    """Refuse compressed pixels unless they are a complete zlib stream of ``n_bytes``; data after the stream are ignored."""
    inflate, n_found = zlib.decompressobj(), 0
    try:
        for start in range(0, len(stream), _PIECE_BYTES):
            rest = stream[start : start + _PIECE_BYTES]
            while not inflate.eof and n_found <= n_bytes:
                output = inflate.decompress(rest, _OUTPUT_BYTES)
                n_found, rest = n_found + len(output), inflate.unconsumed_tail
                if not rest and len(output) < _OUTPUT_BYTES:
                    break
    except zlib.error as error:
        raise _corrupt(f"its compressed pixels are damaged: {error}") from error
    if n_found > n_bytes:
        raise _corrupt("its compressed pixels go on behind the last row")
    if not inflate.eof and is_cut:
        raise ImageError("truncated", "the file ends before the image does (its compressed pixels have no end)")
    if not inflate.eof or n_found < n_bytes:
        raise _corrupt("its compressed pixels end before the last row, or without their checksum")


def _corrupt(text: str) -> ImageError:
    return ImageError("corrupt", f"the image cannot be decoded ({text})")


def _check_header(data: bytes, place: int, image: Any) -> tuple[int, bool]:
    """Size of the unpacked pixels in bytes, and whether they are interlaced."""
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))
    depth, color, compression, _, interlace = data[24:29]
    if data[8:16] != b"\0\0\0\x0dIHDR" or (width, height) != image.size:
        raise _corrupt("IHDR is not its first and only header of 13 bytes")
    if compression or interlace > 1:
        raise _corrupt(f"compression {compression} and interlace {interlace}: PNG knows compression 0 and interlace 0 and 1")
    if data[place - 4 : place] != b"IDAT":
        raise _corrupt("its pixels do not begin with IDAT")
    if color == 3 and not (image.png.im_palette and image.png.im_palette[1] and len(image.png.im_palette[1]) % 3 == 0):
        raise _corrupt("its palette is missing, or no whole number of colours")
    n_bytes = 0
    for top, left, y_step, x_step in _PASSES if interlace else ((0, 0, 1, 1),):
        n_rows, n_columns = -(-(height - top) // y_step), -(-(width - left) // x_step)
        if n_rows > 0 and n_columns > 0:
            n_bytes += n_rows * (1 + (n_columns * depth * _CHANNELS[color] + 7) // 8)
    return n_bytes, bool(interlace)


def _check_order(data: bytes, place: int) -> None:
    """Refuse a second header, palette or transparency, and a palette after the transparency: decoders differ on which counts."""
    found, start = [], 8
    while start < place - 8:
        found.append(data[start + 4 : start + 8])
        start += 12 + int.from_bytes(data[start : start + 4], "big")
    decisive = [name for name in found if name in _ORDER]
    if decisive != [name for name in _ORDER if name in decisive]:
        raise _corrupt("one of its chunks IHDR, PLTE and tRNS comes twice, or tRNS before PLTE")


def _pieces(data: bytes, place: int) -> Iterator[bytes]:
    """The compressed pixels of the IDAT chunks from ``place`` on, as far as the file has them."""
    place -= 8
    while data[place + 4 : place + 8] == b"IDAT":
        end, crc = place + 8 + int.from_bytes(data[place : place + 4], "big"), _CRC_OF_IDAT
        for start in range(place + 8, min(end, len(data)), _PIECE_BYTES):
            piece = data[start : min(start + _PIECE_BYTES, end)]
            crc = zlib.crc32(piece, crc)
            yield piece
        if end + 4 <= len(data) and crc != int.from_bytes(data[end : end + 4], "big"):
            raise _corrupt("an IDAT chunk has a wrong checksum")
        place = end + 4


def _merged(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes; the last piece is long enough to hold the end of the last row and the end of the stream."""
    held: list[bytes] = []
    for piece in pieces:
        if held and len(piece) >= _END_BYTES:
            yield held[0] if len(held) == 1 else b"".join(held)
            held = []
        held.append(piece)
    yield b"".join(held)


def _is_cut(data: bytes, place: int) -> bool:
    """Whether the file ends with its pixels, without a further chunk."""
    place -= 8
    while data[place + 4 : place + 8] == b"IDAT":
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return place + 8 > len(data)


def _load(image: Any, *, n_spare_rows: int) -> bool:
    """Decode; return whether the pixels certainly end with the last row: it was written, and the spare row below was not."""
    width, height = image.size
    image._size = (width, height + n_spare_rows)
    image.tile = [image.tile[0]._replace(extents=(0, 0, *image._size))]  # ignores what an animation says about its first frame
    if not n_spare_rows:
        image.load()
        return False
    image.load_prepare()
    n_bands = len(image.getbands())
    image.im.paste(_MARK[:n_bands] if n_bands > 1 else _MARK[0], (0, height - 1, (width + 1) // 2, height + 1))
    last, spare = (_rows(image, top, top + 1) for top in (height - 1, height))
    image.load()
    return _rows(image, height - 1, height) != last and _rows(image, height, height + 1) == spare


def _rows(image: Any, top: int, bottom: int) -> bytes:
    rows: bytes = image._new(image.im.crop((0, top, image.im.size[0], bottom))).tobytes()
    return rows


def _mended(stream: Header) -> Iterator[bytes]:
    """Versions of the file without broken chunks that are not needed: first with the chunks that may turn the image, then without."""
    stream.seek(0)
    if stream.read(8) != SIGNATURE:
        return
    needed, turning = [], []
    for name, chunk in _header_chunks(stream):
        if name in _KEPT:
            needed.append(chunk)
        elif name == b"eXIf" or (name in {b"tEXt", b"zTXt", b"iTXt"} and chunk[8:].startswith(_TURNING_TEXTS)):
            turning.append(chunk)
    pixels = _from_pixels(stream)
    yield b"".join([SIGNATURE, *needed, *turning, pixels])
    yield b"".join([SIGNATURE, *needed, pixels])


def _from_pixels(stream: Any) -> bytes:
    """All bytes from the first IDAT on, for a file in memory; for other files, only the start of the chunk."""
    start = stream.tell() - 8
    rest: bytes = stream.getvalue()[start:] if hasattr(stream, "getvalue") else bytes(4) + b"IDAT"
    return rest


def _header_chunks(stream: Header) -> Iterator[tuple[bytes, bytes]]:
    """Name and bytes of each sound chunk before the pixels; stops after the 8 bytes that begin the first IDAT."""
    while True:
        head = stream.read(8)
        size, name = int.from_bytes(head[:4], "big"), head[4:]
        if len(head) == 8 and name == b"IDAT":
            return
        body = stream.read(min(size + 4, stream.size_bytes))
        if len(head) < 8 or len(body) < size + 4:
            raise ImageError("truncated", "the file ends before the image does (a chunk of its header has no end)")
        if zlib.crc32(body[:-4], zlib.crc32(name)) == int.from_bytes(body[-4:], "big"):
            yield name, head + body
        else:
            _check_ignorable(name, body)


def _check_ignorable(name: bytes, body: bytes) -> None:
    """Refuse a chunk with a wrong checksum, unless neither its name, nor one that it may have had, affects the pixels."""
    is_ancillary = name.isalpha() and name.isascii() and name[:1].islower()
    is_near = any((int.from_bytes(name, "big") ^ int.from_bytes(other, "big")).bit_count() < 2 for other in _DECISIVE)
    swallows = any(other in body for other in (*_DECISIVE, b"eXIf"))  # then its length is damaged
    if not is_ancillary or is_near or swallows:
        raise _corrupt(f"the chunk {name!r} has a wrong checksum")
