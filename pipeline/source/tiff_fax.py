"""Checks that fax data of group 4 (ITU-T T.6) inside a TIFF have as many rows as its header says.

libtiff leaves rows that are missing as they are, and goes on after codes that do not exist. So each strip or tile is decoded once
more, with two known rows in place of its end code. They come out below its own rows only if those are as many as the TIFF says.
A wrong width mostly shows as well: codes then end within a row.
"""

from __future__ import annotations

import io
import struct
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ImageError
from pipeline.source.tiff import read_layout

if TYPE_CHECKING:
    from collections.abc import Callable

_END = "000000000001" * 2
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
_PAIR, _WHITE, _BLACK = "001" + "000111" + "010", "001" + "000111" + "0000110111", "001" + "00110101" + "010"  # pixels
_SPARE_ROWS = 2


def check_fax(data: bytes, read: Callable[[bytes], np.ndarray]) -> None:
    """Refuse a TIFF of group 4 with a strip or tile that lacks its end code, or has other rows than the TIFF says.

    Parameters
    ----------
    data : bytes
        The whole file.
    read : callable
        Decodes a TIFF of one strip of group 4 to its last two rows ``(2, width) bool``, black as True.

    Raises
    ------
    ImageError
        ``truncated``: an end code is missing. ``corrupt``: rows are missing, left over or damaged.
    """
    layout = read_layout(io.BytesIO(data), len(data))
    spare = np.arange(layout.block_width) % 2 == [[1], [0]]
    for block, (offset, n_bytes) in enumerate(zip(layout.offsets, layout.block_bytes, strict=True)):
        stored = data[offset : offset + n_bytes]
        if layout.fill_order == 2:
            stored = stored.translate(_REVERSED)
        changed = _with_spare_rows(stored.rstrip(b"\0"), layout.block_width, block)
        found = read(_tiff(changed, layout.n_rows(block) + _SPARE_ROWS, layout.block_width))
        if not np.array_equal(found, spare):
            text = f"the fax data of strip or tile {block} have other rows than the TIFF says, or damaged ones"
            raise ImageError("corrupt", f"the image cannot be decoded ({text})")


def _with_spare_rows(stored: bytes, width: int, block: int) -> bytes:
    """The data with two rows in place of the end code; their pixels alternate, one row starts white, the other black."""
    last = "".join(f"{byte:08b}" for byte in stored[-4:]).rstrip("0")
    if not last.endswith(_END):
        raise ImageError("truncated", f"the fax data of strip or tile {block} have no end code: rows are missing")
    rows = (_PAIR * (width // 2) + _WHITE * (width % 2), _BLACK + _PAIR * ((width - 1) // 2) + _WHITE * ((width - 1) % 2))
    bits = last[: -len(_END)] + "".join(rows) + _END
    n_bytes = -(-len(bits) // 8)
    return stored[:-4] + int(bits.ljust(8 * n_bytes, "0"), 2).to_bytes(n_bytes, "big")


def _tiff(strip: bytes, height: int, width: int) -> bytes:
    """A TIFF of one strip of group 4, in which white is False."""
    tags = ((256, width), (257, height), (258, 1), (259, 4), (262, 1), (273, 0), (277, 1), (278, height), (279, len(strip)))
    start = 10 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + strip
