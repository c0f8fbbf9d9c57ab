"""Tells whether a JPEG is whole and sound, by libjpeg's warnings, not by its last two bytes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from pipeline.errors import ImageError

_END = b"\xff\xd9"
# Neither a stuffed byte, a fill byte nor a restart. A run of fill bytes, of which there may be millions, is tried only once.
_END_OF_DATA = re.compile(rb"(?<!\xff)\xff++[^\x00\xd0-\xd7]")
_MARKER = re.compile(rb"\xff[\xc0-\xfe]")
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_QUANTISERS, _CODES = 0xDB, 0xC4
_PROVEN = {0xC0, 0xC1, 0xC2}  # with Huffman codes: for arithmetic codes, libjpeg does not warn when data end early
_ALL = (1 << 64) - 1  # one bit for each coefficient of a block
# Offsets in `struct jpeg_error_mgr`, on 64 bits, of the number of its last message and of its count of warnings.
_MESSAGE_BYTES, _WARNINGS_BYTES = 40, 128
_CONTEXT_BYTES = 2048
_HOLE = bytes(64)  # longer than two blocks of the shortest codes that do not end a block
_MORE = bytes(16)  # libjpeg may read this far ahead
_DOT = (  # a grey square of 8 x 8 pixels, in parts: garbage between them is worth one warning each
    b"\xff\xd8\xff\xdb\0\x43\0" + b"\1" * 64,
    bytes.fromhex(
        "ffc0000b080008000801011100ffc40014000100000000000000000000000000000005ffc40014100100000000000000000000000000000000"
    ),
    bytes.fromhex("ffda0008010100003f00"),
    bytes.fromhex("15"),
)


def check_scans(data: bytes) -> None:
    """Refuse a JPEG unless its scans send every coefficient of every colour, down to the last bit."""
    missing: dict[int, int] = {}  # colour -> a bit for each missing coefficient
    lowest: dict[tuple[int, int], int] = {}  # (colour, coefficient) -> lowest bit so far: the next scan must continue from it
    place, is_progressive = 2, False
    while (found := _MARKER.search(data, place)) and found[0] != _END:
        kind, start = found[0][1], found.end()
        place = start if 0xD0 <= kind <= 0xD8 else start + int.from_bytes(data[start : start + 2], "big")
        if place > len(data):
            break
        if kind in {_QUANTISERS, _CODES}:
            tables_of(kind, data[start + 2 : place])
        elif kind in _FRAMES and not missing:
            if kind not in _PROVEN:
                text = (
                    f"a JPEG of frame kind {kind - 0xC0} (arithmetic codes or lossless), where nothing shows that all blocks came"
                )
                raise ImageError("unsupported_mode", f"{text}; convert it with jpegtran, or to PNG")
            is_progressive = kind & 3 == 2
            missing = dict.fromkeys(data[start + 8 : start + 8 + 3 * data[start + 7] : 3], _ALL)
        elif kind == 0xDA and missing:
            n = data[start + 2]
            first, last, bits = data[start + 3 + 2 * n : start + 6 + 2 * n]
            band = range(first, last + 1)
            sent = sum(1 << index for index in band) if is_progressive else _ALL
            for colour in data[start + 3 : start + 3 + 2 * n : 2]:
                known = missing.get(colour, 0)
                missing[colour] = known | sent if is_progressive and bits & 15 else known & ~sent
                if not is_progressive:
                    continue
                if any(lowest.get((colour, index), 0) != bits >> 4 for index in band):
                    raise ImageError("truncated", "a scan of its pixels is missing, which a later one goes on from")
                lowest.update(((colour, index), bits & 15) for index in band)
            if not is_progressive and not any(missing.values()):
                return
    if not missing or any(missing.values()):
        raise ImageError("truncated", "the file ends before the image does (not all scans of its pixels are there)")


@lru_cache(64)  # most files share a few tables
def tables_of(kind: int, content: bytes) -> set[tuple[int, int]]:
    """Kind (of its segment) and number of each table in a segment. Refuse a segment that breaks the rules of ITU-T T.81."""
    names, place = set(), 0
    while kind in {_QUANTISERS, _CODES} and place < len(content):
        names.add((kind, content[place]))
        if kind == _QUANTISERS:
            n_bytes = 1 + (content[place] >> 4 > 0)
            values = content[place + 1 : place + 1 + 64 * n_bytes]
            is_sound = len(values) == 64 * n_bytes and all(values if n_bytes == 1 else map(max, values[::2], values[1::2]))
            place += 1 + 64 * n_bytes
        else:
            n_codes = sum(content[place + 1 : place + 17])
            symbols = content[place + 17 : place + 17 + n_codes]
            is_sound = len(set(symbols)) == n_codes
            place += 17 + n_codes
        if not is_sound or place > len(content):
            what = "quantisers" if kind == _QUANTISERS else "codes"
            raise ImageError("corrupt", f"the image cannot be decoded (a table of its {what} is damaged)")
    return names


def without_filling(data: bytes) -> bytes:
    """Return a sequential JPEG without the zeros that fill its data up to the end marker.

    They are padding, or stand for data that never came, which libjpeg would take for blocks. If they were needed, data are missing
    after this. If they were padding, nothing changes.

    Raises
    ------
    ImageError
        ``corrupt``: there is a run of zeros within the data that its code tables cannot produce.
    """
    if _HOLE not in data:
        return data
    place, ends = 2, set()  # symbols whose code is all zeros; the end of a block may repeat
    while (found := _MARKER.search(data, place)) and found[0] != _END:
        kind, start = found[0][1], found.end()
        place = start if 0xD0 <= kind <= 0xD8 else start + int.from_bytes(data[start : start + 2], "big")
        if kind in _FRAMES and kind & 3 == 2:
            break
        if kind == _CODES:
            ends |= _first_symbols(data[start + 2 : place])
        elif kind == 0xDA and ends - {0}:
            hole = data.find(_HOLE, place)
            stop = _END_OF_DATA.search(data, place) if hole >= 0 else None
            if stop is None or hole > stop.start():
                break
            if data[hole : stop.start()].strip(b"\0") or stop[0] != _END:
                raise ImageError("corrupt", "the image cannot be decoded (zeros within its data are no blocks)")
            hole += data[hole - 1 : hole] == b"\xff"  # its zero only says that it is not a marker
            return data[:hole] + data[stop.start() :]
    return data


def _first_symbols(content: bytes) -> set[int]:
    """For each table, what a code of zeros means for the coefficients after the first."""
    symbols, place = set(), 0
    while place + 17 < len(content):
        if content[place] >> 4:
            symbols.add(content[place + 17])
        place += 17 + sum(content[place + 1 : place + 17])
    return symbols


def load_jpeg(image: Any, data: bytes, pillow: Any) -> None:
    """Load the pixels of ``image``, an open JPEG of Pillow, if all of them come from its data.

    Parameters
    ----------
    image : PIL.JpegImagePlugin.JpegImageFile
        Opened, not loaded.
    data : bytes
        The whole file.
    pillow : module
        ``PIL.Image``, which this module must not import.

    Raises
    ------
    ImageError
        ``truncated``: blocks or scans are missing. ``corrupt``: libjpeg finds the data damaged.
    """
    trial = _Trial(image, pillow)
    if trial.is_clean(data) or _is_whole(trial, data):
        image.tile = []
    if not counts_warnings(pillow):
        _check_by_filling(trial, data)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Byte offsets from a decoder of Pillow to libjpeg's count of warnings, and the number of its message about an end marker."""

    context: int
    errors: int
    end_message: int


