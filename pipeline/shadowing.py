"""A user's file that bears the name of a module hides it from the scripts beside it."""

from __future__ import annotations

import sys
from pathlib import Path


def hiding(folder: Path) -> list[Path]:
    """Files of a folder that hide a module of Python's own, or this package, from the scripts there, sorted."""
    folder = folder.absolute()
    try:
        files = sorted(folder.glob("*.py"))
    except OSError:
        return []
    is_ours = Path(__file__).absolute().parents[1] == folder
    return [] if is_ours else [file for file in files if file.stem in sys.stdlib_module_names | {"pipeline"}]


def explain(error: Exception) -> Exception:
    """The error of an import, or the file beside the script that is to blame for it."""
    found = hiding(Path(sys.path[0])) if sys.path else []
    if not found:
        return error
    return ImportError(
        f"{found[0]} hides the module {found[0].stem!r}, which featuremaps or a package of its needs, so importing failed ({error}): "
        "rename that file"
    )
