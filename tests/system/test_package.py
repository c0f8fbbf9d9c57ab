"""The packages that are released: built from a copy of the sources, installed into an environment of their own, and used from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from pipeline.extract import kernel
from tests.conftest import make_images

ROOT = Path(__file__).parents[2]
FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "cluster.yaml", "constraints.txt", "pyproject.toml")
C_SOURCES = {".c", ".h"}
MADE = {".pyc", ".so"}

LOOK = """
import json, pipeline
from importlib.metadata import distribution
from pipeline.extract import kernel
folders = [pipeline.__path__[0], str(distribution("featuremaps").locate_file("."))]
print(json.dumps({"folders": folders, "kernel": kernel.version()}))
"""

pytestmark = pytest.mark.long


def sh(*words: object, folder: Path) -> str:
    """Run a command that sees nothing of this checkout: its standard output."""
    env = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run([*map(str, words)], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def sources() -> set[str]:
    """Return the files of the package, as they stand in the checkout."""
    files = (path for path in (ROOT / "pipeline").rglob("*") if path.is_file() and path.suffix not in MADE)
    return {path.relative_to(ROOT).as_posix() for path in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the source distribution, and the wheel that was built from it. It needs no network."""
    folder = tmp_path_factory.mktemp("package")
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    shutil.copytree(
        ROOT / "pipeline", folder / "pipeline", ignore=shutil.ignore_patterns("__pycache__", *(f"*{s}" for s in MADE))
    )
    build = "import sys, runpy; sys.path[1:1] = sys.argv.pop(1).split(':'); runpy.run_module('build', run_name='__main__')"
    sh(sys.executable, "-c", build, ":".join(sys.path), "--no-isolation", folder=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """A fresh environment with the wheel; what it depends on is taken from the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    sh(sys.executable, "-m", "venv", "--without-pip", folder, folder=built)
    python = folder / "bin/python"
    (wheel,) = built.glob("*.whl")
    sh(sys.executable, "-m", "pip", f"--python={python}", "install", "--quiet", "--no-deps", "--no-index", wheel, folder=built)
    site = Path(sh(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=built).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_the_wheel_has_every_module_and_all_that_they_read(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pipeline", "featuremaps"}
    in_wheel = {name for name in names if name.startswith("pipeline/") and Path(name).suffix not in MADE}
    assert in_wheel == {name for name in sources() if Path(name).suffix not in C_SOURCES}
    assert {"py.typed", "report.css", "report.html.j2", "report.js"} <= {Path(name).name for name in in_wheel}
    assert sum(name.endswith(".so") for name in names) == (shutil.which("cc") is not None)


def test_the_source_distribution_has_what_is_compiled_and_the_tested_versions(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames() if not name.endswith(".so")}
    assert sources() | {"constraints.txt", "cluster.yaml", "LICENSE"} <= names


@pytest.mark.cluster
def test_an_installed_wheel_runs_a_job_from_another_folder(installed, tmp_path):
    found = json.loads(sh(installed / "python", "-c", LOOK, folder=tmp_path))
    assert all(Path(folder).is_relative_to(installed.parent) for folder in found["folders"])
    assert found["kernel"] == kernel.version()

    make_images(tmp_path / "photos", 6, [(40, 60)])
    sh(installed / "featuremaps", "run", "photos", "features.zarr", "--workers", "1", folder=tmp_path)
    sh(installed / "featuremaps", "report", "features.zarr", "-o", "report.html", folder=tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert all(name in page for name in ("<style>", "<script>", "img00000.png"))
