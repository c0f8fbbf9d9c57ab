"""Makes command-line options from the model of a job: each field of `Job`, or of a model inside it, has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin

import click
from pydantic import BaseModel

from pipeline.config import Job

_METAVARS = {  # where the type does not show what to write
    "background": "RED GREEN BLUE",
    "cluster": "NAME",
    "exclude": "PATTERN",
    "layers": "FxHxW[:ACT][:poolN]",
    "max_removed": "SHARE",
    "outputs": "NAME",
    "resize": "HEIGHT WIDTH",
    "weights": "FILE.safetensors",
}
_UNITS = {"_bytes": ("MIB", 2**20), "_s": ("SECONDS", 1)}
"""Suffix of a field: unit of its option, and how many of the field's own unit that is."""


class JobField(NamedTuple):
    """A field of a job that has an option."""

    path: tuple[str, ...]
    """Keys that lead to the field in a job file."""
    kind: Any
    """Its type, without None."""
    default: Any
    help: str

    @property
    def unit(self) -> tuple[str, str, int]:
        """Suffix of its name, metavar and factor of its unit; without a unit, the suffix is empty."""
        name = self.path[-1]
        found = ((suffix, *unit) for suffix, unit in _UNITS.items() if name.endswith(suffix))
        return next(found, ("", _METAVARS.get(name, "N" if self.kind is int else ""), 1))


def job_fields(model: type[BaseModel] = Job, path: tuple[str, ...] = ()) -> Iterator[JobField]:
    """All fields with a default, including those of inner models; fields without one are arguments."""
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        if NoneType in get_args(kind):
            kind = get_args(kind)[0]
        while hasattr(kind, "__metadata__"):
            kind = kind.__origin__
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from job_fields(kind, (*path, name))
        elif not field.is_required():
            yield JobField((*path, name), kind, field.default, field.description or "")


def job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option to a command for each field of a job; an option that is not given is None or an empty tuple."""
    for field in reversed(list(job_fields())):
        command = _option(field)(command)
    return command


def _option(field: JobField) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    suffix, metavar, _ = field.unit
    name = field.path[-1]
    words = name.removesuffix(suffix).replace("_", "-")
    parts = get_args(field.kind)
    settings: dict[str, Any] = {"help": field.help, "default": None, "metavar": metavar or None}
    if field.kind is bool:
        words += f"/--no-{words}" if field.default else ""
        settings |= {"is_flag": True}
    elif get_origin(field.kind) is not tuple:
        settings |= {"type": _plain(field.kind)}
    elif parts[1:] == (...,):
        settings |= {"type": _plain(parts[0]), "multiple": True}
    else:
        settings |= {"type": _plain(parts[0]), "nargs": len(parts)}
    return click.option(f"--{words}", name, **settings)


def _plain(kind: Any) -> Any:
    """The type as which click parses a value; the model checks bounds, and parses texts that stand for models."""
    while hasattr(kind, "__metadata__"):
        kind = kind.__origin__
    if get_origin(kind) is Literal:
        return click.Choice(get_args(kind))
    return kind if kind in {int, float} else str


def job_values(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, under the keys of a job file."""
    values: dict[str, Any] = {}
    for field in job_fields():
        value = options[field.path[-1]]
        if value is None or value == ():
            continue
        model = (get_args(field.kind) or (None,))[0]
        if hasattr(model, "parse"):
            value = [model.parse(text).model_dump() for text in value]
        elif field.unit[2] != 1:
            value *= field.unit[2]
        inner = values
        for key in field.path[:-1]:
            inner = inner.setdefault(key, {})
        inner[field.path[-1]] = value
    return values
