"""The docs site, built once with warnings as errors, and the links between the Markdown files as a code host follows them."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import FunctionType, ModuleType
from typing import get_args
from urllib.parse import unquote, urlsplit

import click
import nbformat
import pytest
from pydantic import BaseModel

import pipeline
from pipeline import config, errors
from pipeline.analysis.feature_store import FeatureStore
from pipeline.cli.commands import cli
from pipeline.cluster import spec as cluster_spec
from pipeline.cluster.kinds import spec_types
from pipeline.report import figures

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
MARKDOWN = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "workflows/**/*.md", "benchmarks/*.md", "tests/**/*.md")
    for page in ROOT.glob(pattern)
)
FOLLOWED = {"a": "href", "link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src", "object": "data"}
LOADED = FOLLOWED.keys() - {"a"}


class Page(HTMLParser):
    """What a page refers to, what can be referred to in it, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.refers: list[tuple[str, str]] = []
        self.ids: set[str] = set()
        self.images: list[dict[str, str | None]] = []
        self.code: list[str] = []
        self.tags: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids |= {value for key in ("id", "name") if (value := found.get(key))}
        if tag == "img":
            self.images.append(found)
        if FOLLOWED.get(tag) in found and found.get("rel") not in {"search", "canonical"}:
            self.refers.append((tag, found[FOLLOWED[tag]] or ""))

    def handle_data(self, data: str) -> None:
        if "code" in self.tags[-3:]:
            self.code.append(data.strip())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, built as CONTRIBUTING says but elsewhere; some 20 s, of which half is the store that its pictures come from."""
    folder = tmp_path_factory.mktemp("site")
    (command,) = re.findall(r"python (-m sphinx .+) docs docs/_build/html$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    options = [*command.split(), "-q", "-d", folder / "doctrees", "docs", folder / "html"]
    done = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "html"


@cache
def read(file: Path) -> Page:
    return Page(file)


def pages(site: Path) -> list[Path]:
    return sorted(page for page in site.rglob("*.html") if "_static" not in page.parts)


# -- the site --------------------------------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_every_page_is_reached_from_the_first(site):
    reached, next_ones = set(), {site / "index.html"}
    while next_ones:
        page = next_ones.pop()
        reached.add(page)
        targets = [urlsplit(link) for tag, link in read(page).refers if tag == "a"]
        files = {(page.parent / unquote(target.path)).resolve() for target in targets if not target.scheme and target.path}
        next_ones |= {file for file in files if file.suffix == ".html" and file.exists()} - reached
    of_documents = {site / f"{page.stem}.html" for page in DOCS.glob("*.md")}
    assert of_documents <= reached
    # What Sphinx makes besides: the index of names is there for the search, and pages of source code there are none.
    assert {page.name for page in pages(site) if page not in reached} <= {"genindex.html", "py-modindex.html", "search.html"}


@pytest.mark.cluster
def test_every_link_and_every_image_is_there(site):
    for page in pages(site):
        for _, link in read(page).refers:
            target = urlsplit(link)
            if target.scheme or target.netloc:
                continue
            file = (page.parent / unquote(target.path)).resolve() if target.path else page
            assert file.exists(), f"{page.name}: {link}"
            if target.fragment and file.suffix == ".html":
                assert unquote(target.fragment) in read(file).ids | {""}, f"{page.name}: {link}"


@pytest.mark.cluster
def test_nothing_is_loaded_from_the_network(site):
    for page in pages(site):
        loaded = [link for tag, link in read(page).refers if tag in LOADED]
        assert not [link for link in loaded if urlsplit(link).netloc or urlsplit(link).scheme not in {"", "data"}], page.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet.name


@pytest.mark.cluster
def test_every_image_says_what_it_shows(site):
    for page in pages(site):
        for image in read(page).images:
            assert (image.get("alt") or "").strip(), f"{page.name}: {image.get('src')}"


def models(module: ModuleType) -> list[type[BaseModel]]:
    """The models of a file: all that are public."""
    found = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, config.StrictModel)]
    return [model for model in found if model.__module__ == module.__name__ and model.model_fields and model.__name__[0] != "_"]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("page", "modules"),
    [("job-file", [config]), ("clusters", [cluster_spec, *dict.fromkeys(sys.modules[kind.__module__] for kind in spec_types())])],
)
def test_every_key_is_in_the_reference(site, page, modules):
    text = (DOCS / f"{page}.md").read_text()
    for model in (model for module in modules for model in models(module)):
        if issubclass(model, cluster_spec.ClusterSpec) and model not in spec_types():  # what several kinds have in common
            continue
        assert f"<!-- keys of {model.__module__.removeprefix('pipeline.')}.{model.__name__} -->" in text
        assert set(model.model_fields) <= set(read(site / f"{page}.html").code), model.__name__


@pytest.mark.cluster
def test_every_command_and_option_is_in_the_reference(site):
    found = read(site / "commands.html")
    text = " ".join(found.code)

    def look(command: click.Command, words: str) -> None:
        if isinstance(command, click.Group):
            for name, inner in command.commands.items():
                look(inner, f"{words}-{name}")
            return
        assert words in found.ids
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.opts[-1] in text, f"{words} {option.opts}"

    look(cli, "featuremaps")
    assert "--attend" not in text, "which is hidden"


def public_names() -> set[str]:
    """What is promised not to change silently."""
    members = {name for name in vars(FeatureStore) if not name.startswith("_") and name != "path"}
    classes = {model.__name__ for model in models(config)}
    drawing = {name for name, value in vars(figures).items() if isinstance(value, FunctionType) and name[0] != "_"} - {
        "check_format"
    }
    failures = {name for name, value in vars(errors).items() if isinstance(value, type)}
    return {
        *(f"pipeline.{name}" for name in set(pipeline.__all__) - {"__version__", "errors", "figures"}),
        *(f"pipeline.analysis.feature_store.FeatureStore.{name}" for name in members),
        *(
            f"pipeline.report.figures.{name}"
            for name in drawing
            if getattr(figures, name).__module__ == "pipeline.report.figures"
        ),
        *(f"pipeline.config.{name}" for name in classes - {"Job"}),
        *(f"pipeline.errors.{name}" for name in failures),
    }


@pytest.mark.cluster
def test_every_public_name_is_in_the_reference(site):
    assert public_names() <= read(site / "api.html").ids


@pytest.mark.cluster
@pytest.mark.parametrize("page", sorted(page.stem for page in DOCS.glob("*.md") if "<!-- run the code -->" in page.read_text()))
def test_code_of_a_page_was_run_and_what_it_gives_is_shown(site, page):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)
    loud = [block for block in blocks if not re.match(r"[\w, ]+ = |import |from ", block.strip().splitlines()[-1])]
    html = (site / f"{page}.html").read_text(encoding="utf-8")
    figures = [image for image in read(site / f"{page}.html").images if "/figure-" in (image["src"] or "")]
    assert len(figures) + html.count('class="highlight-text') + html.count('href="gallery/') == len(loud) > 0


@pytest.mark.cluster
def test_a_notebook_that_is_a_page_shows_its_pictures(site):
    cells = nbformat.read(ROOT / "workflows/notebooks/convolution.ipynb", 4).cells
    figures = [image for image in read(site / "convolution.html").images if "/figure-" in (image["src"] or "")]
    assert len(figures) == sum("plt.show()" in cell.source for cell in cells) > 5


# -- the Markdown files ----------------------------------------------------------------------------------------------------------


def headings(page: Path) -> set[str]:
    """As they are linked to on a code host."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", link):
            continue
        file, _, heading = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link


