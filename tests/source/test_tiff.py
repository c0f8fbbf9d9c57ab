"""TIFF: each generated file is read as the rule says, or refused with the reason. All: ``python -m tests.support.tiff_matrix``."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode, probe
from tests.source.test_decoding import tiff
from tests.support.tiff_matrix import Case, cases, outcome

CASES = Path(__file__).parents[1] / "cases"
SPEC = DecodeSpec()
LOSSLESS = (None, "deflate", "lzw", "packbits", "zstd", "lzma")
SHARES = 4
WAYS = [("<", None, "strips"), (">", "lzw", "tiles"), ("<", "deflate", "strips"), ("<", "packbits", "odd tiles")]
WAYS += [(">", "zstd", "one strip")]
# What must be read: refusing everything would pass the matrix.
COMMON = [
    *(Case(depth, kind, "contig", "<", None, False, "strips", 1, False) for depth in "1248" for kind in ("black", "white") ),
    *(Case("8", kind, "contig", order, codec, False, layout, 1, False)
      for kind in ("black", "rgb", "palette", "cmyk", "rgb+alpha", "rgb+assoc", "black+alpha", "lab")
      for order, codec, layout in WAYS),
    *(Case("16", kind, "contig", order, codec, codec is not None, "strips", 6, False)
      for kind in ("black", "white", "rgb") for order in "<>" for codec in (None, "deflate", "lzw")),
    *(Case("8", "rgb", "separate", order, codec, False, "strips", 3, False) for order in "<>" for codec in LOSSLESS),
    *(Case("16", "rgb", "separate", "<", codec, False, "strips", 1, True) for codec in ("deflate", "lzw")),
    *(Case("8", kind, "contig", "<", "jpeg", False, layout, 1, False)
      for kind in ("black", "rgb", "ycbcr") for layout in ("strips", "tiles")),
    *(Case("12", kind, "contig", "<", None, False, layout, 1, False)
      for kind in ("black", "white") for layout in ("strips", "odd tiles")),
]  # fmt: skip


@pytest.mark.parametrize("share", range(SHARES))
def test_no_generated_file_is_done_with_wrong_pixels(share):
    found = {case: outcome(case) for case in islice(cases(), share, None, 2 * SHARES)}
    wrong = {str(case): text for case, text in found.items() if text in {"wrong", "no rule"}}
    assert not wrong
    assert sum(text == "right" for text in found.values()) > 50


def test_common_kinds_are_read():
    found = {str(case): outcome(case) for case in COMMON}
    assert {case: text for case, text in found.items() if text not in {"right", "not written"}} == {}
    assert sum(text == "right" for text in found.values()) > 70


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("planar16.tif", r"^unsupported_mode: TIFF with 16 bits per channel of RGB in separate planes, which Pillow misreads"),
        ("int8_minus1.tif", r"^unsupported_mode: TIFF with signed 8-bit integers: their range is not known"),
        ("big_be.tif", r"^unsupported_mode: big-endian BigTIFF is not supported"),
    ],
)
def test_kinds_that_are_not_read_are_refused_with_the_reason(name, message):
    for read in (decode, probe):
        with pytest.raises(ImageError, match=message):
            read((CASES / name).read_bytes(), SPEC)


def test_big_endian_grey_whose_white_is_zero_is_inverted():
    data = (CASES / "g16_white0_be.tif").read_bytes()
    wanted = np.rint((65535 - tifffile.imread(io.BytesIO(data)).astype(float)) / 257)
    np.testing.assert_array_equal(decode(data, SPEC)[..., 0], wanted)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("is_black_0", [True, False])
@pytest.mark.parametrize("compress", [bytes, zlib.compress])
def test_grey_of_12_bits_is_read_in_either_byte_order(order, is_black_0, compress):
    values = np.random.default_rng(1).integers(0, 4096, (37, 43), dtype=np.uint16)  # of which a row ends within a byte
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(37, 43, 2), axis=2)[..., 4:]
    stored = compress(np.packbits(bits.reshape(37, -1), axis=1).tobytes())
    data = tiff(stored, 43, 37, [12], int(is_black_0), order, tag_259=[1 if compress is bytes else 8])
    np.testing.assert_array_equal(tifffile.imread(io.BytesIO(data)), values)
    wanted = np.rint((values if is_black_0 else 4095 - values.astype(float)) * 255.0 / 4095)
    np.testing.assert_array_equal(decode(data, SPEC)[..., 0], wanted)


def deflated(pixels: np.ndarray, **options) -> tuple[bytes, int, int]:
    """A file of one deflate strip, its place and its length."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="minisblack", compression="deflate", metadata=None, **options)
    data = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as read:
        page = read.pages[0]
        return data, page.dataoffsets[0], page.databytecounts[0]


