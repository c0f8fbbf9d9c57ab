"""Converts a picture that Pillow has opened to the array that the extractor sees: turned, flattened, scaled, resized."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

from pipeline.config import DecodeSpec

# 16-bit grey in which 0 is white, big-endian: `_scale_grey` inverts it, as it does for little-endian.
TiffImagePlugin.OPEN_INFO[(b"MM", 0, (1,), 1, (16,), ())] = ("I;16B", "I;16B")
# 12-bit grey: two pixels take three bytes, high bits first, whatever the byte order.
TiffImagePlugin.OPEN_INFO |= {
    (order, white, (1,), 1, (12,), ()): ("I;16", "I;12") for order in (b"II", b"MM") for white in (0, 1)
}

BAND_ROWS = 64
_ORIENTATION = 0x0112
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258
_TURN = Image.Transpose
_TURNS = {2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE}
_TURNS |= {6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90}
_UNDO = _TURNS | {6: _TURN.ROTATE_90, 8: _TURN.ROTATE_270}
_EXIF_KEYS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def raw_mode(image: PngImagePlugin.PngImageFile) -> Any:
    """Pillow's name for the layout of the file's pixels; None if there is none."""
    return image.tile[0].args if image.tile else None


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from the data before the pixels, as Pillow reads it; damaged EXIF counts as none."""
    if image.format == "AVIF":  # only its own boxes turn it
        image.info.pop("xmp", None)
    if not isinstance(image, TiffImagePlugin.TiffImageFile) and image.info.keys().isdisjoint(_EXIF_KEYS):
        return 1
    try:
        value = Image.Image.getexif(image).get(_ORIENTATION)  # PngImageFile.getexif would decode the pixels
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (damaged EXIF raises anything)
        return 1
    return value if value in _TURNS else 1


def turn_of(image: Image.Image, orientation: int, spec: DecodeSpec) -> Image.Transpose | None:
    """Return the transposition to do after loading. Pillow itself turns a TIFF while it loads it, and no other format."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return None if spec.exif_orientation else _UNDO.get(orientation)
    return _TURNS.get(orientation) if spec.exif_orientation else None


def mend_colour_key(image: Image.Image) -> None:
    """Convert the colour key of a PNG from the file's depth to the 8 bits of the pixels; Pillow does not."""
    key: Any = image.info.get("transparency")
    if key is None or not isinstance(image, PngImagePlugin.PngImageFile):
        return
    found = raw_mode(image)
    if found in {"L;2", "L;4"}:
        image.info["transparency"] = key * (85 if found == "L;2" else 17)


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Convert to mode L or RGB, without transparency."""
    if image.mode.startswith("I"):
        image = _scale_grey(image)
    elif image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    if image.mode in {"L", "RGB"}:
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _scale_grey(image: Image.Image) -> Image.Image:
    """Convert 16-bit grey (or 12-bit, from TIFF) to mode L, or LA with a colour key, over the full range and without clipping."""
    tags: Any = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    levels = ((np.arange(white + 1) * 255 + white // 2) // white).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow handles this at 8 bits only
        levels = levels[::-1]
    values = np.asarray(image)
    grey = Image.fromarray(levels[values])
    key = image.info.get("transparency")
    if key is None:
        return grey
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))


def to_array(image: Image.Image, spec: DecodeSpec) -> np.ndarray:
    """Convert mode L or RGB to an array ``(height, width, channel)``."""
    mode = "RGB" if spec.color == "rgb" else "L"
    if image.mode != mode:
        image = image.convert(mode)
    if spec.resize:
        height, width = spec.resize
        image = image.resize((width, height), Image.Resampling[spec.resize_filter.upper()])
    pixels = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for top in range(0, image.height, BAND_ROWS):  # in bands, because Pillow copies twice what it hands out
        band = pixels[top : top + BAND_ROWS]
        band[...] = np.asarray(image.crop((0, top, image.width, top + len(band)))).reshape(band.shape)
    pixels.flags.writeable = False
    return pixels
