"""Reads what the header of a TIFF declares, and checks that Pillow is proven to read it right.

Pillow opens more kinds of TIFF than it reads right. `check_tiff` accepts the kinds that ``tests/support/tiff_matrix.py`` compares with
another library in every pixel. It refuses all others, and says why.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.errors import ImageError
from pipeline.source.header_limits import check_pixels

if TYPE_CHECKING:
    from typing import BinaryIO

    from pipeline.source.header_limits import HeaderStream

_VALUES = 1 << 17  # per tag: Pillow makes an object of each strip or tile, whatever the size of the image
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # unsigned integers
_BYTES = 7  # the type "undefined": bytes without a meaning
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANES, _PREDICTOR = 273, 277, 278, 279, 284, 317
_COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 320, 322, 323, 324, 325
_EXTRA, _FORMAT, _SUBSAMPLING, _INKS, _JPEG_TABLES = 338, 339, 530, 332, 347
_LAYOUT = frozenset({_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIP_OFFSETS, _SAMPLES, _STRIP_ROWS})
_LAYOUT |= {_STRIP_BYTES, _PLANES, _PREDICTOR, _COLOURS, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, _EXTRA, _FORMAT}
_LAYOUT |= {_SUBSAMPLING, _INKS, _JPEG_TABLES}
_NONE, _GROUP_4, _LZW, _JPEG, _PACKBITS, _ZSTD, _LZMA = 1, 4, 5, 7, 32773, 50000, 34925
_DEFLATE = {8, 32946}
_GENERAL = _DEFLATE | {_LZW, _ZSTD, _LZMA}  # those that work with a predictor
_OTHERS = {
    2: "fax of group 3",
    3: "fax of group 3",
    6: "old-style JPEG",
    50001: "WebP",
    34712: "JPEG 2000",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34887: "LERC",
    34933: "PNG",
    34934: "JPEG XR",
}
_OTHERS |= {32809: "ThunderScan", 34676: "SGI LogLuv", 34677: "SGI LogLuv", 50002: "JPEG XL", 52546: "JPEG XL"}
_READER = "tifffile with imagecodecs reads it"
_FORMATS = {2: "signed {}-bit integers", 3: "{}-bit floats", 4: "{}-bit values of an undefined format"}
_FORMATS |= {5: "complex integers", 6: "complex floats"}
_WHITE_0, _BLACK_0, _RGB, _PALETTE, _CMYK, _YCBCR, _LAB = 0, 1, 2, 3, 5, 6, 8
_COLOUR = {_WHITE_0: 1, _BLACK_0: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3, _LAB: 3}  # samples, without extra ones
_NAMES = {_WHITE_0: "grey whose white is zero", _BLACK_0: "grey", _RGB: "RGB", _PALETTE: "palette", _CMYK: "CMYK"}
_NAMES |= {_YCBCR: "YCbCr", _LAB: "CIELAB"}
_OTHER, _ASSOCIATED, _ALPHA = 0, 1, 2
# Extra samples that Pillow reads right with 8 bits and pixels interleaved.
_RGB_EXTRA: set[tuple[int, ...]] = {()} | {(kind, *rest) for kind in (_OTHER, _ASSOCIATED, _ALPHA) for rest in ((), (0,), (0, 0))}
_INTERLEAVED: dict[int, set[tuple[int, ...]]] = {
    _WHITE_0: {()},
    _BLACK_0: {(), (_OTHER,), (_ASSOCIATED,), (_ALPHA,)},
    _RGB: _RGB_EXTRA,
    _PALETTE: {(), (_OTHER,), (_ALPHA,)},
    _CMYK: {(), (0,), (0, 0)},
    _YCBCR: {()},
    _LAB: {()},
}
_INTERLEAVED_16: dict[int, set[tuple[int, ...]]] = {
    _WHITE_0: {()},
    _BLACK_0: {()},
    _RGB: {(), (0,), (_ASSOCIATED,), (_ALPHA,)},
    _CMYK: {()},
}
# The same for separate planes, of uncompressed and of compressed files.
_SEPARATE_PLAIN: dict[int, set[tuple[int, ...]]] = {_RGB: {(), (_ALPHA,)}, _CMYK: {()}}
_SEPARATE: dict[int, set[tuple[int, ...]]] = {
    _RGB: {(), (0,), (0, 0), (_ASSOCIATED,), (_ALPHA,)},
    _CMYK: {(), (0,)},
    _YCBCR: {()},
}


@dataclass(frozen=True, slots=True)
class Layout:
    """What the first directory of a TIFF declares about its pixels."""

    order: str
    """``<`` or ``>``, as `struct` writes byte orders."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    bits: int
    """Of each sample."""
    n_samples: int
    """Per pixel, including the extra ones."""
    extra: tuple[int, ...]
    """Kinds of the extra samples: 0 unspecified, 1 associated alpha, 2 alpha."""
    photometric: int
    compression: int
    predictor: int
    fill_order: int
    is_separate: bool
    """Whether each sample has its own planes."""
    is_tiled: bool
    block_width: int
    """Pixels of a tile; for strips, the width of the image."""
    block_height: int
    """Rows of a strip or tile."""
    offsets: tuple[int, ...]
    """Position of each strip or tile in the file, in bytes."""
    block_bytes: tuple[int, ...]
    """Size of each strip or tile, as stored."""
    jpeg_tables: bytes
    """Value of the tag JPEGTables: the tables that the JPEG data of all strips or tiles share."""

    def n_rows(self, block: int) -> int:
        """Rows of one strip or tile: a tile is always whole, the last strip is not."""
        if self.is_tiled:
            return self.block_height
        per_plane = -(-self.height // self.block_height)
        return min(self.block_height, self.height - block % per_plane * self.block_height)

    def n_bytes(self, block: int) -> int:
        """Bytes of one strip or tile, once decompressed."""
        row_bits = self.block_width * self.bits * (1 if self.is_separate else self.n_samples)
        return self.n_rows(block) * -(-row_bits // 8)


def check_tiff(stream: HeaderStream, pixel_limit: int) -> None:
    """Refuse a TIFF that Pillow is not proven to read right, or whose pixels are beyond the end of the file.

    Raises
    ------
    ImageError
        ``unsupported_mode``, ``truncated``, ``too_many_pixels`` or ``corrupt``, with the property at fault.
    """
    read_layout(stream, stream.size_bytes, pixel_limit)


def read_layout(stream: BinaryIO | HeaderStream, size_bytes: int, pixel_limit: int | None = None) -> Layout:
    """Read what the first directory declares, and refuse what Pillow is not proven to read right."""
    order, tags = _read_tags(stream)
    _check_depth(tags)
    layout = _layout(order, tags)
    reason = _unproven(layout, tags)
    if reason:
        raise ImageError("unsupported_mode", f"TIFF with {reason}")
    if pixel_limit is not None:
        check_pixels("the image has", layout.height, layout.width, pixel_limit)
        check_pixels("a tile has", layout.block_height, layout.block_width, pixel_limit)
    return _check_blocks(layout, size_bytes)


def _read_tags(stream: BinaryIO | HeaderStream) -> tuple[str, dict[int, tuple[int, ...]]]:
    """Byte order, and the values of the tags that describe pixels, from the first directory."""
    stream.seek(0)
    head = stream.read(16)
    order, is_big = "<>"[head.startswith(b"M")], 43 in head[2:4]
    if is_big and order == ">":
        raise ImageError(
            "unsupported_mode", f"big-endian BigTIFF is not supported; {_READER}: save it as little-endian or as classic TIFF"
        )
    start, count, entry = (struct.Struct(order + form) for form in (("8xQ", "Q", "HHQ8s") if is_big else ("4xI", "H", "HHI4s")))
    if len(head) < start.size:
        raise ImageError("truncated", "the file ends before the image does (within the header)")
    stream.seek(*start.unpack_from(head))
    number = stream.read(count.size)
    n_tags = min(*count.unpack(number), 65536) if len(number) == count.size else 0
    directory = stream.read(n_tags * entry.size)
    if not n_tags or len(directory) < n_tags * entry.size:
        raise ImageError("truncated", "the file ends before the image does (the directory lies beyond its end)")
    tags: dict[int, tuple[int, ...]] = {}
    for tag, kind, n_values, inline in islice(entry.iter_unpack(directory), n_tags):
        if tag in _LAYOUT:
            if kind == _BYTES and tag == _JPEG_TABLES:
                kind = 1  # noqa: PLW2901
            if tag in tags or kind not in _TYPES or not n_values or n_values > _VALUES:
                raise ImageError("corrupt", _fault_of_tag(tag, kind, n_values))
            tags[tag] = _values(stream, struct.Struct(f"{order}{n_values}{_TYPES[kind]}"), inline, order)
    return order, tags


def _fault_of_tag(tag: int, kind: int, n_values: int) -> str:
    if n_values > _VALUES:
        return f"the image cannot be decoded (tag {tag} has {n_values} values, the limit is {_VALUES})"
    if kind not in _TYPES:
        return f"the image cannot be decoded (tag {tag} has type {kind}, which is no whole number)"
    return f"the image cannot be decoded (tag {tag} is empty or given twice)"


def _values(stream: BinaryIO | HeaderStream, form: struct.Struct, inline: bytes, order: str) -> tuple[int, ...]:
    """Values of one tag; they are inline if they fit."""
    data = inline[: form.size]
    if form.size > len(inline):
        stream.seek(int.from_bytes(inline, "little" if order == "<" else "big"))
        data = stream.read(form.size)
    if len(data) < form.size:
        raise ImageError("truncated", "the file ends before the image does (values of its directory lie beyond its end)")
    return form.unpack(data)


def _one(tags: dict[int, tuple[int, ...]], tag: int, default: int | None = None) -> int:
    """The value of a tag that has exactly one."""
    values = tags.get(tag, () if default is None else (default,))
    if len(values) != 1:
        raise ImageError("corrupt", f"the image cannot be decoded (tag {tag} has {len(values)} values instead of one)")
    return values[0]


def _check_depth(tags: dict[int, tuple[int, ...]]) -> None:
    """Refuse samples of different types, signed integers and floats."""
    bits, formats = tags.get(_BITS, (1,)), tags.get(_FORMAT, (1,))
    for what, values in (("different depths", bits), ("different sample formats", formats)):
        if len(set(values)) > 1:
            raise ImageError("unsupported_mode", f"TIFF whose channels have {what} {values}")
    if formats[0] != 1:
        what = _FORMATS.get(formats[0], "{}-bit values of sample format " + str(formats[0])).format(bits[0])
        raise ImageError("unsupported_mode", f"TIFF with {what}: their range is not known; save it with unsigned integers")
    if bits[0] > 16:
        what = f"{bits[0]}-bit integers: their range is not known"
        raise ImageError("unsupported_mode", f"TIFF with {what}; save it with 16 bits or fewer")


def _layout(order: str, tags: dict[int, tuple[int, ...]]) -> Layout:
    n_samples, bits = _one(tags, _SAMPLES, 1), tags.get(_BITS, (1,))
    if len(bits) not in {1, n_samples}:
        raise ImageError("corrupt", f"the image cannot be decoded ({n_samples} samples per pixel, depths of {len(bits)})")
    width, height = _one(tags, _WIDTH), _one(tags, _HEIGHT)
    is_tiled = _TILE_OFFSETS in tags
    if not is_tiled and (_TILE_WIDTH in tags or _TILE_HEIGHT in tags):
        raise ImageError(
            "unsupported_mode", "TIFF with strips and the size of a tile, which Pillow misreads; save it without tiles"
        )
    if is_tiled and _STRIP_OFFSETS in tags:
        raise ImageError("corrupt", "the image cannot be decoded (it has strips and tiles)")
    block = (_one(tags, _TILE_WIDTH), _one(tags, _TILE_HEIGHT)) if is_tiled else (width, _one(tags, _STRIP_ROWS, height))
    if not (width and height and block[0] and block[1]):
        raise ImageError("corrupt", "the image cannot be decoded (its size, or that of its strips or tiles, is 0)")
    offsets, block_bytes = (_TILE_OFFSETS, _TILE_BYTES) if is_tiled else (_STRIP_OFFSETS, _STRIP_BYTES)
    return Layout(
        order=order,
        width=width,
        height=height,
        bits=bits[0],
        n_samples=n_samples,
        extra=tags.get(_EXTRA, ()),
        photometric=_one(tags, _PHOTOMETRIC),
        compression=_one(tags, _COMPRESSION, 1),
        predictor=_one(tags, _PREDICTOR, 1),
        fill_order=_one(tags, _FILL_ORDER, 1),
        is_separate=_one(tags, _PLANES, 1) == 2 and n_samples > 1,
        is_tiled=is_tiled,
        block_width=block[0],
        block_height=block[1] if is_tiled else min(block[1], height),
        offsets=tags.get(offsets, ()),
        block_bytes=tags.get(block_bytes, ()),
        jpeg_tables=bytes(tags.get(_JPEG_TABLES, ())),
    )


def _unproven(layout: Layout, tags: dict[int, tuple[int, ...]]) -> str:
    """The property of a layout that is not proven to be read right; empty if there is none."""
    samples = _COLOUR.get(layout.photometric)
    if samples is None:
        return f"photometric interpretation {layout.photometric}, which is not supported"
    if layout.n_samples != samples + len(layout.extra):
        return (
            f"{layout.n_samples} samples per pixel, where {_NAMES[layout.photometric]} and the tag ExtraSamples explain "
            f"{samples + len(layout.extra)}; save it with that tag"
        )
    if layout.photometric == _PALETTE and len(tags.get(_COLOURS, ())) != 3 << layout.bits:
        return f"a colour table of {len(tags.get(_COLOURS, ()))} values, where {layout.bits} bits need {3 << layout.bits}"
    if layout.photometric == _PALETTE and 0 < max(tags[_COLOURS]) < 256:
        return "a colour table whose values are all below 256 instead of 65536, so that its scale is not known"
    if layout.photometric == _CMYK and tags.get(_INKS, (1,)) != (1,):
        return "inks other than cyan, magenta, yellow and black, which are not supported; save it as RGB"
    return _unproven_compression(layout, tags) or _unproven_samples(layout)


def _unproven_compression(layout: Layout, tags: dict[int, tuple[int, ...]]) -> str:
    compression = layout.compression
    if compression not in _GENERAL | {_NONE, _GROUP_4, _JPEG, _PACKBITS}:
        name = _OTHERS.get(compression, f"compression {compression}")
        return f"{name} inside, which is not supported; {_READER}: save it with deflate or LZW"
    if compression == _GROUP_4 and (layout.bits, layout.n_samples, layout.photometric > 1) != (1, 1, False):
        return "fax compression of other than 1-bit grey"
    if layout.predictor != 1 and (layout.predictor != 2 or compression not in _GENERAL or layout.bits not in {8, 16}):
        return f"predictor {layout.predictor}, which is not supported with {layout.bits} bits and compression {compression}"
    if layout.fill_order != 1 and (
        compression not in {_NONE, _GROUP_4} or layout.bits > 8 or layout.extra or layout.n_samples > 1
    ):
        return f"fill order {layout.fill_order}, which is only supported for uncompressed or fax grey and palettes"
    is_as_stored = layout.fill_order == 1 and (layout.bits, layout.photometric) in {(1, _BLACK_0), (8, _BLACK_0), (8, _PALETTE)}
    if compression == _NONE and layout.n_samples == 1 and tags.get(_PLANES) == (2,) and not is_as_stored:
        return "separate planes of a single channel, of which Pillow misreads this kind; save it with interleaved channels"
    is_subsampled = tags.get(_SUBSAMPLING, (2, 2)) != (1, 1)
    if layout.photometric == _YCBCR and compression != _JPEG and is_subsampled:
        return "YCbCr of halved colour that is not JPEG, which Pillow misreads; save it as RGB"
    if compression == _JPEG and layout.bits != 8:
        return f"JPEG of {layout.bits} bits, which cannot be proven whole; {_READER}: save it with deflate or LZW"
    if compression == _JPEG and (layout.photometric == _LAB or (layout.extra and not layout.is_separate)):
        return f"JPEG of {_NAMES[layout.photometric]} with {len(layout.extra)} extra channels"
    return ""


def _unproven_samples(layout: Layout) -> str:
    bits, kind, extra = layout.bits, layout.photometric, layout.extra
    what = f"{bits} bits per channel of {_NAMES[kind]}"
    if layout.is_separate:
        table = _SEPARATE_PLAIN if layout.compression == _NONE else _SEPARATE
        is_plain_16 = layout.compression == _NONE and bits != 8
        is_jpeg_ycbcr = layout.compression == _JPEG and kind == _YCBCR
        if (
            bits not in {8, 16}
            or is_plain_16
            or is_jpeg_ycbcr
            or extra not in table.get(kind, set())
            or (bits == 16 and kind == _YCBCR)
        ):
            return f"{what} in separate planes, which Pillow misreads; save it with interleaved channels"
        return ""
    if extra and bits in {8, 16} and extra not in (_INTERLEAVED if bits == 8 else _INTERLEAVED_16).get(kind, set()):
        return f"{what} and extra channels {extra}, which are not supported"
    if bits in {8, 16}:
        is_known = extra in (_INTERLEAVED if bits == 8 else _INTERLEAVED_16).get(kind, set())
    elif bits == 12:
        is_known = kind in {_WHITE_0, _BLACK_0} and not extra
    else:
        is_known = bits in {1, 2, 4} and kind in {_WHITE_0, _BLACK_0, _PALETTE} and not extra
    return "" if is_known else f"{what}, {'big' if layout.order == '>' else 'little'}-endian, which is not supported"


def _check_blocks(layout: Layout, size_bytes: int) -> Layout:
    """Refuse strips or tiles that are missing, beyond the file or too short for their rows; fill in missing byte counts."""
    per_plane = -(-layout.height // layout.block_height) * -(-layout.width // layout.block_width)
    n_blocks = per_plane * (layout.n_samples if layout.is_separate else 1)
    what = "tiles" if layout.is_tiled else "strips"
    if len(layout.offsets) != n_blocks:
        raise ImageError("corrupt", f"the image cannot be decoded ({len(layout.offsets)} {what}, its size needs {n_blocks})")
    is_plain = layout.compression == _NONE
    needed = [layout.n_bytes(block) for block in range(n_blocks)] if is_plain else []
    stored = layout.block_bytes or tuple(needed)
    if len(stored) != n_blocks:
        raise ImageError("corrupt", f"the image cannot be decoded ({n_blocks} {what}, byte counts of {len(stored)})")
    if min(stored) == 0 or min(layout.offsets) < 8:
        raise ImageError("corrupt", f"the image cannot be decoded (one of its {what} is empty or lies in the header)")
    ends = [offset + n_bytes for offset, n_bytes in zip(layout.offsets, needed or stored, strict=True)]
    if max(ends) > size_bytes:
        text = f"one of its {what} ends at byte {max(ends)} of {size_bytes}"
        raise ImageError("truncated", f"the file ends before the image does ({text})")
    for n_stored, n_needed in zip(stored, needed, strict=False):
        if n_stored < n_needed:
            raise ImageError("truncated", f"one of the {what} has {n_stored} bytes, its rows need {n_needed}")
    return replace(layout, block_bytes=stored)
