"""JPEG inside TIFF: every strip and tile is whole and what the TIFF says, or the file is refused."""

from __future__ import annotations

import io
import struct
from collections import Counter
from itertools import product

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode

SPEC = DecodeSpec()
HEIGHT, WIDTH = 72, 80
SHAPES = {"one strip": {}, "strips": {"rowsperstrip": 16}, "tiles": {"tile": (32, 32)}}
KINDS = ("minisblack", "rgb", "ycbcr", "separate")
WRITERS = ("tifffile", "libtiff")  # libtiff puts the tables into the tag JPEGTables, tifffile into each strip


def picture(*, is_grey: bool) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    noise = np.random.default_rng(0).integers(-9, 9, (HEIGHT, WIDTH, 3))
    pixels = np.clip(np.stack([3 * x, 3 * y, 200 - x - y], 2) + noise, 0, 255).astype(np.uint8)
    return pixels[..., 0].copy() if is_grey else pixels


def written(kind: str, shape: str, writer: str) -> bytes:
    pixels, file = picture(is_grey=kind == "minisblack"), io.BytesIO()
    if writer == "libtiff":
        mode = "YCbCr" if kind == "ycbcr" else None
        tags = {278: SHAPES[shape].get("rowsperstrip", HEIGHT)}
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode else image).save(file, "TIFF", compression="jpeg", quality=90, tiffinfo=tags)
    elif kind == "separate":
        tifffile.imwrite(
            file, pixels.transpose(2, 0, 1), photometric="rgb", planarconfig=kind, compression="jpeg", **SHAPES[shape]
        )
    else:
        options = {"compressionargs": {"outcolorspace": "rgb", "level": 90}} if kind == "rgb" else {}
        tifffile.imwrite(file, pixels, photometric=kind, compression="jpeg", **SHAPES[shape], **options)
    return file.getvalue()


CASES = [
    case for case in product(KINDS, SHAPES, WRITERS) if case[2] == "tifffile" or (case[0] != "separate" and case[1] != "tiles")
]
FILES = {" ".join(case): written(*case) for case in CASES}


def blocks(data: bytes) -> list[tuple[int, int]]:
    """Place and length of each strip or tile."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        return list(zip(file.pages[0].dataoffsets, file.pages[0].databytecounts, strict=True))


def tables_of(data: bytes) -> tuple[int, int]:
    """Place and length of the tag JPEGTables."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        tag = file.pages[0].tags[347]
        return tag.valueoffset, tag.count


def with_block(data: bytes, block: int, stored: bytes) -> bytes:
    """The file with other data of a strip or tile, put at its end."""
    data += b"\0" * (len(data) % 2)
    changed = bytearray(data + stored)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        for tag, value in (
            (page.tags.get(324) or page.tags[273], len(data)),
            (page.tags.get(325) or page.tags[279], len(stored)),
        ):
            form = {3: "<H", 4: "<I"}[tag.dtype.value]
            struct.pack_into(form, changed, tag.valueoffset + block * struct.calcsize(form), value)
    return bytes(changed)


def end_of(data: bytes, code: str | None = None) -> ImageError:
    with pytest.raises(ImageError) as caught:
        decode(data, SPEC)
    assert code in (None, caught.value.code), caught.value
    return caught.value


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_what_tifffile_reads(name):
    with tifffile.TiffFile(io.BytesIO(FILES[name])) as file:
        wanted = file.pages[0].asarray()
    wanted = wanted.transpose(1, 2, 0) if name.startswith("separate") else wanted
    wanted = np.stack([wanted] * 3, 2) if wanted.ndim == 2 else wanted
    assert np.abs(decode(FILES[name], SPEC).astype(int) - wanted).max() <= 3


def test_the_kinds_are_what_they_are_called():
    for name, data in FILES.items():
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            wanted = "rgb" if name.startswith("separate") else name.split()[0]
            assert file.pages[0].photometric.name.lower() == wanted


def test_the_tables_are_shared_by_one_writer_only():
    """So that both ways are tried."""
    for name, data in FILES.items():
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            assert (347 in file.pages[0].tags) == name.endswith("libtiff")


