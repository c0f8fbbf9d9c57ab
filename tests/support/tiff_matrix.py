"""Generated TIFF files with the right answer for each: ``python -m tests.support.tiff_matrix`` tries them all.

tifffile and imagecodecs write the files and read them back. The rule in docs/decoding.md, applied to what tifffile reads, is the answer.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import tifffile
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode

if TYPE_CHECKING:
    from collections.abc import Iterator

HEIGHT, WIDTH = 37, 43  # neither is a multiple of a byte, a strip or a tile
TILE = (16, 32)
SPEC = DecodeSpec()
SETTLED = "right", "wrong", "not written"
# Kind: tifffile's photometric, samples, extra samples.
KINDS = {
    "black": ("minisblack", 1, ()),
    "white": ("miniswhite", 1, ()),
    "rgb": ("rgb", 3, ()),
    "palette": ("palette", 1, ()),
    "cmyk": ("separated", 4, ()),
    "ycbcr": ("ycbcr", 3, ()),
    "lab": ("cielab", 3, ()),
    "black+alpha": ("minisblack", 2, ("unassalpha",)),
    "black+assoc": ("minisblack", 2, ("assocalpha",)),
    "black+other": ("minisblack", 2, ("unspecified",)),
    "white+alpha": ("miniswhite", 2, ("unassalpha",)),
    "rgb+alpha": ("rgb", 4, ("unassalpha",)),
    "rgb+assoc": ("rgb", 4, ("assocalpha",)),
    "rgb+other": ("rgb", 4, ("unspecified",)),
    "rgb+alpha+other": ("rgb", 5, ("unassalpha", "unspecified")),
    "rgb+other+other": ("rgb", 5, ("unspecified", "unspecified")),
    "cmyk+other": ("separated", 5, ("unspecified",)),
}
# Depth: numpy's type, bits, "u" unsigned, "i" signed, "f" float.
DEPTHS = {
    "1": ("?", 1), "2": ("u1", 2), "4": ("u1", 4), "8": ("u1", 8), "12": ("u2", 12), "16": ("u2", 16), "32": ("u4", 32),
    "i8": ("i1", 8), "i16": ("i2", 16), "i32": ("i4", 32), "f16": ("f2", 16), "f32": ("f4", 32), "f64": ("f8", 64),
}  # fmt: skip
COMPRESSIONS = (None, "deflate", "adobe_deflate", "lzw", "packbits", "zstd", "lzma", "jpeg", "webp")
LAYOUTS = ("one strip", "strips", "tiles", "odd tiles")


@dataclass(frozen=True)
class Case:
    """One file of the matrix."""

    depth: str
    kind: str
    planes: str
    order: str
    compression: str | None
    predictor: bool
    layout: str
    orientation: int
    is_big: bool

    def __str__(self) -> str:
        big = " BigTIFF" if self.is_big else ""
        parts = (self.depth, self.kind, self.planes, self.order, self.compression, "predictor" if self.predictor else "plain")
        return f"{' '.join(map(str, parts))} {self.layout} turn {self.orientation}{big}"


def cases(*, everything: bool = False) -> Iterator[Case]:
    """Return the matrix: the product of what matters to samples; the rest is turned through in step with it."""
    n = 0
    rest = list(product(LAYOUTS, (1, 6, 3, 8, 2, 5, 4, 7), (False, True)))
    for depth, kind, order, compression, predictor in product(DEPTHS, KINDS, "<>", COMPRESSIONS, (False, True)):
        planes = ("contig", "separate") if KINDS[kind][1] > 1 else ("contig",)
        if predictor and (compression in {None, "packbits", "jpeg", "webp"} or DEPTHS[depth][1] < 8):
            continue
        if compression in {"jpeg", "webp"} and depth not in {"8", "12"}:
            continue
        is_refused = DEPTHS[depth][0][0] in "if" or DEPTHS[depth][1] > 16  # whatever the rest
        if is_refused and (compression not in {None, "deflate"} or "+" in kind or predictor or kind in {"ycbcr", "lab"}):
            continue
        for plane in planes:
            picked = rest if everything else [rest[(n * 29 + n // 64 * 13 + n // 2) % len(rest)]]
            for layout, orientation, is_big in picked:
                yield Case(depth, kind, plane, order, compression, predictor, layout, orientation, is_big)
            n += 1


def samples_of(case: Case) -> np.ndarray:
    """Samples ``(y, x, sample)`` that use the whole range of their depth; smooth where compression is lossy."""
    dtype, bits = DEPTHS[case.depth]
    n = KINDS[case.kind][1]
    rng = np.random.default_rng(bits * 100 + n)
    if case.compression in {"jpeg", "webp"}:
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        smooth = np.stack([(20 + 4 * x + k * 15 + (2 + k) * y) % 256 if k > 2 else 20 + 3 * x + (1 + k) * y for k in range(n)], 2)
        return (smooth << (bits - 8)).astype(dtype)
    if dtype[0] == "f":
        return (rng.random((HEIGHT, WIDTH, n)) * 300 - 20).astype(dtype)
    if dtype == "?":
        return rng.random((HEIGHT, WIDTH, n)) < 0.5
    low = -(1 << (bits - 1)) if dtype[0] == "i" else 0
    return rng.integers(low, low + (1 << bits), (HEIGHT, WIDTH, n), dtype=np.int64).astype(dtype)


def palette_of(case: Case) -> np.ndarray:
    """A colour table ``(3, entry) uint16``."""
    return np.random.default_rng(9).integers(0, 65536, (3, 1 << min(DEPTHS[case.depth][1], 16)), dtype=np.uint16)


def write(case: Case) -> bytes | None:
    """The file, or None where tifffile does not write this combination."""
    photometric, n, extra = KINDS[case.kind]
    dtype, bits = DEPTHS[case.depth]
    samples = samples_of(case)
    options: dict = {"photometric": photometric, "compression": case.compression, "metadata": None}
    if n > 1:
        options["planarconfig"] = case.planes
    if extra:
        options["extrasamples"] = extra
    if case.kind == "palette":
        options["colormap"] = palette_of(case)
    if case.predictor:
        options["predictor"] = True
    if bits not in {1, 8, 16, 32, 64} or (bits < 8 and dtype != "?"):
        options["bitspersample"] = bits
    if case.kind == "ycbcr" and case.compression != "jpeg":
        options["subsampling"] = (1, 1)
    if case.layout.endswith("tiles"):
        options["tile"] = TILE if case.layout == "tiles" else (16, 16)
    elif case.layout == "strips":
        options["rowsperstrip"] = 8
    if case.orientation != 1:
        options["extratags"] = [(274, 3, 1, case.orientation, True)]
    samples = samples[..., 0] if n == 1 else samples.transpose(2, 0, 1) if case.planes == "separate" else samples
    file = io.BytesIO()
    try:
        with tifffile.TiffWriter(file, bigtiff=case.is_big, byteorder=case.order) as writer:
            writer.write(samples, **options)
    except Exception:  # noqa: BLE001 (this combination is not for tifffile)
        return None
    return file.getvalue()


def read_samples(data: bytes, case: Case) -> np.ndarray | None:
    """Samples ``(y, x, sample)`` as tifffile reads them; None where it does not, or gives others than were written."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            samples = file.pages[0].asarray()
    except Exception:  # noqa: BLE001 (this combination is not for tifffile)
        return None
    if samples.ndim == 2:
        samples = samples[..., np.newaxis]
    elif case.planes == "separate":
        samples = samples.transpose(1, 2, 0)
    if case.compression not in {"jpeg", "webp"} and not np.array_equal(samples, samples_of(case)):
        return None
    return samples


