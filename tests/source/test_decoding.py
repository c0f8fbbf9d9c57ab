"""Tests of pipeline/source/decoding.py: expected pixels are computed here with numpy, never by the function under test."""

from __future__ import annotations

import errno
import io
import resource
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import AvifImagePlugin, Image, features

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source import decoding as decode_module
from pipeline.source.decoding import ImageSize, decode, decode_versions, probe

# pytest restores the warning filters that decode.py sets at import; that they work is tested in a process of its own.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this build of Pillow lacks AVIF")

RGB = DecodeSpec()
GREY = DecodeSpec(color="grey")
HEIGHT, WIDTH = 12, 20
RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
ALL_GREYS_16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def save(image: Image.Image | np.ndarray, file_format: str, **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    if "append_images" in options:  # copies, because saving leaves traces in an image
        options["append_images"] = [other.copy() for other in options["append_images"]]
    image.copy().save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, color: int, rows: list[bytes], *before: tuple[bytes, bytes], after=()) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *before, (b"IDAT", data), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def tiff(
    pixels: bytes, width: int, height: int, bits: list[int], photometric: int, order: str = "<", **extra: list[int]
) -> bytes:
    """An uncompressed TIFF of one strip; extra tags are given as ``tag_338=[1]``, as shorts."""
    longs = {256: [width], 257: [height], 278: [height], 279: [len(pixels)]}
    shorts = {258: bits, 259: [1], 262: [photometric], 277: [len(bits)]} | {int(k[4:]): v for k, v in extra.items()}
    tags = sorted(
        [(tag, 4, "I", v) for tag, v in longs.items()] + [(tag, 3, "H", v) for tag, v in shorts.items()] + [(273, 4, "I", [8])]
    )
    start = 8 + len(pixels)  # header, pixels, directory, values that do not fit it
    entries, values = b"", b""
    for tag, kind, letter, numbers in tags:
        packed = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(packed) > 4:
            offset = start + 2 + 12 * len(tags) + 4 + len(values)
            values += packed
            packed = struct.pack(f"{order}I", offset)
        entries += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + packed.ljust(4, b"\0")
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return header + pixels + struct.pack(f"{order}H", len(tags)) + entries + b"\0" * 4 + values


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def over(pixels: np.ndarray, alpha: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """The documented rule of composition, in floating point (there are no ties: 255 is odd)."""
    weight = alpha[..., np.newaxis].astype(float)
    return np.rint((pixels * weight + np.array(background) * (255 - weight)) / 255).astype(np.uint8)


def three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., np.newaxis], 3, axis=2)


def smooth() -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([20 + 10 * x, 30 + 15 * y, 200 - 5 * x - 5 * y], axis=2).astype(np.uint8)


def small_files() -> dict[str, bytes]:
    """One small file or more of every format and of every path through the decoder."""
    image, other = Image.fromarray(PIXELS), Image.fromarray(PIXELS[::-1].copy())
    alpha = Image.fromarray(RNG.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8))
    palette = image.quantize(16)
    rows = [row.astype(">u2").tobytes() for row in ALL_GREYS_16[:8, :8]]
    return {
        "jpeg": save(image, "JPEG"),
        "jpeg-progressive": save(image, "JPEG", progressive=True),
        "jpeg-grey": save(image.convert("L"), "JPEG"),
        "jpeg-cmyk": save(image.convert("CMYK"), "JPEG"),
        "jpeg-exif": save(image, "JPEG", exif=exif(6)),
        "mpo": save(image, "MPO", save_all=True, append_images=[other]),
        "png": save(image, "PNG"),
        "png-alpha": save(alpha, "PNG"),
        "png-palette": save(palette, "PNG", transparency=bytes(range(16))),
        "png-grey16": png(8, 8, 16, 0, rows),
        "png-exif": save(image, "PNG", exif=exif(5)),
        "apng": save(image, "PNG", save_all=True, append_images=[other]),
        "gif": save(palette, "GIF", transparency=3),
        "gif-animated": save(image, "GIF", save_all=True, append_images=[other], disposal=2),
        "bmp": save(image, "BMP"),
        "bmp-palette": save(palette, "BMP"),
        "tiff": save(image, "TIFF"),
        "tiff-lzw": save(image, "TIFF", compression="tiff_lzw"),
        "tiff-exif": save(image, "TIFF", exif=exif(8)),
        "tiff-pages": save(image, "TIFF", save_all=True, append_images=[other]),
        "tiff-lab": save(Image.new("LAB", (4, 3)), "TIFF"),
        "webp": save(image, "WEBP"),
        "webp-lossless": save(alpha, "WEBP", lossless=True, exact=True),
        "webp-animated": save(image, "WEBP", save_all=True, append_images=[other]),
        "webp-exif": save(image, "WEBP", exif=exif(7)),
        "ppm": save(image, "PPM"),
        "pgm16": b"P5\n# remark\n2 1 65535\n\x12\x34\xff\xff",
        "pgm-plain": b"P2 2 2 10 0 5 7 10\n",
        "pbm": save(image.convert("1"), "PPM"),
    } | (
        {"avif": save(image, "AVIF", speed=10), "avif-exif": save(image, "AVIF", exif=exif(6), speed=10)}
        if features.check("avif")
        else {}
    )


