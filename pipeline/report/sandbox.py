"""Pictures for a page: encoded here, files of the source read and decoded in a process of its own; the second home of Pillow."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from pipeline.config import DecodeSpec
from pipeline.errors import FeaturemapsError, ImageError
from pipeline.extract.layers import Array
from pipeline.run.bounded import bounded_process
from pipeline.source.decoding import decode
from pipeline.source.fetch import Patience, Source, read_bytes, read_current
from pipeline.source.names import absolute_path, absolute_url
from pipeline.source.urls import Url, is_url

PIXEL_LIMIT = 20_000_000
"""Larger files are not decoded for a page."""
FILE_BYTES = 64 * 1024**2
"""Nor are those that take more than this."""
MEMORY_BYTES = 1024**3
"""Address space of the process that decodes: what asks for more fails there. It begins with 170 MB."""
IMAGE_S = 5.0
"""How long one file is waited for."""
TOTAL_S = 20.0
"""How long all are, or a second for each where they are more."""
STARTS = 4
"""Processes, one after another: each may be killed by one file."""
_ANSWER_BYTES = 1 << 22
_PIXELS_BYTES = 1 << 26
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
        The store's; a pixel limit above `PIXEL_LIMIT` is lowered to it.
    images : sequence of (str, str)
        Path and fingerprint; a file of another fingerprint has none.
    longest : int
        Pixels of the longer side.
    """
    order = {"kind": "thumbnails", "root": root, "decode": spec.model_dump(mode="json"), "longest": longest}
    return [None if not isinstance(found, list) else Embedded(*found) for found in _ask(order, images)]


class Photograph(NamedTuple):
    """An image as the extractor saw it, or why it cannot be had."""

    pixels: Array | None
    """(y, x, channel) uint8."""
    trouble: str = ""


def photographs(root: str, spec: DecodeSpec, images: Sequence[tuple[str, int, str]]) -> Iterator[Photograph]:
    """Images as the extractor saw them, read and decoded with the same bounds, one after another as they are asked for.

    Parameters
    ----------
    root : str
        Source root, which may hang.
    spec : DecodeSpec
        The store's; a pixel limit above `PIXEL_LIMIT` is lowered to it.
    images : sequence of (str, int, str)
        Path, size in bytes and sha256 of what the maps were computed of.
    """
    order = {"kind": "photographs", "root": root, "decode": spec.model_dump(mode="json")}
    for found in _ask(order, images):
        if isinstance(found, Photograph):
            yield found
        else:
            yield Photograph(None, str(found or "the source image is out of reach: reading it took too long, or too much memory"))


