"""What driver and workers must have in common, because results depend on it: versions of packages, and GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType

from pipeline.extract import devices, kernel

PACKAGES = ("featuremaps", "dask", "distributed", "numpy", "pillow", "torch", "zarr")


def find_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of Python (without its last number) and of packages (without a build's local tag).

    The source text of this function is sent to places without featuremaps, so it imports all that it uses.
    """
    import platform  # noqa: PLC0415 (sent as text)
    from importlib import metadata  # noqa: PLC0415 (as above)

    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in packages:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def own_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect the result.

    Examples
    --------
    >>> sorted(own_versions())[:3]
    ['dask', 'distributed', 'featuremaps']
    """
    return find_versions(PACKAGES)


def asking_for_versions() -> Callable[[], dict[str, str]]:
    """Return a function that is sent by value, not by name, so that a worker without featuremaps can answer too."""
    return partial(FunctionType(find_versions.__code__, {}, find_versions.__name__), PACKAGES)


def versions_script() -> str:
    """A program that prints the result of `own_versions` for another Python, as JSON."""
    return f"import json\n{inspect.getsource(find_versions)}\nprint(json.dumps(find_versions({PACKAGES!r})))"


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Each difference, in words.

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
    """Whether this process has the compiled code; otherwise torch does the work, and needs more memory."""
    return kernel.version() != "torch"
