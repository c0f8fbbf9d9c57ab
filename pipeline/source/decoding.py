"""Decodes the bytes of an image file to its size and its pixels. Only this module and `pixels` import Pillow.

Every rule is a row of the table in ``docs/decoding.md``.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from itertools import product
from typing import TYPE_CHECKING, Any, BinaryIO, cast, get_args

import numpy as np
from PIL import (
    AvifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401 (registers the format)
    features,
)

from pipeline.config import DEFAULT_PIXEL_LIMIT, DecodeSpec, ImageFormat
from pipeline.errors import ImageError
from pipeline.source.avif import check_avif
from pipeline.source.bitmaps import HEAD_BYTES, check_bitmap, check_indices
from pipeline.source.dropped import dropped, is_far
from pipeline.source.header_limits import (
    HeaderStream,
    StorageFault,
    check_bytes,
    check_gif_blocks,
    check_pixels,
    check_webp,
    check_webp_chunks,
    gif_size,
    n_scans,
)
from pipeline.source.jpeg import check_scans, load_jpeg, without_filling
from pipeline.source.other_formats import LOOK_BYTES, check_jpeg_frame, explain_other
from pipeline.source.pixels import BAND_ROWS, flatten, mend_colour_key, orientation_of, raw_mode, to_array, turn_of
from pipeline.source.png import load_png, open_png
from pipeline.source.small_png import decode_small, open_small
from pipeline.source.tiff import check_tiff
from pipeline.source.tiff_data import unpack
from pipeline.source.tiff_fax import check_fax
from pipeline.source.tiff_jpeg import check_jpegs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Set once per process, before any thread decodes.
Image.preinit()  # registers BMP, GIF, JPEG, PNG and PPM; without this the first image would import forty plugins
Image.MAX_IMAGE_PIXELS = None  # `DecodeSpec.pixel_limit` decides, before anything large is allocated
# Text chunks are of no use here, and 64 MiB of them fit into a file of 64 kB.
PngImagePlugin.MAX_TEXT_MEMORY = 4 * PngImagePlugin.MAX_TEXT_CHUNK
AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker thread is one core's work; by default every image starts a thread per core
# Warnings about odd files ("Corrupt EXIF data ...") are of no use among millions of images: what matters becomes an ImageError.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

PLAIN_PIXEL_BYTES = 8  # bytes per grey or RGB pixel while decoding; Pillow itself takes 4 for RGB
# Markers of a JPEG's frames; the three left out are tables.
_FRAMES = {bytes([marker]) for marker in range(0xC0, 0xD0)} - {b"\xc4", b"\xc8", b"\xcc"}
_IMAGE_WIDTH, _IMAGE_LENGTH = 256, 257
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_JPEG_SCANS = 500  # same limit as libjpeg-turbo's own fuzzers: an empty scan of 14 bytes takes as long as one with data
_PLAIN_COMMENTS = 10_000  # Pillow copies up to a megabyte for each
_OTHER_BYTES, _CODEC_BYTES = 20, 32  # most bytes per pixel, as measured: of other modes; of WebP and AVIF
_DECODE_BASE_BYTES = 32 * 1024**2  # objects made from a header; a block of plain PNM as words
_ENDED = {"tiff_adobe_deflate", "tiff_deflate", "lzma"}  # Pillow's names for compressions of a TIFF whose data show their own end
_TRUNCATED = ("truncat", "not enough image data", "reached eof", "cannot load this image")


@dataclass(frozen=True, slots=True)
class ImageSize:
    """Size of one image, before and after ``resize``."""

    source_height: int
    """Pixels, as oriented."""
    source_width: int
    """Pixels, as oriented."""
    input_height: int
    """Pixels, as the extractor sees the image, after ``resize``."""
    input_width: int
    """Pixels, as the extractor sees the image, after ``resize``."""
    decode_bytes: int = field(default=0, compare=False)
    """The most memory that decoding takes: the file, and the pixels as Pillow holds them, oriented, flattened, and as an array."""
    dropped: tuple[str, ...] = field(default=(), compare=False)
    """Codes of what `decode` drops; see `dropped.dropped`."""


def plain_decode_bytes(height: int, width: int, file_bytes: int) -> int:
    """`ImageSize.decode_bytes` of a grey or RGB image whose header is not available."""
    return _DECODE_BASE_BYTES + 3 * file_bytes + PLAIN_PIXEL_BYTES * height * width


def probe(data: BinaryIO | bytes, spec: DecodeSpec) -> ImageSize:
    """Read the size of an image from its header, without decoding a pixel.

    Parameters
    ----------
    data : bytes or binary file
        The whole file, or a buffered, seekable stream of it. Only its header is read (for WebP and AVIF, all of it).
    spec : DecodeSpec
        How the image will be decoded.

    Returns
    -------
    ImageSize
        ``input_height, input_width`` equal the shape that `decode` returns, for every file that `decode` can read.

    Raises
    ------
    ImageError
        When the image is at fault, with one of the codes of `decode`.
    Exception
        Whatever the stream's own ``read`` raises, unchanged: a fault of the storage is not the image's fault.
    """
    stream = HeaderStream(io.BytesIO(data) if isinstance(data, bytes) else data)
    try:
        with _blaming_the_image():
            if small := open_small(stream, spec):
                return _measure(small, 1, spec, stream.size_bytes)
            image, orientation = _open(stream, spec)
            size = _measure(image, orientation, spec, stream.size_bytes)
            return replace(size, dropped=dropped(image, stream, is_far=is_far(data)))
    except StorageFault as fault:
        raise fault.error from None


def decode(data: bytes, spec: DecodeSpec, *, partial: bool = False) -> np.ndarray:
    """Decode one image file to pixels.

    - RGB as is; grey three times over, or once for ``color: grey``; 1 bit as 0 and 255; palettes expanded
    - alpha, transparent palette entries, colour keys: ``round((pixel * alpha + background * (255 - alpha)) / 255)``
    - 16-bit grey: ``round(v / 257)``, 12-bit TIFF ``round(v * 255 / 4095)``; 16-bit colour: the high byte
    - CMYK (JPEG: inverted, as Adobe writes it), YCCK, YCbCr, LAB: Pillow's conversion to RGB; ICC profiles are ignored
    - ``color: grey`` from colour: ITU-R 601-2 luma, Pillow's ``convert("L")``, after composing
    - of several frames, pages or pictures the first; turned and mirrored by its EXIF orientation, or else its XMP orientation
    - last, ``resize`` with Pillow's filter, on 8-bit pixels, without ``reducing_gap``

    Parameters
    ----------
    data : bytes
        The whole file.
    spec : DecodeSpec
        Colour, background, orientation, limit, formats and resizing.
    partial : bool
        Return what can be decoded of a damaged image, for display, without checks that it is whole. The caller sets Pillow's
        ``LOAD_TRUNCATED_IMAGES``.

    Returns
    -------
    np.ndarray
        Pixels ``(height, width, channel) uint8, range [0, 255]``, C-contiguous, not writable; ``spec.channels`` channels.

    Raises
    ------
    ImageError
        ``empty``, ``not_an_image``, ``unsupported_format`` (also: one that is not allowed), ``unsupported_mode`` (of a format that is
        read, such as floats), ``too_many_pixels``, ``too_large`` (the file), ``truncated`` or ``corrupt`` (anything else).
        Only `MemoryError` passes as it is.
    """
    if not partial and (small := decode_small(data, spec, Image)) is not None:
        return small
    with _blaming_the_image():
        stream = HeaderStream(io.BytesIO(data))
        image, orientation = _open(stream, spec)
        _measure(image, orientation, spec, len(data))
        _check_cost(image, data)
        stream.end_of_header()
        is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
        if not partial:
            data = _check_data(image, data)
        turn = turn_of(image, orientation, spec)
        pixels = None
        if image.info.get("compression") in _ENDED and not partial:
            pixels = unpack(data)
        elif type(image) is JpegImagePlugin.JpegImageFile:
            pixels = _decode_fast(data) if (image.mode, spec.color, spec.resize, turn) == ("RGB", "rgb", None, None) else None
        if pixels is not None and _is_wanted(pixels, image, orientation, spec):
            pixels.flags.writeable = False
            return pixels
        mend_colour_key(image)
        if isinstance(image, PngImagePlugin.PngImageFile) and not partial:
            is_as_wanted = turn is None and spec.resize is None and image.mode == ("RGB" if spec.color == "rgb" else "L")
            load_png(image, keep_spare_row=is_as_wanted and image.height > BAND_ROWS)
        else:
            if is_jpeg and not partial:
                load_jpeg(image, data, Image)
            image.load()
        if image.mode == "P" and not partial:
            check_indices(image)
        flat = flatten(image, spec.background)
        turned = flat if turn is None else flat.transpose(turn)
        return to_array(turned, spec)


def _decode_fast(data: bytes) -> np.ndarray | None:
    """Decode a flawless colour JPEG with simplejpeg, twice as fast and with the same pixels; None leaves the file to Pillow."""
    decode_jpeg = _fast_decoder()
    if decode_jpeg is None or not _is_common(data):
        return None
    try:
        pixels: np.ndarray = decode_jpeg(data, colorspace="RGB", strict=True)
    except Exception:  # noqa: BLE001 (any flaw, even one that Pillow ignores: Pillow decides)
        return None
    return pixels


def _check_data(image: Image.Image, data: bytes) -> bytes:
    """Refuse a file whose bytes are damaged, missing or would be misread; return the bytes to decode."""
    if isinstance(image, JpegImagePlugin.JpegImageFile):
        check_scans(data)
        return without_filling(data)
    if image.format == "WEBP":
        check_webp_chunks(data)
    elif image.format == "GIF":
        check_gif_blocks(data, cast("Any", image).tile[0].offset)
    elif image.format == "AVIF":
        check_avif(data, *image.size)
    elif image.info.get("compression") == "jpeg":
        check_jpegs(data, _check_jpeg)
    elif image.info.get("compression") == "group4":
        check_fax(data, _last_rows)
    return data


def _last_rows(data: bytes) -> np.ndarray:
    """The last two rows of a 1-bit TIFF."""
    image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
    image.load()
    return np.asarray(image.crop((0, image.height - 2, *image.size)))


def _check_jpeg(data: bytes) -> None:
    """Refuse a JPEG inside another file, unless all its pixels come from its data."""
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
    _check_cost(image, data)
    check_scans(data)
    load_jpeg(image, without_filling(data), Image)


def _is_wanted(pixels: np.ndarray, image: Image.Image, orientation: int, spec: DecodeSpec) -> bool:
    """Whether pixels of another decoder have the form that Pillow would give."""
    is_turned = isinstance(image, TiffImagePlugin.TiffImageFile) and orientation != 1
    return not is_turned and spec.resize is None and pixels.shape == (image.height, image.width, spec.channels)


def _is_common(data: bytes) -> bool:
    """Whether a JPEG is baseline, extended or progressive with Huffman codes; every libjpeg decodes these kinds alike."""
    place = 2
    while data[place : place + 1] == b"\xff" and (marker := data[place + 1 : place + 2]) not in _FRAMES:
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return data[place : place + 1] == b"\xff" and marker in {b"\xc0", b"\xc1", b"\xc2"}


@cache
def _fast_decoder() -> Callable[..., np.ndarray] | None:
    """The decoder of simplejpeg, if it works and gives the same pixels as Pillow: each brings its own libjpeg-turbo."""
    try:
        from simplejpeg import decode_jpeg, encode_jpeg  # noqa: PLC0415 (the extra `fast`)

        y, x = np.mgrid[:83, :117]
        noise = np.random.default_rng(0).integers(-40, 40, (83, 117, 3))
        pixels = np.clip(np.stack([2 * x, 3 * y, x + y], 2) % 256 + noise, 0, 255).astype(np.uint8)
        samples = [encode_jpeg(pixels, 80, colorsubsampling=kind) for kind in ("444", "422", "420", "440", "411")]
        for subsampling, quality in product((0, 1, 2), (30, 95)):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG", subsampling=subsampling, quality=quality, progressive=True)
            samples.append(file.getvalue())
        for data in samples:
            if not np.array_equal(np.asarray(Image.open(io.BytesIO(data))), decode_jpeg(data, colorspace="RGB", strict=True)):
                return None
    except Exception:  # noqa: BLE001 (not installed, or broken: that is no image's fault)
        return None
    return cast("Callable[..., np.ndarray]", decode_jpeg)


def decode_versions() -> dict[str, str]:
    """Versions of Pillow and of its decoders, for the store's receipt."""
    names = ("libjpeg_turbo", "zlib", "zlib_ng", "libtiff", "webp", "avif", "littlecms2")
    found = {"pillow": features.version("pil")} | {name: features.version(name) for name in names}
    found["simplejpeg"] = version("simplejpeg") if _fast_decoder() else None
    return {name: number for name, number in found.items() if number}