def test_pages_that_the_site_fills_have_content_on_a_code_host_too():
    for name in cli.commands:
        assert f"| `featuremaps {name}" in (DOCS / "commands.md").read_text()
    for name in {*pipeline.__all__} - {"__version__"}:
        assert re.search(rf"^\| .*`pipeline\.{name}\b", (DOCS / "api.md").read_text(), re.MULTILINE), name


def test_what_makes_a_page_stand_for_a_file_is_one_link():
    assert (DOCS / "workflows.md").read_text() == "[workflows/README.md](../workflows/README.md)\n"


def test_notebooks_are_kept_without_output():
    for file in (ROOT / "workflows/notebooks").glob("*.ipynb"):
        cells = nbformat.read(file, 4).cells
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], file.name


def test_code_of_a_page_that_fails_ends_the_build(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "extensions")
    import gallery

    with pytest.raises(
        RuntimeError, match=r"this code of a page failed, so its result cannot be shown: '1 / 0': ZeroDivisionError"
    ):
        gallery._run("1 / 0", {})


@pytest.mark.parametrize(
    "page", [page for page in DOCS.glob("*.md") if "<!-- run the code -->" in page.read_text()], ids=lambda page: page.stem
)
def test_all_python_of_a_page_is_run(page, monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "extensions")
    import gallery

    text = page.read_text(encoding="utf-8")
    assert len(gallery._BLOCK.findall(text)) == len(re.findall(r"^\s*(?:```|~~~)\s*\{?(?:py|code)", text, re.MULTILINE)) > 0


def test_a_field_without_a_meaning_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "extensions")
    import reference

    class Silent(BaseModel):
        key: int = 0

    with pytest.raises(ValueError, match=r"Silent\.key has no text below it"):
        reference.meaning(Silent, "key")
    assert get_args(config.Dtype)  # the reference lists them
    assert "`float32`, `float16`, `uint16`, `uint8`" in reference.keys("config", "Job")


def test_the_picture_of_the_folders_is_that_of_the_import_contract():
    drawn = subprocess.run(
        [sys.executable, "-c", "import layout_picture; print(layout_picture.draw(), end='')"],
        cwd=ROOT / "docs" / "extensions",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert drawn == (ROOT / "docs" / "layout.svg").read_text()
    folders = {path.parent.name for path in (ROOT / "pipeline").glob("*/__init__.py")}
    assert {f">{name}/<" in drawn for name in folders} == {True}
