"""Whether a JPEG is whole and sound: by what libjpeg warns of, not by its last two bytes."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from pipeline.errors import ImageError

_END = b"\xff\xd9"
# What is not a stuffed byte, a fill byte or a restart; begun once per run of fill bytes, of which there may be millions.
_END_OF_DATA = re.compile(rb"(?<!\xff)\xff++[^\x00\xd0-\xd7]")
_MARKER = re.compile(rb"\xff[\xc0-\xfe]")
_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_QUANTISERS, _CODES = 0xDB, 0xC4
_PROVEN = {0xC0, 0xC1, 0xC2}  # with Huffman codes: libjpeg does not warn where arithmetic codes end early
_ALL = (1 << 64) - 1  # a bit for each coefficient of a block
# Where `struct jpeg_error_mgr` holds the number of its last message and the count of warnings, on 64 bits.
_MESSAGE_BYTES, _WARNINGS_BYTES = 40, 128
_CONTEXT_BYTES = 2048
_HOLE = bytes(64)  # more than two blocks of the shortest codes that are no end of a block
_MORE = bytes(16)  # so much libjpeg may read ahead
_DOT = (  # a grey square of 8 x 8 pixels, in parts: garbage between them is worth one warning each
    b"\xff\xd8\xff\xdb\0\x43\0" + b"\1" * 64,
    bytes.fromhex(
        "ffc0000b080008000801011100ffc40014000100000000000000000000000000000005ffc40014100100000000000000000000000000000000"
    ),
    bytes.fromhex("ffda0008010100003f00"),
    bytes.fromhex("15"),
)


def check_scans(data: bytes) -> None:
    """Refuse a JPEG whose scans do not send every coefficient of every colour down to its last bit."""
    missing: dict[int, int] = {}  # by colour, a bit for each coefficient
    lowest: dict[tuple[int, int], int] = {}  # bit so far, by colour and coefficient: the next scan must go on from it
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
    """Kind (of its segment) and number of each table in a segment, which is refused where it breaks the rules of ITU-T T.81."""
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
    """A sequential JPEG without the zeros that fill its data up to the end marker: they are padding, or what never came.

    libjpeg takes zeros for blocks. If those were needed, they are missing now. If they were padding, nothing changes.

    Raises
    ------
    ImageError
        ``corrupt``: zeros go on within the data, and no codes of its tables are zeros that go on.
    """
    if _HOLE not in data:
        return data
    place, ends = 2, set()  # symbols whose code is all zeros; that of a block's end may go on
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
            hole += data[hole - 1 : hole] == b"\xff"  # whose zero only says that it is no marker
            return data[:hole] + data[stop.start() :]
    return data


def _first_symbols(content: bytes) -> set[int]:
    """What the code of zeros means in each table for the coefficients after the first."""
    symbols, place = set(), 0
    while place + 17 < len(content):
        if content[place] >> 4:
            symbols.add(content[place + 17])
        place += 17 + sum(content[place + 1 : place + 17])
    return symbols


def load_jpeg(image: Any, data: bytes, pillow: Any) -> None:
    """Give ``image``, an open JPEG of Pillow, its pixels, if all of them come from its data.

    Parameters
    ----------
    image : PIL.JpegImagePlugin.JpegImageFile
        Opened, not loaded.
    data : bytes
        The whole file.
    pillow : module
        ``PIL.Image``, which has no home here.

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
    """Offsets in bytes from a decoder of Pillow to libjpeg's count of warnings, and what libjpeg says at an end marker."""

    context: int
    errors: int
    end_message: int


def counts_warnings(pillow: Any) -> bool:
    """Whether libjpeg's warnings can be seen here; ``pillow`` is the module ``PIL.Image``."""
    return _layout(pillow) is not None


