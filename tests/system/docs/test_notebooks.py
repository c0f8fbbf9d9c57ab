"""The notebooks, each executed from clean in a copy of its own, as a reader's first click on "run all" does."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.support.needs import need

ROOT = Path(__file__).parents[3]
NOTEBOOKS = sorted((ROOT / "workflows").glob("[np]*/*.ipynb"))  # of notebooks/ and python/
LONGEST_CELL_S = 900
SMALLER = {"lenet_probe": {"n_train=4800, n_test=1500": "n_train=600, n_test=150", "n_epochs=6": "n_epochs=1"}}
"""What stands in a notebook for minutes of work, and what the tests put in its place: it is the same code on fewer images."""
SLOW_FONTS = "Matplotlib is building the font cache"  # it says so in a new home on a slow machine

pytestmark = pytest.mark.long


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A copy of the folder ``workflows``, and a home of its own for whatever Jupyter and matplotlib keep."""
    (tmp_path / "home").mkdir()
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    ignored = shutil.ignore_patterns("build", "__pycache__", ".ipynb_checkpoints")
    return Path(shutil.copytree(ROOT / "workflows", tmp_path / "checkout" / "workflows", ignore=ignored))


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def execute(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, 4)
    client = NotebookClient(
        notebook, timeout=LONGEST_CELL_S, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    )
    return client.execute()


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_without_output_and_valid(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert all(cell.source.strip() for cell in notebook.cells), "an empty cell"


@pytest.mark.cluster
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_clean_and_leaves_its_checkout_as_it_was(path, workplace):
    if path.stem == "lenet_probe":
        need("dataset-fashion-mnist")
    copy = workplace / path.relative_to(ROOT / "workflows")
    text = copy.read_text()
    for large, small in SMALLER.get(path.stem, {}).items():
        assert text.count(large) == 1
        text = text.replace(large, small)
    copy.write_text(text)
    before = files(workplace.parent)
    executed = execute(copy)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    said = [output.text for output in outputs if output.get("name") == "stderr" and SLOW_FONTS not in output.text]
    assert not said, "a warning that a reader would wonder about"
    assert files(workplace.parent) == before


def test_a_cell_that_fails_is_found(tmp_path):
    broken = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(broken, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="division by zero"):
        execute(tmp_path / "broken.ipynb")