@pytest.mark.parametrize("predictor", [None, True])
def test_no_flipped_bit_of_deflate_data_is_done_with_wrong_pixels(predictor):
    y, x = np.mgrid[:12, :12]
    data, start, n_bytes = deflated(((y * 9 + x * x) % 256).astype(np.uint8), predictor=predictor)
    right, n_refused = decode(data, SPEC), 0
    for bit in range(8 * start, 8 * (start + n_bytes)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            np.testing.assert_array_equal(decode(bytes(damaged), SPEC), right)
        except ImageError as error:
            n_refused += error.code in {"corrupt", "truncated"}
    assert n_refused > 7 * n_bytes


def test_deflate_data_with_more_bytes_than_pixels_need_their_checksum_too():
    pixels = np.arange(144, dtype=np.uint8).reshape(12, 12)
    data, start, n_bytes = deflated(pixels)
    longer = zlib.compress(pixels.tobytes() + bytes(200))[:-1] + b"?"
    assert start + n_bytes <= len(data)
    damaged = data[:start] + longer.ljust(n_bytes, b"\0")[: max(n_bytes, len(longer))] + data[start + n_bytes :]
    with pytest.raises(ImageError, match=r"^corrupt: "):
        decode(damaged, SPEC)


def test_strips_beyond_the_file_or_too_short_for_their_rows_are_truncated():
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((20, 20), np.uint8), photometric="minisblack", metadata=None, software=False)
    whole = file.getvalue()
    for read in (decode, probe):
        with pytest.raises(
            ImageError, match=r"^truncated: the file ends before the image does \(one of its strips ends at byte "
        ):
            read(whole[:-1], SPEC)


@pytest.mark.parametrize(
    ("photometric", "n_samples", "tags", "message"),
    [
        ("palette", 1, [(320, 3, 768, tuple(range(256)) * 3, True)], "a colour table whose values are all below 256"),
        ("separated", 4, [(332, 3, 1, 2, True)], "inks other than cyan, magenta, yellow and black"),
        ("minisblack", 1, [(65322, 3, 1, 16, True), (65323, 3, 1, 16, True)], "strips and the size of a tile"),
    ],
)
def test_tags_that_pillow_passes_over_are_refused(photometric, n_samples, tags, message):
    file, pixels = io.BytesIO(), np.zeros((16, 16, n_samples), np.uint8)
    options = {"colormap": np.tile(np.arange(256, dtype=np.uint16), (3, 1))} if photometric == "palette" else {"extratags": tags}
    tifffile.imwrite(file, pixels[..., 0] if n_samples == 1 else pixels, photometric=photometric, metadata=None, **options)
    data = file.getvalue()
    for tag in (322, 323):  # which tifffile does not write for strips
        data = data.replace(struct.pack("<HHI", 65000 + tag, 3, 1), struct.pack("<HHI", tag, 3, 1))
    with pytest.raises(ImageError, match=f"^unsupported_mode: TIFF with {message}"):
        decode(data, SPEC)


