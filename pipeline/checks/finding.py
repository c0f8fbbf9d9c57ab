"""What a check finds; checks never raise, because one that cannot look must not keep the others from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import FeaturemapsError

Level = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of ``featuremaps doctor``."""

    level: Level
    """``note``: a run works, but could do better or may surprise; ``FAIL``: a run would not work."""
    what: str
    """What was looked at."""
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.what}: {self.found}" + (f" -> {self.remedy}" if self.remedy else "")


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
