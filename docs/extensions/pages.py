"""What the site makes of the Markdown files before MyST reads them; a code host shows them as they are.

- A page whose whole text is one link to a Markdown file or a notebook outside of docs stands for that file; the notebook's code is run.
- A relative link to a file that has a page leads to that page, any other to the file itself.
- ``<!-- keys of MODULE.MODEL -->`` becomes a table of the model's keys, ``<!-- commands -->`` the commands with their options.
- ``<!-- every other page -->`` in the list of pages becomes those that it does not name.
- On a page with ``<!-- run the code -->`` what a block of Python gives is shown below it.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import gallery
import nbformat
import reference
from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]+)?\)")
_STANDS_FOR = re.compile(r"\s*\[[^\]]+\]\((\.\./[^)#]+\.(?:md|ipynb))\)\s*")
_KEYS = re.compile(r"^<!-- keys of ([\w.]+)\.(\w+) -->$", re.MULTILINE)


@cache
def standing_for() -> dict[Path, Path]:
    """Files outside of docs, and the page that stands for each."""
    pages = {page: _STANDS_FOR.fullmatch(page.read_text(encoding="utf-8")) for page in DOCS.glob("*.md")}
    return {(DOCS / match[1]).resolve(): page for page, match in pages.items() if match}


def relink(text: str, file: Path) -> str:
    """Make the relative links of ``file`` those of a page in docs."""

    def replaced(match: re.Match[str]) -> str:
        target = (file.parent / match[1]).resolve()
        target = standing_for().get(target, target)
        return f"]({os.path.relpath(target, DOCS)}{match[2] or ''})"

    return _LINK.sub(replaced, text)


def _cells(notebook: Path) -> str:
    """A notebook as Markdown whose code is run."""
    cells = nbformat.read(notebook, 4).cells
    return "\n\n".join(
        [cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```" for cell in cells] + [gallery.MARK]
    )


def others(text: str) -> list[str]:
    """Pages of docs that a list of pages does not name."""
    stems = sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")
    return [stem for stem in stems if f"\n{stem}\n" not in text and f"<{stem}>" not in text]


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
    """Replace what Sphinx has read of a page."""
    (file,) = [outside for outside, page in standing_for().items() if page.stem == docname] or [DOCS / f"{docname}.md"]
    text = file.read_text(encoding="utf-8") if file.suffix == ".md" else _cells(file)
    made = _KEYS.sub(lambda match: reference.keys(*match.groups()), text)
    made = made.replace("<!-- commands -->", reference.commands()) if "<!-- commands -->" in made else made
    made = made.replace("<!-- every other page -->", "\n".join(others(made)))
    made = gallery.run_the_code(made, Path(app.doctreedir) / "gallery") if gallery.MARK in made else made
    for dependency in [file, *(ROOT / "pipeline").rglob("*.py")] if made != text else [file]:
        app.env.note_dependency(dependency)
    content[0] = relink(made, file)


def _whole_sentence(_app: Sphinx, what: str, _name: str, _value: object, _options: object, lines: list[str]) -> None:
    """Keep napoleon from reading a type into a property's first line where that has a colon."""
    if what in {"attribute", "property"}:
        lines.insert(0, "")


def setup(app: Sphinx) -> dict[str, Any]:
    """Sphinx calls this."""
    app.connect("env-get-outdated", lambda *_: ["index"])  # a page may have come or gone
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _whole_sentence, priority=400)
    app.connect("build-finished", gallery.publish)
    return {"parallel_read_safe": False}