FILES = small_files()


# One test per rule


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("BMP", {}), ("PPM", {}), ("TIFF", {}), ("WEBP", {"lossless": True})]
)
def test_rgb_stays_as_it_is(file_format, options):
    pixels = decode(save(PIXELS, file_format, **options), RGB)
    np.testing.assert_array_equal(pixels, PIXELS)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous


def test_tiff_compressions_give_the_same_pixels():
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        np.testing.assert_array_equal(decode(save(PIXELS, "TIFF", compression=compression), RGB), PIXELS)


def test_jpeg_baseline_and_progressive_come_close_to_what_was_saved():
    for progressive in (False, True):
        pixels = decode(save(smooth(), "JPEG", quality=98, subsampling=0, progressive=progressive), RGB)
        assert np.abs(pixels.astype(int) - smooth()).max() <= 4


@needs_avif
def test_avif_comes_close_to_what_was_saved():
    pixels = decode(save(smooth(), "AVIF", quality=98, subsampling="4:4:4"), RGB)
    assert np.abs(pixels.astype(int) - smooth()).max() <= 8


def test_grey_is_repeated_three_times_or_given_once():
    grey = PIXELS[:, :, 0].copy()
    np.testing.assert_array_equal(decode(save(grey, "PNG"), RGB), three(grey))
    np.testing.assert_array_equal(decode(save(grey, "PNG"), GREY), grey[:, :, np.newaxis])
    assert decode(save(grey, "PNG"), GREY).flags.c_contiguous


@pytest.mark.parametrize("background", [(255, 255, 255), (0, 0, 0), (200, 3, 77)])
def test_alpha_is_composed_on_the_background_for_every_value_and_alpha(background):
    alpha, value = np.mgrid[:256, :256].astype(np.uint8)
    spec = DecodeSpec(background=background)
    expected = over(three(value), alpha, background)
    np.testing.assert_array_equal(decode(save(np.dstack([three(value), alpha]), "PNG"), spec), expected)
    grey_alpha = png(256, 256, 8, 4, [np.dstack([v, a]).tobytes() for v, a in zip(value, alpha, strict=True)])
    np.testing.assert_array_equal(decode(grey_alpha, spec), expected)


def test_premultiplied_grey_alpha_of_a_tiff():
    data = tiff(bytes([100, 200, 0, 0, 50, 255, 30, 60]), 4, 1, [8, 8], 1, tag_338=[1])
    expected = [100 + 255 - 200, 255, 50, 30 + 255 - 60]  # value * alpha is already in the first number of each pair
    assert np.abs(decode(data, RGB)[0, :, 0].astype(int) - expected).max() <= 1


def test_palette_is_expanded():
    colours = [(1, 2, 3), (200, 100, 0), (9, 9, 9), (255, 0, 255)]
    data = png(4, 1, 8, 3, [bytes([2, 0, 3, 1])], (b"PLTE", bytes(sum(colours, ()))))
    np.testing.assert_array_equal(decode(data, RGB)[0], [colours[i] for i in (2, 0, 3, 1)])


def test_palette_with_an_alpha_channel_of_a_tiff_is_composed():
    colours = np.array([(10, 20, 30), (200, 100, 0)])
    table = np.zeros((3, 256), int)
    table[:, :2] = colours.T * 257
    data = tiff(bytes([1, 255, 0, 100, 1, 0]), 3, 1, [8, 8], 3, tag_320=table.ravel().tolist(), tag_338=[2])
    np.testing.assert_array_equal(decode(data, RGB)[0], over(colours[[1, 0, 1]], np.array([255, 100, 0])))


@pytest.mark.parametrize("alphas", [bytes([255, 0]), bytes([255, 128, 7])])
def test_palette_with_transparency_is_composed(alphas):
    colours = np.array([(1, 2, 3), (200, 100, 0), (9, 90, 9)])
    data = png(3, 1, 8, 3, [bytes([0, 1, 2])], (b"PLTE", colours.astype(np.uint8).tobytes()), (b"tRNS", alphas))
    alpha = np.array([*alphas, 255, 255][:3])
    expected = over(colours, alpha, (10, 20, 30))
    np.testing.assert_array_equal(decode(data, DecodeSpec(background=(10, 20, 30)))[0], expected)


def test_transparent_index_of_a_gif_is_composed():
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([10, 0, 0, 0, 20, 0, 0, 0, 30])
    expected = [[[10, 0, 0], [255, 255, 255]], [[0, 0, 30], [255, 255, 255]]]
    np.testing.assert_array_equal(decode(save(image, "GIF", transparency=1), RGB), expected)


