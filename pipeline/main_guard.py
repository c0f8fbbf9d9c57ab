"""A script that starts processes needs a guard, because each new process imports the script again."""

from __future__ import annotations

import ast
import multiprocessing
import sys
from pathlib import Path

from pipeline.errors import UsageError


def require_guard(call: str) -> None:
    """Refuse to start processes from a script that would do so again in each of them.

    Parameters
    ----------
    call : str
        What the script calls, for the message.

    Raises
    ------
    UsageError
        When the script has no ``if __name__ == "__main__":`` in front of the call, or this process was started by such a script.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False) or _is_unguarded():
        raise UsageError(
            f'{call} starts processes, and this script calls it without the line `if __name__ == "__main__":`: each new process would '
            "import the script and call it again, so nothing was started; put the calls below that line"
        )


def _is_unguarded() -> bool:
    """Whether the script that runs now is at a line of its top level, with no look at ``__name__`` up to there."""
    frame = sys._getframe()
    while frame.f_back is not None and not _is_top_of_main(frame.f_code.co_name, frame.f_globals):
        frame = frame.f_back
    file, spec = frame.f_globals.get("__file__"), frame.f_globals.get("__spec__")
    is_imported = isinstance(file, str) and not (spec and spec.name.rpartition(".")[2] == "__main__")
    if not _is_top_of_main(frame.f_code.co_name, frame.f_globals) or not is_imported:
        return False  # a notebook, a prompt or the command of a package, which no process imports
    try:
        lines = ast.parse(Path(str(file)).read_bytes()).body
    except (OSError, ValueError, SyntaxError):
        return False
    before = (node for node in lines if node.lineno <= frame.f_lineno)
    return not any(isinstance(node, ast.If) and "__name__" in ast.unparse(node.test) for node in before)


def _is_top_of_main(function: str, names: dict[str, object]) -> bool:
    return function == "<module>" and names.get("__name__") == "__main__"
