"""BMP and PNM, formats without a checksum, beside a reader of our own; ``python -m tests.source.test_bitmaps`` counts flipped bits."""

from __future__ import annotations

import struct
import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode, probe
from tests.source.test_decoding import over

RGB = DecodeSpec()
MASKS = {
    "555": (16, (0x7C00, 0x3E0, 0x1F, 0)),
    "565": (16, (0xF800, 0x7E0, 0x1F, 0)),
    "BGR": (24, (0xFF0000, 0xFF00, 0xFF, 0)),
    "BGRX": (32, (0xFF0000, 0xFF00, 0xFF, 0)),
    "XBGR": (32, (0xFF000000, 0xFF0000, 0xFF00, 0)),
    "BGXR": (32, (0xFF000000, 0xFF00, 0xFF, 0)),
    "ABGR": (32, (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
    "RGBA": (32, (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
    "BGRA": (32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)),
    "BGAR": (32, (0xFF000000, 0xFF00, 0xFF, 0xFF0000)),
}
HEADERS = (12, 40, 52, 56, 64, 108, 124)
WIDTHS = (1, 2, 3, 4, 7, 8, 9, 31, 33)


def bmp(width, height, bits, rows, *, compression=0, header=40, masks=(), palette=b"", gap=0, colors=0) -> bytes:
    """``rows`` are bytes from the top down, not padded, or all of the pixel data; a negative height means top-down."""
    if isinstance(rows, list):
        padded = [row.ljust((width * bits + 31) // 32 * 4, b"\0") for row in rows]
        rows = b"".join(padded if height < 0 else padded[::-1])
    if header == 12:
        info = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        info = struct.pack("<IiiHHIIiiII", header, width, height, 1, bits, compression, len(rows), 0, 0, colors, 0)
        info = (info + struct.pack(f"<{len(masks)}I", *masks)).ljust(header, b"\0") if header > 40 else info
        info += struct.pack("<3I", *masks[:3]) if header == 40 and masks else b""
    offset = 14 + len(info) + len(palette) + gap
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + info + palette + bytes(gap) + rows


def indexed(width: int, height: int, bits: int, n_colors: int) -> tuple[np.ndarray, list[bytes]]:
    index = np.random.default_rng(width).integers(0, n_colors, (height, width)).astype(np.uint8)
    digits = np.unpackbits(index[..., np.newaxis], axis=2)[:, :, 8 - bits :]
    return index, [np.packbits(row).tobytes() for row in digits]


def colors_of(n: int, kind: str) -> np.ndarray:
    if kind == "colour":
        return np.random.default_rng(n).integers(0, 256, (n, 3)).astype(np.uint8)
    greys = {"counting": range(n), "scaled": np.linspace(0, 255, n), "white first": np.linspace(255, 0, n)}[kind]
    return np.repeat(np.array(greys).astype(np.uint8)[:, np.newaxis], 3, axis=1)


def palette_of(colors: np.ndarray, header: int) -> bytes:
    padding = 0 if header == 12 else 1
    return b"".join(bytes(color[::-1]) + bytes(padding) for color in colors)


def right_or_refused(data: bytes, wanted: np.ndarray) -> str:
    try:
        pixels = decode(data, RGB)
    except ImageError as error:
        return error.code
    np.testing.assert_array_equal(pixels, wanted)
    assert probe(data, RGB).input_width == wanted.shape[1]
    return "done"


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("kind", ["colour", "counting", "scaled", "white first"])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_palettes_of_every_size_are_read_or_refused(bits, kind, header):
    ends = Counter()
    sizes = [2**bits] if header == 12 else sorted({2, min(3, 2**bits), 2**bits - 1 or 2, 2**bits})
    for width, n_colors, sign in product(WIDTHS, sizes, (1,) if header == 12 else (1, -1)):
        index, rows = indexed(width, 5, bits, n_colors)
        colors = colors_of(n_colors, kind)
        data = bmp(width, 5 * sign, bits, rows, header=header, palette=palette_of(colors, header), colors=n_colors, gap=2)
        ends[right_or_refused(data, colors[index])] += 1
    assert ends.keys() <= {"done", "unsupported_mode"}
    assert ends["done"] == ends.total() or (
        (kind in {"counting", "scaled"} and bits > 1 and header != 12) or (kind, bits, header) == ("counting", 4, 12)
    )


def pixels_of(words: np.ndarray, bits: int, masks: tuple[int, ...]) -> np.ndarray:
    """Channels of each word by its masks, to 8 bits: ``floor(v * 255 / largest)``; composed on white where there is alpha."""
    channels = []
    for mask in masks:
        if mask:
            shift = (mask & -mask).bit_length() - 1
            channels.append((words.astype(np.int64) & mask) // 2**shift * 255 // (mask >> shift))
    found = np.stack(channels[:3], 2).astype(np.uint8)
    return over(found, channels[3].astype(np.uint8)) if masks[3] else found


@pytest.mark.parametrize("sign", [1, -1], ids=["bottom-up", "top-down"])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read_as_declared(name, sign):
    bits, masks = MASKS[name]
    n_done = 0
    for width, header in product(WIDTHS, (40, 52, 56, 108, 124)):
        if masks[3] and header < 56:
            continue
        bytes_ = np.random.default_rng(width).integers(0, 256, (5, width, bits // 8)).astype(np.uint8)
        words = np.dot(bytes_.astype(np.int64), 256 ** np.arange(bits // 8))
        data = bmp(width, 5 * sign, bits, [row.tobytes() for row in bytes_], compression=3, header=header, masks=masks)
        n_done += right_or_refused(data, pixels_of(words, bits, masks)) == "done"
    assert n_done >= 9


@pytest.mark.parametrize("header", [56, 108, 124])
def test_alpha_in_16_bits_is_refused_because_pillow_ignores_it(header):
    masks = (0x7C00, 0x3E0, 0x1F)
    rows = [bytes(range(8))] * 2
    opaque = bmp(4, 2, 16, rows, compression=3, header=header, masks=(*masks, 0))
    assert right_or_refused(opaque, pixels_of(np.frombuffer(b"".join(rows), "<u2").reshape(2, 4), 16, (*masks, 0))) == "done"
    with pytest.raises(ImageError, match=r"^unsupported_mode: BMP with alpha in 16 bits"):
        decode(bmp(4, 2, 16, rows, compression=3, header=header, masks=(*masks, 0x8000)), RGB)


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(("name", "bits"), [("555", 16), ("BGR", 24), ("BGRX", 32)])
def test_colours_without_masks_are_read(name, bits, header):
    for width in WIDTHS:
        bytes_ = np.random.default_rng(width).integers(0, 256, (5, width, bits // 8)).astype(np.uint8)
        words = np.dot(bytes_.astype(np.int64), 256 ** np.arange(bits // 8))
        data = bmp(width, 5, bits, [row.tobytes() for row in bytes_], header=header)
        assert right_or_refused(data, pixels_of(words, bits, MASKS[name][1])) == "done"


def runs(index: np.ndarray, bits: int, rng: np.random.Generator) -> bytes:
    """Rows from the bottom up, as runs and literal pieces of random lengths."""
    found = b""
    for row in index[::-1]:
        x = 0
        while x < len(row):
            n = int(rng.integers(1, 9))
            piece = row[x : x + n]
            if len(piece) < 3 or rng.integers(2):
                n = 1 + int(np.argmin(np.append(row[x:] == row[x], False))) - 1
                found += bytes([n, row[x] if bits == 8 else row[x] * 17])
            else:
                n = len(piece)
                body = piece.tobytes() if bits == 8 else np.packbits(np.unpackbits(piece[:, None], axis=1)[:, 4:]).tobytes()
                found += bytes([0, n]) + body + bytes(len(body) % 2)
            x += n
        found += b"\0\0"
    return found + b"\0\1"


@pytest.mark.parametrize("kind", ["colour", "counting", "scaled", "white first"])
@pytest.mark.parametrize(("compression", "bits"), [(1, 8), (2, 4)])
def test_runs_are_read_or_refused(compression, bits, kind):
    ends = Counter()
    for width, n_colors, gap in product((3, 8, 31), (2, 2**bits), (0, 1, 2)):
        index, _ = indexed(width, 6, bits, n_colors)
        index[2:4] = 1
        colors = colors_of(n_colors, kind)
        body = runs(index, bits, np.random.default_rng(width))
        data = bmp(width, 6, bits, body, compression=compression, palette=palette_of(colors, 40), colors=n_colors, gap=gap)
        ends[right_or_refused(data, colors[index])] += 1
    assert ends["done"] >= 6
    assert ends.keys() <= {"done", "unsupported_mode"}


@pytest.mark.parametrize("bits", [1, 4, 8, 16, 24, 32])
def test_a_bmp_that_ends_early_is_truncated(bits):
    palette = palette_of(colors_of(2**bits, "colour"), 40) if bits <= 8 else b""
    data = bmp(9, 5, bits, [bytes((9 * bits + 7) // 8)] * 5, palette=palette)
    assert decode(data, RGB).shape == (5, 9, 3)
    for n_missing in (1, 5, 4 * ((9 * bits + 31) // 32)):
        if n_missing > 4 * ((9 * bits + 31) // 32) - (9 * bits + 7) // 8:  # more than the padding of the last row
            with pytest.raises(ImageError, match=r"^truncated: "):
                decode(data[:-n_missing], RGB)


@pytest.mark.parametrize(("compression", "bits"), [(1, 4), (2, 8)])
def test_runs_of_other_bits_than_their_compression_are_refused(compression, bits):
    palette = palette_of(colors_of(2**bits, "colour"), 40)
    data = bmp(4, 1, bits, b"\4\1\0\0\0\1", compression=compression, palette=palette)
    for function in (probe, decode):
        with pytest.raises(ImageError, match=r"^unsupported_mode: BMP with runs"):
            function(data, RGB)


# PNM


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("maximum", [1, 3, 15, 100, 254, 255, 256, 1000, 4095, 65534, 65535])
def test_every_maximum_is_scaled_to_255(maximum, channels):
    samples = np.random.default_rng(maximum).integers(0, maximum + 1, (5, 7, channels))
    wanted = np.rint(samples / maximum * 255)
    if channels == 1 and maximum > 255:
        wanted = np.rint(np.rint(samples / maximum * 65535) / 257)
    wanted = np.broadcast_to(wanted, (5, 7, 3)).astype(np.uint8)
    magic = {1: 5, 3: 6}[channels]
    binary = b"P%d 7 5 %d\n" % (magic, maximum) + samples.astype(">u2" if maximum > 255 else "u1").tobytes()
    plain = b"P%d 7 5 %d\n" % (magic - 3, maximum) + " ".join(map(str, samples.ravel())).encode() + b"\n"
    for data in (binary, plain):
        if data is plain and channels == 3 and maximum > 255:
            wanted = np.rint(samples / maximum * 255).astype(np.uint8)
        np.testing.assert_array_equal(decode(data, RGB), wanted)


@pytest.mark.parametrize(
    "data", [b"P5 2 1 100\n\1\xc8", b"P6 1 1 100\n\1\2\xc8", b"P5 2 1 1000\n\0\1\x10\0", b"P2 2 1 100\n1 200\n"]
)
def test_a_sample_above_the_maximum_is_refused(data):
    with pytest.raises(ImageError, match=r"^corrupt: "):
        decode(data, RGB)


# Flipped bits: without a checksum some damage stays unseen


def residue(data: bytes, step: int = 1) -> Counter[str]:
    """How a file ends for each of its bits flipped; behind the headers for each ``step``-th."""
    whole, ends = decode(data, RGB), Counter()
    for bit in (*range(512), *range(512, 8 * len(data), step)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            pixels = decode(bytes(damaged), DecodeSpec(pixel_limit=1_000_000))
        except ImageError as error:
            ends[error.code] += 1
        else:
            same_shape = pixels.shape == whole.shape
            ends["right" if same_shape and np.array_equal(pixels, whole) else "wrong pixels" if same_shape else "wrong size"] += 1
    return ends


def small_files() -> dict[str, bytes]:
    noise = np.random.default_rng(3).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    index, rows = indexed(8, 6, 8, 200)
    palette = palette_of(colors_of(256, "colour"), 40)
    return {
        "BMP, 24 bits": bmp(8, 6, 24, [row.tobytes() for row in noise]),
        "BMP, palette": bmp(8, 6, 8, rows, palette=palette),
        "BMP, runs": bmp(8, 6, 8, runs(index, 8, np.random.default_rng(0)), palette=palette, compression=1),
        "PPM": b"P6 8 6 255\n" + noise.tobytes(),
        "PPM, plain": b"P3 8 6 255\n" + " ".join(map(str, noise.ravel())).encode() + b"\n",
    }


@pytest.mark.parametrize("name", small_files())
def test_a_flipped_bit_raises_nothing_but_an_image_error(name):
    ends = residue(small_files()[name], 5)
    assert ends["wrong pixels"] > 0  # that is what docs/decoding.md says of these formats


def main() -> None:
    for name, data in small_files().items():
        ends = residue(data)
        shares = ", ".join(f"{end} {100 * n / ends.total():.0f} %" for end, n in ends.most_common())
        sys.stdout.write(f"{name}, {len(data)} bytes: {shares}\n")


if __name__ == "__main__":
    main()