@pytest.mark.parametrize(
    ("depth", "color", "row", "key", "expected"),
    [
        (8, 0, bytes([7, 8, 9]), (8,), [7, 255, 9]),
        (1, 0, bytes([0b01000000]), (0,), [255, 255, 255]),
        (2, 0, bytes([0b00011000]), (1,), [0, 255, 170]),
        (4, 0, bytes([0x12, 0x30]), (2,), [17, 255, 51]),
        (16, 0, struct.pack(">3H", 257, 258, 514), (257,), [255, 1, 2]),
        (16, 0, struct.pack(">3H", 65535, 255, 514), (255,), [255, 255, 2]),
        (8, 2, bytes([1, 1, 1, 2, 2, 2, 3, 3, 3]), (2, 2, 2), [1, 255, 3]),
    ],
)
def test_colour_key_of_a_png_is_composed_at_every_depth(depth, color, row, key, expected):
    data = png(3, 1, depth, color, [row], (b"tRNS", struct.pack(f">{len(key)}H", *key)))
    np.testing.assert_array_equal(decode(data, RGB)[0, :, 0], expected)


def test_cmyk_is_converted_and_jpeg_is_read_as_adobe_inverts_it():
    inks = RNG.integers(0, 256, (HEIGHT, WIDTH, 4)).astype(np.uint8)
    data = tiff(inks.tobytes(), WIDTH, HEIGHT, [8] * 4, 5)
    expected = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    assert np.abs(decode(data, RGB) - expected).max() <= 1
    uniform = Image.new("CMYK", (16, 16), (200, 30, 0, 40))
    data = save(uniform, "JPEG", quality=100)
    assert b"Adobe" in data
    expected = np.array([255.0 - 200, 255 - 30, 255]) * (255 - 40) / 255
    assert np.abs(decode(data, RGB) - expected).max() <= 3


def test_ycbcr_and_lab_are_converted():
    data = tiff(bytes([120, 90, 200, 50, 128, 128]), 2, 1, [8] * 3, 6, tag_530=[1, 1])
    luma, blue, red = 120, 90 - 128, 200 - 128
    expected = [luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue]
    assert np.abs(decode(data, RGB)[0].astype(int) - [expected, [50] * 3]).max() <= 1
    data = tiff(bytes([255, 0, 0, 0, 0, 0]), 2, 1, [8] * 3, 8)
    assert np.abs(decode(data, RGB)[0].astype(int) - [[255] * 3, [0] * 3]).max() <= 1


@pytest.mark.parametrize(
    "data",
    [
        png(256, 256, 16, 0, [row.astype(">u2").tobytes() for row in ALL_GREYS_16]),
        tiff(ALL_GREYS_16.astype("<u2").tobytes(), 256, 256, [16], 1),
        tiff(ALL_GREYS_16.astype(">u2").tobytes(), 256, 256, [16], 1, ">"),
        save(Image.fromarray(ALL_GREYS_16), "TIFF", compression="tiff_lzw"),
        b"P5 256 256 65535\n" + ALL_GREYS_16.astype(">u2").tobytes(),
        b"P2 256 256 65535\n" + b" ".join(b"%d" % v for v in ALL_GREYS_16.ravel()),
        tiff((65535 - ALL_GREYS_16).astype("<u2").tobytes(), 256, 256, [16], 0),
    ],
    ids=["png", "tiff-little", "tiff-big", "tiff-lzw", "pgm", "pgm-plain", "tiff-white-is-zero"],
)
def test_sixteen_bit_grey_is_scaled_and_never_clipped(data):
    np.testing.assert_array_equal(decode(data, GREY)[:, :, 0], np.rint(ALL_GREYS_16 / 257))


def test_sixteen_bit_grey_with_another_maximum_reaches_white():
    data = b"P5 4 1 1000\n" + struct.pack(">4H", 0, 250, 500, 1000)
    np.testing.assert_array_equal(decode(data, GREY)[0, :, 0], [0, 64, 128, 255])


def test_twelve_bit_tiff_is_scaled_by_its_own_maximum():
    data = tiff(bytes([0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10]), 4, 1, [12], 1)
    np.testing.assert_array_equal(decode(data, GREY)[0, :, 0], np.rint(np.array([0, 0x800, 0xFFF, 0x010]) * 255 / 4095))


def test_sixteen_bit_colour_gives_its_high_byte():
    values = RNG.integers(0, 65536, (HEIGHT, WIDTH, 3)).astype(np.uint16)
    big = values.astype(">u2")
    for data in (
        png(WIDTH, HEIGHT, 16, 2, [row.tobytes() for row in big]),
        tiff(values.astype("<u2").tobytes(), WIDTH, HEIGHT, [16] * 3, 2),
        tiff(big.tobytes(), WIDTH, HEIGHT, [16] * 3, 2, ">"),
    ):
        np.testing.assert_array_equal(decode(data, RGB), values >> 8)


