"""Files that are valid, and that Pillow reads otherwise than other programs: refused, and their neighbours read."""

from __future__ import annotations

import io
import struct

import imagecodecs
import numpy as np
import pytest
from PIL import Image, features

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode

SPEC = DecodeSpec()
HEIGHT, WIDTH = 24, 32
Y, X = np.mgrid[:HEIGHT, :WIDTH]
PIXELS = np.stack([8 * X, 10 * Y, 4 * (X + Y)], 2).astype(np.uint8)


def refused(data: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        decode(data, SPEC)


def avif(**options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "AVIF", quality=95, speed=10, **options)
    return file.getvalue()


def box(kind: bytes, *values: int) -> bytes:
    form = ">I4s" + ("B" if kind in {b"irot", b"imir"} else "i") * len(values)
    return struct.pack(form, struct.calcsize(form), kind, *values)


def with_properties(data: bytes, *boxes: bytes) -> bytes:
    """An AVIF of one item, with essential properties added behind its own."""
    grown = sum(map(len, boxes)) + len(boxes)
    start = data.index(b"ipco") - 4
    place, end, n = start + 8, start + int.from_bytes(data[start : start + 4], "big"), 0
    while place < end:
        place, n = place + int.from_bytes(data[place : place + 4], "big"), n + 1
    association = data.index(b"ipma") - 4
    stop = association + int.from_bytes(data[association : association + 4], "big")
    changed = bytearray(
        data[:end] + b"".join(boxes) + data[end:stop] + bytes(0x81 + n + i for i in range(len(boxes))) + data[stop:]
    )
    changed[association + 18 + grown - len(boxes)] += len(boxes)
    for kind, size in ((b"ipco", grown - len(boxes)), (b"ipma", len(boxes)), (b"iprp", grown), (b"meta", grown)):
        at = changed.index(kind) - 4
        struct.pack_into(">I", changed, at, int.from_bytes(changed[at : at + 4], "big") + size)
    at = changed.index(b"iloc") + 18
    struct.pack_into(">I", changed, at, int.from_bytes(changed[at : at + 4], "big") + grown)
    return bytes(changed)


TURN, FLIP = box(b"irot", 1), box(b"imir", 1)
needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this build of Pillow cannot read AVIF")


@needs_avif
def test_an_avif_that_is_to_be_cropped_is_refused():
    data = avif()
    refused(with_properties(data, box(b"clap", 16, 1, 12, 1, -8, 1, -6, 1)), "^unsupported_mode: an AVIF that is to be cropped")
    refused(with_properties(data, box(b"clap", 32, 1, 24, 1, 1, 1, 0, 1)), "^unsupported_mode: an AVIF that is to be cropped")
    whole = with_properties(data, box(b"clap", 2 * WIDTH, 2, HEIGHT, 1, 0, 1, 0, 1))
    np.testing.assert_array_equal(decode(whole, SPEC), decode(data, SPEC))


@needs_avif
def test_an_avif_is_turned_then_mirrored_or_refused():
    data = avif()
    upright = decode(data, SPEC)
    turned = decode(with_properties(data, TURN), SPEC)
    np.testing.assert_array_equal(turned, np.rot90(upright))
    np.testing.assert_array_equal(decode(with_properties(data, TURN, FLIP), SPEC), turned[:, ::-1])
    for wrong in ((FLIP, TURN), (TURN, TURN), (FLIP, FLIP)):
        refused(with_properties(data, *wrong), "^unsupported_mode: an AVIF that is to be turned or mirrored in an order")


@needs_avif
def test_an_avif_is_not_turned_by_what_its_xmp_says():
    """Its own boxes turn it: a program that has turned the pixels may have left the XMP as it was."""
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    np.testing.assert_array_equal(decode(avif(xmp=xmp), SPEC), decode(avif(), SPEC))


@needs_avif
@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("subsampling", ["444", "422", "420"])
def test_an_avif_of_any_depth_is_what_imagecodecs_reads(bits, subsampling):
    white = (1 << bits) - 1
    samples = (PIXELS.astype(np.uint32) * white // 255).astype(np.uint16 if bits > 8 else np.uint8)
    data = imagecodecs.avif_encode(samples, level=95, bitspersample=bits, pixelformat=subsampling)
    wanted = imagecodecs.avif_decode(data).astype(float) * 255 / white
    assert np.abs(decode(data, SPEC) - wanted).max() <= 4


def chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)


@pytest.mark.parametrize("lossless", [True, False])
def test_an_animated_webp_whose_frame_has_the_alpha_that_its_header_denies_is_refused(lossless):
    file = io.BytesIO()
    Image.fromarray(np.dstack([PIXELS, (7 * X).astype(np.uint8)])).save(file, "WEBP", lossless=lossless)
    still = file.getvalue()
    parts = still[12:] if lossless else still[30:]
    head = struct.pack("<I", WIDTH - 1)[:3] + struct.pack("<I", HEIGHT - 1)[:3]
    frame = chunk(b"ANMF", bytes(6) + head + bytes(4) + parts)

    def animation(flags: int) -> bytes:
        body = b"WEBP" + chunk(b"VP8X", bytes([flags, 0, 0, 0]) + head) + chunk(b"ANIM", bytes(6)) + frame + frame
        return b"RIFF" + struct.pack("<I", len(body)) + body

    np.testing.assert_array_equal(decode(animation(0x12), SPEC), decode(still, SPEC))
    refused(animation(0x02), "^corrupt: .*disagree on whether it has an alpha channel")


GREYS = bytes(v for index in range(256) for v in (index, index, index))
COLOURS = np.random.default_rng(0).bytes(768)


def gif(shared: bytes, own: bytes = b"", before: bytes = b"") -> bytes:
    """Two pixels, 1 and 2."""
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 1, 0xF7 if shared else 0x70, 0, 0) + shared + before
    codes = sum(code << 9 * place for place, code in enumerate((256, 1, 2, 257)))
    return (
        head
        + b","
        + struct.pack("<4HB", 0, 0, 2, 1, 0x87 if own else 0)
        + own
        + b"\x08\x05"
        + codes.to_bytes(5, "little")
        + b"\0;"
    )


