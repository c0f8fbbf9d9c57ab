"""Runs the checks of ``featuremaps doctor``. They never raise: one check that fails must not stop the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from pipeline.cluster.finding import Finding, Level
from pipeline.errors import FeaturemapsError

__all__ = ["Finding", "Level", "look"]

_NOTHING_STARTED = re.compile(r"(?:, so| and|[:;]) nothing was started(?=$|[:;.])")
"""What a command says that was to start something, which no check is."""


def look(what: str, check: Callable[..., Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """Run a check; an exception that it raises becomes a finding."""
    findings: list[Finding] = []
    try:
        for finding in check(*arguments):
            findings.append(finding)  # noqa: PERF402 (findings before an exception are kept)
    except FeaturemapsError as error:  # its message has the remedy
        findings.append(Finding("FAIL", what, _NOTHING_STARTED.sub("", str(error))))
    except Exception as error:  # noqa: BLE001 (no check may stop the others)
        text = " ".join(str(error).split()) or "no more is known"
        findings.append(Finding("FAIL", what, f"{type(error).__name__}: {text}", "correct what the error names, and check again"))
    return findings
