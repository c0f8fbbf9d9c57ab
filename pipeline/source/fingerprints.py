"""The images of a source, and the fingerprints that reveal a change."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from pipeline.source.urls import Meta

UNREADABLE = "unreadable"
"""Fingerprint of an image whose size and time could not be read."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The images of a source, in a stable order; takes about a hundred bytes and one path per image."""

    root: str
    """Absolute folder to which the paths are relative, as returned by `os.fsdecode`."""
    paths: list[str] = field(repr=False)
    """Encoded relative paths, without duplicates."""
    size_bytes: array[int] = field(repr=False)
    """Size of each image; -1 if it could not be read."""
    mtime_ns: array[int] = field(repr=False)
    """Time of the last change of each image; -1 if it could not be read."""
    unreadable: tuple[str, ...] = ()
    """Encoded relative folders that could not be read; images below them keep their entries."""
    ignored: dict[str, int] = field(default_factory=dict, repr=False)
    """Files of a folder without an image suffix: number per suffix, for a few suffixes at most."""
    excluded: dict[str, int] = field(default_factory=dict, repr=False)
    """Folders and files (in a bucket: objects) that were left out: number per pattern."""
    identities: list[str] = field(default_factory=list, repr=False)
    """For a URL, used in place of the times: the ETag of each image, empty if it could not be read."""
    complete: bool = True
    """Whether this is the whole source, not only its first images."""

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self, i: int) -> str:
        """Fingerprint of image ``i``: size and time, or ETag, as one word; `UNREADABLE` if they could not be read."""
        return self.fingerprints([i])[0]

    def fingerprints(self, images: Iterable[int]) -> list[str]:
        """Fingerprint of each of some images."""
        sizes, versions = self.size_bytes, self.identities or self.mtime_ns
        return [_fingerprint(sizes[i], versions[i]) if sizes[i] >= 0 else UNREADABLE for i in images]

    def is_unreadable(self, i: int) -> bool:
        """Whether the size and time of image ``i`` could not be read."""
        return self.size_bytes[i] < 0

    def limit(self, n: int) -> Listing:
        """Return the first ``n`` images; if that leaves some out, the result is not ``complete``."""
        if n >= len(self):
            return self
        kept = {name: getattr(self, name)[:n] for name in ("paths", "size_bytes", "mtime_ns", "identities")}
        return replace(self, **kept, complete=False)


def fingerprint_of(status: os.stat_result | Meta) -> str:
    """Fingerprint of a regular file or an object with this status, as in a listing."""
    if isinstance(status, Meta):
        return _fingerprint(status.size_bytes, status.identity)
    return _fingerprint(status.st_size, clamp_time(status.st_mtime_ns))


def _fingerprint(size_bytes: int, version: int | str) -> str:
    return f"{size_bytes}-{version}"


def clamp_time(mtime_ns: int) -> int:
    """A time as 64 bits hold it."""
    return max(-(2**63), min(mtime_ns, 2**63 - 1))  # some file systems can store the year 300,000
