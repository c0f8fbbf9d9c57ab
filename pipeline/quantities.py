"""Times, sizes and lists as people write them in YAML, for the fields of pydantic models."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, ByteSize, Field, ValidationInfo

UNITS_NEEDED = {"units": True}
"""Context of a validation that refuses a number without a unit where the key does not name one, as in ``cluster.yaml``."""

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)")
_DAYS = re.compile(r"(\d+)-(\d+)(?::([0-5]?\d))?")  # as Slurm has it: days-hours, days-hours:minutes
_UNITS = {"s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hour": 3600, "d": 86400, "day": 86400}
_PART = r"(\d+(?:\.\d+)?)\s*([a-z]+)"
_SUM = re.compile(rf"{_PART}(?:\s*{_PART})*")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)(b?)", re.IGNORECASE)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")


def read_seconds(text: str) -> float | None:
    """Seconds of a text such as ``8h``, ``1 h 30 min``, ``HH:MM:SS``, ``D-HH:MM:SS`` or Slurm's ``D-HH``; None where it is none.

    Examples
    --------
    >>> read_seconds("8h"), read_seconds("1-00:00:00"), read_seconds("1 h 30 min"), read_seconds("8:00"), read_seconds("8")
    (28800.0, 86400.0, 5400.0, None, None)
    """
    text = text.strip().lower()
    if match := _CLOCK.fullmatch(text) or _DAYS.fullmatch(text):
        days, hours, *rest = (int(part or 0) for part in match.groups())
        return float(sum(n * unit for n, unit in zip((days, hours, *rest), (86400, 3600, 60, 1), strict=False)))
    parts = re.findall(_PART, text) if _SUM.fullmatch(text) else []
    units = [_UNITS.get(unit) or _UNITS.get(unit.removesuffix("s")) for _, unit in parts]
    return sum(float(n) * unit for (n, _), unit in zip(parts, units, strict=True) if unit) if parts and all(units) else None


def read_size(text: str) -> int | None:
    """Bytes of a text such as ``4GB``, ``4 GiB`` or ``4G``, which is 4 GB; None where it is none, or has no unit.

    Examples
    --------
    >>> read_size("4GB"), read_size("4 GiB"), read_size("1.5Gi"), read_size("17 B"), read_size("4096")
    (4000000000, 4294967296, 1610612736, 17, None)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not (match[2] or match[4]) or (match[3] and not match[2]):
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** (" kmgtp".index(match[2].lower()) if match[2] else 0))


def _seconds(value: Any, info: ValidationInfo) -> Any:
    """A time with its unit in seconds; plain numbers are seconds, unless units are needed."""
    found = read_seconds(value) if isinstance(value, str) else None
    if found is not None:
        return found
    if _is_plain(value) and _may_be_plain(info):
        return value
    if _is_plain(value):
        text = f"{value} has no unit, and batch systems disagree on it: write {value}s, {value}min, {value}h or HH:MM:SS"
    elif isinstance(value, str) and re.fullmatch(r"\d+:\d+", value):
        text = f"{value!r} may be hours or minutes: write {value}:00, or for instance 8min"
    else:
        text = f"{value!r} is no time: write for instance 8h, 90min, 08:00:00 or 1-00:00:00"
    raise ValueError(text)


def _bytes(value: Any, info: ValidationInfo) -> Any:
    """A size with its unit in bytes; plain numbers are bytes, unless units are needed."""
    found = read_size(value) if isinstance(value, str) else None
    if found is not None:
        return found
    if _is_plain(value) and _may_be_plain(info):
        return value
    if _is_plain(value):
        raise ValueError(f"{value} has no unit: write {value} MiB, {value} GiB or {value} B, whichever is meant")
    raise ValueError(f"{value!r} is no size: write for instance 16 GiB or 4GB")


def _may_be_plain(info: ValidationInfo) -> bool:
    """Whether a number says enough: to a program, or behind a key that names the unit."""
    return not info.context or (info.field_name or "").endswith(("_s", "_bytes"))


def _is_plain(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number or (isinstance(value, str) and bool(_NUMBER.fullmatch(value.strip())))


def _words(value: Any) -> Any:
    """A list of words, which may be one word, or a text of some with commas or spaces between them; one mapping is a list of one."""
    if isinstance(value, str):
        return [word for word in re.split(r"[,\s]+", value) if word]
    return [value] if isinstance(value, dict) else value


def _lines(value: Any) -> Any:
    """A list of lines, which may be one line, or a text of several."""
    return [line for line in value.splitlines() if line.strip()] if isinstance(value, str) else value


def _text(value: Any) -> Any:
    """A text, for which a whole number may stand, as YAML reads an account 1234; a float may have lost a zero."""
    if isinstance(value, bool | float):
        raise ValueError(f"{value!r} is what YAML makes of a text without quotes: put it in quotes")  # noqa: TRY004 (pydantic's)
    return str(value) if isinstance(value, int) else value


def _variables(value: Any) -> Any:
    """Names and values, which may also be a list of NAME=VALUE."""
    if isinstance(value, list) and all(isinstance(item, str) and "=" in item for item in value):
        return dict(item.split("=", 1) for item in value)
    return value


WORDS, LINES = BeforeValidator(_words), BeforeValidator(_lines)
"""For a list of words, or of lines, that may also be written as one text."""
SECONDS, BYTES = BeforeValidator(_seconds), BeforeValidator(_bytes)
"""For a number that may also be written with a unit."""
Word = Annotated[str, BeforeValidator(_text)]
"""A text for which a whole number may stand."""
Variables = Annotated[dict[str, Word], BeforeValidator(_variables)]
"""Environment variables."""
Memory = Annotated[ByteSize, BYTES, Field(gt=0)]
"""Bytes, or text such as ``16 GiB``."""
Walltime = Annotated[int, SECONDS, Field(gt=0)]
"""Seconds, or text such as ``8h``, ``HH:MM:SS`` or ``D-HH:MM:SS``."""
