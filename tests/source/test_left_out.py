"""Files that are cut, or leave pixels out, where no library complains."""

from __future__ import annotations

import io
import struct
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode

RGB = DecodeSpec()
PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3)).astype(np.uint8)
CLEAR, OPAQUE = b"!\xf9\x04\x01\0\0\x09\0", b"!\xf9\x04\0\0\0\x09\0"
PALETTE = bytes(range(256)) * 3


@pytest.mark.parametrize("tail", [b"2", b"25", b"0", b"1"])
@pytest.mark.parametrize("kind", [2, 3])
def test_a_plain_pnm_that_ends_within_a_number_is_truncated(kind, tail):
    data = b"P%d 3 2 255\n" % kind + b"9 " * (6 * (1 if kind == 2 else 3) - 1)
    with pytest.raises(ImageError, match="more digits may be missing"):
        decode(data + tail, RGB)
    assert decode(data + tail + b"\n", RGB)[-1, -1, -1] == int(tail)
    assert decode(data + b"255", RGB)[-1, -1, -1] == 255  # no longer number fits below the maximum


def test_a_plain_pbm_needs_no_line_end():
    assert decode(b"P1 2 1\n01", RGB)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("options", [{"tile": (16, 16)}, {"rowsperstrip": 16}, {"rowsperstrip": 32}])
@pytest.mark.parametrize("lost", [1, 2, 5, 100])
def test_jpeg_data_of_a_tiff_without_end_marker_are_truncated(options, lost):
    file = io.BytesIO()
    tifffile.imwrite(file, PIXELS, photometric="rgb", compression="jpeg", **options)
    with tifffile.TiffFile(io.BytesIO(file.getvalue())) as tiff:
        page = tiff.pages.first
        end = page.dataoffsets[0] + page.databytecounts[0]
    data = file.getvalue()
    assert decode(data, RGB).shape == PIXELS.shape
    with pytest.raises(ImageError, match="no end marker") as caught:
        decode(data[: end - lost] + bytes(lost) + data[end:], RGB)
    assert caught.value.code == "truncated"


def gif(*, background=0, local=False, control=b"", offset=2) -> bytes:
    """One picture of 2 x 2 pixels, all of index 1, on a canvas of 4 x 4 (or its own, without an offset)."""
    side = 4 if offset else 2
    head = b"GIF89a" + struct.pack("<HHBBB", side, side, 0xF7, background, 0) + PALETTE + control
    head += b"," + struct.pack("<4HB", offset, offset, 2, 2, 0x87 if local else 0) + (PALETTE[::-1] if local else b"")
    codes = sum(code << 9 * place for place, code in enumerate((256, 1, 1, 1, 1, 257)))
    return head + b"\x08\x07" + codes.to_bytes(7, "little") + b"\0;"


@pytest.mark.parametrize("settings", [{"background": 7}, {"local": True}, {"background": 7, "control": OPAQUE}])
def test_a_gif_that_leaves_the_canvas_to_a_background_is_refused(settings):
    with pytest.raises(ImageError, match="leaves a part of the canvas") as caught:
        decode(gif(**settings), RGB)
    assert caught.value.code == "unsupported_mode"
    assert decode(gif(**settings, offset=0), RGB).shape == (2, 2, 3)


def test_the_rest_of_a_gif_is_its_background_or_transparent():
    black = decode(gif(), RGB)
    assert black[0, 0].tolist() == list(PALETTE[:3])
    assert black[2, 2].tolist() == list(PALETTE[3:6])
    for settings in ({}, {"background": 7}, {"local": True}):
        assert decode(gif(control=CLEAR, **settings), RGB)[0, 0].tolist() == [255, 255, 255]


def webp(alpha: int, *, animated: bool = False, **options) -> bytes:
    pixels = np.dstack([PIXELS, np.full(PIXELS.shape[:2], alpha, np.uint8)]) if alpha < 255 else PIXELS
    images, file = [Image.fromarray(pixels), Image.fromarray(pixels[::-1].copy())], io.BytesIO()
    images[0].save(file, "WEBP", save_all=animated, append_images=images[1:] if animated else [], **options)
    return file.getvalue()


def test_a_webp_that_lost_its_alpha_is_refused():
    data = webp(100)
    start = data.index(b"ALPH")
    end = data.index(b"VP8 ")
    lost = data[:start] + data[end:]
    lost = lost[:4] + (len(lost) - 8).to_bytes(4, "little") + lost[8:]
    flagless = data[:20] + bytes([data[20] & ~0x10]) + data[21:]
    assert decode(data, RGB).shape == PIXELS.shape
    for damaged in (lost, flagless):
        with pytest.raises(ImageError, match="disagree on whether it has an alpha channel"):
            decode(damaged, RGB)


def test_a_first_frame_of_a_webp_that_leaves_the_canvas_out_is_refused():
    data = webp(255, animated=True, lossless=True)
    assert np.array_equal(decode(data, RGB), PIXELS)
    larger = data[:24] + (63).to_bytes(3, "little") + data[27:]
    with pytest.raises(ImageError, match="leaves a part of the canvas out"):
        decode(larger, RGB)


def test_an_index_beyond_the_palette_is_refused():
    index = np.array([[0, 1, 2, 3]], np.uint8)
    palette = bytes(range(12))
    for n_colours in (4, 3):
        info = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 8, 0, 4, 0, 0, n_colours, 0) + palette[: 4 * n_colours].ljust(
            4 * n_colours
        )
        head = b"BM" + struct.pack("<IHHI", 14 + len(info) + 4, 0, 0, 14 + len(info))
        if n_colours == 4:
            assert decode(head + info + index.tobytes(), RGB).shape == (1, 4, 3)
        else:
            with pytest.raises(ImageError, match="the index 3, and the palette has 3 colours"):
                decode(head + info + index.tobytes(), RGB)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_progressive_jpeg_without_any_one_of_its_scans_is_refused(mode):
    ramp = np.add.outer(np.arange(40) * 4, np.arange(56) * 3)
    file = io.BytesIO()
    Image.fromarray(np.stack([ramp, ramp // 2, 255 - ramp], 2).astype(np.uint8)).convert(mode).save(
        file, "JPEG", progressive=True
    )
    data = file.getvalue()
    starts = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    assert decode(data, RGB).shape == (40, 56, 3)
    for start, end in pairwise(starts):
        with pytest.raises(ImageError):
            decode(data[:start] + data[end:], RGB)