def _ask(order: dict[str, Any], images: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
    """An answer for each image; None for those on which a process has died or taken too long, and once there are too many of these.

    Only the time counts in which this waits.
    """
    left_s = max(TOTAL_S, float(len(images))) if TOTAL_S else 0.0
    n_done = n_starts = 0
    while n_done < len(images):
        if n_starts == STARTS or left_s <= 0:
            yield None
            n_done += 1
            continue
        n_starts += 1
        with _process(order | {"images": images[n_done:]}) as answers:
            patience_s = left_s  # until it has begun
            while n_done < len(images):
                start_s = time.monotonic()
                try:
                    answer = _receive(answers, min(patience_s, left_s))
                except (EOFError, OSError, ValueError, TypeError, KeyError):  # with TimeoutError, or no answer of ours
                    answer, patience_s = None, 0.0
                left_s -= time.monotonic() - start_s
                if answer == "begun":
                    patience_s = IMAGE_S
                    continue
                yield answer
                n_done += 1
                if not patience_s:
                    break


@contextmanager
def _process(order: dict[str, Any]) -> Iterator[Connection]:
    """One that answers. At the end it is killed and hardly waited for: while a file system hangs it cannot end."""
    answers, theirs = Pipe(duplex=False)
    # -P: a file json.py or a folder pipeline of the current folder is none of ours
    command = [sys.executable, "-P", "-m", "pipeline.report.sandbox", str(theirs.fileno())]
    limits = {resource.RLIMIT_AS: MEMORY_BYTES, resource.RLIMIT_CORE: 0}
    with answers, tempfile.TemporaryFile() as file:
        file.write(json.dumps(order).encode())
        file.seek(0)
        with bounded_process(command, n_threads=1, limits=limits, stdin=file, pass_fds=[theirs.fileno()]):
            theirs.close()  # only the process has it now, so that its death ends what is read here
            yield answers


def _receive(answers: Connection, patience_s: float) -> Any:
    """One answer; pixels follow their shape."""
    if not answers.poll(max(0.0, patience_s)):
        raise TimeoutError
    answer = json.loads(answers.recv_bytes(_ANSWER_BYTES))
    if not isinstance(answer, dict):
        return answer
    pixels = np.frombuffer(answers.recv_bytes(_PIXELS_BYTES), np.uint8).reshape(answer["shape"])
    return Photograph(pixels)


# -- in the process that decodes -------------------------------------------------------------------------------------------------


def answers(order: dict[str, Any]) -> Iterator[Embedded | Array | str | None]:
    """What is found of each image of an order: a thumbnail or pixels, words that say why there are none, or None."""
    spec = DecodeSpec(**order["decode"])
    spec = spec.model_copy(update={"pixel_limit": min(spec.pixel_limit, PIXEL_LIMIT)})
    if order["kind"] == "photographs":
        source = Source(order["root"], spec)
        yield from (_photograph(source, path, size_bytes, digest) for path, size_bytes, digest in order["images"])
    else:
        source = Source(order["root"], spec.model_copy(update={"resize": None}))
        yield from (_thumbnail(source, path, fingerprint, order["longest"]) for path, fingerprint in order["images"])


def _thumbnail(source: Source, path: str, fingerprint: str, longest: int) -> Embedded | None:
    size_bytes, _, _ = fingerprint.partition("-")
    if not size_bytes.isdigit() or int(size_bytes) > FILE_BYTES:
        return None
    try:
        data = read_bytes(source, path, fingerprint, Patience())
        return encode(decode(data, source.decode, partial=True), longest)
    except (ImageError, FeaturemapsError, OSError, MemoryError, ValueError):
        return None


def _photograph(source: Source, path: str, size_bytes: int, digest: str) -> Array | str:
    changed = "the file has changed since its maps were computed, so it is not shown beside them"
    if size_bytes > FILE_BYTES:
        return f"the source image has more than {FILE_BYTES:,} bytes, so it is not shown here"
    try:
        if _size_bytes(source.root, path) != size_bytes:  # asked first, because a file may have grown without end
            return changed
        data = read_current(source, path)
        return decode(data, source.decode) if hashlib.sha256(data).hexdigest() == digest else changed
    except MemoryError:
        return "the source image takes too much memory to be shown here"
    except (ImageError, FeaturemapsError, OSError, ValueError):
        return "the source image cannot be read any more"


def _size_bytes(root: str, path: str) -> int:
    if is_url(root):
        return Url.parse(absolute_url(root, path)).stat().size_bytes
    return Path(os.fsdecode(absolute_path(root, path))).stat().st_size


def _main() -> None:
    order = json.load(sys.stdin)
    if order["kind"] == "thumbnails":
        ImageFile.LOAD_TRUNCATED_IMAGES = True  # here, what there is of a picture is wanted
    with Connection(int(sys.argv[1]), readable=False) as connection:
        _send(connection, "begun")
        for found in answers(order):
            if isinstance(found, np.ndarray):
                _send(connection, {"shape": found.shape})
                connection.send_bytes(np.ascontiguousarray(found).data.cast("B"))
            else:
                _send(connection, found)


def _send(connection: Connection, value: Any) -> None:
    connection.send_bytes(json.dumps(value).encode())


if __name__ == "__main__":
    _main()
