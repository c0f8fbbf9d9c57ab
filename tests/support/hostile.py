"""Files made to hurt, and what it costs to look at each, alone: ``python -m tests.support.hostile FOLDER``."""

from __future__ import annotations

import io
import json
import os
import resource
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source import decoding as decode_module
from pipeline.source.decoding import decode, probe
from tests.source.test_decoding import FILES, HEIGHT, WIDTH, chunk, gif, vp8x

SPEC = DecodeSpec(pixel_limit=16_000_000)
ADDRESS_SPACE_BYTES = 6 * 2**30
SIZE_OF_JPEG = struct.pack(">BHH", 8, HEIGHT, WIDTH)


def png(height: int, width: int, *before: bytes, data: bytes | None = None, after: bytes = b"") -> bytes:
    """RGB, black, with chunks before and after its pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = zlib.compress(bytes((3 * width + 1) * height)) if data is None else data
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(before) + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def jpeg(*segments: bytes) -> bytes:
    return FILES["jpeg"][:2] + b"".join(segments) + FILES["jpeg"][2:]


def jpeg_of(height: int, width: int, name: str = "jpeg") -> bytes:
    """A JPEG whose header claims more than there is."""
    return FILES[name].replace(SIZE_OF_JPEG, struct.pack(">BHH", 8, height, width))


def scans(height: int, width: int, n: int, name: str = "jpeg-progressive") -> bytes:
    """A JPEG that ends in empty scans; in a progressive one, each refines every block."""
    data = jpeg_of(height, width, name)
    refine = b"\xff\xda" + struct.pack(">H", 12) + bytes([3, 1, 0, 2, 0, 3, 0, 0, 0, 0x10])
    return data[:-2] + refine * n + b"\xff\xd9"


def bmp(width: int, height: int, bits: int, compression: int, body: bytes, colors: int = 256) -> bytes:
    palette = bytes(range(256)) * 4
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 0, 0, colors, 0)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + len(palette)) + header + palette + body


def tiff(width: int, height: int, compression: int, tags: dict[int, tuple[int, list[int]]], body: bytes = bytes(300)) -> bytes:
    """RGB; ``tags`` are numbers of a type (1, 3 or 4) each."""
    longs = {256: (4, [width]), 257: (4, [height]), 258: (3, [8] * 3), 259: (3, [compression]), 262: (3, [2]), 277: (3, [3])}
    entries, values = b"", b""
    every = sorted((longs | tags).items())
    place = 8 + len(body) + 2 + 12 * len(every) + 4
    for tag, (kind, numbers) in every:
        packed = np.array(numbers, {1: "<u1", 3: "<u2", 4: "<u4"}[kind]).tobytes()
        inline = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack("<I", place + len(values))
        values += packed if len(packed) > 4 else b""
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + inline
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(every)) + entries + bytes(4) + values


def webp_of(width: int, height: int, *, lossless: bool) -> bytes:
    """A WebP without VP8X, whose bitstream claims more than there is."""
    data = FILES["webp-lossless" if lossless else "webp"]
    if not lossless:
        place = data.index(b"\x9d\x01\x2a") + 3
        return data[:place] + struct.pack("<HH", width, height) + data[place + 4 :]
    place = data.index(b"VP8L") + 8
    body = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14 | 1 << 28) + data[place + 5 :]
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + b"WEBPVP8L" + struct.pack("<I", len(body)) + body


def animation(kind: str, n: int) -> bytes:
    frames = [Image.new("RGB", (16, 16), (i % 256, i // 256, 9)) for i in range(n)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], loop=0)
    return file.getvalue()


def avif_of(width: int, height: int) -> bytes:
    place = FILES["avif"].index(b"ispe") + 8
    return FILES["avif"][:place] + struct.pack(">II", width, height) + FILES["avif"][place + 8 :]


def corpus() -> dict[str, tuple[bytes, str]]:
    """Files by name, each with the beginning of what `decode` says: ``done`` or an error."""
    text = zlib.compress("\U0001f600".encode() + b"a" * 1_000_000)
    exif = b"II*\0\x08\0\0\0" + struct.pack("<H", 5000) + b"".join(struct.pack("<HHII", i, 1, 60000, 8) for i in range(5000))
    segment = b"\xff\xe1" + struct.pack(">H", 65535) + b"Exif\0\0" + bytes(65527)
    black = zlib.compress(bytes(3 * 6000 * 6000), 9)
    gif_head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
    frame = b"," + struct.pack("<4HB", 0, 0, 1, 1, 0) + b"\x02\x01\x44\0"
    looped = tiff(10, 10, 1, {273: (4, [8]), 279: (4, [300])})
    looped = looped[:-10] + looped[4:8] + looped[-6:]
    strips = {273: (3, [8] * 1_000_000), 278: (4, [1]), 279: (4, [30])}
    tile = {322: (4, [6000]), 323: (4, [6000]), 324: (4, [8]), 325: (4, [len(black)])}
    too_many, cost = "too_many_pixels: ", "corrupt: the image cannot be decoded ("
    reads, values = cost + "its header takes more than", cost + "tag 273 has 1000000 values"
    return {
        # bombs: much from little
        "bomb.bmp": (bmp(65535, 65535, 8, 1, b"\0\2\xff\xff"), too_many),
        "bomb.gif": (gif(65535, 65535, (1, 1)), too_many),
        "bomb.jpg": (jpeg_of(65535, 65535), too_many),
        "bomb.png": (png(65535, 65535, data=b""), too_many),
        "bomb.pgm": (b"P2 65535 65535 255\n1", too_many),
        "bomb.ppm": (b"P6 65535 65535 255\n1", too_many),
        "bomb.tif": (tiff(65535, 65535, 8, {273: (4, [8]), 279: (4, [300])}), too_many),
        "bomb.webp": (vp8x(65535, 65535), too_many),
        "bomb vp8.webp": (webp_of(16383, 16383, lossless=False), too_many),
        "bomb vp8l.webp": (webp_of(16384, 16384, lossless=True), too_many),
        "bomb.avif": (avif_of(16384, 16384), too_many),
        "bomb beyond avif.avif": (avif_of(60000, 60000), "corrupt: "),
        "bomb of a tile.tif": (tiff(10, 10, 8, tile, black), too_many + "a tile has 6000 x 6000 pixels"),
        "more pixels than needed.png": (png(10, 10, data=zlib.compress(bytes(10**8), 9)), cost + "its compressed pixels go on"),
        "delta.bmp": (bmp(400_000, 10, 8, 1, b"\0\2\xff\xff" * 4), cost + "a run of row 255 goes on behind its last pixel"),
        "empty lines.bmp": (bmp(400_000, 10, 8, 1, b"\1\1\0\0" * 10), "done"),
        "black.png": (png(4000, 4000), "done"),
        "lie.jpg": (jpeg_of(4000, 4000), "truncated: "),
        "lie.avif": (avif_of(4000, 4000), "done"),
        # long sides
        "65500 wide.jpg": (jpeg_of(24, 65500), "truncated: "),
        "65535 wide.png": (png(60, 65535), "done"),
        "65535 high.png": (png(65535, 60), "done"),
        "65535 wide.bmp": (bmp(65535, 60, 8, 0, bytes(65536 * 60)), "done"),
        "65535 wide.gif": (gif(65535, 60, (1, 1)), "done"),
        "65535 wide.tif": (tiff(65535, 60, 1, {273: (4, [8]), 279: (4, [300])}), "truncated: "),
        "65535 wide.ppm": (b"P6 65535 60 255\n" + bytes(65535 * 180), "done"),
        "65535 wide.webp": (vp8x(65535, 60), "corrupt: "),
        # animations
        "100000 frames.gif": (gif(1, 1, (1, 1))[:-1] + frame * 100_000 + b";", "done"),
        "1000 frames.webp": (animation("WEBP", 1000), "done"),
        "1000 frames.png": (animation("PNG", 1000), "done"),
        "100 frames.avif": (animation("AVIF", 100), "done"),
        # headers without an end
        "fill.jpg": (jpeg(b"\xff" * 1_000_000), reads),
        "comments.jpg": (jpeg(b"\xff\xfe\0\2" * 500_000), reads),
        "exif in parts.jpg": (jpeg(*[segment] * 400), reads),
        "exif upon itself.jpg": (jpeg(b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif), "done"),
        "exif upon itself.png": (png(10, 10, chunk(b"eXIf", exif)), "done"),
        "text.png": (
            png(10, 10, *[chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text) for i in range(60)]),
            "done",
        ),
        "text behind.png": (
            png(10, 10, after=b"".join([chunk(b"iTXt", b"k%d\0\1\0\0\0" % i + text) for i in range(60)])),
            "done",
        ),
        "profile.png": (
            png(10, 10, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(10**8), 9))),
            "done",
        ),
        "chunks.png": (png(10, 10, chunk(b"prVt", b"") * 300_000), reads),
        "chunks behind.png": (png(10, 10, after=chunk(b"prVt", b"") * 300_000), "done"),
        "empty pixels.png": (png(10, 10, chunk(b"IDAT", b"") * 300_000), "done"),
        "comments.gif": (gif_head + b"!\xfe\1a\0" * 500_000 + gif(1, 1, (1, 1))[13 + 6 :], reads),
        "extension.gif": (gif_head + b"!\xff" + b"\1a" * 500_000 + b"\0" + gif(1, 1, (1, 1))[13 + 6 :], reads),
        "garbage.gif": (
            gif_head + b"x" * 1_000_000,
            "corrupt: the image cannot be decoded (there are bytes between its blocks",
        ),
        "comment.ppm": (b"P6 #" + b"x" * 1_000_000 + b"\n10 10 255\n" + bytes(300), reads),
        "comments.ppm": (b"P3 10 10 255\n" + b"#\n" * 500_000 + b"1 " * 300, cost + "it has more than 10000 comments"),
        "spaces.ppm": (b"P3 10 10 255\n" + b" " * 5_000_000 + b"1 " * 300, "done"),
        "strips.tif": (tiff(10, 10, 1, strips), values),
        "strips of bytes.tif": (tiff(10, 10, 1, strips | {273: (1, [8] * 1_000_000)}), values),
        "strips lzw.tif": (tiff(10, 10, 5, strips), values),
        "tags upon themselves.tif": (
            tiff(10, 10, 1, {273: (4, [8]), 279: (4, [300])} | {40000 + i: (1, [1] * 5) for i in range(8000)}),
            "done",
        ),
        "next directory is this.tif": (looped, "done"),
        "colors.bmp": (bmp(10, 10, 8, 0, b"", colors=2**32 - 1), cost + "Unsupported BMP Palette"),
        # work without an end
        "scans.jpg": (scans(3000, 3000, 5000), cost + "it has more than 500 scans"),
        "scans behind a whole one.jpg": (scans(3000, 3000, 5000, "jpeg"), "truncated: "),
        "scans of a small one.jpg": (scans(HEIGHT, WIDTH, 400), "truncated: a scan of its pixels is missing"),
        "runs.bmp": (bmp(100, 100, 8, 1, b"\xff\1" * 500_000), cost + "a run of row 0 goes on behind its last pixel"),
        "wide.png": (png(1, 10_000_000), "done"),
    }


def measure(path: Path) -> dict[str, object]:
    """Look at a file as a worker does; time, memory that was taken, and the memory that the plan would count on."""
    data = path.read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before_bytes, started_s = _peak_bytes(), time.perf_counter()
    found: dict[str, object] = {"decode_bytes": 0}
    for function in (probe, decode):
        try:
            result = function(data, SPEC)
            found[function.__name__] = "done"
            found["decode_bytes"] = getattr(result, "decode_bytes", found["decode_bytes"])
        except ImageError as error:
            found[function.__name__] = str(error)
        except BaseException as error:  # noqa: BLE001 (that is what the test is about)
            found[function.__name__] = f"raised {error!r}"
    return found | {"elapsed_s": time.perf_counter() - started_s, "taken_bytes": _peak_bytes() - before_bytes + len(data)}


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """A line of JSON per file; each in a child that may die."""
    decode_module._fast_decoder()
    for path in sorted(Path(sys.argv[1]).iterdir()):
        receive, send = os.pipe()
        if not (child := os.fork()):
            resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))
            resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
            os.write(send, json.dumps(measure(path)).encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive, "rb") as stream:
            text = stream.read()
        status = os.waitpid(child, 0)[1]
        found = json.loads(text) if text else {"decode": f"killed its process (status {status})"}
        print(json.dumps({"name": path.name, **found}), flush=True)


if __name__ == "__main__":
    main()