class _Trial:
    """One image, decoded from changed data until it is clear what is wrong with them."""

    def __init__(self, image: Any, pillow: Any) -> None:
        self.image, self.pillow = image, pillow
        self.tile = image.tile[0]

    def decode(self, data: bytes) -> tuple[int, int, int, bool]:
        """Bytes taken (-1 at the end), Pillow's error, libjpeg's warnings, and whether it met the end marker."""
        self.image.load_prepare()
        decoder = self.pillow._getdecoder(self.image.mode, self.tile[0], self.tile[3], self.image.decoderconfig)
        try:
            decoder.setimage(self.image.im, self.tile[1])
            n, error = decoder.decode(data)
            return n, error, *_warnings(decoder, _layout(self.pillow))
        finally:
            decoder.cleanup()

    def is_clean(self, data: bytes, n_allowed: int = 0) -> bool:
        """Whether the image came whole, and libjpeg warned of no more than that."""
        n, error, n_found, is_sealed = self.decode(data)
        return n < 0 and error >= 0 and n_found <= n_allowed and is_sealed

    def is_enough(self, data: bytes) -> bool:
        """Whether libjpeg has all blocks without more than 16 further bytes: it then ends, or looks for a marker."""
        n = self.decode(data + _MORE)[0]
        return n == (len(data) + len(_MORE) if "progressive" in self.image.info else -1)

    def place_of_end(self, data: bytes, start: int, step: int) -> int:
        """How many bytes libjpeg takes until it has all blocks, found by feeding it what follows ``start`` in steps."""
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
    """Say what is wrong with a JPEG that libjpeg warned of, refused or wanted more of."""
    first, start, end = _scans(data)
    picture = data[:end]
    n_before = trial.decode(data[:first])[2]  # of the header alone: a warning of any scan is damage
    n, error, n_found, _ = trial.decode(picture + _END)
    if error < 0:
        raise ImageError("corrupt", "the image cannot be decoded (broken data stream)")
    is_sealed = data[end : end + 2] == _END
    if n < 0 and n_found <= n_before and (is_sealed or not _is_filled(data, end)):
        return True  # only its end marker was missing, or what follows it is odd
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
    """Refuse a JPEG whose pixels change with what is put behind its data: three times the work, where warnings are not seen."""
    found = trial.image.tobytes()
    picture = data[: _scans(data)[2]]
    for fill in (b"\x55" * 96, b"\x6d\xb6\xdb" * 32, b"\x23\x91" * 48):
        trial.decode(picture + fill + _END)
        if trial.image.tobytes() != found:
            raise ImageError("truncated", "the file ends before the image does (blocks of the picture are missing)")


def _has_film(trial: _Trial, picture: bytes, start: int, n_before: int) -> bool:
    """Whether some beginning of the data is exactly the picture; what follows it is then no part of it."""
    rough = trial.place_of_end(picture, start, 1024)
    end = trial.place_of_end(picture, max(start, rough - 1024), 1)
    places = (place for place in range(end, max(start, end - 10), -1) if not _is_filled(picture, place))
    return any(trial.is_clean(picture[:place] + _END, n_before) for place in places)


def _is_filled(data: bytes, end: int) -> bool:
    """Whether a picture ends in zeros that go on, which libjpeg takes for blocks: what was to be there never came."""
    return (
        data[end - 1 : end] == b"\0"
        and data[end - 2 : end] != b"\xff\0"
        and b"\0" in (data[end - 2 : end - 1], data[end : end + 1])
    )


def _scans(data: bytes) -> tuple[int, int, int]:
    """Where the data of the first scan and of the last begin, and where the last end: at a marker, or with the file."""
    place, first, start, end = 2, len(data), len(data), len(data)
    n_colours, is_progressive = 0, False
    while (found := _MARKER.search(data, place)) and found[0] != _END:
        kind, place = found[0][1], found.end()
        if 0xD0 <= kind <= 0xD8:
            continue
        place += int.from_bytes(data[place : place + 2], "big")
        if kind in _FRAMES:
            if n_colours:
                break  # of another picture
            n_colours, is_progressive = data[found.end() + 7], kind & 3 == 2
        elif kind == 0xDA:
            first, start = min(first, place), place
            stop = _END_OF_DATA.search(data, start)
            place = end = stop.start() if stop else len(data)
            if not is_progressive and data[found.end() + 2] == n_colours:
                break
    return first, min(start, len(data)), end


def _warnings(decoder: Any, layout: _Layout | None) -> tuple[int, bool]:
    """How often libjpeg warned this decoder of Pillow, which does not tell, and whether it met the end marker."""
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
    """Where a decoder of Pillow points to its context, and that to libjpeg's own count of warnings.

    Both are found by trying small files for which libjpeg has 0 to 3 warnings, so a change of Pillow's structures is found
    out. An address that is none of the process is an error of ``pread``, never a fault.
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