def test_sixteen_bit_ppm_is_scaled_by_its_maximum():
    values = np.array([0, 1000, 128, 999, 2, 500])
    data = b"P6 2 1 1000\n" + values.astype(">u2").tobytes()
    np.testing.assert_array_equal(decode(data, RGB).ravel(), np.rint(values * 255 / 1000))


def test_one_bit_gives_0_and_255():
    np.testing.assert_array_equal(decode(png(4, 1, 1, 0, [b"\x50"]), GREY)[0, :, 0], [0, 255, 0, 255])
    np.testing.assert_array_equal(decode(b"P4 4 1\n\x50", RGB)[0, :, 2], [255, 0, 255, 0])


def test_plain_pnm_is_read():
    np.testing.assert_array_equal(decode(b"P1 3 1\n0 1 0\n", GREY)[0, :, 0], [255, 0, 255])
    np.testing.assert_array_equal(decode(b"P2 3 1 10\n0 5 10\n", GREY)[0, :, 0], [0, 128, 255])
    np.testing.assert_array_equal(decode(b"P3 1 1 255\n7 8 9\n", RGB)[0, 0], [7, 8, 9])


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}
AS_STORED = DecodeSpec(exif_orientation=False)


@pytest.mark.parametrize(
    ("file_format", "options"), [("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})]
)
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied_or_left(orientation, file_format, options):
    data = save(PIXELS, file_format, exif=exif(orientation), **options)
    turned = decode(data, RGB)
    np.testing.assert_array_equal(turned, TURNS[orientation](PIXELS))
    assert turned.flags.c_contiguous
    np.testing.assert_array_equal(decode(data, AS_STORED), PIXELS)
    assert probe(data, AS_STORED) == ImageSize(HEIGHT, WIDTH, HEIGHT, WIDTH)


@pytest.mark.parametrize("file_format", ["JPEG", pytest.param("AVIF", marks=needs_avif)])
@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_of_lossy_formats(orientation, file_format):
    data = save(smooth(), file_format, exif=exif(orientation), quality=98)
    stored = decode(data, AS_STORED)
    assert stored.shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(decode(data, RGB), TURNS[orientation](stored))


def test_orientation_of_xmp_counts_where_exif_has_none():
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for data in (save(PIXELS, "TIFF", tiffinfo={700: xmp}), save(PIXELS, "WEBP", lossless=True, xmp=xmp)):
        np.testing.assert_array_equal(decode(data, RGB), TURNS[6](PIXELS))
        assert probe(data, RGB) == ImageSize(WIDTH, HEIGHT, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "damaged", [b"Exif\0\0rubbish", b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01", b"Exif\0\0MM\0*\xff\xff\xff\xff"]
)
def test_damaged_exif_counts_as_none(damaged):
    data = save(PIXELS, "PNG", exif=damaged)
    np.testing.assert_array_equal(decode(data, RGB), PIXELS)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientation_without_a_meaning_counts_as_none(orientation):
    data = save(PIXELS, "PNG", exif=exif(orientation))
    np.testing.assert_array_equal(decode(data, RGB), PIXELS)
    assert probe(data, RGB) == ImageSize(HEIGHT, WIDTH, HEIGHT, WIDTH)


def test_exif_behind_the_pixels_of_a_png_counts_for_neither_probe_nor_decode():
    data = png(WIDTH, HEIGHT, 8, 2, [row.tobytes() for row in PIXELS], after=[(b"eXIf", exif(6).tobytes()[6:])])
    np.testing.assert_array_equal(decode(data, RGB), PIXELS)
    assert probe(data, RGB) == ImageSize(HEIGHT, WIDTH, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("file_format", "options"), [("GIF", {}), ("GIF", {"disposal": 2}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]
)
def test_first_frame_or_page_is_read(file_format, options):
    first = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    first[2:5, 3:9] = (255, 0, 0)
    others = [Image.fromarray(255 - first), Image.fromarray(PIXELS)]
    data = save(first, file_format, save_all=True, append_images=others, **options)
    np.testing.assert_array_equal(decode(data, RGB), first)


def test_first_picture_of_an_mpo_is_read_as_jpeg():
    options = {"quality": 98, "subsampling": 0}
    data = save(
        smooth(), "MPO", save_all=True, append_images=[Image.fromarray(255 - smooth()).rotate(90, expand=True)], **options
    )
    assert Image.open(io.BytesIO(data)).n_frames == 2
    only_jpeg = DecodeSpec(formats=("JPEG",))
    assert np.abs(decode(data, only_jpeg).astype(int) - smooth()).max() <= 4
    assert probe(data, only_jpeg) == ImageSize(HEIGHT, WIDTH, HEIGHT, WIDTH)


def test_damaged_index_of_an_mpo_leaves_a_jpeg():
    data = save(PIXELS, "MPO", save_all=True, append_images=[Image.fromarray(PIXELS)])
    damaged = data.replace(b"MPF\0II*\0", b"MPF\0IIxx")
    assert damaged != data
    np.testing.assert_array_equal(decode(damaged, RGB), decode(data, RGB))


def test_grey_of_colour_is_luma_after_composing():
    alpha = RNG.integers(0, 256, (HEIGHT, WIDTH)).astype(np.uint8)
    composed = over(PIXELS, alpha, (0, 50, 200))
    luma = composed @ np.array([0.299, 0.587, 0.114])
    grey = decode(save(np.dstack([PIXELS, alpha]), "PNG"), DecodeSpec(color="grey", background=(0, 50, 200)))
    assert grey.shape == (HEIGHT, WIDTH, 1)
    assert np.abs(grey[:, :, 0] - luma).max() <= 0.51


def test_icc_profile_is_ignored():
    np.testing.assert_array_equal(decode(save(PIXELS, "PNG", icc_profile=b"any profile at all"), RGB), PIXELS)


def test_resize_comes_last_and_means_height_then_width():
    blocks = PIXELS.reshape(HEIGHT // 2, 2, WIDTH // 4, 4, 3).mean(axis=(1, 3))
    box = DecodeSpec(resize=(HEIGHT // 2, WIDTH // 4), resize_filter="box")
    assert np.abs(decode(save(PIXELS, "PNG"), box) - blocks).max() <= 1
    nearest = DecodeSpec(resize=(WIDTH * 2, HEIGHT * 3), resize_filter="nearest")
    data = save(PIXELS, "PNG", exif=exif(6))
    np.testing.assert_array_equal(decode(data, nearest), TURNS[6](PIXELS).repeat(2, axis=0).repeat(3, axis=1))
    assert probe(data, nearest) == ImageSize(WIDTH, HEIGHT, WIDTH * 2, HEIGHT * 3)


def test_every_filter_is_its_own():
    names = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
    results = {decode(save(PIXELS, "PNG"), DecodeSpec(resize=(7, 9), resize_filter=name)).tobytes() for name in names}
    assert len(results) == len(names)


# probe


@pytest.mark.parametrize(
    "spec",
    [RGB, GREY, DecodeSpec(exif_orientation=False), DecodeSpec(resize=(5, 9)), DecodeSpec(color="grey", resize=(30, 2))],
    ids=["rgb", "grey", "as-stored", "resize", "grey-resize"],
)
@pytest.mark.parametrize("name", FILES)
def test_probe_equals_the_shape_that_decode_gives(name, spec):
    size = probe(FILES[name], spec)
    assert (size.input_height, size.input_width, spec.channels) == decode(FILES[name], spec).shape
    assert probe(io.BytesIO(FILES[name]), spec) == size
    unresized = spec.model_copy(update={"resize": None})
    assert (size.source_height, size.source_width) == decode(FILES[name], unresized).shape[:2]


def test_probe_reads_a_stream_from_its_beginning_and_only_the_header(tmp_path):
    data = save(RNG.integers(0, 256, (300, 400, 3), dtype=np.uint8), "JPEG")
    path = tmp_path / "image.jpg"
    path.write_bytes(data)
    with path.open("rb") as stream:
        stream.seek(0, io.SEEK_END)
        assert probe(stream, RGB) == ImageSize(300, 400, 300, 400)
        assert stream.tell() < 2000 < len(data)


def test_probe_decodes_no_pixel():
    xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>'
    data = png(WIDTH, HEIGHT, 8, 2, [b"far too short"], (b"iTXt", xmp))
    assert probe(data, RGB) == ImageSize(WIDTH, HEIGHT, WIDTH, HEIGHT)
    with pytest.raises(ImageError, match="its compressed pixels end before the last row"):
        decode(data, RGB)


@pytest.mark.parametrize("name", ["jpeg", "png", "tiff-exif", "webp", "gif", "bmp", "ppm"])
def test_fault_of_the_stream_is_never_the_images_fault(name):
    class Failing(io.BytesIO):
        reads_left = 0

        def read(self, size=-1):
            if self.reads_left == 0:
                raise fault
            self.reads_left -= 1
            return super().read(size)

    fault = OSError(errno.EIO, "Input/output error")
    for reads in range(200):
        stream = Failing(FILES[name])
        stream.reads_left = reads
        try:
            size = probe(stream, RGB)
        except OSError as error:
            assert error is fault  # noqa: PT017 (either outcome is right)
        else:
            assert size == probe(FILES[name], RGB)
            assert reads > 0
            break
    else:
        pytest.fail("probe never came to an end")


# What is refused


def both_raise(data: bytes, spec: DecodeSpec, match: str) -> None:
    for function in (probe, decode):
        with pytest.raises(ImageError, match=match):
            function(data, spec)


def test_empty_file():
    both_raise(b"", RGB, r"^empty: the file has 0 bytes$")


def test_not_an_image():
    both_raise(b"x", DecodeSpec(formats=("PNG", "JPEG")), r"^not_an_image: the content is none of PNG, JPEG$")


@pytest.mark.parametrize("name", ["gif", "bmp", "tiff", "webp", "ppm", "jpeg"])
def test_format_that_is_not_allowed_is_named(name):
    both_raise(
        FILES[name],
        DecodeSpec(formats=("PNG",)),
        rf"^unsupported_format: the content is {name.upper()}, which is not among .* \(PNG\)$",
    )


@needs_avif
def test_format_that_the_build_lacks_is_named(monkeypatch):
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    both_raise(FILES["avif"], RGB, r"^unsupported_format: the content is AVIF, which this build of Pillow cannot read$")


@pytest.mark.parametrize(("name", "data"), [("JPEG", b"\xff\xd8\xff, it says"), ("BMP", b"BM")])
def test_unreadable_header_names_the_format(name, data):
    both_raise(
        data, RGB, rf"^corrupt: the content begins like {name}, but its header cannot be read: cut short, damaged, or of a"
    )


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (tiff(struct.pack("<2f", 0.5, 1), 2, 1, [32], 1, tag_339=[3]), "TIFF with 32-bit floats: their range is not known"),
        (tiff(struct.pack("<2I", 5, 1), 2, 1, [32], 1), "TIFF with 32-bit integers: their range is not known"),
        (
            tiff(struct.pack("<2h", 5, -1), 2, 1, [16], 1, tag_339=[2]),
            "TIFF with signed 16-bit integers: their range is not known",
        ),
        (b"Pf 1 1 -1.0\n\0\0\0\0", "PPM of mode F: integers or floats without a known range$"),
    ],
)
def test_unsupported_mode(data, text):
    both_raise(data, RGB, rf"^unsupported_mode: {text}")


def test_truncated_directory_of_a_tiff():
    both_raise(
        FILES["tiff-lzw"][:-9], RGB, r"^truncated: the file ends before the image does \(values of its directory lie beyond"
    )


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "bmp", "webp", "ppm"])
def test_truncated(name):
    with pytest.raises(ImageError, match=r"^truncated: the file ends before the image does"):
        decode(FILES[name][: len(FILES[name]) * 9 // 10], RGB)


def test_truncated_in_the_header_of_a_gif():
    both_raise(FILES["gif"][:10], RGB, r"^truncated: the file ends before the image does \(unpack requires")


def test_truncated_tiff_whose_directory_precedes_the_pixels():
    with pytest.raises(ImageError, match=r"^truncated: the file ends before the image does"):
        decode(tiff(bytes(30), 20, 20, [8], 1), RGB)


def test_corrupt():
    rows = [row.tobytes() for row in PIXELS]
    data = png(WIDTH, HEIGHT, 8, 2, rows)
    start = data.index(b"IDAT") + 4
    with pytest.raises(ImageError, match=r"^corrupt: the image cannot be decoded \(an IDAT chunk has a wrong checksum\)$"):
        decode(data[:start] + b"\xff" * 20 + data[start + 20 :], RGB)


def test_images_fault_keeps_its_cause():
    with pytest.raises(ImageError, match="truncated") as caught:
        decode(FILES["png"][:-300], RGB)
    assert isinstance(caught.value.__cause__, OSError)


def test_memory_error_passes(monkeypatch):
    def open_without_memory(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(decode_module.Image, "open", open_without_memory)
    for function in (probe, decode):
        with pytest.raises(MemoryError):
            function(FILES["bmp"], RGB)


def test_memory_error_in_exif_passes(monkeypatch):
    def getexif_without_memory(image):
        raise MemoryError

    monkeypatch.setattr(decode_module.Image.Image, "getexif", getexif_without_memory)
    with pytest.raises(MemoryError):
        probe(FILES["webp-exif"], RGB)


# Too many pixels


def gif(width: int, height: int, frame: tuple[int, int], disposal: int = 0) -> bytes:
    control = b"!\xf9\x04" + bytes([disposal << 2]) + b"\0\0\0\0"
    palette = b",!;,!;"  # the bytes that would mislead a reader that does not skip it
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", width, height, 0x80, 0, 0)
        + palette
        + control
        + b","
        + struct.pack("<4HB", 0, 0, *frame, 0)
        + b"\x02\x01\x44\0;"
    )


def vp8x(width: int, height: int) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


SIDE = 65_000
BOMBS = {
    "png": png(SIDE, SIDE, 8, 2, [b""]),
    "gif-screen": gif(SIDE, SIDE, (1, 1)),
    "gif-frame": gif(1, 1, (SIDE, SIDE)),
    "gif-frame-disposed": gif(1, 1, (SIDE, SIDE), disposal=2),
    "bmp": b"BM" + struct.pack("<IHHI", 60, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, SIDE, SIDE, 1, 24, 0, 0, 0, 0, 0, 0),
    "tiff": tiff(b"", SIDE, SIDE, [8], 1),
    "webp": vp8x(SIDE, SIDE),
    "ppm": b"P6 65000 65000 255\n",
    "pgm-plain": b"P2 65000 65000 255\n1 2 3",
    "jpeg": FILES["jpeg"].replace(struct.pack(">BHH", 8, HEIGHT, WIDTH), struct.pack(">BHH", 8, SIDE, SIDE)),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bomb_is_refused_without_memory(name):
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    both_raise(
        BOMBS[name], RGB, rf"^too_many_pixels: the image has {SIDE} x {SIDE} pixels, the limit is 178956970; raise pixel_limit "
    )
    grown_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    assert grown_bytes < 64 * 2**20


@pytest.mark.parametrize("name", FILES)
def test_limit_is_the_last_size_that_passes(name):
    size = probe(FILES[name], AS_STORED)
    pixels = size.source_height * size.source_width
    assert decode(FILES[name], DecodeSpec(pixel_limit=pixels)).size == pixels * 3
    both_raise(
        FILES[name],
        DecodeSpec(pixel_limit=pixels - 1),
        rf"^too_many_pixels: .* pixels, the limit is {pixels - 1}; raise pixel_limit ",
    )


def test_limit_holds_for_the_resized_image_and_for_the_way_there():
    both_raise(
        FILES["png"],
        DecodeSpec(resize=(40, 30), pixel_limit=1199),
        "^too_many_pixels: the resized image has 40 x 30 pixels, the limit is 1199; raise pixel_limit ",
    )
    sliver = png(1, 10_000_000, 1, 0, [b""])
    both_raise(
        sliver,
        DecodeSpec(resize=(100, 100)),
        "^too_many_pixels: resizing needs 10000000 x 100 pixels, the limit is 178956970; raise pixel_limit ",
    )


def test_pillows_own_limits_neither_warn_nor_refuse(recwarn):
    data = png(20_000, 20_000, 8, 2, [b""])
    assert probe(data, DecodeSpec(pixel_limit=400_000_000)) == ImageSize(20_000, 20_000, 20_000, 20_000)
    assert not recwarn.list


# Robustness

BOUNDED = DecodeSpec(pixel_limit=50_000)


@pytest.mark.parametrize("name", FILES)
def test_truncated_anywhere_is_an_image_error_or_a_whole_image(name):
    data = FILES[name]
    shape = decode(data, BOUNDED).shape
    refused = 0
    for length in {*range(min(len(data), 64)), *range(0, len(data), max(1, len(data) // 100)), len(data) - 1}:
        try:
            assert decode(data[:length], BOUNDED).shape == shape
        except ImageError:
            refused += 1
    assert refused >= 5


def outcome(function, data: bytes):
    """What ``function`` gives, or None with an ImageError of a known code; any other exception fails the test."""
    try:
        return function(data, BOUNDED)
    except ImageError as error:
        known = {"empty", "not_an_image", "unsupported_format", "too_many_pixels", "truncated", "corrupt", "unsupported_mode"}
        return None if error.code in known else pytest.fail(f"unknown code {error.code!r}")


def check_outcome(data: bytes) -> None:
    """``decode`` and ``probe`` raise nothing but ImageError, agree on the size, and end quickly."""
    started_s = time.perf_counter()
    pixels, size = outcome(decode, data), outcome(probe, data)
    assert time.perf_counter() - started_s < 100  # a hang, not a slow machine
    if pixels is not None:
        assert size is not None
        assert pixels.shape == (size.input_height, size.input_width, 3)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("name", FILES)
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=12),
    front=st.booleans(),
)
def test_mutated_bytes_raise_nothing_but_image_errors(name, edits, front):
    data = bytearray(FILES[name])
    reach = min(len(data), 200) if front else len(data)
    for where, value in edits:
        data[int(where * reach)] = value
    check_outcome(bytes(data))


@settings(max_examples=200, deadline=None)
@given(start=st.sampled_from([data[:n] for data in FILES.values() for n in (4, 16, 40)]), rest=st.binary(max_size=300))
def test_random_bytes_behind_a_real_beginning_raise_nothing_but_image_errors(start, rest):
    check_outcome(start + rest)


def test_threads_get_what_one_thread_gets():
    names = list(FILES) * 8
    expected = {name: decode(data, RGB).tobytes() for name, data in FILES.items()}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda name: decode(FILES[name], RGB).tobytes(), names))
    assert results == [expected[name] for name in names]


def test_odd_files_make_no_noise(tmp_path):
    mpo = FILES["mpo"].replace(b"MPF\0II*\0", b"MPF\0IIxx")  # Pillow warns
    (tmp_path / "1.jpg").write_bytes(mpo)
    (tmp_path / "2.tif").write_bytes(tiff(bytes(99), 3, 3, [8] * 9, 2))  # Pillow would log an error
    code = """if True:
        import pathlib, sys, warnings
        from pipeline.config import DecodeSpec
        from pipeline.source.decoding import decode
        from pipeline.errors import ImageError
        for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
            try:
                decode(path.read_bytes(), DecodeSpec())
            except ImageError as error:
                print(path.name, error.code)
        warnings.warn("others still speak")
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "2.tif unsupported_mode\n"
    assert [line for line in done.stderr.splitlines() if line] == ["<string>:11: UserWarning: others still speak"]


def test_versions_name_pillow_and_its_codecs():
    versions = decode_versions()
    assert versions["pillow"] == Image.__version__
    assert {"libjpeg_turbo", "libtiff", "webp", "zlib"} <= set(versions)
    assert all(isinstance(value, str) and value for value in versions.values())


# -- the fast decoder --------------------------------------------------------------------------------------------------------


def verdict(data: bytes, spec: DecodeSpec = RGB):
    try:
        return decode(data, spec)
    except ImageError as error:
        return str(error)


def both(data: bytes, spec: DecodeSpec = RGB):
    """What `decode` makes of a file with simplejpeg and with Pillow alone."""
    assert decode_module._fast_decoder() is not None, "the tests need the extra `fast`"
    with pytest.MonkeyPatch.context() as patch:
        fast = verdict(data, spec)
        patch.setattr(decode_module, "_fast_decoder", lambda: None)
        return fast, verdict(data, spec)


@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(1, 100),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    st.booleans(),
    st.integers(0, 4),
    st.integers(1, 8),
    st.integers(0, 99),
)
def test_a_jpeg_is_the_same_by_both_decoders(height, width, quality, subsampling, progressive, restart, orientation, seed):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"subsampling": subsampling, "progressive": progressive, "restart_marker_rows": restart, "exif": exif}
    fast, plain = both(save(image, "JPEG", quality=quality, **options))
    assert np.array_equal(fast, plain)
    assert (fast.dtype, fast.flags.c_contiguous, fast.flags.writeable) == (np.uint8, True, False)


JPEGS = [
    save(PIXELS.repeat(4, 0).repeat(3, 1), "JPEG", quality=80),
    save(PIXELS.repeat(5, 0).repeat(5, 1), "JPEG", quality=90, progressive=True, subsampling="4:2:0"),
    save(PIXELS, "JPEG", quality=70, restart_marker_blocks=2, optimize=True),
]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(JPEGS), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.integers(0, 10**6))
def test_a_damaged_jpeg_ends_the_same_by_both_decoders(data, changes, cut):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    if cut % 3 == 0:
        del damaged[cut % len(damaged) :]
    fast, plain = both(bytes(damaged))
    assert np.array_equal(fast, plain) if isinstance(plain, np.ndarray) else fast == plain


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("spec", [RGB, GREY, DecodeSpec(resize=(20, 30))], ids=["rgb", "grey", "resized"])
def test_other_jpegs_are_left_to_pillow(mode, spec):
    fast, plain = both(save(Image.fromarray(PIXELS).convert(mode), "JPEG"), spec)
    assert np.array_equal(fast, plain)


def test_a_decoder_that_differs_from_pillow_is_not_used(monkeypatch):
    import simplejpeg

    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **options: real(*args, **options, fastdct=True))
    decode_module._fast_decoder.cache_clear()
    assert decode_module._fast_decoder() is None
    assert "simplejpeg" not in decode_versions()
    monkeypatch.undo()
    decode_module._fast_decoder.cache_clear()
    assert decode_versions()["simplejpeg"]


def test_without_the_extra_pillow_does_it_all(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    decode_module._fast_decoder.cache_clear()
    assert decode_module._fast_decoder() is None
    assert isinstance(verdict(JPEGS[0]), np.ndarray)
    monkeypatch.undo()
    decode_module._fast_decoder.cache_clear()


@pytest.mark.parametrize("broken", [ValueError("numpy.dtype size changed"), TypeError("unexpected keyword argument 'strict'")])
def test_a_broken_installation_is_no_image_s_fault(monkeypatch, broken):
    import simplejpeg

    def fail(*_, **__):
        raise broken

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    decode_module._fast_decoder.cache_clear()
    assert isinstance(verdict(JPEGS[0]), np.ndarray)
    assert "simplejpeg" not in decode_versions()
    monkeypatch.undo()
    decode_module._fast_decoder.cache_clear()


def test_only_common_kinds_of_jpeg_are_decoded_fast():
    assert [decode_module._decode_fast(data) is not None for data in JPEGS] == [True] * 3
    for data in JPEGS:
        for frame in (b"\xff\xc0", b"\xff\xc2"):
            lossless = data.replace(frame + b"\0", b"\xff\xc3" + b"\0")
            assert decode_module._decode_fast(lossless) is None or lossless == data
    assert decode_module._decode_fast(b"\xff\xd8\xff\xe0") is None
