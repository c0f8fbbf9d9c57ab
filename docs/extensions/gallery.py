"""Runs the Python of a page on the store of the demo, and puts below each block what it gives: figures, a table, a page.

The store is made by the real command from the photographs that scikit-image ships, once per build folder.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from zlib import crc32

import matplotlib as mpl
import matplotlib.pyplot as plt
import pandas as pd
import skimage
from sphinx.application import Sphinx
from sphinx.util import logging

MARK = "<!-- run the code -->"
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
logger = logging.getLogger(__name__)


def run_the_code(text: str, folder: Path) -> str:
    """Put below each Python block of a page what its last line gives; the blocks share their names."""
    _demo(folder)
    names: dict[str, Any] = {}

    def with_results(match: re.Match[str]) -> str:
        before = _pages(folder)
        values, above = _run(match[1], names), _BLOCK.sub("", text[: match.start()]).strip().rpartition("\n\n")[2]
        says = " ".join(re.sub(r"[#`*\[\]]", "", above).split())  # of a figure, which is described there
        file = folder / f"figure-{crc32(match[1].encode()):08x}"
        shown = [_show(value, file.with_name(f"{file.name}-{n}.png"), says) for n, value in enumerate(values)]
        made = [f'<p><a href="gallery/{name}">Open {name}</a></p>' for name, _ in sorted(_pages(folder) - before)]
        return "\n\n".join([match[0], *shown, *made])

    with contextlib.chdir(folder), mpl.rc_context({"backend": "agg"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")  # of plt.show in notebooks
        return _BLOCK.sub(with_results, text)


def _pages(folder: Path) -> set[tuple[str, int]]:
    """HTML files by name and time of writing."""
    return {(page.name, page.stat().st_mtime_ns) for page in folder.glob("*.html")}


def _demo(folder: Path) -> None:
    """Make demo/features.zarr in ``folder``, as the first command of the README does."""
    folder.mkdir(parents=True, exist_ok=True)
    photographs = Path(skimage.__file__).parent / "data"
    command = [sys.executable, "-m", "pipeline", "run", photographs, "demo/features.zarr", "--workers", "2"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 (our own command)
    if done.returncode:
        raise RuntimeError(f"the store of the demo could not be made: {done.stdout}{done.stderr}")
    logger.info("gallery: %s", done.stdout.partition("\n")[0])


def _run(code: str, names: dict[str, Any]) -> list[Any]:
    """Execute a block: what it printed, the figures of pyplot, and the value of its last line if that is an expression."""
    tree = ast.parse(code)
    last = tree.body[-1] if isinstance(tree.body[-1], ast.Expr) else None
    del tree.body[-1 if last else len(tree.body) :]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(tree, "<page>", "exec"), names)  # noqa: S102 (the page is ours)
            value = eval(compile(ast.Expression(last.value), "<page>", "eval"), names) if last else None  # noqa: S307
    except Exception as error:
        raise RuntimeError(f"this code of a page failed, so its result cannot be shown: {code!r}: {error!r}") from error
    drawn = [plt.figure(number) for number in plt.get_fignums()]
    plt.close("all")
    text = printed.getvalue().rstrip()
    return [*([text] if text else []), *drawn, *([] if value is None else [value])]


def _show(value: Any, file: Path, says: str) -> str:
    """Markdown of what a block gave: a figure, which goes to ``file``, or a text."""
    if hasattr(value, "savefig"):
        value.savefig(file, dpi=110, facecolor="white")
        return f"![{says}]({file})"
    text = value.to_string() if isinstance(value, pd.DataFrame | pd.Series) else value if isinstance(value, str) else repr(value)
    return f"```text\n{text}\n```"


def publish(app: Sphinx, error: Exception | None) -> None:
    """Copy the pages that were made beside the site's own."""
    for page in (Path(app.doctreedir) / "gallery").glob("*.html") if error is None else ():
        folder = Path(app.outdir) / "gallery"
        folder.mkdir(exist_ok=True)
        shutil.copy(page, folder)
