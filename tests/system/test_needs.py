"""What happens where a service or a right is missing: tests are left out and counted; with CI=true they fail. And the scripts that install.

The scripts run in folders of their own, on stand-ins of Debian's and Python's programs: the real ones would change this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest
from tests.support import needs

HERE = Path(__file__).parents[1]
TESTS = """
import pytest
from tests.support import needs


@pytest.fixture(scope="module")
def service():
    needs.debian_program("no-such-daemon", "slurm-wlm")


@pytest.mark.parametrize("n", range(3))
def test_service(service, n): ...


def test_another():
    needs.leave_out("root rights", needs.MOUNTS)


@pytest.mark.skipif(True, reason="needs the C compiler (Debian package gcc)")
def test_marked(): ...


@pytest.mark.skipif(True, reason="no GPU")
def test_not_a_service(): ...


def test_that_runs(): ...
"""


@pytest.fixture
def suite(tmp_path):
    """Run pytest on a few tests of which some need what is not there: exit code and output."""
    (tmp_path / "conftest.py").write_text("from tests.support.needs import pytest_runtest_makereport, pytest_terminal_summary\n")
    (tmp_path / "test_few.py").write_text(TESTS)

    def call(*options: str, **variables: str) -> tuple[int, str]:
        env = {key: value for key, value in os.environ.items() if key not in {"CI", "PYTEST_ADDOPTS"}} | variables
        env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # loading them takes seconds, and changes nothing here
        env["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{env.get('PYTHONPATH', '')}"
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", f"--rootdir={tmp_path}", *options]
        done = subprocess.run([*words, "test_few.py"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    return call


@pytest.mark.parametrize("options", [(), ("-p", "xdist", "-n", "2")])
def test_tests_of_what_is_missing_are_left_out_and_counted(suite, options):
    code, said = suite(*options)
    assert code == 0, said
    assert [line for line in said.splitlines() if line.startswith("left out")] == [
        "left out: 3 tests need Slurm (Debian package slurm-wlm)",
        "left out: 1 test needs root rights and the right to mount file systems",
        "left out: 1 test needs the C compiler (Debian package gcc)",
    ]
    assert "1 passed, 6 skipped" in said


def test_in_ci_they_fail_and_other_skips_do_not(suite):
    code, said = suite(CI="true")
    assert code == 1
    assert "1 failed, 1 passed, 1 skipped, 4 errors" in said
    assert "left out:" not in said
    assert "This test needs Slurm (Debian package slurm-wlm). With CI=true that is a failure" in said
    assert suite(CI="false")[0] == 0


def test_the_whole_suite_does_the_same():
    assert conftest.pytest_runtest_makereport is needs.pytest_runtest_makereport
    assert conftest.pytest_terminal_summary is needs.pytest_terminal_summary


def test_all_that_is_missing_is_named_at_once(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(needs, "SBIN", "/nonexistent")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception) as left_out:
        needs.need("slurm-wlm", "munge", rights=[needs.ROOT_RIGHTS])
    assert str(left_out.value) == "needs Slurm (Debian package slurm-wlm) and MUNGE (Debian package munge) and root rights"
    with pytest.raises(pytest.skip.Exception, match=r"needs no-such-program \(Debian package some-package\)"):
        needs.debian_program("no-such-program", "some-package")


# -- the scripts -----------------------------------------------------------------------------------------------------------------


def program(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def fresh(tmp_path):
    """A checkout with the scripts alone, and a machine that has nothing but the programs of ``bin``: exit code and output of a script."""
    checkout, programs = tmp_path / "check out", tmp_path / "bin"
    (checkout / "tests").mkdir(parents=True)
    for name in ("run.sh", "install_packages.sh", "debian_packages.txt"):
        shutil.copy(HERE / name, checkout / "tests")
    lines = ["# a comment", "no-such-daemon  daemon  a daemon", f"{tmp_path}/data  data-set  a data set", "sh  dash  the shell"]
    (checkout / "tests/debian_packages.txt").write_text("\n".join(lines) + "\n")
    programs.mkdir()
    for name in ("sh", "dirname", "rm", "chmod", "cat", "touch"):
        (programs / name).symlink_to(shutil.which(name))
    program(programs / "id", "echo 0")
    program(programs / "python3", f'case "$*" in *" --clear .venv") echo "makes .venv" ;; esac; : {tmp_path}')

    def call(*words: str, **variables: str) -> tuple[int, str]:
        env = {"PATH": str(programs), **variables}
        done = subprocess.run(["/bin/sh", *words], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    call.checkout, call.programs, call.folder = checkout, programs, tmp_path
    return call


INSTALL = "check out/tests/install_packages.sh"
RUN = "check out/tests/run.sh"


def test_packages_that_may_not_be_installed_are_named(fresh):
    code, said = fresh(INSTALL)
    assert code == 0
    assert said.startswith("Debian packages are missing, and this machine has no apt-get: daemon data-set\n")
    assert said.endswith("To run these as well: apt-get install daemon data-set\n")
    program(fresh.programs / "apt-get", "exit 100")
    program(fresh.programs / "id", "echo 1000")
    assert "only root may install them: daemon data-set" in fresh(INSTALL)[1]


def test_root_installs_what_is_missing_and_keeps_it_from_starting(fresh):
    log = fresh.folder / "log"
    policy = fresh.folder / "policy-rc.d"
    lines = [f'echo "$*" >>{log}', f"[ -x {policy} ] && ! {policy} || exit 9"]
    lines += ['case "$*" in', "*daemon) exit 100 ;;", f"*data-set) touch {fresh.folder}/data ;;", "esac"]
    program(fresh.programs / "apt-get", "\n".join(lines))
    code, said = fresh(INSTALL, POLICY_RC_D=str(policy))
    assert log.read_text().splitlines() == [
        "update -qq",
        "install -y -qq --no-install-recommends daemon",
        "install -y -qq --no-install-recommends data-set",
    ]
    assert code == 0
    assert "apt-get cannot install daemon.\n" in said
    assert "Debian packages are missing, and apt-get could not install them: daemon\n" in said
    assert not policy.exists()
    policy.write_text("of the administrator")
    fresh(INSTALL, POLICY_RC_D=str(policy))
    assert policy.read_text() == "of the administrator"


def test_arguments_reach_pytest_whole_and_its_exit_code_comes_back(fresh):
    said_by_pytest = fresh.folder / "words"
    script = f'[ "$2" != pytest ] || {{ for word; do echo "<$word>"; done >"{said_by_pytest}"; exit 5; }}'
    program(fresh.checkout / ".venv/bin/python", script)
    code, _ = fresh(RUN, "tests/a b.py", "-k", "x or 'y'")
    assert code == 5
    words = ["-m", "pytest", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", "tests/a b.py", "-k", "x or 'y'"]
    assert said_by_pytest.read_text().splitlines() == [f"<{word}>" for word in words]


@pytest.mark.parametrize(
    ("ci", "has_pytest", "code", "expected"),
    [
        ("", True, 0, "The tests run with what .venv has."),
        ("", False, 1, "it is not in .venv. Nothing was tested."),
        ("true", True, 1, "pip cannot install what the tests need. Nothing was tested."),
    ],
)
def test_where_pip_cannot_install_the_tests_run_with_what_there_is(fresh, ci, has_pytest, code, expected):
    lines = ['case "$*" in "-m pip"*) exit 1 ;;', f'"-c import pytest"*) exit {0 if has_pytest else 1} ;; esac']
    program(fresh.checkout / ".venv/bin/python", "\n".join(lines))
    found, said = fresh(RUN, CI=ci)
    assert (found, expected in said) == (code, True), said


def test_without_a_python_that_makes_environments_the_reason_is_said(fresh):
    program(fresh.programs / "python3", 'case "$*" in "-m venv"*) exit 1 ;; esac')
    code, said = fresh(RUN)
    assert (code, "that takes the package python3-venv. Nothing was tested." in said) == (1, True), said
    program(fresh.programs / "python3", "exit 1")
    code, said = fresh(RUN)
    assert (code, "need Python 3.11 or later as python3, and it is not there" in said) == (1, True), said
    assert "python3-venv" in said
