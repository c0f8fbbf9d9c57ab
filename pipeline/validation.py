"""What people write in YAML: times, sizes and lists as values, and a message that names every wrong key, with the nearest right one."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ByteSize, Field, ValidationError, ValidationInfo

from pipeline.errors import UsageError

M = TypeVar("M", bound=BaseModel)
Location = tuple[int | str, ...]

SYNONYMS = {
    # of keys: what Slurm, PBS, Grid Engine and dask-jobqueue call them
    "partition": "queue",
    "project": "account",
    "time": "walltime",
    "h-rt": "walltime",
    "mem": "memory",
    "memory-limit": "memory",
    "cores": "threads",
    "cpus": "threads",
    "cpus-per-task": "threads",
    "ncpus": "threads",
    "nthreads": "threads",
    "jobs": "workers",
    "nodes": "workers",
    "ntasks": "workers",
    "n-workers": "workers",
    "replicas": "workers",
    "gres": "gpus",
    "gpu": "gpus",
    "ngpus": "gpus",
    "env": "environment",
    "constraint": "options",
    "qos": "options",
    "reservation": "options",
    "job-extra-directives": "options",
    "job-script-prologue": "prologue",
    "modules": "prologue",
    "setup": "prologue",
    "nodelist": "hosts",
    "host": "hosts",
    "output": "log_folder",
    "log-directory": "log_folder",
    "local-directory": "local_folder",
    "scheduler": "address",
    # of kinds
    "k8s": "kubernetes",
    "torque": "pbs",
    "openpbs": "pbs",
    "gridengine": "sge",
    "condor": "htcondor",
    # of values
    "jpg": "JPEG",
    "gray": "grey",
    "grayscale": "grey",
    "greyscale": "grey",
}


def validate_model(model: type[M], values: Any, where: str, context: dict[str, Any] | None = None) -> M:
    """Validate ``values`` into ``model``.

    Parameters
    ----------
    model : type
        Of pydantic's.
    values : mapping
    where : str
        What holds the values, for the message.
    context : dict, optional
        For validators: `quantities.UNITS_NEEDED`.

    Raises
    ------
    UsageError
        Naming every unknown key, with the nearest known one, and every bad value.
    """
    try:
        return model.model_validate(values, context=context)
    except ValidationError as error:
        found = error.errors()
        deeper = {problem["loc"][:n] for problem in found for n in range(1, len(problem["loc"]))}
        # A tuple whose items were refused is also "too short", which would only distract.
        first = _without_repeats(model, [problem for problem in found if problem["loc"] not in deeper])
        problems = "; ".join(_explain(model, problem) for problem in first[:10])
        problems += f"; and {len(first) - 10} more" if len(first) > 10 else ""
        raise UsageError(f"{where} is not usable, so nothing was started: {problems}") from error


def _without_repeats(model: type[BaseModel], problems: list[Any]) -> list[Any]:
    """Leave out the missing keys that the remedy of an unknown key names; give an entry one level too high its remedy, ``below``."""
    missing = {problem["loc"]: _locate(model, problem["loc"])[1] for problem in problems if problem["type"] == "missing"}
    named: set[str] = set()
    for problem in problems:
        if problem["type"] != "extra_forbidden":
            continue
        *above, key = problem["loc"]
        meant = _meant(model, tuple(above), str(key))
        mappings = [loc[-1] for loc in missing if [*loc[:-1]] == above and get_origin(_locate(model, loc)[0]) is dict]
        if mappings and meant in ([], mappings) and _is_entry(problem["input"]):
            problem["below"], meant = mappings[0], mappings
        if len(meant) == 1:
            named |= {meant[0], ".".join(filter(None, (_locate(model, tuple(above))[1], meant[0])))}
    patterns = [re.escape(name).replace("NAME", r"[^.]+") for name in named]
    repeated = {loc for loc, where in missing.items() if any(re.fullmatch(pattern, where) for pattern in patterns)}
    return [problem for problem in problems if problem["type"] != "missing" or problem["loc"] not in repeated]


def _is_entry(value: Any) -> bool:
    """Whether a value is an entry of a mapping, not a mapping of entries: it has values that are not mappings."""
    return isinstance(value, dict) and not all(isinstance(inner, dict) for inner in value.values())


def _explain(model: type[BaseModel], problem: Any) -> str:
    """One problem of pydantic's, as value, expectation and remedy."""
    location = "" if problem["type"] == "extra_forbidden" else _locate(model, problem["loc"])[1]
    if problem["type"] == "extra_forbidden":
        *above, key = problem["loc"]
        location = ".".join(filter(None, (_locate(model, tuple(above))[1], str(key))))
        hint = f"put it below '{problem['below']}:'" if "below" in problem else _hint_of_key(model, tuple(above), str(key))
        return f"unknown key {location!r}: {hint}"
    if problem["type"] == "missing":
        return f"key {location!r} is missing: add it"
    if problem["type"] == "union_tag_not_found":
        tag = problem["ctx"]["discriminator"].strip("'")
        return f"key {f'{location}.{tag}'!r} is missing: add it"
    if problem["type"] == "union_tag_invalid":
        tags = problem["ctx"]["expected_tags"].replace("'", "")
        return f"{location}: kind {problem['ctx']['tag']!r} is none of {tags}{_hint_of_value(problem)}"
    if problem["type"] == "value_error":
        return f"{location}: {problem['ctx']['error']}"
    if problem["type"] == "model_type" and problem["loc"]:
        return _explain_no_mapping(model, problem, location)
    return f"{location or 'the whole'}: {problem['msg']}, not {reprlib.repr(problem['input'])}{_hint_of_value(problem)}"