def counts_warnings(pillow: Any) -> bool:
    """Whether libjpeg's warnings are accessible here; ``pillow`` is the module ``PIL.Image``."""
    return _layout(pillow) is not None


class _Trial:
    """One image, decoded from modified data until it is clear what is wrong with it."""

    def __init__(self, image: Any, pillow: Any) -> None:
        self.image, self.pillow = image, pillow
        self.tile = image.tile[0]

    def decode(self, data: bytes) -> tuple[int, int, int, bool]:
        """Bytes consumed (-1 at the end), Pillow's error, number of libjpeg's warnings, and whether it met the end marker."""
        self.image.load_prepare()
        decoder = self.pillow._getdecoder(self.image.mode, self.tile[0], self.tile[3], self.image.decoderconfig)
        try:
            decoder.setimage(self.image.im, self.tile[1])
            n, error = decoder.decode(data)
            return n, error, *_warnings(decoder, _layout(self.pillow))
        finally:
            decoder.cleanup()

    def is_clean(self, data: bytes, n_allowed: int = 0) -> bool:
        """Whether the image is complete, with at most ``n_allowed`` warnings of libjpeg."""
        n, error, n_found, is_sealed = self.decode(data)
        return n < 0 and error >= 0 and n_found <= n_allowed and is_sealed

    def is_enough(self, data: bytes) -> bool:
        """Whether libjpeg has all blocks with no more than 16 further bytes: then it ends, or looks for a marker."""
        n = self.decode(data + _MORE)[0]
        return n == (len(data) + len(_MORE) if "progressive" in self.image.info else -1)

    def place_of_end(self, data: bytes, start: int, step: int) -> int:
        """How many bytes libjpeg reads until it has all blocks; found by feeding it the data after ``start`` in steps."""
        self.image.load_prepare()
        decoder = self.pillow._getdecoder(self.image.mode, self.tile[0], self.tile[3], self.image.decoderconfig)
        decoder.setimage(self.image.im, self.tile[1])
        rest, place = data[:start], start
        try:
            while (n := decoder.decode(rest)[0]) >= 0 and place < len(data):
                rest = rest[n:] + data[place : place + step]
                place = min(place + step, len(data))
        finally:
            decoder.cleanup()
        return place


