"""A script without ``if __name__ == "__main__":`` is told so, before anything is started."""

from __future__ import annotations

import multiprocessing
import runpy

import pytest

from pipeline.checks.user_script import require_guard
from pipeline.errors import UsageError

CALL = "from pipeline.checks.user_script import require_guard\n{}require_guard('run_job')\n"
GUARD = 'if __name__ == "__main__":\n    '


@pytest.fixture
def start(tmp_path):
    """Run a script as ``python script.py`` does."""

    def run(text: str) -> None:
        script = tmp_path / "script.py"
        script.write_text(text)
        runpy.run_path(str(script), run_name="__main__")

    return run


def test_a_script_without_a_guard_is_refused_with_the_line_that_it_needs(start):
    with pytest.raises(UsageError, match=r'without the line `if __name__ == "__main__":`.*nothing was started'):
        start(CALL.format(""))


@pytest.mark.parametrize(
    "text",
    [
        CALL.format(GUARD),
        f"def main():\n    from pipeline.checks.user_script import require_guard\n    require_guard('run_job')\n\n\n{GUARD}main()\n",
        "import sys\nif __name__ != '__main__':\n    raise SystemExit\n" + CALL.format(""),
    ],
)
def test_a_script_with_a_guard_may_start_processes(start, text):
    start(text)


def test_a_process_that_imports_the_script_of_its_parent_is_refused(monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    with pytest.raises(UsageError, match="starts processes"):
        require_guard("run_job")


def test_what_no_process_imports_needs_no_guard():
    exec(CALL.format(""), {"__name__": "__main__"})