def test_a_gif_of_greys_beside_a_colour_palette_is_refused():
    refused(gif(COLOURS, GREYS), "^unsupported_mode: a GIF whose first picture has a palette of greys beside a global one")
    for shared, own in ((GREYS, COLOURS), (COLOURS, COLOURS[::-1]), (GREYS, GREYS), (b"", GREYS), (b"", COLOURS), (GREYS, b"")):
        colours = np.frombuffer(own or shared, np.uint8).reshape(256, 3)
        np.testing.assert_array_equal(decode(gif(shared, own), SPEC)[0], colours[1:3])


def test_a_gif_without_a_palette_is_refused():
    refused(gif(b""), "^unsupported_mode: a GIF without any palette")


def control(index: int | None) -> bytes:
    return b"!\xf9\x04" + bytes([index is not None, 0, 0, index or 0, 0])


def test_a_gif_with_several_transparent_colours_is_refused():
    text = b"!\x01\x0c" + bytes(12) + b"\x01x\0"
    for before in (control(1) + control(None), control(1) + control(2), control(None) + control(1), control(1) + text):
        refused(gif(COLOURS, before=before), "^unsupported_mode: a GIF whose first picture has several transparent colours")
    for before in (control(1), control(1) + control(1), text + control(1), b"!\xfe\x01x\0" + control(1)):
        assert decode(gif(COLOURS, before=before), SPEC)[0, 0].tolist() == [255, 255, 255]


def bitmap(n_stored: int, n_named: int, header_bytes: int = 40) -> bytes:
    """Eight-bit indices 0 to 7 of a palette that names more colours than it stores."""
    palette = np.random.default_rng(1).bytes((4 if header_bytes > 12 else 3) * n_stored)
    if header_bytes == 12:
        head = struct.pack("<IHHHH", 12, 8, 1, 1, 8)
    else:
        head = struct.pack("<IiiHHIIiiII", header_bytes, 8, 1, 1, 8, 0, 8, 0, 0, n_named, 0).ljust(header_bytes, b"\0")
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + 8, 0, 0, start) + head + palette + bytes(range(8))


