"""A JPEG is whole when all its blocks came: generated files, cut and sealed, by both decoders."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source import decoding as decode_module
from pipeline.source import jpeg
from pipeline.source.decoding import decode
from pipeline.source.jpeg import check_scans

RGB = DecodeSpec()
CASES = Path(__file__).parents[1] / "cases"
END = b"\xff\xd9"


@pytest.fixture(params=["fast", "plain"], autouse=True)
def decoder(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(decode_module, "_fast_decoder", lambda: None)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    """Smooth, with noise, and exactly mid-grey in its lower right part, as blocks are that never came."""
    noise = np.random.default_rng(height * width).integers(-20, 20, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    pixels = np.clip(np.stack([2 * x, 3 * y, x + y], 2) % 256 + noise, 0, 255).astype(np.uint8)
    pixels[height // 2 :, width // 2 :] = 128
    return Image.fromarray(pixels).convert(mode)


def file_of(height: int, width: int, mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    picture(height, width, mode).save(file, "JPEG", **options)
    return file.getvalue()


def plain_pixels(data: bytes) -> np.ndarray:
    """By Pillow alone, without any check of this project."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def end_of(data: bytes) -> str:
    try:
        decode(data, RGB)
    except ImageError as error:
        return error.code
    return "done"


KINDS = {
    f"{height}x{width} {subsampling} {'progressive' if progressive else 'baseline'}": (
        height,
        width,
        {"subsampling": subsampling, "progressive": progressive},
    )
    for height, width in ((8, 8), (16, 32), (37, 45))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0")
    for progressive in (False, True)
} | {
    "restarts": (48, 64, {"restart_marker_blocks": 2}),
    "grey": (37, 45, {"mode": "L"}),
    "grey progressive": (37, 45, {"mode": "L", "progressive": True}),
    "cmyk": (37, 45, {"mode": "CMYK"}),
    "optimised": (37, 45, {"optimize": True, "quality": 30}),
}
FILES = {name: file_of(height, width, **options) for name, (height, width, options) in KINDS.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_jpeg_without_its_end_marker_is_whole(name):
    data = FILES[name]
    assert data.endswith(END)
    expected = plain_pixels(data)
    np.testing.assert_array_equal(decode(data, RGB), expected)
    endings = [] if data[-3] == 0 else [bytes(400)]  # whether the last zero is the picture's cannot be told
    for ending in (*endings, b"", b"\xff", END + b"film", END + data, b"\xff\xff" + END):
        np.testing.assert_array_equal(decode(data[:-2] + ending, RGB), expected)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("ending", [b"", END, END + b"film", bytes(400)], ids=["cut", "sealed", "film", "zeros"])
def test_a_jpeg_cut_anywhere_is_whole_or_refused(name, ending):
    data = FILES[name]
    expected = plain_pixels(data)
    start = data.index(b"\xff\xda")
    step = 1 if len(data) - start < 300 else 7
    ends = set()
    for place in (*range(start, len(data) - 40, step), *range(len(data) - 40, len(data) - 2)):
        try:
            pixels = decode(data[:place] + ending, RGB)
        except ImageError as error:
            ends.add(error.code)
        else:
            ends.add("done")
            np.testing.assert_array_equal(pixels, expected, err_msg=f"cut at {place} of {len(data)}")
    assert ends & {"truncated", "corrupt"}, ends


@pytest.mark.parametrize("name", [name for name in FILES if "progressive" not in name])
def test_a_film_behind_a_jpeg_without_an_end_marker_is_passed_over(name):
    data = FILES[name]
    film = np.random.default_rng(1).integers(1, 255, 3000).astype(np.uint8).tobytes() + b"\xff\x01"
    np.testing.assert_array_equal(decode(data[:-2] + film, RGB), plain_pixels(data))


def test_half_the_data_with_an_end_marker_is_truncated():
    with pytest.raises(
        ImageError, match=r"^truncated: the file ends before the image does \(blocks of the picture are missing\)"
    ):
        decode((CASES / "half_eoi.jpg").read_bytes(), RGB)


def test_a_camera_that_writes_no_end_marker_is_read():
    data = (CASES / "esp32_no_eoi.jpg").read_bytes()
    np.testing.assert_array_equal(decode(data, RGB), plain_pixels(data + END))


@pytest.mark.parametrize("spec", [DecodeSpec(color="grey"), DecodeSpec(resize=(20, 30))])
def test_missing_blocks_are_seen_whatever_is_made_of_the_pixels(spec):
    data = FILES["37x45 4:2:0 baseline"]
    with pytest.raises(ImageError, match="truncated"):
        decode(data[: len(data) * 3 // 4] + END, spec)


def test_a_progressive_jpeg_without_its_last_scans_is_truncated():
    data = FILES["37x45 4:2:0 progressive"]
    places = [place for place in range(len(data)) if data[place : place + 2] == b"\xff\xda"]
    check_scans(data)
    for place in places[1:]:
        table = data.rindex(b"\xff\xc4", 0, place)
        for cut in (place, table):
            with pytest.raises(ImageError, match="truncated"):
                decode(data[:cut] + END, RGB)
    with pytest.raises(ImageError, match=r"not all scans of its pixels are there"):
        check_scans(data[: places[-1]] + END)


@pytest.mark.parametrize("name", ["37x45 4:2:0 progressive", "grey progressive"])
def test_damage_in_any_scan_is_seen(name):
    """Half of its data gone, or data left over."""
    data = FILES[name]
    places = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    for place in places:
        start = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        end = re.compile(rb"\xff[^\0]").search(data, start).start()
        middle = (start + end) // 2
        for rest in (b"", data[middle:end] + b"left over"):
            with pytest.raises(ImageError, match=r"^(truncated|corrupt): "):
                decode(data[:middle] + rest + data[end:], RGB)


def test_data_left_over_before_the_end_marker_are_damage_unless_they_are_zeros():
    data = FILES["37x45 4:2:0 baseline"]
    np.testing.assert_array_equal(decode(data[:-2] + bytes(9) + END, RGB), plain_pixels(data))
    with pytest.raises(ImageError, match=r"^corrupt: the image cannot be decoded \(libjpeg finds its data damaged\)"):
        decode(data[:-2] + b"left over, and not little" + END, RGB)


def test_restarts_out_of_order_are_damage():
    data = FILES["restarts"]
    first, second = data.index(b"\xff\xd0"), data.index(b"\xff\xd1")
    swapped = data[: first + 1] + b"\xd1" + data[first + 2 : second + 1] + b"\xd0" + data[second + 2 :]
    assert end_of(swapped) in {"corrupt", "truncated"}
    lost = data[:first] + data[second:]
    assert end_of(lost) in {"corrupt", "truncated"}


def test_a_flaw_of_the_header_costs_no_image():
    data = FILES["37x45 4:2:0 baseline"]
    table = data.index(b"\xff\xdb")
    np.testing.assert_array_equal(decode(data[:table] + b"abc" + data[table:], RGB), plain_pixels(data))


def test_a_megabyte_of_fill_bytes_is_looked_at_once():
    data = file_of(40, 40)
    start = jpeg._scans(data)[1]
    filled = data[: start + 100] + b"\xff" * 1_000_000  # at once; some hours when each byte of them begins a search
    assert jpeg._scans(filled + b"\0")[1:] == (start, len(filled) + 1)
    assert jpeg._scans(filled + END)[1:] == (start, start + 100)
    assert end_of(filled + b"\0") != "done"


def test_libjpegs_warnings_are_found():
    assert jpeg.counts_warnings(Image)
    image = Image.open(io.BytesIO(FILES["grey"]))
    trial = jpeg._Trial(image, Image)
    assert [trial.decode(data)[2] for data in (FILES["grey"], FILES["grey"][:-40] + END)] == [0, 1]


def test_missing_blocks_are_seen_without_libjpegs_warnings(monkeypatch):
    monkeypatch.setattr(decode_module, "_fast_decoder", lambda: None)
    monkeypatch.setattr(jpeg, "_layout", lambda pillow: None)
    for name in ("37x45 4:2:0 baseline", "37x45 4:2:0 progressive", "restarts", "grey", "cmyk"):
        data = FILES[name]
        np.testing.assert_array_equal(decode(data, RGB), plain_pixels(data))
        np.testing.assert_array_equal(decode(data[:-2], RGB), plain_pixels(data))
        assert end_of(data[: len(data) * 3 // 4] + END) == "truncated", name
    assert end_of((CASES / "half_eoi.jpg").read_bytes()) == "truncated"


def test_arithmetic_codes_and_lossless_frames_are_refused():
    """libjpeg does not warn where arithmetic codes end early."""
    for kind in (b"\xff\xc9", b"\xff\xca", b"\xff\xc3"):
        with pytest.raises(ImageError, match=r"^unsupported_mode: a JPEG of frame kind "):
            check_scans(FILES["grey"].replace(b"\xff\xc0", kind, 1))


@pytest.mark.parametrize("name", [name for name in FILES if "progressive" not in name and name != "optimised"])
def test_zeros_in_place_of_the_data_are_refused(name):
    """Also where libjpeg takes them for as many blocks as are missing."""
    data = FILES[name]
    start = jpeg._scans(data)[1]
    for n in range(100, 9000, 37):
        assert end_of(data[: start + 20] + bytes(n) + END) in {"truncated", "corrupt"}, n
    middle = (start + len(data)) // 2
    if len(data) - middle > 200:
        with pytest.raises(ImageError, match=r"^corrupt: .*zeros within its data are no blocks"):
            decode(data[:middle] + bytes(64) + data[middle + 64 :], RGB)


@pytest.mark.parametrize("name", [name for name in FILES if name != "restarts"])  # whose own data end in a zero
def test_zeros_before_the_end_marker_are_padding(name):
    data = FILES[name]
    np.testing.assert_array_equal(decode(data[:-2] + bytes(500) + END, RGB), plain_pixels(data))


def test_zeros_may_be_blocks_where_the_code_of_their_end_is_zeros():
    file = io.BytesIO()
    Image.new("RGB", (2048, 2048), "white").save(file, "JPEG", optimize=True)
    data = file.getvalue()
    assert bytes(64) in data[jpeg._scans(data)[1] :]
    assert decode(data, RGB).min() == 255
