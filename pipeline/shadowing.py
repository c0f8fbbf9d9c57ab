"""A user's file that bears the name of a module hides it from the scripts beside it."""

from __future__ import annotations

import os
import sys


def hiding(folder: str) -> list[str]:
    """Files of a folder that hide a module of Python's own, or this package, from the scripts there, sorted.

    Examples
    --------
    >>> hiding(os.path.dirname(os.__file__))  # Python's own folder hides nothing
    []
    """
    own = os.path.dirname(os.__file__), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if os.path.realpath(folder) in map(os.path.realpath, own):
        return []
    names = sys.stdlib_module_names | {"pipeline"}
    try:
        return sorted(os.path.join(folder, file) for file in os.listdir(folder) if file.endswith(".py") and file[:-3] in names)
    except OSError:
        return []


def explain(error: Exception) -> Exception:
    """The error of an import, or the file that is to blame for it."""
    found = hiding(os.path.abspath(sys.path[0] if sys.path else ""))
    if not found:
        return error
    name = os.path.basename(found[0])[:-3]
    return ImportError(
        f"{found[0]} hides the module {name!r}, which featuremaps or a package of its needs, so importing failed ({error}): rename that file"
    )
