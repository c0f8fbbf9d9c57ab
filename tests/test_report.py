from __future__ import annotations

import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import report
from pipeline.config import make_job
from pipeline.errors import UsageError
from pipeline.report import MAX_MAPS, show_image
from pipeline.run import run_job
from tests.conftest import make_images

pytestmark = pytest.mark.cluster

HOSTILE = "x$^2$_{<b>}&\n\x1b[31m日本.png"


@pytest.fixture(scope="module")
def folder(client, tmp_path_factory):
    """A source with images of all proportions, and stores of two maps, of twenty, and of two layers of grey images."""
    folder = tmp_path_factory.mktemp("report")
    source = make_images(folder / "source", 3, [(60, 90), (300, 40), (24, 400)])
    (source / "img00001.png").rename(source / "tall.png")
    (source / "img00002.png").rename(source / "wide.png")
    shutil.copy(source / "img00000.png", source / HOSTILE)
    shutil.copy(source / "img00000.png", source / f"{'long' * 50}.png")
    layers = [{"filters": 3, "kernel": 5, "pool": 2, "activation": "tanh"}, {"filters": 1, "kernel": 3}]
    specs = {
        "two": {},
        "twenty": {"extractor": {"layers": [{"filters": 20}]}},
        "grey": {"extractor": {"layers": layers, "outputs": ["conv1", "conv2"]}, "decode": {"color": "grey"}},
    }
    for name, values in specs.items():
        run_job(make_job({"source": str(source), "store": str(folder / f"{name}.zarr"), **values}), client)
    return folder