@contextmanager
def _blaming_the_image() -> Iterator[None]:
    """Turn anything that Pillow raises into an `ImageError`; the data are in memory, so the image is at fault."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except Exception as error:
        text = str(error) or type(error).__name__
        cut = isinstance(error, (EOFError, struct.error)) or any(words in text.lower() for words in _TRUNCATED)
        if cut:
            raise ImageError("truncated", f"the file ends before the image does ({text})") from error
        if text.startswith("Unsupported ") and "Palette" not in text:  # as Pillow says about kinds of BMP
            raise ImageError("unsupported_mode", f"{text}, which Pillow does not read; save it as PNG") from error
        raise ImageError("corrupt", f"the image cannot be decoded ({text})") from error


def _open(stream: HeaderStream, spec: DecodeSpec) -> tuple[Image.Image, int]:
    """Read the header, refuse what must not be decoded, and return the image and its orientation."""
    head = stream.read(HEAD_BYTES)
    if not head:
        raise ImageError("empty", "the file has 0 bytes")
    check_bytes(stream.size_bytes, spec.pixel_limit)
    # Pillow allocates the canvas of the first two while it reads their header.
    if head.startswith((b"GIF87a", b"GIF89a")):
        check_pixels("the image has", *gif_size(stream), spec.pixel_limit)
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        check_webp(head, stream.size_bytes, spec.pixel_limit)
    elif head.startswith(tuple(TiffImagePlugin.PREFIXES)):
        check_tiff(stream, spec.pixel_limit)
    elif head.startswith(b"\xff\xd8"):
        stream.begin_jpeg()
    try:
        image = open_png(partial(Image.open, formats=spec.formats), stream)
    except UnidentifiedImageError as error:
        raise _explain_unidentified(head, stream, spec) from error
    check_pixels("the image has", image.height, image.width, spec.pixel_limit)
    check_bitmap(image, head)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise ImageError("unsupported_mode", f"{image.format} of mode {image.mode}: integers or floats without a known range")
    if isinstance(image, PngImagePlugin.PngImageFile) and "transparency" in image.info and raw_mode(image) == "RGB;16B":
        raise ImageError(
            "unsupported_mode",
            "a PNG of 16-bit RGB with a transparent colour, of which Pillow drops the low bits; save it with alpha",
        )
    return image, orientation_of(image)


def _check_cost(image: Image.Image, data: bytes) -> None:
    """Refuse an image that would take minutes, whatever the size of its file."""
    text = ""
    if (
        isinstance(image, JpegImagePlugin.JpegImageFile)
        and n_scans(data, 0 if "progressive" in image.info else image.layers) > _JPEG_SCANS
    ):
        text = f"it has more than {_JPEG_SCANS} scans, and some ten are usual"
    elif image.format == "PPM" and cast("Any", image).tile[0].codec_name == "ppm_plain" and data.count(b"#") > _PLAIN_COMMENTS:
        text = f"it has more than {_PLAIN_COMMENTS} comments"
    if text:
        raise ImageError("corrupt", f"the image cannot be decoded ({text})")


def _explain_unidentified(head: bytes, stream: HeaderStream, spec: DecodeSpec) -> ImageError:
    """The error for a file that none of the allowed formats could open: says what the file is."""
    verdicts = {name: Image.OPEN[name][1](head) for name in get_args(ImageFormat)}  # type: ignore[misc]
    likely = next((name for name, verdict in verdicts.items() if verdict), None)
    if likely is None or (likely == "AVIF" and b"avi" not in head):  # a HEIC has the same container
        stream.seek(0)
        return explain_other(stream.read(LOOK_BYTES), spec.formats)
    if likely not in spec.formats:
        allowed = ", ".join(spec.formats)
        return ImageError("unsupported_format", f"the content is {likely}, which is not among the formats to read ({allowed})")
    if isinstance(verdicts[likely], str):
        return ImageError("unsupported_format", f"the content is {likely}, which this build of Pillow cannot read")
    if likely == "JPEG":
        check_jpeg_frame(stream)
    text = f"the content begins like {likely}, but its header cannot be read: cut short, damaged, or of a kind that Pillow does not read"
    return ImageError("corrupt", text)


def _measure(image: Any, orientation: int, spec: DecodeSpec, file_bytes: int) -> ImageSize:
    """Sizes before and after ``resize``, which has a limit too, and the memory that decoding takes."""
    width, height = image.size
    tile_pixels = 0
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # its ``size`` is already that of the turned image
        width, height = image.tag_v2[_IMAGE_WIDTH], image.tag_v2[_IMAGE_LENGTH]
        tile = image.tag_v2.get(_TILE_LENGTH, 0), image.tag_v2.get(_TILE_WIDTH, 0)
        check_pixels("a tile has", *tile, spec.pixel_limit)
        tile_pixels = tile[0] * tile[1]
    if spec.exif_orientation and orientation >= 5:
        height, width = width, height
    input_height, input_width = spec.resize or (height, width)
    check_pixels("the resized image has", input_height, input_width, spec.pixel_limit)
    # A tall, narrow image: Pillow resizes the rows first, into a buffer as high as the image and as wide as the result.
    check_pixels("resizing needs", height, input_width, max(spec.pixel_limit, DEFAULT_PIXEL_LIMIT))
    is_plain = image.mode in {"L", "RGB"} and not image.has_transparency_data and turn_of(image, orientation, spec) is None
    pixel_bytes = (7 if image.mode == "RGB" else PLAIN_PIXEL_BYTES) if is_plain else _OTHER_BYTES
    if image.format in {"WEBP", "AVIF"} or image.mode == "I":
        pixel_bytes = _CODEC_BYTES
    resize_bytes = input_width * (4 * height + 7 * input_height) if spec.resize else 0
    band_bytes = 6 * max(width, input_width) * BAND_ROWS  # what Pillow hands out, twice
    pixels = height * width + tile_pixels
    decode_bytes = _DECODE_BASE_BYTES + 3 * file_bytes + pixel_bytes * pixels + resize_bytes + band_bytes
    return ImageSize(height, width, input_height, input_width, decode_bytes)