@pytest.mark.parametrize("name", FILES)
def test_a_part_of_the_data_with_an_end_marker_is_refused(name):
    data, codes = FILES[name], Counter()
    for block, (place, n_bytes) in enumerate(blocks(data)):
        stored = data[place : place + n_bytes]
        start = stored.rindex(b"\xff\xda") + 14
        for share in (0, 0.25, 0.5, 0.75, 0.95):
            kept = stored[: start + int(share * (n_bytes - start - 2))].rstrip(b"\xff") + b"\xff\xd9"
            codes[end_of(with_block(data, block, kept)).code] += 1
        codes[end_of(with_block(data, block, stored[:-9]), "truncated").code] += 1
    assert codes.keys() <= {"truncated", "corrupt"}
    assert codes["truncated"] > codes["corrupt"]


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("libtiff")])
def test_damaged_shared_tables_are_refused(name):
    data = FILES[name]
    place, n_bytes = tables_of(data)
    for start, end in ((0, n_bytes), (0, n_bytes // 2), (n_bytes // 2, n_bytes), (20, 40), (n_bytes - 40, n_bytes - 20)):
        end_of(data[: place + start] + bytes(end - start) + data[place + end :])


SIZES = {"height": (3, 2), "width": (5, 2)}


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("ycbcr")])
@pytest.mark.parametrize("change", [-16, -8, 8, 16])
@pytest.mark.parametrize("side", [0, 1])
def test_a_strip_or_tile_of_another_size_is_refused(name, change, side):
    data = FILES[name]
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, WIDTH)
    shape = [min(rows, HEIGHT), columns]
    shape[side] += change
    if shape[side] <= 0:
        return
    pixels = np.zeros((*shape, 3) if "rgb" in name else shape, np.uint8)
    options = {"colorspace": "rgb", "outcolorspace": "rgb"} if pixels.ndim == 3 else {}
    error = end_of(with_block(data, 0, imagecodecs.jpeg8_encode(pixels, **options)), "corrupt")
    assert f"{shape[0]} x {shape[1]} pixels, where the TIFF says" in error.text


def test_a_last_strip_of_full_height_is_read():
    data = FILES["rgb strips tifffile"]
    last = len(blocks(data)) - 1
    rows = np.concatenate([picture(is_grey=False)[64:], np.zeros((8, WIDTH, 3), np.uint8)])
    full = imagecodecs.jpeg8_encode(rows, 95, colorspace="rgb", outcolorspace="rgb")
    found = decode(with_block(data, last, full), SPEC)
    assert np.abs(found[64:].astype(int) - picture(is_grey=False)[64:]).max() < 20
    assert "where the TIFF says" in end_of(with_block(data, 0, imagecodecs.jpeg8_encode(rows[:8])), "corrupt").text


@pytest.mark.parametrize("name", ["minisblack strips tifffile", "rgb strips tifffile"])
def test_other_sample_counts_and_depths_are_refused(name):
    data, rows = FILES[name], picture(is_grey=name.startswith("rgb"))[:16]
    assert "samples of 8 bits" in end_of(with_block(data, 0, imagecodecs.jpeg8_encode(rows)), "corrupt").text
    deep = imagecodecs.jpeg8_encode(picture(is_grey=True)[:16].astype(np.uint16), bitspersample=12)
    assert "of 12 bits" in end_of(with_block(data, 0, deep), "corrupt").text


def test_colours_that_contradict_the_tiff_are_refused():
    rows = picture(is_grey=False)[:16]
    for name, colorspace in (("rgb strips tifffile", "ycbcr"), ("ycbcr strips tifffile", "rgb")):
        stored = imagecodecs.jpeg8_encode(rows, colorspace="rgb", outcolorspace=colorspace, subsampling="420")
        end_of(with_block(FILES[name], 0, stored))


def test_what_cannot_be_proven_is_refused():
    file = io.BytesIO()
    pixels = np.zeros((16, 16, 2), np.uint8)
    tifffile.imwrite(file, pixels, photometric="minisblack", extrasamples=["unassalpha"], compression="jpeg")
    end_of(file.getvalue(), "unsupported_mode")
    arithmetic = imagecodecs.jpeg8_encode(picture(is_grey=True)[:16])
    arithmetic = arithmetic.replace(b"\xff\xc0", b"\xff\xc9")
    assert "frame of kind 9" in end_of(with_block(FILES["minisblack strips tifffile"], 0, arithmetic), "unsupported_mode").text


@pytest.mark.parametrize("name", ["rgb strips libtiff", "rgb strips tifffile"])
def test_tables_are_taken_from_the_strip_or_the_tag_and_from_no_other_strip(name):
    data = FILES[name]
    place, n_bytes = blocks(data)[1]
    stored = data[place : place + n_bytes]
    tables = b""
    if name.endswith("libtiff"):  # a strip that brings tables, of which the others know nothing
        own, size = tables_of(data)
        tables = data[own : own + size - 2]
        changed = tables + stored[2:]
    else:  # one without, after others that had them
        changed = stored[:2] + stored[min(stored.index(marker) for marker in (b"\xff\xc0", b"\xff\xda")) :]
    end_of(with_block(data, 1, changed))


def flips(data: bytes, start: int, n_bytes: int, step: int) -> Counter[str]:
    """How decoding ends with each ``step``-th bit of a part flipped."""
    right, ends = decode(data, SPEC), Counter()
    for bit in range(8 * start, 8 * (start + n_bytes), step):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            ends["exact" if np.array_equal(decode(bytes(changed), SPEC), right) else "wrong"] += 1
        except ImageError:
            ends["refused"] += 1
    return ends


@pytest.mark.parametrize("name", ["rgb tiles tifffile", "ycbcr strips libtiff"])
def test_of_flipped_bits_some_are_refused(name):
    """The residue has no proof in a JPEG: a flip mostly gives another picture of as many blocks."""
    place, n_bytes = blocks(FILES[name])[1]
    ends = flips(FILES[name], place, n_bytes, 41)
    assert ends["refused"] > 0.2 * ends.total()
