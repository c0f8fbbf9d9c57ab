"""Tests of pipeline/source/png.py, on files whose pixels are known; ``python -m tests.source.test_png`` flips more bits."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from collections import Counter
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode, probe
from tests.source.test_decoding import chunk, exif, over

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RGB = DecodeSpec()
CASES = Path(__file__).parents[1] / "cases"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
KINDS = [(0, depth) for depth in (1, 2, 4, 8, 16)] + [(3, depth) for depth in (1, 2, 4, 8)] + list(product((2, 4, 6), (8, 16)))
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
SIGNATURE = b"\x89PNG\r\n\x1a\n"
END = chunk(b"IEND", b"")


def packed(samples: np.ndarray, depth: int) -> list[bytes]:
    """Rows of ``(y, x, channel)`` samples as bytes."""
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in samples]
    bits = np.unpackbits(samples.reshape(len(samples), -1, 1).astype(np.uint8), axis=2)[:, :, 8 - depth :]
    return [np.packbits(row).tobytes() for row in bits]


def filtered(rows: list[bytes], step: int, first: int) -> bytes:
    """Rows with their filters: one of the five after the other, from ``first`` on."""
    found, above = b"", bytes(len(rows[0]))
    for number, row in enumerate(rows):
        kind = (first + number) % 5
        left, corner = bytes(step) + row[:-step], bytes(step) + above[:-step]
        values = zip(row, left, above, corner, strict=False)
        found += bytes([kind]) + bytes((x - predicted(kind, a, b, c)) % 256 for x, a, b, c in values)
        above = row
    return found


def predicted(kind: int, a: int, b: int, c: int) -> int:
    if kind < 4:
        return (0, a, b, (a + b) // 2)[kind]
    return min((a, b, c), key=lambda value: abs(a + b - c - value))  # Paeth; of equals, the first


def raw_pixels(samples: np.ndarray, depth: int, *, interlaced: bool) -> bytes:
    step = max(1, samples.shape[2] * depth // 8)
    passes = [samples[y::dy, x::dx] for y, x, dy, dx in (PASSES if interlaced else [(0, 0, 1, 1)])]
    return b"".join(filtered(packed(part, depth), step, number) for number, part in enumerate(passes) if part.size)


def write(samples: np.ndarray, depth: int, color: int, *before: bytes, interlaced: bool = False, n_chunks: int = 1) -> bytes:
    data = zlib.compress(raw_pixels(samples, depth, interlaced=interlaced))
    bounds = np.linspace(0, len(data), n_chunks + 1).astype(int)
    parts = [chunk(b"IDAT", data[a:b]) for a, b in pairwise(bounds)]
    return SIGNATURE + header(samples, depth, color, interlaced=interlaced) + b"".join([*before, *parts, END])


def header(samples: np.ndarray, depth: int, color: int, *, interlaced: bool = False) -> bytes:
    height, width = samples.shape[:2]
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))


def noise(height: int, width: int, depth: int, color: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**depth, (height, width, CHANNELS[color])).astype(np.uint16)


def palette(depth: int) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (2**depth, 3)).astype(np.uint8)


def transparency(samples: np.ndarray, depth: int, color: int) -> bytes:
    """A tRNS chunk: the colour of the first pixel, or an alpha for each colour but the last."""
    if color == 3:
        return chunk(b"tRNS", bytes(range(7, 7 + 2**depth - 1)) if depth < 8 else bytes(range(255)))
    return chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes())


def expected(samples: np.ndarray, depth: int, color: int, *, transparent: bool) -> np.ndarray:
    """By the rules of docs/decoding.md."""
    if color == 3:
        index = samples[..., 0]
        alphas = np.append(np.arange(2**depth - 1) + (7 if depth < 8 else 0), 255) if transparent else np.full(2**depth, 255)
        return over(palette(depth)[index], alphas[index])
    values = samples >> 8 if depth == 16 else samples * (255 // (2**depth - 1))
    if (depth, color) == (16, 0):
        values = np.rint(samples / 257)
    colors = np.broadcast_to(values[..., : 3 if color in {2, 6} else 1], (*samples.shape[:2], 3))
    if color in {4, 6}:
        return over(colors, values[..., -1])
    return over(colors, np.where(transparent & (samples == samples[0, 0]).all(axis=2), 0, 255))


@pytest.mark.parametrize("transparent", [False, True], ids=["opaque", "transparent"])
@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "adam7"])
@pytest.mark.parametrize(("color", "depth"), KINDS)
def test_every_kind_is_read_as_it_was_written(color, depth, interlaced, transparent):
    if transparent and color in {4, 6}:
        pytest.skip("has an alpha channel")
    before = [chunk(b"PLTE", palette(depth).tobytes())] if color == 3 else []
    for (height, width), n_chunks in product([(1, 1), (2, 3), (5, 5), (9, 17), (70, 33)], (1, 3)):
        samples = noise(height, width, depth, color, height)
        after = [transparency(samples, depth, color)] if transparent else []
        data = write(samples, depth, color, *before, *after, interlaced=interlaced, n_chunks=n_chunks)
        if transparent and (color, depth) == (2, 16):
            for read in (decode, probe):
                with pytest.raises(ImageError, match=r"^unsupported_mode: a PNG of 16-bit RGB with a transparent colour"):
                    read(data, RGB)
            continue
        wanted = expected(samples, depth, color, transparent=transparent)
        np.testing.assert_array_equal(decode(data, RGB), wanted)
        assert (probe(data, RGB).input_height, probe(data, RGB).input_width) == (height, width)


@pytest.mark.parametrize("interlaced", [False, True], ids=["rows", "adam7"])
@pytest.mark.parametrize(("color", "depth"), [kind for kind in KINDS if kind[0] != 3 and kind[1] >= 8])
def test_the_files_of_this_module_are_read_alike_by_libpng(color, depth, interlaced):
    codecs = pytest.importorskip("imagecodecs")
    samples = noise(23, 31, depth, color)
    found = codecs.png_decode(write(samples, depth, color, interlaced=interlaced))
    np.testing.assert_array_equal(found.reshape(samples.shape), samples)


@pytest.mark.parametrize("color", ["rgb", "grey"])
@pytest.mark.parametrize("resize", [None, (40, 30)])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("mode", ["L", "RGB", "LA", "RGBA", "1", "P"])
def test_the_spare_row_below_the_pixels_never_shows(mode, orientation, resize, color):
    pixels = noise(200, 100, 8, 2).astype(np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(pixels).convert(mode)
    image.save(file, "PNG", exif=exif(orientation))
    found = decode(file.getvalue(), DecodeSpec(color=color, resize=resize))
    image = image.convert("L" if mode in {"1", "LA"} else "RGBA" if mode == "RGBA" else "RGB")
    if mode in {"RGB", "L", "P"}:
        turned = image.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else image
        turned = turned.convert("RGB" if color == "rgb" else "L")
        turned = turned.resize((30, 40), Image.Resampling.BILINEAR) if resize else turned
        if resize is None:
            np.testing.assert_array_equal(found, np.asarray(turned).reshape(found.shape))
    height, width = resize or ((100, 200) if orientation == 6 else (200, 100))
    assert found.shape == (height, width, 3 if color == "rgb" else 1)


# Checksums and lengths

PIXELS = noise(12, 20, 8, 2)
RAW = raw_pixels(PIXELS, 8, interlaced=False)
WHOLE = expected(PIXELS, 8, 2, transparent=False)
ROW_BYTES = 1 + 3 * 20


def stored(data: bytes) -> bytes:
    return zlib.compress(data, 0)


def of_stream(*parts: bytes, end: bytes = END) -> bytes:
    return SIGNATURE + header(PIXELS, 8, 2) + b"".join(chunk(b"IDAT", part) for part in parts) + end


SOUND = {
    "one chunk": of_stream(zlib.compress(RAW)),
    "a byte a chunk": of_stream(*[bytes([value]) for value in zlib.compress(RAW)]),
    "empty chunks": of_stream(b"", zlib.compress(RAW), b"", b""),
    "checksum in a chunk of its own": of_stream(zlib.compress(RAW)[:-4], zlib.compress(RAW)[-4:]),
    "empty blocks before the checksum": of_stream(
        stored(RAW)[:2] + b"".join([struct.pack("<BHH", 0, len(RAW), 65535 - len(RAW)), RAW, b"\0\0\0\xff\xff" * 50])
        + b"\1\0\0\xff\xff" + struct.pack(">I", zlib.adler32(RAW))
    ),
    "without IEND": of_stream(zlib.compress(RAW), end=b""),
    "IEND with a wrong checksum": of_stream(zlib.compress(RAW), end=END[:-1] + b"x"),
    "cut within the checksum of IDAT": of_stream(zlib.compress(RAW), end=b"")[:-2],
    "something behind the stream": of_stream(zlib.compress(RAW) + b"something"),
    "much behind the stream": of_stream(zlib.compress(RAW) + bytes(200_000)),
}  # fmt: skip
DAMAGED = {
    "a row is missing": (of_stream(zlib.compress(RAW[:-ROW_BYTES])), "corrupt", "end before the last row"),
    "all rows are missing": (of_stream(zlib.compress(b"")), "corrupt", "end before the last row"),
    "a byte is missing": (of_stream(zlib.compress(RAW[:-1])), "corrupt", "end before the last row"),
    "no pixels": (of_stream(b""), "corrupt", "end before the last row"),
    "a row too many": (of_stream(zlib.compress(RAW + RAW[:ROW_BYTES])), "corrupt", "go on behind the last row"),
    "an empty row too many": (of_stream(zlib.compress(RAW + bytes(ROW_BYTES))), "corrupt", "go on behind the last row"),
    "a byte too many": (of_stream(zlib.compress(RAW + b"\0")), "corrupt", "go on behind the last row"),
    "wrong adler": (of_stream(zlib.compress(RAW)[:-1] + b"x"), "corrupt", "incorrect data check"),
    "wrong adler in a chunk of its own": (of_stream(zlib.compress(RAW)[:-4], b"abcd"), "corrupt", "incorrect data check"),
    "no adler": (of_stream(zlib.compress(RAW)[:-4]), "corrupt", "without their checksum"),
    "cut within the adler": (of_stream(zlib.compress(RAW))[: -len(END) - 4 - 2], "truncated", "have no end"),
    "cut behind the first of two chunks": (of_stream(*[zlib.compress(RAW)[:90]], end=b""), "truncated", "have no end"),
    "the stream ends in an error": (of_stream(b"\x78\1\0\5\0\0\0" + RAW), "corrupt", "damaged: "),
    "unknown filter": (of_stream(zlib.compress(b"\7" + RAW[1:])), "corrupt", "data stream"),
    "IDAT with a wrong checksum": (of_stream(zlib.compress(RAW), end=b"")[:-1] + b"x" + END, "corrupt", "wrong checksum"),
    "other chunk between the pixels": (
        of_stream(zlib.compress(RAW)[:90], end=chunk(b"tEXt", b"a\0b") + chunk(b"IDAT", zlib.compress(RAW)[90:]) + END),
        "corrupt",
        "end before the last row",
    ),
    "palette is missing": (write(noise(4, 4, 8, 3), 8, 3), "corrupt", "palette is missing"),
    "two headers": (
        SIGNATURE + header(PIXELS[:6], 8, 2) + header(PIXELS, 8, 2) + chunk(b"IDAT", zlib.compress(RAW)) + END,
        "corrupt",
        "IHDR",
    ),
    "header ends the file": (of_stream(b"")[:40], "truncated", "a chunk of its header"),
}


@pytest.mark.parametrize("name", SOUND)
def test_whole_pixels_are_read_however_their_chunks_are_cut(name):
    np.testing.assert_array_equal(decode(SOUND[name], RGB), WHOLE)
    assert decode(SOUND[name], DecodeSpec(color="grey")).shape == (12, 20, 1)


@pytest.mark.parametrize("name", DAMAGED)
def test_pixels_without_their_proof_are_refused(name):
    data, code, text = DAMAGED[name]
    with pytest.raises(ImageError, match=text) as caught:
        decode(data, RGB)
    assert caught.value.code == code


def test_interlaced_pixels_have_the_same_proof():
    raw = raw_pixels(PIXELS, 8, interlaced=True)
    for data, text in ((raw[:-1], "end before"), (raw[: -(1 + 60)], "end before"), (raw + b"\0", "go on behind")):
        file = SIGNATURE + header(PIXELS, 8, 2, interlaced=True) + chunk(b"IDAT", zlib.compress(data)) + END
        with pytest.raises(ImageError, match=text):
            decode(file, RGB)


def test_a_last_row_that_looks_like_the_mark_is_read():
    for mode, ink in (("L", 165), ("RGB", (165, 90, 60)), ("1", 1)):
        image = Image.new(mode, (20, 80))
        image.paste(ink, (0, 79, 10, 80))
        file = io.BytesIO()
        image.save(file, "PNG")
        np.testing.assert_array_equal(decode(file.getvalue(), RGB), np.asarray(image.convert("RGB")))


# Chunks that decide on nothing

PROFILE = b"name\0\0" + zlib.compress(bytes(300))
BROKEN = {
    "text": chunk(b"tEXt", b"Title\0hello")[:-1] + b"x",
    "unknown": chunk(b"prVt", b"hello")[:-1] + b"x",
    "profile": chunk(b"iCCP", PROFILE)[:-1] + b"x",
    "EXIF": chunk(b"eXIf", exif(6).tobytes()[6:])[:-1] + b"x",
    "profile of another compression": chunk(b"iCCP", b"name\0\7xx"),
    "profile without an end": chunk(b"iCCP", b"name"),
    "profile too large": chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8), 9)),
    "gamma too short": chunk(b"gAMA", b"\0"),
    "chromaticities too short": chunk(b"cHRM", b"\0"),
    "size too short": chunk(b"pHYs", b"\0"),
    "animation out of order": chunk(b"acTL", struct.pack(">II", 2, 0)) + chunk(b"fcTL", bytes([0, 0, 0, 9]) + bytes(22)),
    "text too large": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7), 9)),
    "XMP too large": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(10**7), 9)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_ancillary_chunk_costs_nothing(name, tmp_path):
    data = SIGNATURE + header(PIXELS, 8, 2) + BROKEN[name] + chunk(b"IDAT", zlib.compress(RAW)) + END
    np.testing.assert_array_equal(decode(data, RGB), WHOLE)
    assert probe(data, RGB).input_width == 20
    (tmp_path / "a.png").write_bytes(data)
    with (tmp_path / "a.png").open("rb") as file:
        assert probe(file, RGB) == probe(data, RGB)


@pytest.mark.parametrize("orientation", [chunk(b"eXIf", exif(6).tobytes()[6:]),
    chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<rdf:Description tiff:Orientation="6"/>')])  # fmt: skip
def test_a_broken_chunk_leaves_the_orientation(orientation):
    data = SIGNATURE + header(PIXELS, 8, 2) + BROKEN["text"] + orientation + chunk(b"IDAT", zlib.compress(RAW)) + END
    np.testing.assert_array_equal(decode(data, RGB), np.rot90(WHOLE, -1))
    assert probe(data, RGB).input_width == 12


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"tRNS", b"TEXt", b"tRNQ", b"t\0Xt"])
def test_a_chunk_that_decides_on_the_pixels_is_not_passed_over(name):
    broken = chunk(name, PROFILE)[:-1] + b"x"
    data = SIGNATURE + header(PIXELS, 8, 2) + broken + chunk(b"IDAT", zlib.compress(RAW)) + END
    for function in (probe, decode):
        with pytest.raises(ImageError, match=r"^corrupt: .*wrong checksum"):
            function(data, RGB)


@pytest.mark.parametrize("color", [0, 2, 3])
def test_a_palette_or_transparency_that_comes_twice_or_in_the_wrong_order_is_refused(color):
    """libpng takes the first transparency, and none before the palette; Pillow takes the last."""
    samples = noise(4, 4, 8, color)
    colors = chunk(b"PLTE", palette(8).tobytes())
    key, other = transparency(samples, 8, color), transparency(samples[::-1], 8, color)
    before = (colors,) if color == 3 else ()
    np.testing.assert_array_equal(
        decode(write(samples, 8, color, *before, key), RGB), expected(samples, 8, color, transparent=True)
    )
    wrong = [(*before, key, other), (colors, colors), (*before, header(samples, 8, color))]
    for chunks in [*wrong, (key, colors)]:
        with pytest.raises(ImageError, match=r"^corrupt: .*IHDR, PLTE and tRNS comes twice, or tRNS before PLTE"):
            decode(write(samples, 8, color, *chunks), RGB)


def test_a_length_that_swallows_the_next_chunk_is_seen():
    samples = noise(4, 4, 8, 2)
    text, key = chunk(b"tEXt", b"a\0b"), transparency(samples, 8, 2)
    longer = struct.pack(">I", 3 + len(key)) + text[4:]
    data = write(samples, 8, 2, longer, key)
    with pytest.raises(ImageError, match="wrong checksum"):
        decode(data, RGB)


def test_the_samples_of_old():
    assert decode((CASES / "crc_ancillary.png").read_bytes(), RGB).shape == (61, 83, 3)
    with pytest.raises(ImageError, match=r"^corrupt: .*IDAT chunk has a wrong checksum"):
        decode((CASES / "flip_drawing.png").read_bytes(), RGB)


# Every bit flipped once


def small_files() -> dict[str, tuple[bytes, list[np.ndarray]]]:
    """Files by name, each with the pixels that it may give."""
    found = {}
    for color, depth in KINDS:
        samples = noise(5, 6, depth, color)
        before = [chunk(b"PLTE", palette(min(depth, 4)).tobytes())] if color == 3 else []
        samples = np.minimum(samples, 15) if color == 3 else samples
        pixels = expected(samples, depth, color, transparent=False) if color != 3 else palette(min(depth, 4))[samples[..., 0]]
        found[f"{color} {depth}"] = write(samples, depth, color, *before), [pixels]
        if color < 3 and (color, depth) != (2, 16):  # which is refused
            key = transparency(samples, depth, color)
            keyed = write(samples, depth, color, key, interlaced=depth == 8)
            found[f"{color} {depth} key"] = keyed, [expected(samples, depth, color, transparent=True)]
    samples = noise(5, 6, 8, 2)
    pixels = expected(samples, 8, 2, transparent=False)
    texts = [chunk(b"tEXt", b"a\0b"), chunk(b"iCCP", PROFILE), chunk(b"gAMA", bytes([0, 0, 177, 143]))]
    found["texts, two chunks"] = write(samples, 8, 2, *texts, n_chunks=2), [pixels]
    turned = write(samples, 8, 2, chunk(b"eXIf", exif(6).tobytes()[6:]))
    found["EXIF"] = turned, [np.rot90(pixels, -1), pixels]  # damaged EXIF counts as none, by its rule
    flat = np.full((32, 32, 1), 200, np.uint16)
    flat[8:20, 8:20] = 20
    found["drawing"] = write(flat, 8, 0), [expected(flat, 8, 0, transparent=False)]
    return found


FILES = small_files()


def flips(data: bytes, allowed: list[np.ndarray]) -> Counter[str]:
    """How the file ends for each of its bits flipped; wrong pixels raise."""
    ends: Counter[str] = Counter()
    for bit in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            pixels = decode(bytes(damaged), RGB)
        except ImageError as error:
            ends[error.code] += 1
            continue
        assert any(np.array_equal(pixels, wanted) for wanted in allowed), f"wrong pixels with bit {bit} flipped"
        assert pixels.shape[:2] == (probe(bytes(damaged), RGB).input_height, probe(bytes(damaged), RGB).input_width)
        ends["done"] += 1
    return ends


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_gives_the_right_pixels_or_none(name):
    ends = flips(*FILES[name])
    assert ends["corrupt"] > 100
    assert ends["done"] >= 8 * len(END)


def main() -> None:
    """The same for larger files of many kinds; prints how they ended."""
    ends: Counter[str] = Counter()
    for (color, depth), interlaced in product(KINDS, (False, True)):
        samples = noise(9, 11, depth, color)
        before = [chunk(b"PLTE", palette(depth).tobytes())] if color == 3 else []
        data = write(samples, depth, color, *before, interlaced=interlaced, n_chunks=1)
        ends += flips(data, [expected(samples, depth, color, transparent=False)])
    sys.stdout.write(
        f"{ends.total()} flips: " + ", ".join(f"{n} {end}" for end, n in ends.most_common()) + ", none with wrong pixels\n"
    )


if __name__ == "__main__":
    main()
