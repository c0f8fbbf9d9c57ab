"""Pictures for benchmarks, made once and kept in a folder of their own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(os.environ.get("FEATUREMAPS_BENCHMARKS", Path(tempfile.gettempdir()) / "featuremaps-benchmarks"))


def machine() -> str:
    """Processor, cores and versions, for the head of every result."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ", ".join(f"{name} {version(name)}" for name in ("dask", "numpy", "pillow", "torch", "zarr"))
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, {packages}"


def picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A smooth random picture with some detail."""
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def make(name: str, n: int, sizes: list[tuple[int, int]], distinct: int = 0) -> Path:
    """A folder of ``n`` JPEGs; with ``distinct`` the first that many are drawn and the rest are hard links to them."""
    folder = FOLDER / f"{name}-{n}"
    if (folder / ".complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"{i // 1000:04d}" / f"{i:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        if distinct and i >= distinct:
            first = i % distinct
            path.hardlink_to(folder / f"{first // 1000:04d}" / f"{first:07d}.jpg")
        else:
            picture(rng, *sizes[i % len(sizes)]).save(path, quality=90)
    (folder / ".complete").touch()
    return folder


def command(*arguments: object) -> list[str]:
    """The real command line, in this interpreter."""
    return [sys.executable, "-c", "from pipeline.cli.commands import main; main()", *map(str, arguments)]


def run(*arguments: object) -> str:
    """Run the command; its standard output."""
    return subprocess.run(command(*arguments), check=True, capture_output=True, text=True).stdout
