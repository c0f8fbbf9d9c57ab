"""Small pictures for a page: encoded here, those of bad files decoded in a process of its own; the second home of Pillow."""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from pipeline.chunks import Array
from pipeline.config import DecodeSpec
from pipeline.decode import decode
from pipeline.errors import FeaturemapsError, ImageError
from pipeline.reading import Patience, Source, read_bytes

PIXEL_LIMIT = 20_000_000
"""Larger files are not decoded for a thumbnail."""
FILE_BYTES = 32 * 1024**2
"""Nor are those that take more than this."""
MEMORY_BYTES = 2 * 1024**3
"""Address space of the process that decodes bad files: what asks for more fails there."""
IMAGE_S = 5.0
TOTAL_S = 20.0
STARTS = 4
"""Processes, one after another: each may be killed by one file."""
_LOSSLESS_PIXELS = 48 * 48
_QUALITY = 85


class Embedded(NamedTuple):
    """An encoded picture."""

    uri: str
    """``data:image/...;base64,...``"""
    width: int
    """Pixels, as encoded."""
    height: int


def encode(pixels: Array, longest: int) -> Embedded:
    """Encode a picture, made smaller where a side is longer than ``longest`` pixels.

    Parameters
    ----------
    pixels : (y, x, 3), (y, x, 1) or (y, x) uint8
    longest : int
        A sliver keeps at least one pixel on its short side.

    Examples
    --------
    >>> encode(np.zeros((200, 400, 3), np.uint8), 100)[1:]
    (100, 50)
    """
    flat = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    image = Image.fromarray(np.ascontiguousarray(flat))
    if max(image.size) > longest:
        factor = longest / max(image.size)
        width, height = (max(1, round(side * factor)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BOX)
    file = io.BytesIO()
    if image.width * image.height <= _LOSSLESS_PIXELS:
        kind = "png"
        image.save(file, "PNG", optimize=True)
    else:
        kind = "jpeg"
        image.save(file, "JPEG", quality=_QUALITY, optimize=True)
    return Embedded(data_uri(file.getvalue(), f"image/{kind}"), *image.size)


def data_uri(data: bytes, kind: str) -> str:
    """Bytes as an address that holds them.

    Examples
    --------
    >>> data_uri(b"abc", "image/png")
    'data:image/png;base64,YWJj'
    """
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def thumbnails(root: str, spec: DecodeSpec, images: Sequence[tuple[str, str]], longest: int) -> list[Embedded | None]:
    """Thumbnails of files that a run found to be bad, as far as they can be decoded.

    They are read and decoded in a process of its own, with bounds for its memory, for the time of each file and of all; a file on which it
    dies or hangs has none.

    Parameters
    ----------
    root : str
        Source root.
    spec : DecodeSpec
        As of the store; of its pixel limit at most `PIXEL_LIMIT` counts.
    images : sequence of (str, str)
        Path and fingerprint; a file of another fingerprint has none.
    longest : int
        Pixels of the longer side.
    """
    found: list[Embedded | None] = []
    end_s = time.monotonic() + TOTAL_S
    for _ in range(STARTS):
        if len(found) == len(images) or time.monotonic() >= end_s:
            break
        found += _try(root, spec, images[len(found) :], longest, end_s)
    return found + [None] * (len(images) - len(found))


def _try(root: str, spec: DecodeSpec, images: Sequence[tuple[str, str]], longest: int, end_s: float) -> list[Embedded | None]:
    """What one process finds, until it has done all, died, or taken too long; the file at fault counts as done."""
    order = {"root": root, "decode": spec.model_dump(mode="json"), "images": list(images), "longest": longest}
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.thumbnails"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    talk = threading.Thread(target=_talk, args=(process, json.dumps(order).encode(), lines), daemon=True)
    talk.start()
    found: list[Embedded | None] = []
    try:
        patience_s = TOTAL_S  # until it has begun
        while len(found) < len(images):
            line = lines.get(timeout=max(0.0, min(patience_s, end_s - time.monotonic())))
            if not line:
                break
            answer = json.loads(line)
            patience_s = IMAGE_S
            if answer != "begun":
                found.append(None if answer is None else Embedded(*answer))
    except (queue.Empty, ValueError):
        pass
    finally:
        process.kill()
        process.wait()
        talk.join()
    return [*found, None] if len(found) < len(images) else found


def _talk(process: subprocess.Popen[bytes], order: bytes, lines: queue.SimpleQueue[bytes]) -> None:
    """Hand the order in, and take lines until there are no more; an empty one is the end."""
    try:
        with process.stdin as stdin:  # type: ignore[union-attr]
            stdin.write(order)
    except OSError:
        pass
    with process.stdout as stdout:  # type: ignore[union-attr]
        for line in stdout:
            lines.put(line)
    lines.put(b"")


# -- in the process that decodes -------------------------------------------------------------------------------------------------


def answers(order: dict[str, Any]) -> Iterator[Embedded | None]:
    """The pictures of an order, one after another."""
    spec = DecodeSpec(**order["decode"])
    source = Source(order["root"], spec.model_copy(update={"pixel_limit": min(spec.pixel_limit, PIXEL_LIMIT), "resize": None}))
    for path, fingerprint in order["images"]:
        yield _picture(source, path, fingerprint, order["longest"])


def _picture(source: Source, path: str, fingerprint: str, longest: int) -> Embedded | None:
    size_bytes, _, _ = fingerprint.partition("-")
    if not size_bytes.isdigit() or int(size_bytes) > FILE_BYTES:
        return None
    try:
        data = read_bytes(source, path, fingerprint, Patience())
        return encode(decode(data, source.decode), longest)
    except (ImageError, FeaturemapsError, OSError, MemoryError, ValueError):
        return None


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    order = json.load(sys.stdin)
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # here, what there is of a picture is wanted
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    sys.stdout.write('"begun"\n')
    for picture in answers(order):
        sys.stdout.write(json.dumps(picture) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
