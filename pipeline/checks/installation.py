"""Checks of this machine: packages, the compiled kernel, GPUs, limits."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from pipeline.checks.finding import Finding
from pipeline.checks.user_script import hiding
from pipeline.errors import EXTRAS
from pipeline.extract import devices, kernel
from pipeline.run.worker_versions import PACKAGES

FILES_BASE, FILES_PER_WORKER = 128, 10
"""Open files of a driver: as measured, 16, and 9 more for each worker of this machine, whose nanny is in the driver."""


def packages() -> Iterator[Finding]:
    """Versions of Python and of required packages, and which optional packages are installed."""
    required = [Requirement(text) for text in requires("featuremaps") or []]
    wrong = list(filter(None, (_wrong(found) for found in required if found.marker is None)))
    shown = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    if wrong:
        yield Finding("FAIL", "packages", "; ".join(wrong), "install featuremaps again: pip install -c constraints.txt .")
    else:
        yield Finding("ok", "packages", f"python {platform.python_version()}, {shown}")
    for extra, (_, purpose) in EXTRAS.items():
        wanted = [found for found in required if found.marker is not None and found.marker.evaluate({"extra": extra})]
        wrong = list(filter(None, map(_wrong, wanted)))
        if wrong:
            yield Finding(
                "note", f"extra {extra}", f"{'; '.join(wrong)}; it is for {purpose}", f"pip install 'featuremaps[{extra}]'"
            )
        else:
            yield Finding("ok", f"extra {extra}", ", ".join(f"{found.name} {_version(found.name)}" for found in wanted))


def hidden_modules(folder: Path) -> Iterator[Finding]:
    """Files in a folder that hide a module from scripts in the same folder."""
    found = hiding(folder)
    if found:
        text = (
            f"{', '.join(map(str, found))} {'hides a module' if len(found) == 1 else 'hide modules'} from the scripts beside it"
        )
        yield Finding("note", "hidden modules", text, "rename it, if a script here, or python -m pipeline, fails to import")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _wrong(wanted: Requirement) -> str:
    found = _version(wanted.name)
    if found == "missing":
        return f"{wanted.name} is not installed"
    return (
        "" if wanted.specifier.contains(found, prereleases=True) else f"{wanted.name} is {found} and has to be {wanted.specifier}"
    )


def compiled_kernel() -> Iterator[Finding]:
    """Whether compiled code or PyTorch computes the first layer on processors."""
    name = kernel.version()
    if name == "torch":
        remedy = "install a C compiler (cc), then featuremaps again"
        yield Finding("note", "first layer", "not compiled: PyTorch computes it, in 3 to 5 times the time", remedy)
    else:
        yield Finding("ok", "first layer", f"compiled, {name}")


def gpus(device_files: Path = Path("/dev")) -> Iterator[Finding]:
    """Device files of NVIDIA's driver, and the GPUs that torch sees."""
    n_devices = len(list(device_files.glob("nvidia[0-9]*")))
    if not n_devices:
        yield Finding("ok", "GPUs", "no device files of NVIDIA's driver: processors compute")
        return
    n, named = devices.n_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    found = f"{n_devices} device files, and torch {_version('torch')} sees {n}"
    if n >= n_devices:
        yield Finding("ok", "GPUs", found)
    elif named is not None:
        yield Finding("note", "GPUs", f"{found}, with CUDA_VISIBLE_DEVICES={named!r}", "unset it to use all")
    else:
        remedy = "check the driver (nvidia-smi), permissions of /dev/nvidia*, and that torch was installed with CUDA"
        yield Finding("FAIL", "GPUs", found, remedy)


def open_files(workers: int) -> Iterator[Finding]:
    """The limit of open files, for a driver with this many workers."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES_BASE + FILES_PER_WORKER * workers
    found = f"{'no limit' if limit == resource.RLIM_INFINITY else limit}, and a driver of {workers} workers wants {wanted}"
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        yield Finding("ok", "open files", found)
    else:
        hard = "unlimited" if most == resource.RLIM_INFINITY else most
        yield Finding("FAIL", "open files", found, f"ulimit -n {wanted} (the hard limit is {hard}), or fewer workers")