def to_8_bits(samples: np.ndarray, bits: int, *, is_grey: bool) -> np.ndarray:
    if bits == 8:
        return samples.astype(np.uint8)
    if not is_grey:
        return (samples >> (bits - 8)).astype(np.uint8) if bits > 8 else (samples * (255 // ((1 << bits) - 1))).astype(np.uint8)
    return np.rint(samples.astype(float) * 255 / ((1 << bits) - 1)).astype(np.uint8)


def rule(samples: np.ndarray, case: Case) -> np.ndarray | None:
    """Pixels ``(y, x, 3) uint8`` by docs/decoding.md; None where there is no rule."""
    dtype, bits = DEPTHS[case.depth]
    if dtype[0] in "if" or bits > 16:
        return None
    base, *extra = case.kind.split("+")
    if base == "palette":
        if bits > 8:
            return None
        return turn((palette_of(case) >> 8).astype(np.uint8).T[samples[..., 0].astype(int)], case.orientation)
    values = to_8_bits(samples, bits, is_grey=base in {"black", "white"})
    if base == "white":
        values = np.concatenate([255 - values[..., :1], values[..., 1:]], axis=2)
    n = {"black": 1, "white": 1, "rgb": 3, "cmyk": 4, "ycbcr": 3, "lab": 3}[base]
    colour, alpha = values[..., :n], values[..., n : n + 1].astype(int)
    if base in {"cmyk", "ycbcr", "lab"} and not (base == "ycbcr" and case.compression == "jpeg"):
        mode = {"cmyk": "CMYK", "ycbcr": "YCbCr", "lab": "LAB"}[base]
        colour = np.asarray(
            Image.frombytes(mode, (WIDTH, HEIGHT), np.ascontiguousarray(colour).tobytes(), "raw", mode).convert("RGB")
        )
    if extra and extra[0] in {"alpha", "assoc"}:
        if extra[0] == "assoc":
            colour = np.where(alpha == 0, 0, np.minimum(255, 255 * colour.astype(int) // np.maximum(alpha, 1)))
        colour = np.rint((colour * alpha.astype(float) + 255 * (255 - alpha)) / 255).astype(np.uint8)
    return turn(np.repeat(colour, 3, axis=2) if colour.shape[2] == 1 else colour, case.orientation)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Orient ``(y, x, channel)`` by the tag's number."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    flips = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}
    y, x = flips[orientation]
    return pixels[::y, ::x]


def outcome(case: Case) -> str:
    """``right``, ``wrong``, ``no rule`` (done although there is none), ``not written``, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = write(case)
        samples = None if data is None else read_samples(data, case)
    if data is None or samples is None:
        return "not written"
    try:
        pixels = decode(data, SPEC)
    except ImageError as error:
        return f"{error}"
    wanted = rule(samples, case)
    if wanted is None:
        return "no rule"
    # Two builds of libjpeg differ by rounding; libtiff's own conversion of YCbCr too.
    tolerance = 3 if case.compression in {"jpeg", "webp"} or case.kind == "ycbcr" else 0
    same = pixels.shape == wanted.shape and np.abs(pixels.astype(int) - wanted).max() <= tolerance
    return "right" if same else "wrong"


def main() -> int:
    """Try the matrix and print a table of what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", action="store_true", help="only the part that the suite tries")
    parser.add_argument("--show", action="store_true", help="print each outcome")
    options = parser.parse_args()
    start, counts = time.perf_counter(), Counter()
    for case in cases(everything=not options.sample):
        found = outcome(case)
        counts[found if found in {"right", "wrong", "no rule", "not written"} else found.split(":")[0]] += 1
        if options.show or found in {"wrong", "no rule"}:
            print(f"{case}: {found}")
    print(dict(counts), f"{time.perf_counter() - start:.0f} s")
    return int(bool(counts["wrong"] or counts["no rule"]))


if __name__ == "__main__":
    sys.exit(main())
