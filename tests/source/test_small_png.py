"""Tests of pipeline/source/small_png.py: what it decodes is what the long way decodes, and all else is left to that."""

from __future__ import annotations

import struct
import zlib
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError
from pipeline.source import decoding
from pipeline.source.decoding import decode, probe
from pipeline.source.small_png import decode_small
from tests.source.test_decoding import chunk
from tests.source.test_png import END, SIGNATURE, header, noise, raw_pixels, write

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RGB, GREY = DecodeSpec(), DecodeSpec(color="grey")
GAMMA, TIME = chunk(b"gAMA", bytes(4)), chunk(b"tIME", bytes(7))
SAMPLES = noise(9, 17, 8, 2)
PLAIN = write(SAMPLES, 8, 2)


def small(data: bytes, spec: DecodeSpec = RGB) -> np.ndarray | None:
    return decode_small(data, spec, Image)


def the_long_way(monkeypatch, function, data: bytes, spec: DecodeSpec):
    """What a file would give without the short way: its pixels, its size, or why it has none."""
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_small", lambda *_: None)
        patch.setattr(decoding, "open_small", lambda *_: None)
        return outcome(function, data, spec)


def outcome(function, data: bytes, spec: DecodeSpec):
    try:
        found = function(data, spec)
    except ImageError as error:
        return str(error)
    return (found.shape, found.tobytes()) if isinstance(found, np.ndarray) else (found, found.decode_bytes, found.dropped)


@pytest.mark.parametrize(("color", "spec"), [(0, GREY), (0, RGB), (2, RGB)])
def test_pixels_and_size_are_those_of_the_long_way(monkeypatch, color, spec):
    for (height, width), n_chunks, before in product([(1, 1), (2, 3), (5, 5), (28, 28), (70, 33)], (1, 3), ([], [GAMMA, TIME])):
        data = write(noise(height, width, 8, color), 8, color, *before, n_chunks=n_chunks)
        found = small(data, spec)
        assert found is not None
        assert not found.flags.writeable
        for given in (spec, spec.model_copy(update={"resize": (height, width)})):
            assert outcome(decode, data, given) == (found.shape, found.tobytes())
            for function in (decode, probe):
                assert outcome(function, data, given) == the_long_way(monkeypatch, function, data, given)


def of_stream(stream: bytes) -> bytes:
    return SIGNATURE + header(SAMPLES, 8, 2) + chunk(b"IDAT", stream) + END


ROWS = raw_pixels(SAMPLES, 8, interlaced=False)
UNUSUAL = {
    "palette": write(noise(5, 5, 8, 3), 8, 3, chunk(b"PLTE", bytes(768))),
    "alpha": write(noise(5, 5, 8, 6), 8, 6),
    "16 bits": write(noise(5, 5, 16, 0), 16, 0),
    "1 bit": write(noise(5, 5, 1, 0), 1, 0),
    "interlaced": write(SAMPLES, 8, 2, interlaced=True),
    "transparent": write(SAMPLES, 8, 2, chunk(b"tRNS", bytes(6))),
    "text": write(SAMPLES, 8, 2, chunk(b"tEXt", b"transparency\0yes")),
    "exif": write(SAMPLES, 8, 2, chunk(b"eXIf", b"MM\0*")),
    "animation": write(SAMPLES, 8, 2, chunk(b"acTL", bytes(8))),
    "gamma of another length": write(SAMPLES, 8, 2, chunk(b"gAMA", bytes(5))),
    "large": write(noise(150, 150, 8, 2), 8, 2),
    "large file": PLAIN + bytes(1 << 18),
    "no pixels": SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 5, 8, 0, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")),
    "a row less": of_stream(zlib.compress(ROWS[:-52])),
    "a byte more": of_stream(zlib.compress(ROWS + b"\0")),
    "a filter that there is not": of_stream(zlib.compress(b"\5" + ROWS[1:])),
    "wrong sum of the stream": of_stream(zlib.compress(ROWS)[:-1] + b"\0"),
    "no sum of the stream": of_stream(zlib.compress(ROWS)[:-4]),
    "bytes behind the stream": of_stream(zlib.compress(ROWS) + b"\0"),
    "no stream": of_stream(b"no stream"),
    "wrong sum of a chunk": PLAIN[:-13] + b"\0" + END,
    "cut": PLAIN[: -len(END) - 2],
    "jpeg": b"\xff\xd8\xff",
    "empty": b"",
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_the_long_way(monkeypatch, name):
    data = UNUSUAL[name]
    assert small(data) is None
    for function in (decode, probe):
        assert outcome(function, data, RGB) == the_long_way(monkeypatch, function, data, RGB)


@pytest.mark.parametrize(
    "spec",
    [
        GREY,
        RGB.model_copy(update={"resize": (5, 7)}),
        RGB.model_copy(update={"pixel_limit": 152}),
        RGB.model_copy(update={"formats": ("JPEG",)}),
    ],
    ids=["grey of colour", "resize", "limit", "formats"],
)
def test_what_a_job_wants_otherwise_is_left_to_the_long_way(monkeypatch, spec):
    assert small(PLAIN, spec) is None
    for function in (decode, probe):
        assert outcome(function, PLAIN, spec) == the_long_way(monkeypatch, function, PLAIN, spec)


def test_a_flipped_bit_gives_what_the_long_way_gives(monkeypatch):
    data = write(noise(4, 5, 8, 0), 8, 0, GAMMA)
    for place, bit in product(range(len(data)), range(8)):
        flipped = data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
        for function in (decode, probe):
            assert outcome(function, flipped, RGB) == the_long_way(monkeypatch, function, flipped, RGB), (place, bit)


def test_another_pillow_is_left_to_the_long_way():
    assert decode_small(PLAIN, RGB, SimpleNamespace()) is None


def test_a_decoder_that_finds_no_end_is_not_believed():
    class Decoder:
        def setimage(self, *_):
            pass

        def decode(self, data):
            return len(data), 0

    core = SimpleNamespace(new=Image.core.new, zip_decoder=lambda *_: Decoder(), raw_encoder=Image.core.raw_encoder)
    assert decode_small(PLAIN, RGB, SimpleNamespace(core=core)) is None


def test_a_memory_error_passes():
    def new(*_):
        raise MemoryError

    with pytest.raises(MemoryError):
        decode_small(PLAIN, RGB, SimpleNamespace(core=SimpleNamespace(new=new)))
