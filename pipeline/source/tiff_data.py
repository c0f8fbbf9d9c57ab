"""Checks that the compressed data of a TIFF are sound and whole, where they can prove it; see `tiff_jpeg` and `tiff_fax` for others."""

from __future__ import annotations

import io
import lzma
import zlib
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ImageError
from pipeline.source.tiff import read_layout

if TYPE_CHECKING:
    from pipeline.source.tiff import Layout

_BLACK_0, _RGB, _DEFLATE = 1, 2, {8, 32946}


def unpack(data: bytes) -> np.ndarray | None:
    """Check the ends and checksums of a TIFF's compressed data, which libtiff ignores.

    Returns
    -------
    np.ndarray or None
        Pixels ``(height, width, channel) uint8`` of plain grey or RGB in strips, as stored. None leaves all others to Pillow.

    Raises
    ------
    ImageError
        ``corrupt``: a strip or tile ends too early, or its checksum is wrong.
    """
    layout = read_layout(io.BytesIO(data), len(data))
    kind = layout.bits, layout.photometric, layout.n_samples, layout.is_separate, layout.is_tiled
    is_plain = kind in {(8, _BLACK_0, 1, False, False), (8, _RGB, 3, False, False)}
    pixels = np.empty((layout.height, layout.width, layout.n_samples) if is_plain else 0, np.uint8)
    view = memoryview(data)
    for block, (offset, n_bytes) in enumerate(zip(layout.offsets, layout.block_bytes, strict=True)):
        unpacked = _unpack_block(layout, view[offset : offset + n_bytes], block)
        if is_plain:
            rows = pixels[block * layout.block_height :][: layout.block_height]
            rows[...] = np.frombuffer(unpacked, np.uint8, rows.size).reshape(rows.shape)
            del unpacked  # frees it before the next copy
            if layout.predictor == 2:
                np.add.accumulate(rows, axis=1, dtype=np.uint8, out=rows)
    return pixels if is_plain else None


def _unpack_block(layout: Layout, stored: memoryview, block: int) -> bytes:
    """One strip or tile, decompressed to its end."""
    wanted, most = layout.n_bytes(block), layout.n_bytes(0) + 1  # some writers fill the last strip to its full height
    unpacker = zlib.decompressobj() if layout.compression in _DEFLATE else lzma.LZMADecompressor()
    fault, unpacked = "", b""
    try:
        unpacked = unpacker.decompress(stored, most)
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        fault = str(error)
    if not fault and len(unpacked) < wanted:
        fault = f"{len(unpacked)} of {wanted} bytes"
    if fault or not unpacker.eof:
        text = fault or "its end is missing"
        raise ImageError("corrupt", f"the compressed data of strip or tile {block} are damaged ({text})")
    return unpacked
