"""The few exceptions of featuremaps, each with the exit code that the command ends with.

Every message is one paragraph: the value, what was expected, what it means and what to do.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

EXIT_COMPLETE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_QUARANTINED = 3
EXIT_RUN_AGAIN = 75


class FeaturemapsError(Exception):
    """Something stopped the work; what the store already holds is intact."""

    exit_code = EXIT_FAILED


class UsageError(FeaturemapsError):
    """The command, the job file, the source or the store cannot be used as asked."""

    exit_code = EXIT_USAGE


class StoreBusyError(FeaturemapsError):
    """Another run holds the store; it is safe to run again later."""

    exit_code = EXIT_RUN_AGAIN


class StoppedError(FeaturemapsError):
    """The run was asked to stop before there was anything to finish; it is safe to run again."""

    exit_code = EXIT_RUN_AGAIN


class StaleWriterError(FeaturemapsError):
    """A task was about to write for a run that no longer holds the store."""


class PassingFaultError(FeaturemapsError):
    """The storage failed in a way that may pass (EIO, stale handle, time-out); no image is to blame."""


class ImageError(Exception):
    """One image cannot be used; it costs itself only.

    Parameters
    ----------
    code : str
        Stable, lower-case code, for instance ``truncated``.
    text : str
        What was found, for a person.

    Examples
    --------
    >>> str(ImageError("empty", "the file has 0 bytes"))
    'empty: the file has 0 bytes'
    """

    def __init__(self, code: str, text: str) -> None:
        super().__init__(code, text)
        self.code = code
        self.text = text

    def __str__(self) -> str:
        return f"{self.code}: {self.text}"


class Extra(NamedTuple):
    """An optional set of packages, as pyproject.toml names it."""

    package: str
    """The package that is missed first."""
    purpose: str


EXTRAS = {
    "analysis": Extra("scipy", "pairs of images that are equal or near"),
    "batch": Extra("dask-jobqueue", "clusters of kind slurm, pbs, sge and htcondor"),
    "cloud": Extra("obstore", "buckets and web addresses"),
    "fast": Extra("simplejpeg", "JPEGs in half the time"),
    "figures": Extra("matplotlib", "featuremaps show"),
    "kubernetes": Extra("dask-kubernetes", "clusters of kind kubernetes"),
    "metrics": Extra("prometheus-client", "metrics for Prometheus"),
    "parquet": Extra("pyarrow", "lists in .parquet, and tables"),
    "ssh": Extra("asyncssh", "clusters of kind ssh"),
}
"""The one table of extras that code asks for."""


@contextmanager
def needs_extra(name: str, what: str, instead: str = "") -> Iterator[None]:
    """Turn an ImportError of the block into a UsageError that names the extra.

    Parameters
    ----------
    name : str
        One of `EXTRAS`.
    what : str
        What needs it.
    instead : str
        What else can be done.
    """
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"{what} needs {EXTRAS[name].package}, which is not installed ({error}): nothing was done; "
            f"pip install 'featuremaps[{name}]'{f', or {instead}' if instead else ''}"
        ) from error
