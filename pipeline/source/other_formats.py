"""Recognises a file that has none of the supported formats: an image of another format, or no image at all."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pipeline.errors import ImageError
from pipeline.text import count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.source.header_limits import HeaderStream

LOOK_BYTES = 512  # the signatures of tar and DICOM are after the first hundred bytes
_BOX = rb"....ftyp"  # of ISO media files: HEIC, videos
# Formats of images that are not supported: signature, name, and a program that reads them.
_IMAGES: tuple[tuple[bytes, str, str], ...] = (
    (_BOX + rb"(?:he[iv][cmsx]|mif1|msf1)", "HEIC", "pillow-heif or `heif-convert`"),
    (_BOX + rb"crx ", "a camera's raw file (CR3)", "rawpy or darktable"),
    (rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a", "JPEG XL", "imagecodecs or `djxl`"),
    (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000", "Pillow or `opj_decompress`"),
    (rb"II\xbc", "JPEG XR", "imagecodecs or `JxrDecApp`"),
    (rb"8BPS", "PSD", "psd-tools or ImageMagick"),
    (rb"FUJIFILMCCD-RAW|IIU\0|IIR[OS]", "a camera's raw file", "rawpy or darktable"),
    (rb"v/1\x01", "OpenEXR", "imageio or ImageMagick"),
    (rb"#\?RADIANCE|#\?RGBE", "Radiance HDR", "imageio or ImageMagick"),
    (rb"DDS ", "DDS", "Pillow"),
    (rb"\0\0[\x01\x02]\0[^\0]", "an icon (ICO)", "Pillow"),
    (rb"icns", "an icon (ICNS)", "Pillow"),
    (rb"SIMPLE  =", "FITS", "astropy"),
    (rb".{128}DICM", "DICOM", "pydicom"),
    (rb"gimp xcf", "GIMP's XCF", "GIMP"),
    (rb"(?:<\?xml[^>]*>\s*)?(?><!--.*?-->\s*)*(?:<!DOCTYPE svg[^>]*>\s*)?<svg[\s>]", "SVG", "CairoSVG or ImageMagick"),
)
# Files that are not images: signature, what the file is, and what to do.
_AGAIN = "the download failed or asked for a login: download the image again"
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs\.", "a git-lfs pointer, which stands for the image", "fetch the image with `git lfs pull`"),
    (rb"(?i:<!doctype html|<html|<head|<body|<script)", "an HTML page", _AGAIN),
    (rb"<\?xml|<[A-Za-z]+>", "an XML text", _AGAIN),
    (rb"[{\[]\s*(?:[\"\[{\]}]|-?\d)", "a JSON text", _AGAIN),
    (rb"%PDF-", "a PDF", "draw its pages to PNG, for instance with `pdftoppm -png`"),
    (rb"%!PS", "PostScript", "draw its pages to PNG, for instance with `gs`"),
    (rb"PK\x03\x04|PK\x05\x06", "a ZIP archive, or a document that is one", "unpack it"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!|.{257}ustar", "a compressed file or an archive", "unpack it"),
    (_BOX + rb"|\x1aE\xdf\xa3|RIFF....AVI |OggS", "a video or a sound", "save its frames as PNG, for instance with `ffmpeg`"),
    (rb"\x93NUMPY|\x89HDF\r\n\x1a\n|CDF[\x01\x02\x05]|PAR1|MATLAB", "an array or a table", "save its images as PNG or TIFF"),
    (rb"\0+\Z", "nothing but zeros at its beginning", "it never reached the disk: copy or download it again"),
    (rb"\s+\Z", "nothing but white space", _AGAIN),
)
_TEXT = re.compile(rb"[\t\n\r -~\x80-\xff]{4,}", re.DOTALL)
_NO_FRAME = {0xC4, 0xC8, 0xCC}  # markers of tables, among those of a JPEG's frames
_JPEG_LS = 0xF7


def explain_other(head: bytes, formats: Sequence[str]) -> ImageError:
    """The error for a file that does not begin like any supported format.

    Parameters
    ----------
    head : bytes
        Its first `LOOK_BYTES`.
    formats : sequence of str
        The formats that are allowed.

    Examples
    --------
    >>> str(explain_other(b"8BPS", ["PNG"]))
    'unsupported_format: the content is PSD, which is not read here; psd-tools or ImageMagick can: convert it to PNG or JPEG'
    """
    trimmed = head.removeprefix(b"\xef\xbb\xbf").lstrip() or head
    for signature, name, reader in _IMAGES:
        if _begins(signature, head, trimmed):
            text = f"the content is {name}, which is not read here; {reader} can: convert it to PNG or JPEG"
            return ImageError("unsupported_format", text)
    for signature, name, remedy in _OTHERS:
        if _begins(signature, head, trimmed):
            return ImageError("not_an_image", f"the content is {name}; {remedy}")
    text = f"the content is none of {', '.join(formats)}"
    if _TEXT.fullmatch(head):
        text += f", but a text that begins with {head[:40].decode('latin-1')!r}"
    return ImageError("not_an_image", text)


def _begins(signature: bytes, head: bytes, trimmed: bytes) -> bool:
    return any(re.match(signature, data, re.DOTALL) for data in (head, trimmed))


def check_jpeg_frame(stream: HeaderStream) -> None:
    """Refuse a sound JPEG that Pillow cannot open: with 12 bits, JPEG-LS, or with 2 or 5 channels.

    Raises
    ------
    ImageError
        ``unsupported_mode``. A damaged header raises nothing here: the caller reports it.
    """
    stream.seek(2)
    while (marker := stream.read(4))[:1] == b"\xff" and len(marker) == 4:
        kind, n_bytes = marker[1], int.from_bytes(marker[2:], "big")
        if kind == _JPEG_LS or (0xC0 <= kind <= 0xCF and kind not in _NO_FRAME):
            _check_frame(kind, stream.read(6))
            return
        stream.seek(n_bytes - 2, 1)


def _check_frame(kind: int, frame: bytes) -> None:
    text, reader = "", "imagecodecs can"
    if len(frame) < 6:
        return
    if kind == _JPEG_LS:
        text = "JPEG-LS"
    elif frame[0] in {12, 16}:
        text = f"a JPEG of {frame[0]} bits per channel"
    elif frame[5] not in {1, 3, 4}:
        text, reader = f"a JPEG of {count(frame[5], 'channel')}", "libjpeg's `djpeg` may"
    if text:
        raise ImageError(
            "unsupported_mode", f"{text}, which is not read here; {reader}: save it with 8 bits, or as TIFF of 16 bits"
        )
