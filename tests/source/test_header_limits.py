"""What a limit kept out is known by its error, of this version and of older ones."""

from __future__ import annotations

import io

import pytest

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import probe
from pipeline.source.header_limits import is_admitted_now
from tests.support.hostile import FILES

LIMIT = 100
ONE_PIXEL = b"GIF89a\1\0\1\0\0\0\0"
NARROW = DecodeSpec(pixel_limit=LIMIT, formats=("PNG",))


class Long(io.BytesIO):
    """A file that says to be longer than it is."""

    def seek(self, place: int, whence: int = 0) -> int:
        return super().seek(place, whence) + (2**25 if whence == io.SEEK_END else 0)


def error_of(data: bytes | io.BytesIO, spec: DecodeSpec) -> str:
    with pytest.raises(ImageError) as caught:
        probe(data, spec)
    return str(caught.value)


@pytest.mark.parametrize(
    ("data", "code", "wider", "no_wider"),
    [
        (FILES["png"], "too_many_pixels", {"pixel_limit": LIMIT + 1}, {"pixel_limit": LIMIT, "formats": ("JPEG",)}),
        (Long(FILES["png"]), "too_large", {"pixel_limit": LIMIT + 1}, {"pixel_limit": LIMIT}),
        (ONE_PIXEL, "unsupported_format", {"formats": ("PNG", "GIF")}, {"formats": ("PNG", "JPEG"), "pixel_limit": 10**9}),
    ],
)
def test_an_image_that_a_limit_kept_out_is_admitted_by_a_wider_one(data, code, wider, no_wider):
    error = error_of(data, NARROW)
    assert error.startswith(f"{code}: ")
    assert is_admitted_now(error, DecodeSpec(**wider))
    assert not is_admitted_now(error, DecodeSpec(**no_wider))


@pytest.mark.parametrize(
    "error",
    [
        "too_many_pixels: the image has 20 x 30 pixels, the limit is 100",
        "not_an_image: the content is GIF, which is not among the formats to read (PNG, JPEG)",
    ],
)
def test_errors_of_older_versions_are_known(error):
    assert is_admitted_now(error, DecodeSpec(pixel_limit=200))
    assert not is_admitted_now(error, DecodeSpec(pixel_limit=100, formats=("PNG",)))


@pytest.mark.parametrize(
    "error",
    [
        "",
        "empty: the file has 0 bytes",
        "too_many_pixels: the image has 1 x 70000000 pixels, the limit of a side is 67108863",
        "unsupported_format: the content is HEIC, which is not read here; pillow-heif or `heif-convert` can: convert it to PNG or JPEG",
        "corrupt: the image cannot be decoded (pixels, the limit is 5)",
    ],
)
def test_other_errors_have_nothing_to_do_with_limits(error):
    assert not is_admitted_now(error, DecodeSpec(pixel_limit=10**12))


def test_the_rejection_names_the_option():
    for data in (FILES["png"], Long(FILES["png"])):
        assert error_of(data, NARROW).endswith("; raise pixel_limit (--pixel-limit) to read it")
