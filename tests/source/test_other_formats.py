"""Files that are no image of a format that is read: each is named, and what is damaged has other codes than what is not supported."""

from __future__ import annotations

import io

import imagecodecs
import numpy as np
import pytest
import tifffile

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode, probe
from tests.support.hostile import FILES

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
DEEP = np.random.default_rng(0).integers(0, 4096, (32, 48), dtype=np.uint16)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"


def tiff_with(**options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, PIXELS, photometric="rgb", **options)
    return file.getvalue()


def container(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0heic" + bytes(50)


UNSUPPORTED = {
    "BigTIFF": (
        lambda: tiff_with(bigtiff=True, byteorder=">"),
        "unsupported_mode: big-endian BigTIFF is not supported; tifffile ",
    ),
    "WebP": (lambda: tiff_with(compression="webp"), "unsupported_mode: TIFF with WebP inside, which is not supported; tifffile "),
    "JPEG 2000": (
        lambda: tiff_with(compression="jpeg2000"),
        "unsupported_mode: TIFF with JPEG 2000 inside, which is not supported; t",
    ),
    "PNG": (lambda: tiff_with(compression="png"), "unsupported_mode: TIFF with PNG inside, which is not supported; tifffile "),
    "12.jpg": (
        lambda: imagecodecs.jpeg8_encode(DEEP, bitspersample=12),
        "unsupported_mode: a JPEG of 12 bits per channel, which",
    ),
    "a.jls": (lambda: imagecodecs.jpegls_encode(PIXELS), "unsupported_mode: JPEG-LS, which is not read here; imagecodecs can"),
    "a.jp2": (
        lambda: imagecodecs.jpeg2k_encode(PIXELS),
        "unsupported_format: the content is JPEG 2000, which is not read here; P",
    ),
    "a.jxl": (
        lambda: imagecodecs.jpegxl_encode(PIXELS),
        "unsupported_format: the content is JPEG XL, which is not read here; ima",
    ),
    "a.jxr": (
        lambda: imagecodecs.jpegxr_encode(PIXELS),
        "unsupported_format: the content is JPEG XR, which is not read here; ima",
    ),
    "a.heic": (lambda: container(b"heic"), "unsupported_format: the content is HEIC, which is not read here; pillow-heif or"),
    "b.heic": (lambda: container(b"mif1"), "unsupported_format: the content is HEIC, which is not read here; pillow-heif or"),
    "a.psd": (lambda: b"8BPS\0\1" + bytes(60), "unsupported_format: the content is PSD, which is not read here; psd-tools or"),
    "a.dcm": (
        lambda: bytes(128) + b"DICM" + bytes(60),
        "unsupported_format: the content is DICOM, which is not read here; pydicom",
    ),
    "a.svg": (
        lambda: b'<?xml version="1.0"?>\n<svg width="5">',
        "unsupported_format: the content is SVG, which is not read here; Cai",
    ),
    "a.bmp": (
        lambda: b"BM" + bytes(12) + b"\x0d" + bytes(60),
        "unsupported_mode: Unsupported BMP header type (13), which Pillow",
    ),
}
NO_IMAGES = {
    "a.pdf": (b"%PDF-1.7\n%", "a PDF; draw its pages to PNG, for instance with `pdftoppm -png`"),
    "a.html": (b"\r\n<!doctype HTML><html><title>404", "an HTML page; the download failed or asked for a login: download "),
    "b.html": (b"\xef\xbb\xbf<html lang='en'>", "an HTML page; the download failed or asked for a login: download the"),
    "a.xml": (b"<Error><Code>AccessDenied</Code>", "an XML text; the download failed or asked for a login: download the"),
    "a.json": (b'{"message": "Not Found"}', "a JSON text; the download failed or asked for a login: download the image"),
    "lfs": (LFS, "a git-lfs pointer, which stands for the image; fetch the image with `git lfs pull`"),
    "page": (b"\r\n\n", "nothing but white space; the download failed or asked for a login: download the image again"),
    "zeros": (bytes(1000), "nothing but zeros at its beginning; it never reached the disk: copy or download it again"),
    "zip": (b"PK\3\4" + bytes(60), "a ZIP archive, or a document that is one; unpack it"),
    "a.mp4": (container(b"isom"), "a video or a sound; save its frames as PNG, for instance with `ffmpeg`"),
    "text": (b"Not Found\n", r"none of AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP, but a text that begins with 'Not Found\n'"),
    "noise": (b"\1\2\3\4\5\6", "none of AVIF, BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"),
}


def what_is_said(data: bytes) -> str:
    """The same of `probe` and `decode`."""
    said = set()
    for read in (probe, decode):
        with pytest.raises(ImageError) as caught:
            read(data, DecodeSpec())
        said.add(str(caught.value))
    (text,) = said
    return text


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_named_with_what_reads_it(name):
    make, text = UNSUPPORTED[name]
    assert what_is_said(bytes(make())).startswith(text)


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_named_with_what_to_do(name):
    data, text = NO_IMAGES[name]
    assert what_is_said(data).startswith(f"not_an_image: the content is {text}")


@pytest.mark.parametrize("name", ["jpeg", "png", "gif", "webp", "bmp", "tiff"])
def test_a_header_that_is_cut_or_damaged_is_never_said_to_be_unsupported(name):
    for data in (FILES[name][:18], FILES[name][:12] + b"\xff" * 40):
        with pytest.raises(ImageError) as caught:
            probe(data, DecodeSpec())
        assert caught.value.code in {"truncated", "corrupt", "too_many_pixels"}, str(caught.value)


def test_what_a_file_is_takes_no_time_that_doubles_with_each_comment():
    assert what_is_said(b"<!---->" * 60 + b"<p>").startswith("not_an_image: ")
    assert what_is_said(b"<!-- a --> <!----><svg>").startswith("unsupported_format: the content is SVG")