def _is_whole(trial: _Trial, data: bytes) -> bool:
    """Find out what is wrong with a JPEG for which libjpeg warned, failed or asked for more data; return whether it is whole."""
    first, start, end = _scans(data)
    picture = data[:end]
    n_before = trial.decode(data[:first])[2]  # of the header alone: any warning about a scan means damage
    n, error, n_found, _ = trial.decode(picture + _END)
    if error < 0:
        raise ImageError("corrupt", "the image cannot be decoded (broken data stream)")
    is_sealed = data[end : end + 2] == _END
    if n < 0 and n_found <= n_before and (is_sealed or not _is_filled(data, end)):
        return True  # only the end marker was missing, or odd bytes follow it
    if not trial.is_enough(picture):
        raise ImageError("truncated", "the file ends before the image does (blocks of the picture are missing)")
    tight = picture.rstrip(b"\0")
    tight += b"\0" * tight.endswith(b"\xff")
    if trial.is_clean(tight + _END, n_before):
        return True
    if not is_sealed and "progressive" not in trial.image.info and _has_film(trial, picture, start, n_before):
        return True
    raise ImageError("corrupt", "the image cannot be decoded (libjpeg finds its data damaged)")


def _check_by_filling(trial: _Trial, data: bytes) -> None:
    """Refuse a JPEG whose pixels depend on what is put after its data; takes three times the work, without access to warnings."""
    found = trial.image.tobytes()
    picture = data[: _scans(data)[2]]
    for fill in (b"\x55" * 96, b"\x6d\xb6\xdb" * 32, b"\x23\x91" * 48):
        trial.decode(picture + fill + _END)
        if trial.image.tobytes() != found:
            raise ImageError("truncated", "the file ends before the image does (blocks of the picture are missing)")


def _has_film(trial: _Trial, picture: bytes, start: int, n_before: int) -> bool:
    """Whether some first part of the data is exactly the picture; then what follows does not belong to it."""
    rough = trial.place_of_end(picture, start, 1024)
    end = trial.place_of_end(picture, max(start, rough - 1024), 1)
    places = (place for place in range(end, max(start, end - 10), -1) if not _is_filled(picture, place))
    return any(trial.is_clean(picture[:place] + _END, n_before) for place in places)


