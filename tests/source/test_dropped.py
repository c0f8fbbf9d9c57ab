"""What decoding drops of an image is counted and said: further pages, frames and channels, and low bits."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.source.decoding import decode, probe
from pipeline.source.dropped import describe_dropped
from pipeline.store.store import Store
from tests.conftest import make_images

RNG = np.random.default_rng(0)
ANIMATED = {"save_all": True, "duration": 100}


def pixels(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def tiff(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def frames(kind: str, n: int, **options) -> bytes:
    file = io.BytesIO()
    first, *others = (Image.fromarray(pixels(40, 50, 3)) for _ in range(n))
    first.save(file, kind, append_images=others, **(ANIMATED if n > 1 else {}), **options)
    return file.getvalue()


def png16(mode: str = "RGB") -> bytes:
    """A PNG of 16 bits, which Pillow does not write in colour."""
    n = {"RGB": 3, "RGBA": 4, "L": 1, "LA": 2}[mode]
    colour = {"RGB": 2, "RGBA": 6, "L": 0, "LA": 4}[mode]
    data = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels(40, 50, n, dtype=np.uint16)))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 50, 40, 16, colour, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = (struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def pyramid() -> bytes:
    """One picture, and smaller versions of it, which are no loss."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(pixels(40, 50, 3), photometric="rgb")
        for n in (2, 4):
            writer.write(pixels(40 // n, 50 // n, 3), photometric="rgb", subfiletype=1)
    return file.getvalue()


def pnm(white: int) -> bytes:
    values = (pixels(40, 50, 3, dtype=np.uint16).astype(int) % (white + 1)).astype(">u2" if white > 255 else "u1")
    return b"P6 50 40 %d\n" % white + values.tobytes()


RGB = {"photometric": "rgb", "planarconfig": "contig"}
CASES = {
    "a stack": (tiff(pixels(5, 40, 50, 3), photometric="rgb"), ("pages:5",)),
    "a stack, big-endian": (tiff(pixels(3, 40, 50), photometric="minisblack", byteorder=">"), ("pages:3",)),
    "a BigTIFF stack": (tiff(pixels(4, 40, 50), photometric="minisblack", bigtiff=True), ("pages:4",)),
    "a tall stack": (tiff(pixels(120, 16, 16), photometric="minisblack"), ("pages:100+",)),
    "a pyramid": (pyramid(), ()),
    "one page": (tiff(pixels(40, 50, 3), photometric="rgb"), ()),
    "five channels": (tiff(pixels(40, 50, 5), extrasamples=[0, 0], **RGB), ("channels:5/3",)),
    "alpha": (tiff(pixels(40, 50, 4), extrasamples=[2], **RGB), ()),
    "alpha and another": (tiff(pixels(40, 50, 5), extrasamples=[2, 0], **RGB), ("channels:5/4",)),
    "16 bits and a stack": (tiff(pixels(2, 40, 50, 3, dtype=np.uint16), **RGB), ("pages:2", "bits:16")),
    "16-bit grey TIFF": (tiff(pixels(40, 50, dtype=np.uint16)), ("bits:16",)),
    **{f"16-bit {mode} PNG": (png16(mode), ("bits:16",)) for mode in ("RGB", "RGBA", "L", "LA")},
    "8-bit PNG": (frames("PNG", 1), ()),
    "APNG": (frames("PNG", 3), ("frames:3",)),
    "WebP": (frames("WEBP", 1), ()),
    "animated WebP": (frames("WEBP", 4), ("frames:4",)),
    "GIF": (frames("GIF", 1), ()),
    "animated GIF": (frames("GIF", 3), ("frames:2+",)),
    "looping GIF": (frames("GIF", 3, loop=0), ("frames:2+",)),
    "looping GIF of one frame": (frames("GIF", 1, loop=0), ()),
    "JPEG": (frames("JPEG", 1), ()),
    "16-bit PNM": (pnm(65_535), ("bits:16",)),
    "10-bit PNM": (pnm(1023), ("bits:10",)),
    "8-bit PNM": (pnm(255), ()),
}


@pytest.mark.parametrize("name", CASES)
def test_the_header_says_what_is_dropped(name):
    data, expected = CASES[name]
    assert probe(data, DecodeSpec()).dropped == expected


class Far(io.RawIOBase):
    """A file of which each part takes a request."""

    def __init__(self, data: bytes) -> None:
        self.file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer) -> int:
        return self.file.readinto(buffer)


@pytest.mark.parametrize(("name", "expected"), [("a stack", "pages:2+"), ("one page", ""), ("five channels", "channels:5/3")])
def test_in_a_bucket_two_pages_are_enough(name, expected):
    assert "".join(probe(io.BufferedReader(Far(CASES[name][0])), DecodeSpec()).dropped) == expected


def test_a_directory_that_leads_back_or_out_of_the_file_ends_the_count():
    data = bytearray(tiff(pixels(2, 40, 50), photometric="minisblack"))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        first, second = (page.offset for page in file.pages)
    n_tags = int.from_bytes(data[second : second + 2], "little")
    place = second + 2 + 12 * n_tags
    for target in (first, second, len(data) + 100, 2**32 - 1):
        data[place : place + 4] = target.to_bytes(4, "little")
        assert probe(bytes(data), DecodeSpec()).dropped == ("pages:2",)
        assert decode(bytes(data), DecodeSpec()).shape == (40, 50, 3)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about files that are cut
def test_every_beginning_of_a_file_is_probed_as_without_the_count(monkeypatch):
    """What is counted never decides whether an image is read."""

    def tried(data: bytes) -> str:
        try:
            return str(probe(data, DecodeSpec()))
        except Exception as error:  # noqa: BLE001 (which one is compared)
            return repr(error)

    cut = [data[:n] for data, _ in CASES.values() for n in range(0, min(len(data), 400), 7)]
    with_it = [tried(data).partition("dropped")[0] for data in cut]
    monkeypatch.setattr("pipeline.source.decoding.dropped", lambda *_, **__: ())
    assert with_it == [tried(data).partition("dropped")[0] for data in cut]


@pytest.fixture
def output(command):
    def call(*arguments: object) -> str:
        code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return call


SAID = (
    "3 images have 3 to 5 pages: only the first is used; no setting keeps the others yet",
    "3 images have 2 or more frames: only the first is used; no setting keeps the others yet",
    "1 image has 5 channels: the first 3 are used; no setting keeps the others yet",
    "2 images have 16 bits per channel: the low 8 bits are dropped; no setting keeps them yet",
)


def test_plan_run_and_status_say_it_once(output, tmp_path):
    source, store = make_images(tmp_path / "source", 2, [(40, 50)]), tmp_path / "f.zarr"
    names = {"a.tif": "a stack", "b.tif": "a stack", "c.tif": "a stack, big-endian", "d.tif": "five channels"}
    names |= {
        "e.png": "16-bit RGB PNG",
        "f.png": "16-bit L PNG",
        "g.png": "APNG",
        "h.webp": "animated WebP",
        "i.gif": "animated GIF",
    }
    for name, case in names.items():
        (source / name).write_bytes(CASES[case][0])
    counts = {"pages:5": 2, "pages:3": 1, "channels:5/3": 1, "bits:16": 2, "frames:3": 1, "frames:4": 1, "frames:2+": 1}
    said = output("plan", source, store)
    assert [said.count(line) for line in SAID] == [1] * 4
    assert json.loads(output("plan", source, store, "--json"))["dropped"] == counts
    said = output("run", source, store)
    assert [said.count(line) for line in SAID] == [1] * 4
    said = output("status", store)
    assert [said.count(line) for line in SAID] == [1] * 4
    assert json.loads(output("status", store, "--json"))["dropped"] == counts
    (source / "new.tif").write_bytes(CASES["a stack"][0])
    said = output("run", source, store)
    assert "1 image has 5 pages" in said
    assert "channels" not in said, "what an earlier run has entered was said by that"
    status = json.loads(output("status", store, "--json"))
    assert status["dropped"] == counts | {"pages:5": 3}
    assert status["last_run"]["dropped"] == {"pages:5": 1}
    assert "images have" not in output("run", source, store)
    assert json.loads(output("status", store, "--json"))["dropped"] == counts | {"pages:5": 3}


def test_a_store_of_a_version_that_did_not_count_says_nothing_of_its_images(run, output, tmp_path):
    source, store = tmp_path / "source", tmp_path / "features.zarr"
    source.mkdir()
    (source / "a.tif").write_bytes(CASES["a stack"][0])
    (path,) = (store / "runs" / f"{summary.run_id}.json" for summary in [run(source)])
    receipt = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in receipt.items() if not name.startswith("dropped")}))
    assert "pages" not in output("status", store)
    (source / "b.tif").write_bytes(CASES["a stack"][0])
    assert run(source).dropped_total == {"pages:5": 1}
    assert Store(store).last_receipt()["dropped_total"] == {"pages:5": 1}


def test_nothing_dropped_is_not_worth_a_word():
    assert describe_dropped({}) == []
