"""Checks of a cluster without starting it; each kind adds its own checks."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.checks.finding import Finding
from pipeline.cluster.show import groups_text, unusable
from pipeline.cluster.spec import ClusterSpec


def entry(name: str | None, spec: ClusterSpec) -> Iterator[Finding]:
    """Check that this machine has what such a cluster needs."""
    what = f"cluster {name or 'local'}"
    reason = unusable(spec)
    if reason:
        yield Finding("FAIL", what, f"kind {spec.kind}: {reason}", "install what is missing, or use another cluster")
    else:
        yield Finding("ok", what, f"kind {spec.kind}: {groups_text(spec)}")
    yield from spec.look_here()


def can_be_reached(spec: ClusterSpec) -> Iterator[Finding]:
    """Ask the cluster what it can answer without starting anything."""
    return spec.look_there()
