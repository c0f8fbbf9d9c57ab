"""Do the checks of ``featuremaps doctor``. They never raise, because one that cannot look must not keep the others from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.cluster.finding import Finding, Level
from pipeline.errors import FeaturemapsError

__all__ = ["Finding", "Level", "look"]


def look(what: str, check: Callable[..., Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """Do a check; what it raises is what it found."""
    findings: list[Finding] = []
    try:
        for finding in check(*arguments):
            findings.append(finding)  # noqa: PERF402 (what was found before it raised is kept)
    except FeaturemapsError as error:  # whose message has the remedy
        findings.append(Finding("FAIL", what, str(error)))
    except Exception as error:  # noqa: BLE001 (the point of it)
        text = " ".join(str(error).split()) or "no more is known"
        findings.append(Finding("FAIL", what, f"{type(error).__name__}: {text}", "mend what it says, and look again"))
    return findings