def _is_filled(data: bytes, end: int) -> bool:
    """Whether a picture ends in a run of zeros, which libjpeg takes for blocks: the real data never came."""
    return (
        data[end - 1 : end] == b"\0"
        and data[end - 2 : end] != b"\xff\0"
        and b"\0" in (data[end - 2 : end - 1], data[end : end + 1])
    )


def _scans(data: bytes) -> tuple[int, int, int]:
    """Start of the first scan's data and of the last one's, and the end of the last: at a marker, or at the end of the file."""
    place, first, start, end = 2, len(data), len(data), len(data)
    n_colours, is_progressive = 0, False
    while (found := _MARKER.search(data, place)) and found[0] != _END:
        kind, place = found[0][1], found.end()
        if 0xD0 <= kind <= 0xD8:
            continue
        place += int.from_bytes(data[place : place + 2], "big")
        if kind in _FRAMES:
            if n_colours:
                break  # the marker of another picture
            n_colours, is_progressive = data[found.end() + 7], kind & 3 == 2
        elif kind == 0xDA:
            first, start = min(first, place), place
            stop = _END_OF_DATA.search(data, start)
            place = end = stop.start() if stop else len(data)
            if not is_progressive and data[found.end() + 2] == n_colours:
                break
    return first, min(start, len(data)), end


def _warnings(decoder: Any, layout: _Layout | None) -> tuple[int, bool]:
    """Number of libjpeg's warnings for this decoder of Pillow, which does not tell, and whether it met the end marker."""
    if layout is None:
        return 0, True
    memory = _memory()
    errors = _word(memory, _word(memory, id(decoder) + layout.context) + layout.errors)
    message = _word(memory, errors + _MESSAGE_BYTES) & 0xFFFFFFFF
    return _word(memory, errors + _WARNINGS_BYTES), message == layout.end_message


@cache
def _memory() -> int:
    return os.open("/proc/self/mem", os.O_RDONLY | os.O_CLOEXEC)


def _word(memory: int, place: int) -> int:
    return int.from_bytes(os.pread(memory, 8, place), "little")


@cache
def _layout(pillow: Any) -> _Layout | None:
    """Find where a decoder of Pillow points to its context, and the context to libjpeg's count of warnings.

    It tries small files for which libjpeg has 0 to 3 warnings, so it notices if Pillow's structures change. An address outside the
    process is an error of ``pread``, never a crash.
    """
    tables, frame, scan, block = _DOT
    samples = (
        tables + frame + scan + block + _END,
        tables + frame + scan + _END,
        tables + b"abc" + frame + scan + _END,
        tables + b"abc" + frame + b"abc" + scan + _END,
    )
    try:
        found = [_places(pillow, data, n) for n, data in enumerate(samples)]
    except (AttributeError, OSError, TypeError):
        return None
    common = set.intersection(*found)
    return _Layout(*common.pop()) if len(common) == 1 else None


def _places(pillow: Any, data: bytes, n_expected: int) -> set[tuple[int, int, int]]:
    """Every pair of offsets that leads to a count of ``n_expected``, with the last message."""
    decoder = pillow._getdecoder("L", "jpeg", ("L", ""), ())
    image = pillow.core.new("L", (8, 8))
    decoder.setimage(image, (0, 0, 8, 8))
    decoder.decode(data)
    memory, found = _memory(), set()
    for outer in range(16, decoder.__sizeof__() - 7, 8):
        context = _word(memory, id(decoder) + outer)
        try:
            block = os.pread(memory, _CONTEXT_BYTES, context)
        except (OSError, OverflowError):
            continue
        for inner in range(0, len(block) - 7, 8):
            errors = int.from_bytes(block[inner : inner + 8], "little") - context
            if 0 <= errors < _CONTEXT_BYTES and _word(memory, context + errors + _WARNINGS_BYTES) == n_expected:
                found.add((outer, inner, _word(memory, context + errors + _MESSAGE_BYTES) & 0xFFFFFFFF))
    decoder.cleanup()
    return found


os.register_at_fork(after_in_child=_memory.cache_clear)  # the file is the memory of the process that opened it