def texts(svg: Path) -> list[str]:
    return [element.text for element in ET.parse(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    draw = report._draw
    monkeypatch.setattr(report, "_draw", lambda *args: figures.append(draw(*args)) or figures[-1])
    return figures


def test_a_png_is_a_picture_of_the_image_above_its_maps(folder, tmp_path, drawn):
    show_image(folder / "two.zarr", "img00000.png", tmp_path / "fig.png")
    with Image.open(tmp_path / "fig.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    above, *maps = [axes for part in drawn[0].subfigs for axes in part.axes]
    original = np.asarray(Image.open(folder / "source" / "img00000.png"))
    assert np.array_equal(above.images[0].get_array(), original)
    assert [axes.get_title() for axes in maps] == ["conv1, channel 0", "conv1, channel 1"]
    assert maps[0].images[0].get_array().shape == (52, 82)
    assert maps[0].images[0].get_cmap().name == "gray"
    assert maps[0].get_window_extent().y1 < above.get_window_extent().y0


@pytest.mark.parametrize(
    ("store", "path"),
    [
        ("two", "img00000.png"),
        ("two", "tall.png"),
        ("two", "wide.png"),
        ("two", f"{'long' * 50}.png"),
        ("twenty", "tall.png"),
        ("twenty", "wide.png"),
        ("grey", "tall.png"),
    ],
)
def test_nothing_overlaps_or_is_cut_off(folder, tmp_path, drawn, store, path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figure.draw_without_rendering())
    show_image(folder / f"{store}.zarr", path, tmp_path / "fig.png")
    figure = drawn[0]
    width, height = figure.get_size_inches() * figure.dpi
    drawn_axes = [axes for part in figure.subfigs for axes in part.axes if axes.images]
    boxes = [axes.title.get_window_extent() for axes in drawn_axes] + [axes.get_window_extent() for axes in drawn_axes]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[i + 1 :]) == 0
    covered = sum(box.width * box.height for box in boxes)
    assert covered > 0.15 * width * height


def test_an_svg_holds_the_titles_as_text(folder, tmp_path):
    show_image(folder / "grey.zarr", "img00000.png", tmp_path / "fig.svg")
    channels = [f"conv1, channel {i}" for i in range(3)]
    assert texts(tmp_path / "fig.svg") == ["img00000.png", *channels, "conv2, channel 0"]


def test_a_pdf_is_written_too(folder, tmp_path):
    show_image(folder / "two.zarr", "img00000.png", tmp_path / "fig.PDF")
    assert (tmp_path / "fig.PDF").read_bytes().startswith(b"%PDF")


def test_a_hostile_name_is_drawn_letter_by_letter(folder, tmp_path, recwarn):
    for suffix in ("svg", "png"):
        show_image(folder / "two.zarr", HOSTILE, tmp_path / f"fig.{suffix}")
    assert texts(tmp_path / "fig.svg")[0] == r"x$^2$_{<b>}&\n\x1b[31m日本.png"
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_of_many_maps_the_first_are_drawn_and_the_number_is_said(folder, tmp_path):
    show_image(folder / "twenty.zarr", "img00000.png", tmp_path / "fig.svg")
    found = texts(tmp_path / "fig.svg")
    assert f"the first {MAX_MAPS} of 20 maps" in found
    assert f"conv1, channel {MAX_MAPS - 1}" in found
    assert f"conv1, channel {MAX_MAPS}" not in found


def test_a_grey_image_is_drawn_as_the_extractor_saw_it(folder, tmp_path, drawn):
    show_image(folder / "grey.zarr", "img00000.png", tmp_path / "fig.png")
    seen = drawn[0].subfigs[0].axes[0].images[0].get_array()
    assert np.array_equal(seen, np.asarray(Image.open(folder / "source" / "img00000.png").convert("L")))


def test_a_grey_image_of_one_row_is_drawn_too(client, tmp_path):
    source = make_images(tmp_path / "source", 1, [(1, 30)])
    extractor = {"layers": [{"filters": 1, "kernel": 1}]}
    values = {"source": str(source), "store": str(tmp_path / "f.zarr"), "extractor": extractor, "decode": {"color": "grey"}}
    run_job(make_job(values), client)
    show_image(tmp_path / "f.zarr", "img00000.png", tmp_path / "fig.png")
    assert Image.open(tmp_path / "fig.png").width > 100


@pytest.mark.parametrize("gone", ["the image", "the folder"])
def test_the_maps_are_drawn_when_the_source_is_gone(client, tmp_path, gone):
    source = make_images(tmp_path / "source", 2, [(50, 60)])
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    if gone == "the folder":
        shutil.rmtree(source)
    else:
        (source / "img00000.png").unlink()
    show_image(tmp_path / "f.zarr", "img00000.png", tmp_path / "fig.svg")
    found = texts(tmp_path / "fig.svg")
    assert "the source image cannot be read any more" in found
    assert "conv1, channel 1" in found


def test_a_photograph_that_has_changed_is_not_drawn_above_the_maps_of_another(client, tmp_path):
    source = make_images(tmp_path / "source", 2, [(50, 60)])
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    shutil.copy(source / "img00001.png", source / "img00000.png")
    with pytest.raises(UsageError, match=r"'img00000\.png' has changed since its maps were computed.* nothing was drawn; bring"):
        show_image(tmp_path / "f.zarr", "img00000.png", tmp_path / "fig.png")
    assert not (tmp_path / "fig.png").exists()
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    show_image(tmp_path / "f.zarr", "img00000.png", tmp_path / "fig.png")


def test_an_image_is_found_by_the_name_that_a_shell_completes(client, tmp_path):
    source = make_images(tmp_path / "source", 1, [(50, 60)])
    (source / "img00000.png").rename(source / "50% off.png")
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    show_image(tmp_path / "f.zarr", "50% off.png", tmp_path / "fig.svg")
    assert "the source image cannot be read any more" not in texts(tmp_path / "fig.svg")


def test_a_figure_of_an_unknown_kind_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match=r"fig\.webp would be of an unknown kind '\.webp': name it \.png, \.svg or \.pdf"):
        show_image(tmp_path / "there is no store", "a.png", tmp_path / "fig.webp")


def test_a_figure_that_cannot_be_written_says_so(folder, tmp_path):
    with pytest.raises(UsageError, match=r"fig\.png cannot be written \(.*No such file.*\): check its folder"):
        show_image(folder / "two.zarr", "img00000.png", tmp_path / "missing" / "fig.png")


def test_without_matplotlib_the_extra_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r'matplotlib, which is not installed: pip install "featuremaps\[figures\]"'):
        show_image(folder / "two.zarr", "img00000.png", tmp_path / "fig.png")
