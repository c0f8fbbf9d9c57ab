"""What some tests need of the machine: services, and rights. A test that misses one is left out; with ``CI=true`` it fails.

A test is left out by a skip whose reason begins with "needs". The summary of a test run counts these by reason, and
with ``CI=true`` they become failures. The services are those of ``debian_packages.txt``, which ``install_packages.sh`` reads too.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
ROOT_RIGHTS = "root rights"
MOUNTS = "the right to mount file systems"
NEEDS = "needs "


@dataclass(frozen=True)
class Service:
    """One line of ``debian_packages.txt``."""

    place: str
    """A program to look for, or an absolute path."""
    package: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} (Debian package {self.package})"

    def is_here(self) -> bool:
        return Path(self.place).exists() if self.place.startswith("/") else find_program(self.place) is not None


LINES = Path(__file__).parents[1].joinpath("debian_packages.txt").read_text().splitlines()
SERVICES = {words[1]: Service(*words) for line in LINES if not line.startswith("#") for words in [line.split(maxsplit=2)]}


def find_program(name: str) -> str | None:
    """Return the path of a program, also of one that only root has in its PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")


def need(*packages: str, rights: Iterable[str] = ()) -> None:
    """Leave out this test if one of these packages is not installed, or if these rights are missing."""
    missing = [str(SERVICES[package]) for package in packages if not SERVICES[package].is_here()]
    if ROOT_RIGHTS in rights and os.geteuid():
        missing.append(ROOT_RIGHTS)
    if MOUNTS in rights and not may_mount():
        missing.append(MOUNTS)
    if missing:
        leave_out(*missing)


def leave_out(*things: str) -> NoReturn:
    """Leave out this test, because it needs these things."""
    pytest.skip(NEEDS + " and ".join(things))


def debian_program(name: str, package: str) -> str:
    """Return the path of a program of a Debian package; where it is not installed, leave out this test."""
    found = find_program(name)
    return found or leave_out(str(SERVICES.get(package, Service(name, package, name))))


@cache
def may_mount() -> bool:
    """Whether this process may mount file systems, in a mount namespace of its own."""
    script = "mount -t tmpfs tmpfs /tmp"
    try:
        return subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With ``CI=true``, have a test fail that would be left out."""
    report = yield
    fail_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """Say at the very end what is missing, and how many tests were left out for it."""
    yield
    for line in summary(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line, yellow=True)


def fail_in_ci(report: pytest.TestReport) -> None:
    """With ``CI=true``, turn a test that was left out into one that failed."""
    reason = reason_of(report)
    if reason and os.environ.get("CI", "").lower() not in {"", "0", "false"}:
        report.outcome = "failed"
        report.longrepr = f"This test {reason}. With CI=true that is a failure; elsewhere the test is left out."


def reason_of(report: pytest.TestReport) -> str | None:
    """Return what a test needed that was left out, beginning with "needs"; None for any other end of a test."""
    if not report.skipped or not isinstance(report.longrepr, tuple):
        return None
    reason = str(report.longrepr[2]).removeprefix("Skipped: ")
    return reason if reason.startswith(NEEDS) else None


def summary(reports: Iterable[pytest.TestReport]) -> list[str]:
    """Return a line for each thing that tests needed and that is not there, with the number of these tests."""
    reasons = Counter(reason for report in reports if (reason := reason_of(report)))
    return [
        f"left out: {n} {'test' if n == 1 else 'tests'} {re.sub('^needs', 'needs' if n == 1 else 'need', reason)}"
        for reason, n in sorted(reasons.items())
    ]
