"""What is compared between driver and workers, because it decides about the result: versions of packages, and GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType

from pipeline.extract import devices, kernel

PACKAGES = ("featuremaps", "dask", "distributed", "numpy", "pillow", "torch", "zarr")


def find_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of Python, its last number aside, and of packages; a build's own tag is left out. Travels as text, to where no featuremaps is."""
    import platform  # noqa: PLC0415 (as it travels)
    from importlib import metadata  # noqa: PLC0415 (as above)

    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in packages:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def own_versions() -> dict[str, str]:
    """Of Python and of the packages that decide about the result.

    Examples
    --------
    >>> sorted(own_versions())[:3]
    ['dask', 'distributed', 'featuremaps']
    """
    return find_versions(PACKAGES)


def asking_for_versions() -> Callable[[], dict[str, str]]:
    """A function that is sent whole, and not by its name, so that a worker without featuremaps can answer, too."""
    return partial(FunctionType(find_versions.__code__, {}, find_versions.__name__), PACKAGES)


def versions_script() -> str:
    """A program for another Python, which prints `own_versions` of there as JSON."""
    return f"import json\n{inspect.getsource(find_versions)}\nprint(json.dumps(find_versions({PACKAGES!r})))"


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """What differs, in words.

    Examples
    --------
    >>> differences({"zarr": "9.9", "torch": "2.0"}, {"zarr": "3.1", "torch": "2.0"})
    ['zarr 9.9 instead of 3.1']
    """
    return [f"{name} {theirs.get(name, 'missing')} instead of {ours[name]}" for name in ours if theirs.get(name) != ours[name]]


def n_gpus_there() -> int:
    """GPUs that torch sees in this process."""
    return devices.n_gpus()


def has_kernel_there() -> bool:
    """Whether this process has the compiled code; torch does its work elsewhere, and needs more memory."""
    return kernel.version() != "torch"
