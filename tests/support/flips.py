"""Every single-bit flip of small JPEG, GIF, WebP and AVIF files: ``python -m tests.support.flips`` says how each kind ended."""

from __future__ import annotations

import argparse
import io
from collections import Counter

import numpy as np
from PIL import Image, features

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source.decoding import decode

SPEC = DecodeSpec(pixel_limit=1_000_000)


def saved(kind: str, **options) -> bytes:
    y, x = np.mgrid[:24, :32]
    noise = np.random.default_rng(0).integers(-20, 20, (24, 32, 3))
    image = Image.fromarray(np.clip(np.stack([8 * x, 10 * y, 4 * (x + y)], 2) + noise, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    (image.convert("P") if kind == "GIF" else image).save(file, kind, **options)
    return file.getvalue()


def kinds() -> dict[str, bytes]:
    return {
        "JPEG baseline": saved("JPEG"),
        "JPEG progressive": saved("JPEG", progressive=True),
        "JPEG restarts": saved("JPEG", restart_marker_blocks=1),
        "GIF": saved("GIF"),
        "WebP lossy": saved("WEBP"),
        "WebP lossless": saved("WEBP", lossless=True),
    } | ({"AVIF": saved("AVIF", speed=10)} if features.check("avif") else {})


def flips(data: bytes, step: int = 1) -> Counter[str]:
    """How decoding ends with each ``step``-th bit flipped: the exact pixels, refused, or wrong pixels."""
    expected = decode(data, SPEC)
    ends: Counter[str] = Counter(exact=0, refused=0, wrong=0)
    for bit in range(0, 8 * len(data), step):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            pixels = decode(bytes(changed), SPEC)
        except ImageError:
            ends["refused"] += 1
        else:
            ends["exact" if np.array_equal(pixels, expected) else "wrong"] += 1
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step", type=int, default=1, help="flip every so many bits")
    options = parser.parse_args()
    for name, data in kinds().items():
        ends = flips(data, options.step)
        n = ends.total()
        print(f"{name:18} n {n:6} " + ", ".join(f"{end} {100 * count / n:.1f} %" for end, count in ends.items()), flush=True)


if __name__ == "__main__":
    main()
