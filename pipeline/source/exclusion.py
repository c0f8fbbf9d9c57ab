"""Leaves names out of a listing, such as the folders of thumbnails and snapshots that file servers keep beside the images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import translate

HIDDEN = ".*/"
DEFAULT_EXCLUDE = ("@eaDir/", ".snapshot/", "#recycle/", "__MACOSX/", HIDDEN)
"""Left out by default in a new store: folders of thumbnails, snapshots and deleted files, and all hidden folders."""


class Exclusion:
    """Patterns of names that a listing leaves out, and the number of matches of each.

    A pattern without a slash matches a file or folder of that name at any depth. A pattern with a slash at the end matches only folders.
    A pattern with a slash inside matches the path below the source's root.

    Parameters
    ----------
    patterns : sequence of str

    Examples
    --------
    >>> exclusion = Exclusion(["@eaDir/", "*_thumb.jpg", "2019/raw"])
    >>> [exclusion.leaves_out(path, is_folder=folder) for path, folder in (("a/@eaDir", True), ("a/@eaDir", False))]
    [True, False]
    >>> [exclusion.leaves_out(path, is_folder=False) for path in ("a/1_thumb.jpg", "2019/raw", "a/2019/raw")]
    [True, True, False]
    >>> exclusion.found
    Counter({'@eaDir/': 1, '*_thumb.jpg': 1, '2019/raw': 1})
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.found: Counter[str] = Counter()
        self._rules = [(p, re.compile(translate(p.strip("/"))), "/" in p.rstrip("/"), p.endswith("/")) for p in patterns]
        self._may_be_files = any(not only_folders for *_, only_folders in self._rules)

    def leaves_out(self, path: str, *, is_folder: bool) -> bool:
        """Whether a file or folder, given by its path below the root, is left out; if so, count it."""
        if not (is_folder or self._may_be_files):
            return False
        name = path.rpartition("/")[2]
        for pattern, rule, is_path, only_folders in self._rules:
            if (is_folder or not only_folders) and rule.fullmatch(path if is_path else name):
                self.found[pattern] += 1
                return True
        return False

    def describe(self) -> str:
        """What was left out, as part of the error for a source without images; empty if nothing was."""
        found = ", ".join(self.found)
        return f", except what was left out by name ({found}; see --exclude and --no-default-exclude)" if found else ""

    def leaves_out_key(self, key: str) -> bool:
        """Whether an object of a bucket is left out, because of its own name or a folder's above it."""
        parts = key.split("/")
        above = ("/".join(parts[:n]) for n in range(1, len(parts)))
        return bool(self._rules) and (
            any(self.leaves_out(folder, is_folder=True) for folder in above) or self.leaves_out(key, is_folder=False)
        )