@pytest.mark.parametrize("header_bytes", [12, 40, 64, 108, 124])
def test_a_bmp_whose_palette_reaches_into_its_pixels_is_refused(header_bytes):
    assert decode(bitmap(256, 0, header_bytes), SPEC).shape == (1, 8, 3)
    refused(bitmap(200, 0, header_bytes), "^unsupported_mode: BMP with a palette of 256 colours that reaches into the pixels")
    if header_bytes > 12:
        assert decode(bitmap(200, 200, header_bytes), SPEC).shape == (1, 8, 3)


@pytest.mark.parametrize("head", [b"P2 2 1 25#c\n", b"P5 2 1#c\n 255\n", b"P1 2#c\n1\n", b"P6#c\n2 1 255\n"])
def test_a_pnm_whose_comment_touches_a_number_is_refused(head):
    with pytest.raises(ImageError):
        decode(head + b"1 2 3 4 5 6 7 8 9 0 1\n", SPEC)


def test_a_plain_pnm_whose_comment_touches_a_number_is_refused():
    """Pillow would read 1, 23 and 4."""
    refused(b"P2 3 1 255\n1 2#c\n3 4 5\n", "^unsupported_mode: PNM with a comment directly behind a number")
    assert decode(b"P2 #a#b##\n3 1 255\n1 2 #c\n3 #1#2\n", SPEC)[0, :, 0].tolist() == [1, 2, 3]
    assert decode(b"P1 3 1\n10#c\n1\n", SPEC)[0, :, 0].tolist() == [0, 255, 0]


def test_what_only_pillow_calls_a_pnm_is_refused():
    refused(b"PyRGBA\n2 1\n255\n" + bytes(8), "^unsupported_mode: PNM of kind b'Py'")


def test_a_gif_whose_blocks_lead_to_nothing_is_refused():
    data = gif(COLOURS)
    start = data.index(b"\x08\x05", 700) + 1
    assert data[start] == 5
    refused(data[:-1] + b"\1;", "^corrupt: .*there are bytes between its blocks")
    refused(gif(COLOURS, before=b"\1"), "^corrupt: .*there are bytes between its blocks")
    refused(data[:start] + b"\xff" + data[start + 1 :], "^truncated: ")
    for whole in (
        data,
        data[:-1],
        data[:-2],
        data[:-1] + b"\0\0;",
        data + b"junk",
        data[:-1] + b"!\xfe\1x\0;",
        gif(COLOURS, before=b"\0"),
    ):
        np.testing.assert_array_equal(decode(whole, SPEC), decode(data, SPEC))


def runs(*rows: bytes, bits: int = 8) -> bytes:
    """Width 5, the rows from the bottom, as runs."""
    body, palette = b"".join(row + b"\0\0" for row in rows) + b"\0\1", np.random.default_rng(1).bytes(4 << bits)
    head = struct.pack("<IiiHHIIiiII", 40, 5, len(rows), 1, bits, {8: 1, 4: 2}[bits], len(body), 0, 0, 0, 0)
    start = 14 + len(head) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + palette + body


def test_runs_of_a_bmp_stay_in_their_row():
    for row in (b"\5\1", b"\2\1\3\2", b"\0\5\1\2\3\4\5\0", b"\x08\1"):  # the last fills the row up to whole words
        assert decode(runs(row, row), SPEC).shape == (2, 5, 3)
    for row in (b"\x09\1", b"\5\1\4\2", b"\3\1\0\6\1\2\3\4\5\6"):
        refused(runs(row, b"\5\1"), "^corrupt: .*a run of row 0 goes on behind its last pixel")
    assert decode(runs(b"\5\x12", b"\0\5\x12\x34\x50\0", bits=4), SPEC).shape == (2, 5, 3)
    refused(runs(b"\x09\x12", b"\5\x12", bits=4), "^corrupt: .*a run of row 0 goes on behind its last pixel")
