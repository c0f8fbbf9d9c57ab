"""Benchmarks use and patch the package's internals, and no test runs them: each name that they use must be there."""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Iterator
from inspect import isclass, ismodule
from pathlib import Path

import pytest

from benchmarks.bare_worker import bare_worker
from pipeline.run import activity

FOLDER = Path(__file__).parents[2] / "benchmarks"
OWN = ("pipeline", "benchmarks", "tests")


def imports(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Local name, imported name and line of each import of the project's own, within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OWN:
            yield from ((name.asname or name.name, f"{node.module}.{name.name}", node.lineno) for name in node.names)


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression that is only that, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{owner}.{node.attr}" if isinstance(node, ast.Attribute) and (owner := dotted(node.value)) else ""


def missing(source: str) -> list[str]:
    """The names of the project that ``source`` imports, reads or replaces, and that are not there."""
    tree, found, lacking = ast.parse(source), {}, []
    for local, name, line in imports(tree):
        try:
            found[local] = pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            lacking.append(f"line {line}: {name}")
    for node in ast.walk(tree):
        first, *rest = dotted(node).split(".") if isinstance(node, ast.Attribute) else [""]
        thing = found.get(first)
        for part in rest:
            if not (ismodule(thing) or isclass(thing)):
                break
            if not hasattr(thing, part) and part not in getattr(thing, "__annotations__", {}):
                lacking.append(f"line {node.lineno}: {dotted(node)}")
                break
            thing = getattr(thing, part, None)
    return lacking


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_every_name_that_a_benchmark_uses_is_there(path: Path) -> None:
    assert missing(path.read_text(encoding="utf-8")) == []


def test_a_name_that_is_gone_is_found() -> None:
    source = (
        "from pipeline.run import driver, gone, lifecycle, tasks\n"
        "from pipeline.store.store import Gone\n"
        "lifecycle.list_collections = lambda _: None\n"
        "driver.Driver._take_batches = driver.Driver._take_batch\n"
        "def work():\n"
        "    from pipeline.extract import kernel\n"
        "    kernel.MAX_LANES = kernel.NO_LANES\n"
    )
    assert [line.split(": ")[1] for line in missing(source)] == [
        "pipeline.run.gone",
        "pipeline.store.store.Gone",
        "lifecycle.list_collections",
        "driver.Driver._take_batches",
        "kernel.NO_LANES",
    ]


def test_the_worker_without_a_cluster_has_what_tasks_ask_for() -> None:
    worker = bare_worker()
    activity.require_lease(worker)
    assert not activity.is_draining(worker, "run")