def _explain_no_mapping(model: type[BaseModel], problem: Any, location: str) -> str:
    """A plain value where keys and values belong: often a key that is one level too high, as ``groups: {workers: 2}``."""
    *above, key = problem["loc"]
    found = []
    if get_origin(_locate(model, tuple(above))[0]) is dict:
        found = _elsewhere(model, tuple(above), {str(key), _synonym(str(key))})
    if found:
        return f"unknown key {location!r}: did you mean {' or '.join(map(repr, found))}?"
    return f"{location}: Input should be keys and values, not {reprlib.repr(problem['input'])}"


def _hint_of_key(model: type[BaseModel], above: Location, key: str) -> str:
    """The known key that was meant: beside the unknown one, or at another level."""
    found = _meant(model, above, key)
    if not found:
        return f"known keys are {', '.join(sorted(_locate(model, above)[0].model_fields))}"
    line = f"a line of {found[0]!r}, --{key}=..." if _synonym(key) == "options" != key else " or ".join(map(repr, found))
    return f"did you mean {line}?"


def _meant(model: type[BaseModel], above: Location, key: str) -> list[str]:
    """Names of keys beside an unknown one, or full paths of keys at another level, that it may stand for."""
    known, meant = sorted(_locate(model, above)[0].model_fields), _synonym(key)
    found = [meant] if meant in known else _elsewhere(model, above, {key, meant})
    return found or difflib.get_close_matches(key.lower(), known, n=1)


def _synonym(key: str) -> str:
    return SYNONYMS.get(key.lower().replace("_", "-"), key)


def _elsewhere(model: type[BaseModel], above: Location, names: set[str]) -> list[str]:
    """Full paths of the keys of these names below the nearest model around a place that has any."""
    for n in range(len(above), -1, -1):
        place, where = _locate(model, above[:n])
        paths = [".".join(filter(None, (where, path))) for path in _paths(place)]
        found = [path for path in paths if path.rpartition(".")[2] in names]
        if found:
            return found
    return []


def _paths(place: Any) -> Iterator[str]:
    """Every key of a type, at any depth, as a path; NAME and N stand for the keys of mappings and the places of lists."""
    if isinstance(place, type) and issubclass(place, BaseModel):
        for name, field in place.model_fields.items():
            yield name
            yield from (f"{name}.{path}" for path in _paths(field.annotation))
    elif NoneType in get_args(place) or get_origin(place) is Annotated:
        yield from _paths(get_args(place)[0])
    elif get_origin(place) in {dict, Mapping}:
        yield from (f"NAME.{path}" for path in _paths(get_args(place)[1]))
    elif get_origin(place) is tuple:
        yield from (f"N.{path}" for path in _paths(get_args(place)[0]))


def _hint_of_value(problem: Any) -> str:
    """The known word that was meant, or how the value has to be written."""
    context, value = problem.get("ctx", {}), problem["input"]
    words = re.findall(r"'([^']*)'", context.get("expected", context.get("expected_tags", "")))
    if words:
        return _nearest(str(context.get("tag", value)), words)
    if problem["type"] == "tuple_type":
        return ": write it as a list: [..., ...]"
    return ": put it in quotes" if problem["type"] == "string_type" and isinstance(value, int | float) else ""


def _nearest(value: str, words: Sequence[str]) -> str:
    by_lower = {word.lower(): word for word in words}
    meant = SYNONYMS.get(value.lower(), value).lower()
    near = difflib.get_close_matches(meant, by_lower, n=1)
    return f": did you mean {by_lower[near[0]]!r}?" if near else ""


def _locate(model: type[BaseModel], location: Location) -> tuple[Any, str]:
    """The type at a place inside ``model``, and the place in the file's own keys: pydantic's also has the kinds of unions."""
    place: Any = model
    shown: list[str] = []
    for part in location:
        if get_origin(place) in {Union, UnionType}:
            fields = ((member, member.model_fields.values()) for member in get_args(place))
            place = next(member for member, inner in fields if any(part in get_args(field.annotation) for field in inner))
            continue
        shown.append(str(part))
        if isinstance(place, type) and issubclass(place, BaseModel):
            place = place.model_fields[str(part)].annotation
        else:
            place = get_args(place)[1 if get_origin(place) is dict else 0]
        place = _bare(place)
    return place, ".".join(shown)


def _bare(place: Any) -> Any:
    """A type without None and annotations."""
    while get_origin(place) is Annotated or NoneType in get_args(place):
        place = get_args(place)[0]
    return place


# -- times, sizes and lists ------------------------------------------------------------------------------------------------------

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
    >>> read_seconds("8h"), read_seconds("1-00:00:00"), read_seconds("1 h 30 min"), read_seconds("2 hours")
    (28800.0, 86400.0, 5400.0, 7200.0)
    >>> read_seconds("8:00"), read_seconds("8"), read_seconds("500ms")
    (None, None, None)
    """
    text = text.strip().lower()
    if match := _CLOCK.fullmatch(text) or _DAYS.fullmatch(text):
        days, hours, *rest = (int(part or 0) for part in match.groups())
        return float(sum(n * unit for n, unit in zip((days, hours, *rest), (86400, 3600, 60, 1), strict=False)))
    parts = re.findall(_PART, text) if _SUM.fullmatch(text) else []
    units = [_UNITS.get(unit) or (_UNITS.get(unit.removesuffix("s")) if len(unit) > 2 else None) for _, unit in parts]  # no ms
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
        minutes, seconds = map(int, value.split(":"))
        as_minutes = f"{minutes}min {seconds}s" if seconds else f"{minutes}min"
        text = f"{value!r} may be hours or minutes: write {value}:00 or {as_minutes}"
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
