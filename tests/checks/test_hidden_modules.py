"""A file that hides a module from the scripts beside it is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline.checks.installation import hidden_modules
from pipeline.checks.user_script import hiding

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["random", "pipeline"])
def test_doctor_names_a_file_that_hides_a_module(tmp_path, name):
    (tmp_path / f"{name}.py").touch()
    (tmp_path / "holiday.py").touch()
    (finding,) = hidden_modules(tmp_path)
    assert (finding.level, str(tmp_path / f"{name}.py") in str(finding)) == ("note", True)


def test_an_import_that_fails_names_the_file_that_hides_a_module(tmp_path):
    (tmp_path / "random.py").touch()
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.append({str(ROOT)!r})\nimport pipeline\npipeline.run_job\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert f"ImportError: {tmp_path}/random.py hides the module 'random'" in done.stderr


def test_a_folder_without_such_files_hides_nothing(tmp_path):
    assert hiding(tmp_path) == hiding(tmp_path / "missing") == hiding(ROOT) == []


def test_completion_shows_the_public_names():
    assert dir(pipeline) == sorted(pipeline.__all__)
