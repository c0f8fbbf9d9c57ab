"""One result of ``featuremaps doctor``; each kind of cluster reports its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``featuremaps doctor``."""

    level: Level
    """``note``: a run works, but could be better or has a surprise. ``FAIL``: a run would not work."""
    what: str
    """What was looked at."""
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.what}: {self.found}" + (f" -> {self.remedy}" if self.remedy else "")


def compare_versions(what: str, theirs: Mapping[str, str]) -> Finding:
    """Compare another process's versions, as `own_versions` returns them, with this process's. A run compares them the same way."""
    from pipeline.run import worker_versions  # noqa: PLC0415 (imports Dask)

    differing = worker_versions.differences(theirs, worker_versions.own_versions())
    if not differing:
        return Finding("ok", what, ", ".join(f"{name} {found}" for name, found in theirs.items()))
    return Finding("FAIL", what, ", ".join(differing), "install the same versions (constraints.txt) on both sides")
