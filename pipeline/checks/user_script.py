"""Detects two faults of a user's script: it starts processes without a guard, or a file beside it hides a module."""

from __future__ import annotations

import ast
import multiprocessing
import sys
from pathlib import Path

from pipeline.errors import UsageError


def require_guard(call: str) -> None:
    """Refuse to start processes from a script that would start them again in each of them.

    Parameters
    ----------
    call : str
        The function that the script calls, for the message.

    Raises
    ------
    UsageError
        When the call is not below ``if __name__ == "__main__":``, or this process was started by such a script.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False) or _is_unguarded():
        raise UsageError(
            f'{call} starts processes, and this script calls it without the line `if __name__ == "__main__":`: each new process would '
            "import the script and call it again, so nothing was started; put the calls below that line"
        )


def _is_unguarded() -> bool:
    """Whether the running script is at a line of its top level without a test of ``__name__`` before it."""
    frame = sys._getframe()
    while frame.f_back is not None and not _is_top_of_main(frame.f_code.co_name, frame.f_globals):
        frame = frame.f_back
    file, spec = frame.f_globals.get("__file__"), frame.f_globals.get("__spec__")
    is_imported = isinstance(file, str) and not (spec and spec.name.rpartition(".")[2] == "__main__")
    if not _is_top_of_main(frame.f_code.co_name, frame.f_globals) or not is_imported:
        return False  # a notebook, a prompt or a package's command: no process imports them
    try:
        lines = ast.parse(Path(str(file)).read_bytes()).body
    except (OSError, ValueError, SyntaxError):
        return False
    before = (node for node in lines if node.lineno <= frame.f_lineno)
    return not any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in before)


def _is_top_of_main(function: str, names: dict[str, object]) -> bool:
    return function == "<module>" and names.get("__name__") == "__main__"


def hiding(folder: Path) -> list[Path]:
    """Files of a folder that hide a module of Python's library, or this package, from scripts there; sorted."""
    folder = folder.absolute()
    try:
        files = sorted(folder.glob("*.py"))
    except OSError:
        return []
    is_ours = Path(__file__).absolute().parents[2] == folder
    return [] if is_ours else [file for file in files if file.stem in sys.stdlib_module_names | {"pipeline"}]


def explain(error: Exception) -> Exception:
    """The error of an import, or an error that names the file beside the script that caused it."""
    found = hiding(Path(sys.path[0])) if sys.path else []
    if not found:
        return error
    return ImportError(
        f"{found[0]} hides the module {found[0].stem!r}, which featuremaps or a package of its needs, so importing failed ({error}): "
        "rename that file"
    )
