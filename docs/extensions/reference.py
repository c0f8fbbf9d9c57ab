"""Tables of the keys of job.yaml and cluster.yaml, made from the pydantic models, and of the command's options, made from click."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from typing import Any

import click
from pydantic import BaseModel
from sphinx.pycode import ModuleAnalyzer

from pipeline.cli.commands import cli

_TYPES = {"boolean": "true or false", "integer": "integer", "number": "number", "string": "text", "object": "keys and values"}
_BOUNDS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


def keys(module: str, name: str) -> str:
    """Markdown table of the keys of a model of ``pipeline``."""
    model: type[BaseModel] = getattr(importlib.import_module(f"pipeline.{module}"), name)
    schema = model.model_json_schema()
    lines = ["{.reference .keys}", "| key | value | default | meaning |", "|---|---|---|---|"]
    for key, entry in schema["properties"].items():
        default = "**needed**" if key in schema.get("required", ()) else _default(model.model_fields[key].default)
        lines.append(_row(f"`{key}`", _value(entry), default, meaning(model, key)))
    return "\n".join(lines)


def meaning(model: type[BaseModel], key: str) -> str:
    """The text below a field in the source of the model, or of the one that it comes from."""
    for owner in model.__mro__:
        if owner.__module__.startswith("pipeline."):
            analyzer = ModuleAnalyzer.for_module(owner.__module__)
            analyzer.analyze()
            if (owner.__name__, key) in analyzer.attr_docs:
                text = " ".join(analyzer.attr_docs[owner.__name__, key]).strip()
                return re.sub(r"\bNone\b", "`null`", text)  # as YAML says it
    if key == "kind":  # it says which model this is
        return (model.__doc__ or "").partition("\n")[0]
    raise ValueError(f"{model.__name__}.{key} has no text below it that says what it means: write one")


def _value(entry: dict[str, Any]) -> str:
    """What may stand there, in words, from a JSON schema."""
    if "anyOf" in entry or "oneOf" in entry:
        return " or ".join(_value(part) for part in entry.get("anyOf", entry.get("oneOf")))
    if "$ref" in entry:
        return "keys, see below"
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    if entry.get("type") == "null":
        return "`null`"
    if entry.get("type") == "array":
        parts = entry.get("prefixItems")
        return f"[{', '.join(map(_value, parts))}]" if parts else f"list of: {_value(entry['items'])}"
    inner = entry.get("additionalProperties") or entry.get("patternProperties")
    if isinstance(inner, dict) and inner:
        return f"names, each with: {_value(next(iter(inner.values())) if 'patternProperties' in entry else inner)}"
    bounds = [f"{word} {entry[bound]:g}" for bound, word in _BOUNDS.items() if bound in entry and abs(entry[bound]) < 2**31]
    return " ".join([_TYPES[entry["type"]] if "type" in entry else "anything", ", ".join(bounds)]).strip()


def _default(value: Any) -> str:
    if isinstance(value, BaseModel) or (isinstance(value, tuple) and value and isinstance(value[0], BaseModel)):
        return "theirs"
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`{text}`" if len(text) < 60 else "all"


def commands() -> str:
    """Markdown of every command: how it is called, what it does, its options."""
    return "\n\n".join(_command(command, path) for path, command in walk(cli, "featuremaps"))


def walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Every command that is no group, with the words it is called by."""
    if not isinstance(command, click.Group):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from walk(inner, f"{path} {name}")


def _command(command: click.Command, path: str) -> str:
    context = click.Context(command, info_name=path)
    usage = " ".join(command.collect_usage_pieces(context))
    lines = [f"## {path}", "", f"    {path} {usage}", "", inspect.cleandoc(command.help or ""), ""]
    lines += ["{.reference .options}", "| option | default | meaning |", "|---|---|---|"]
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            _, metavar = option.get_help_record(context) or ("", "")
            names = ", ".join([*option.opts, *option.secondary_opts])
            value = "" if option.is_flag or option.count else f" {option.make_metavar(context)}"
            text = metavar.partition("  [")[0]
            default = f"`{option.default}`" if option.show_default and not option.is_flag else ""
            lines.append(_row(f"`{names}{value}`", default, text))
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
