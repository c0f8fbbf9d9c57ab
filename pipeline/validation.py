"""Plain values to a pydantic model, or a message that names every key and value that is wrong, with the nearest right one."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

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
        first = [problem for problem in found if problem["loc"] not in deeper]
        problems = "; ".join(_explain(model, problem) for problem in first[:10])
        problems += f"; and {len(first) - 10} more" if len(first) > 10 else ""
        raise UsageError(f"{where} is not usable, so nothing was started: {problems}") from error


def _explain(model: type[BaseModel], problem: Any) -> str:
    """One problem of pydantic's, as value, expectation and remedy."""
    if problem["type"] == "extra_forbidden":
        *above, key = problem["loc"]
        where = _locate(model, tuple(above))[1]
        return f"unknown key {'.'.join(filter(None, (where, str(key))))!r}: {_hint_of_key(model, tuple(above), str(key))}"
    location = _locate(model, problem["loc"])[1]
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
    return f"{location or 'the whole'}: {problem['msg']}, not {reprlib.repr(problem['input'])}{_hint_of_value(problem)}"


def _hint_of_key(model: type[BaseModel], above: Location, key: str) -> str:
    """The known key that was meant: beside the unknown one, or at another level."""
    known = sorted(_locate(model, above)[0].model_fields)
    meant = SYNONYMS.get(key.lower().replace("_", "-"), key)
    found = [meant] if meant in known else _elsewhere(model, above, {key, meant})
    found = found or difflib.get_close_matches(key.lower(), known, n=1)
    if not found:
        return f"known keys are {', '.join(known)}"
    line = f"a line of {found[0]!r}, --{key}=..." if meant == "options" != key else " or ".join(map(repr, found))
    return f"did you mean {line}?"


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
        while get_origin(place) is Annotated or NoneType in get_args(place):
            place = get_args(place)[0]
        if get_origin(place) in {Union, UnionType}:
            fields = ((member, member.model_fields.values()) for member in get_args(place))
            place = next(member for member, inner in fields if any(part in get_args(field.annotation) for field in inner))
            continue
        shown.append(str(part))
        if isinstance(place, type) and issubclass(place, BaseModel):
            place = place.model_fields[str(part)].annotation
        else:
            place = get_args(place)[1 if get_origin(place) is dict else 0]
    return place, ".".join(shown)
