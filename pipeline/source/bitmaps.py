"""BMP and PNM: formats without a checksum. Pillow reads some of them differently from what their header says."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from pipeline.errors import ImageError

_RAW_MODES = {1: {"1", "P;1"}, 4: {"P;4"}, 8: {"P", "L"}}  # raw modes that Pillow must use for indices, by number of bits
_RUN_BITS = {1: 8, 2: 4}  # by compression
_MASKS = 3  # compression of a BMP that gives a bit mask for each colour
HEAD_BYTES = 70  # of a BMP, up to the mask of alpha


def check_bitmap(image: Any, head: bytes) -> None:
    """Refuse a BMP or PNM that Pillow would misread; other formats pass.

    Parameters
    ----------
    image : PIL.Image.Image
        Opened, not loaded.
    head : bytes
        The first `HEAD_BYTES` of the file.

    Raises
    ------
    ImageError
        ``unsupported_mode`` (BMP), or ``corrupt`` for samples above the maximum of a PNM that is read from memory.
    """
    if image.format == "BMP":
        _check_bmp(image, head)
        if image.tile[0].codec_name == "bmp_rle" and hasattr(image.fp, "getvalue"):
            _check_runs(image, image.fp.getvalue())
    elif image.format == "PPM" and hasattr(image.fp, "getvalue"):
        codec = image.tile[0].codec_name
        _check_comments(image, codec)
        if codec == "ppm":
            _check_samples(image, image.fp.getvalue())
        elif codec == "ppm_plain" and image.mode != "1":
            _check_last_number(image, image.fp.getvalue())


def check_indices(image: Any) -> None:
    """Refuse a pixel index beyond the palette: Pillow makes such pixels black, other decoders do not.

    Parameters
    ----------
    image : PIL.Image.Image
        In mode P, loaded.
    """
    n_colours = len(image.palette.palette) // len(image.palette.mode)
    beyond = [index for index, n in enumerate(image.histogram()) if n and index >= n_colours]
    if beyond and beyond != [image.info.get("transparency")]:
        text = f"a pixel has the index {beyond[-1]}, and the palette has {n_colours} colours"
        raise ImageError("corrupt", f"the image cannot be decoded ({text})")


def _check_bmp(image: Any, head: bytes) -> None:
    bits = struct.unpack_from("<H", head, 24 if head[14] == 12 else 28)[0]
    codec, _, offset, (raw_mode, *_) = image.tile[0]
    compression, text = image.info["compression"], ""
    if codec == "bmp_rle" and (_RUN_BITS[compression] != bits or offset % 2 or image.mode == "1"):
        text = f"runs (compression {compression}) of {bits} bits at byte {offset}"
    elif codec == "raw" and bits in _RAW_MODES and raw_mode not in _RAW_MODES[bits]:
        text = f"indices of {bits} bits with a palette of greys"
    size = int.from_bytes(head[14:18], "little")
    n_colours = (int.from_bytes(head[46:50], "little") if size > 12 else 0) or 1 << bits
    if bits <= 8 and 14 + size + (4 if size > 12 else 3) * n_colours > offset:
        text = f"a palette of {n_colours} colours that reaches into the pixels"
    if bits == 16 and compression == _MASKS and size >= 56 and any(head[66:70]):
        text = "alpha in 16 bits"
    if text:
        raise ImageError("unsupported_mode", f"BMP with {text}: Pillow reads it otherwise; save it as PNG")


def _check_runs(image: Any, data: bytes) -> None:
    """Refuse runs that cross the end of their row, because decoders differ there; some writers fill a row up to whole words."""
    is_nibbles = image.info["compression"] == 2
    end_of_row = -(-image.width // (8 if is_nibbles else 4)) * (8 if is_nibbles else 4)
    place, x, y = image.tile[0].offset, 0, 0
    while place + 1 < len(data):
        n, value = data[place], data[place + 1]
        place += 2
        if n:
            x += n
        elif value == 0:
            x, y = 0, y + 1
        elif value == 1:
            return
        elif value == 2:
            x, y, place = x + data[place], y + data[place + 1], place + 2
        else:  # pixels without compression, in whole words
            x += value
            n_bytes = (value + 1) // 2 if is_nibbles else value
            place += n_bytes + n_bytes % 2
        if x > end_of_row or (x and y >= image.height):
            raise ImageError("corrupt", f"the image cannot be decoded (a run of row {y} goes on behind its last pixel)")


def _check_comments(image: Any, codec: str) -> None:
    """Refuse a comment that touches the number before it: Pillow joins that number with the next one."""
    data = image.fp.getvalue()
    text = data if codec == "ppm_plain" and image.mode != "1" else data[: image.tile[0].offset]
    if data[1:2] not in b"123456f":
        raise ImageError("unsupported_mode", f"PNM of kind {data[:2]!r}, which only Pillow knows; save it as PNG")
    if any(not text[found.start() - 1 : found.start()].isspace() for found in re.finditer(rb"#[^\r\n]*", text)):
        raise ImageError("unsupported_mode", "PNM with a comment directly behind a number; put a space between them")


def _check_samples(image: Any, data: bytes) -> None:
    """Refuse samples above the maximum; Pillow would lower them to it."""
    maximum, n_bytes = image.tile[0].args[-1], 1 + (image.tile[0].args[-1] > 255)
    n_samples = image.width * image.height * len(image.getbands())
    body = memoryview(data)[image.tile[0].offset :][: n_samples * n_bytes]
    samples = np.frombuffer(body[: len(body) // n_bytes * n_bytes], f">u{n_bytes}")
    if samples.size and samples.max() > maximum:
        raise ImageError("corrupt", f"the image cannot be decoded (a sample is {samples.max()}, above its maximum {maximum})")


def _check_last_number(image: Any, data: bytes) -> None:
    """Refuse a plain PNM that ends within a number: 2 may be the start of 255. Nothing else would show that digits are missing."""
    number, maximum = re.search(rb"[0-9]*\Z", data[-8:])[0], image.tile[0].args[-1]  # type: ignore[index]
    if number and int(number) * 10 <= maximum:
        raise ImageError("truncated", f"the file ends with the digits {int(number)} and no line end: more digits may be missing")