def one_channel(bits: int, photometric: int, fill_order: int, planes: int) -> bytes:
    """Uncompressed, 8 x 3 pixels of one channel in one strip; tifffile writes no PlanarConfiguration for these."""
    pixels = np.random.default_rng(bits).bytes(3 * bits)
    tags = {
        256: 8,
        257: 3,
        258: bits,
        259: 1,
        262: photometric,
        266: fill_order,
        273: 0,
        277: 1,
        278: 3,
        279: len(pixels),
        284: planes,
    }
    colours = struct.pack(f"<{3 << bits}H", *np.random.default_rng(1).integers(0, 65536, 3 << bits)) if photometric == 3 else b""
    start = 8 + 2 + 12 * (len(tags) + bool(colours)) + 4
    tags[273] = start + len(colours)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    entries += struct.pack("<HHII", 320, 3, 3 << bits, start) if colours else b""
    return b"II*\0" + struct.pack("<IH", 8, len(entries) // 12) + entries + bytes(4) + colours + pixels


@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize(
    ("bits", "photometric"), [(bits, kind) for bits in (1, 4, 8, 16) for kind in (0, 1, 3) if bits * kind < 48]
)
def test_the_only_channel_is_read_alike_in_a_plane_of_its_own_or_refused(bits, photometric, fill_order):
    """Pillow takes the first letter of ``L;I`` there: what is white would come out black."""
    data = one_channel(bits, photometric, fill_order, 2)
    if fill_order == 1 and (bits, photometric) in {(1, 1), (8, 1), (8, 3)}:
        np.testing.assert_array_equal(decode(data, SPEC), decode(one_channel(bits, photometric, fill_order, 1), SPEC))
    else:
        with pytest.raises(ImageError, match=r"^unsupported_mode: TIFF with (separate planes of a single channel|fill order 2)"):
            decode(data, SPEC)


def fax(compression: str, fill_order: int = 1) -> bytes:
    """A drawing of 40 rows in strips of 16, by libtiff."""
    y, x = np.mgrid[:40, :64]
    file = io.BytesIO()
    tags = {278: 16} | ({266: 2} if fill_order == 2 else {})
    Image.fromarray((x + 3 * y) % 17 < 6).save(file, "TIFF", compression=compression, tiffinfo=tags)
    return file.getvalue()


@pytest.mark.parametrize("fill_order", [1, 2])
def test_group_4_is_read_and_refused_without_the_end_of_each_strip(fill_order):
    data = fax("group4", fill_order)
    y, x = np.mgrid[:40, :64]
    assert np.array_equal(decode(data, SPEC)[:, :, 0], np.where((x + 3 * y) % 17 < 6, 255, 0))
    with Image.open(io.BytesIO(data)) as image:
        offsets, sizes = image.tag_v2[273], image.tag_v2[279]
    for offset, n_bytes in zip(offsets, sizes, strict=True):
        for filling in (b"\0", b"\xff"):
            half = offset + n_bytes // 2
            damaged = data[:half] + filling * (offset + n_bytes - half) + data[offset + n_bytes :]
            with pytest.raises(
                ImageError, match=r"^truncated: the fax data of strip or tile . have no end code: rows are missing"
            ):
                decode(damaged, SPEC)


def test_group_3_is_refused_because_nothing_shows_that_all_rows_came():
    for compression in ("tiff_ccitt", "group3"):
        with pytest.raises(ImageError, match=r"^unsupported_mode: TIFF with fax of group 3 inside, which is not supported"):
            decode(fax(compression), SPEC)


def with_tags(data: bytes, **values: int) -> bytes:
    """The file with other numbers in tags of its directory."""
    changed = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        for name, value in values.items():
            tag = file.pages[0].tags[name]
            struct.pack_into({3: "<H", 4: "<I"}[tag.dtype.value], changed, tag.valueoffset, value)
    return bytes(changed)


@pytest.mark.parametrize("fill_order", [1, 2])
@pytest.mark.parametrize("change", [-9, -1, 1, 2, 3, 9])
def test_group_4_of_more_or_fewer_rows_than_the_tiff_says_is_refused(fill_order, change):
    data, file = fax("group4", fill_order), io.BytesIO()
    with Image.open(io.BytesIO(data)) as image:
        image.save(file, "TIFF", compression="group4", tiffinfo={278: 40} | ({266: 2} if fill_order == 2 else {}))
    decode(file.getvalue(), SPEC)
    rows = 40 + change
    with pytest.raises(ImageError, match=r"^corrupt: .*the fax data of strip or tile 0 have other rows than the TIFF says"):
        decode(with_tags(file.getvalue(), ImageLength=rows, RowsPerStrip=rows), SPEC)


def test_group_4_of_half_its_rows_with_an_end_code_is_refused():
    whole, part = io.BytesIO(), io.BytesIO()
    with Image.open(io.BytesIO(fax("group4"))) as image:
        image.save(whole, "TIFF", compression="group4", tiffinfo={278: 40})
        image.crop((0, 0, 64, 20)).save(part, "TIFF", compression="group4", tiffinfo={278: 20})
    with pytest.raises(ImageError, match=r"^corrupt: .*the fax data of strip or tile 0 have other rows than the TIFF says"):
        decode(with_tags(part.getvalue(), ImageLength=40, RowsPerStrip=40), SPEC)


@pytest.mark.parametrize("density", [0, 0.02, 0.5, 1])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 63, 64, 65, 2561, 3000])
def test_group_4_of_any_width_is_read(width, density):
    pixels = np.random.default_rng(width).random((13, width)) < density
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", compression="group4", tiffinfo={278: 5})
    np.testing.assert_array_equal(decode(file.getvalue(), SPEC)[..., 0] == 255, pixels)
