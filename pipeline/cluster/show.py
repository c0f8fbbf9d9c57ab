"""Shows what a cluster would launch, as words, scripts, commands or manifests; launches nothing."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.cluster.config import load_cluster
from pipeline.cluster.spec import ClusterSpec, GroupSpec, describe_groups
from pipeline.config import read_yaml
from pipeline.errors import UsageError

JOB_NAME = "featuremaps-12345678"
"""An example; the digits of a real name are derived from the store."""
_SECRET = re.compile(r"(?i)secret|token|passw|credential|_key\b|apikey")


def show_cluster(name: str, path: Path = Path("cluster.yaml")) -> str:
    """What a run with ``--cluster NAME`` would launch; variables of groups whose names suggest a secret are left out.

    Raises
    ------
    UsageError
        When there is no such cluster, or its entry cannot be used.
    """
    return _without_secrets(load_cluster(name, path)).show(JOB_NAME)


def _without_secrets(spec: ClusterSpec) -> ClusterSpec:
    given: dict[str, GroupSpec] = getattr(spec, "groups", {})
    groups = {name: group.model_copy(update={"environment": _hidden(group.environment)}) for name, group in given.items()}
    return spec.model_copy(update={"groups": groups}) if groups else spec


def _hidden(environment: dict[str, str]) -> dict[str, str]:
    return {key: "HIDDEN" if _SECRET.search(key) else value for key, value in environment.items()}


# -- all clusters ----------------------------------------------------------------------------------------------------------------


def list_clusters(path: Path = Path("cluster.yaml")) -> str:
    """A table of the clusters of a file, with the reason if one cannot be used from here.

    Raises
    ------
    UsageError
        When the file exists but cannot be read.
    """
    if not path.exists():
        return f"local  local  this machine, without a cluster.yaml (there is no {path})"
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise UsageError(
            f"{path} cannot be read ({error}): nothing is known of its clusters; correct it, docs/clusters.md has the form"
        ) from error
    entries = values.get("clusters") if isinstance(values, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UsageError(
            f"{path} names no clusters: it needs the key 'clusters' with an entry for each, as docs/clusters.md has them"
        )
    rows = [_row(str(name), entry, path) for name, entry in entries.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {kind:{widths[1]}}  {rest}" for name, kind, rest in rows)


def _row(name: str, entry: Any, path: Path) -> tuple[str, str, str]:
    """Name, kind, and the groups or what is wrong."""
    kind = str(entry.get("kind", "?")) if isinstance(entry, dict) else "?"
    try:
        spec = load_cluster(name, path)
    except UsageError as error:
        return name, kind, f"NOT USABLE: {error}"
    reason = unusable(spec)
    return name, kind, "; ".join(filter(None, [groups_text(spec), f"NOT USABLE HERE: {reason}" if reason else ""]))


def unusable(spec: ClusterSpec) -> str:
    """Why such a cluster cannot be started from this machine, as far as visible without an attempt; empty if it can."""
    if spec.extra is not None and find_spec(spec.extra[0]) is None:
        return f"{spec.extra[0]} is not installed (pip install 'featuremaps[{spec.extra[1]}]')"
    try:
        spec.require_usable()
    except UsageError as error:
        return str(error)
    return ""


def groups_text(spec: ClusterSpec) -> str:
    """The groups of a cluster, on one line."""
    return describe_groups(getattr(spec, "groups", {})) if unusable(spec) else spec.describe()
