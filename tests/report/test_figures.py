from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tracemalloc
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline
from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.errors import UsageError
from pipeline.report import figures
from pipeline.report.figures import MAX_PANELS
from tests.conftest import make_images

pytestmark = pytest.mark.cluster

HOSTILE = "x$^2$_{<b>}&\n\x1b[31m日本.png"
LONG = f"{'long' * 50}.png"


@pytest.fixture(scope="module")
def folder(client, tmp_path_factory):
    """A source with images of all proportions, and stores of few maps and many, of two layers, of grey images, as integers."""
    folder = tmp_path_factory.mktemp("figures")
    source = make_images(folder / "source", 5, [(60, 90), (300, 40), (24, 400), (1, 400), (400, 1)])
    for i, name in enumerate(("tall", "wide", "row", "column"), 1):
        (source / f"img0000{i}.png").rename(source / f"{name}.png")
    shutil.copy(source / "img00000.png", source / HOSTILE)
    shutil.copy(source / "img00000.png", source / LONG)
    layers = [{"filters": 3, "kernel": 5, "pool": 2, "activation": "tanh"}, {"filters": 1, "kernel": 3}]
    point = {"layers": [{"filters": 6, "kernel": 1}]}
    specs = {
        "two": {},
        "many": {"extractor": {"layers": [{"filters": 70}]}},
        "grey": {"extractor": {"layers": layers, "outputs": ["conv1", "conv2"]}, "decode": {"color": "grey"}},
        "point": {"extractor": point, "dtype": "uint8"},
    }
    for name, values in specs.items():
        run_job(make_job({"source": str(source), "store": str(folder / f"{name}.zarr"), **values}), client)
    return folder


@pytest.fixture
def opened(folder):
    return lambda name="two": pipeline.open_store(folder / f"{name}.zarr")


def texts(figure, path: Path) -> list[str]:
    """What is written in a figure, from top to bottom."""
    figures.save(figure, str(path.with_suffix(".svg")))
    return [element.text for element in ET.parse(path.with_suffix(".svg")).iter("{http://www.w3.org/2000/svg}text")]


def panels(figure) -> list:
    """Axes with a picture, without colour bars."""
    return [axes for axes in figure.axes if axes.images]


def extent(axes) -> list[float]:
    return axes.images[-1].get_extent()


# -- an image with its maps ------------------------------------------------------------------------------------------------------


def test_an_image_is_drawn_above_its_maps(folder, opened, tmp_path):
    figure = figures.show(opened(), "img00000.png")
    figures.save(figure, tmp_path / "fig.png")
    with Image.open(tmp_path / "fig.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    above, *maps = panels(figure)
    original = np.asarray(Image.open(folder / "source" / "img00000.png"))
    assert np.array_equal(above.images[0].get_array(), original)
    assert [axes.get_title() for axes in maps] == ["conv1, channel 0", "conv1, channel 1"]
    assert maps[0].images[0].get_array().shape == (52, 82)
    assert maps[0].images[0].get_cmap().name == "gray"
    assert maps[0].get_window_extent().y1 < above.get_window_extent().y0


@pytest.mark.parametrize("paths", [["img00000.png", "row.png"], ("row.png",), np.array(["row.png"])])
def test_show_draws_one_image_and_names_what_draws_several(paths):
    with pytest.raises(UsageError, match=r"show draws one image, and several were given \(.*give one path, or .*contact_sheet\("):
        figures.show(None, paths)


def test_a_map_lies_where_the_centres_of_its_receptive_fields_are(opened):
    figure = figures.show(opened(), "img00000.png")
    image, first, _ = panels(figure)
    assert (extent(image), extent(first)) == ([-0.5, 89.5, 59.5, -0.5], [3.5, 85.5, 55.5, 3.5])
    field = figures.show(opened("grey"), "img00000.png")  # 5 x 5 and a pool of 2: 6 pixels, 2 apart
    assert extent(panels(field)[1]) == [2.5 - 1, 2.5 - 1 + 43 * 2, 2.5 - 1 + 28 * 2, 2.5 - 1]


@pytest.mark.parametrize("overlay", [False, True])
@pytest.mark.parametrize(
    ("store", "path"),
    [
        ("two", "img00000.png"),
        ("two", "tall.png"),
        ("two", "wide.png"),
        ("two", LONG),
        ("many", "wide.png"),
        ("grey", "tall.png"),
        ("point", "row.png"),
        ("point", "column.png"),
    ],
)
def test_nothing_overlaps_or_is_cut_off(opened, store, path, overlay):
    figure = figures.show(opened(store), path, overlay=overlay, channels=None if store != "many" or not overlay else range(7))
    figure.draw_without_rendering()
    check_boxes(figure, 0.15 if path.endswith(("0.png", "wide.png")) else 0.05)


def check_boxes(figure, least: float = 0.15) -> None:
    width, height = figure.get_size_inches() * figure.dpi
    drawn = panels(figure)
    boxes = [axes.title.get_window_extent() for axes in drawn] + [axes.get_window_extent() for axes in drawn]
    for box in boxes:
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
    for i, box in enumerate(boxes):
        assert box.count_overlaps(boxes[i + 1 :]) == 0
    assert sum(box.width * box.height for box in boxes) > least * width * height


def test_an_overlay_lays_each_map_over_the_grey_image_at_its_place(folder, opened):
    figure = figures.show(opened(), "img00000.png", overlay=True)
    first, second = panels(figure)[:2]
    image, covering = first.images
    assert image.get_array().shape == (60, 90)
    assert image.get_extent() == [-0.5, 89.5, 59.5, -0.5]
    assert (first.get_xlim(), first.get_ylim()) == ((-0.5, 89.5), (59.5, -0.5))
    assert covering.get_extent() == [3.5, 85.5, 55.5, 3.5]
    assert covering.get_cmap().name == "plasma"
    maps = opened().image("img00000.png")["conv1"].values[0]
    assert np.array_equal(covering.get_array(), maps)
    alpha = covering.get_alpha()
    assert alpha[np.unravel_index(np.abs(maps - np.median(maps)).argmin(), maps.shape)] < 0.01
    assert alpha[np.unravel_index(np.abs(maps - np.median(maps)).argmax(), maps.shape)] == 1
    assert second.get_title() == "conv1, channel 1"


def test_chosen_layers_and_channels_are_drawn(opened):
    def titles(**choice):
        return [axes.get_title() for axes in panels(figures.show(opened("grey"), "img00000.png", **choice))[1:]]

    assert titles(layers="conv2") == ["conv2, channel 0"]
    assert titles(layers=["conv2", "conv1"], channels=0) == ["conv2, channel 0", "conv1, channel 0"]
    assert titles(layers="conv1", channels=[2, 0]) == ["conv1, channel 2", "conv1, channel 0"]


def test_an_svg_holds_the_titles_as_text(opened, tmp_path):
    found = texts(figures.show(opened("grey"), "img00000.png"), tmp_path / "fig")
    channels = [f"conv1, channel {i}" for i in range(3)]
    assert sorted(found) == sorted(
        [
            "img00000.png",
            *channels,
            "conv2, channel 0",
            "greys: each map's own range, without its 0.5 % lowest and highest values",
        ]
    )


def test_a_pdf_is_written_too(opened, tmp_path):
    figures.save(figures.show(opened(), "img00000.png"), tmp_path / "fig.PDF")
    assert (tmp_path / "fig.PDF").read_bytes().startswith(b"%PDF")


def test_a_figure_shows_itself_in_a_notebook_and_pyplot_knows_nothing_of_it(opened):
    figure = figures.show(opened(), "img00000.png")
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_a_hostile_name_is_drawn_letter_by_letter(opened, tmp_path, recwarn):
    escaped = r"x$^2$_{<b>}&\n\x1b[31m日本.png"
    for figure in (
        figures.show(opened(), HOSTILE),
        figures.show(opened(), HOSTILE, overlay=True),
        figures.contact_sheet(opened(), [HOSTILE]),
    ):
        assert escaped in texts(figure, tmp_path / "fig")
        figures.save(figure, tmp_path / "fig.png")
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def test_of_many_maps_the_first_are_drawn_and_the_number_is_said(opened, tmp_path):
    found = texts(figures.show(opened("many"), "img00000.png"), tmp_path / "fig")
    assert found[-1].endswith(f"; the first {MAX_PANELS} of 70 maps")
    assert f"conv1, channel {MAX_PANELS - 1}" in found
    assert f"conv1, channel {MAX_PANELS}" not in found
    assert f"conv1, channel {MAX_PANELS}" in texts(figures.show(opened("many"), "img00000.png", channels=[64]), tmp_path / "one")


def test_a_grey_image_is_drawn_as_the_extractor_saw_it(folder, opened):
    seen = panels(figures.show(opened("grey"), "img00000.png"))[0].images[0].get_array()
    assert np.array_equal(seen, np.asarray(Image.open(folder / "source" / "img00000.png").convert("L")))


def test_a_grey_image_of_one_row_is_drawn_too(client, tmp_path):
    source = make_images(tmp_path / "source", 1, [(1, 30)])
    extractor = {"layers": [{"filters": 1, "kernel": 1}]}
    values = {"source": str(source), "store": str(tmp_path / "f.zarr"), "extractor": extractor, "decode": {"color": "grey"}}
    run_job(make_job(values), client)
    figures.save(figures.show(pipeline.open_store(tmp_path / "f.zarr"), "img00000.png"), tmp_path / "fig.png")
    assert Image.open(tmp_path / "fig.png").width > 100


@pytest.mark.parametrize("gone", ["the image", "the folder"])
def test_the_maps_are_drawn_when_the_source_is_gone(client, tmp_path, gone):
    source = make_images(tmp_path / "source", 2, [(50, 60)])
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    if gone == "the folder":
        shutil.rmtree(source)
    else:
        (source / "img00000.png").unlink()
    store = pipeline.open_store(tmp_path / "f.zarr")
    found = texts(figures.show(store, "img00000.png"), tmp_path / "fig")
    assert "the source image cannot be read any more" in found
    assert "conv1, channel 1" in found
    over = figures.show(store, "img00000.png", overlay=True)
    assert texts(over, tmp_path / "fig")[-1].startswith("the source image cannot be read any more; ")
    assert panels(over)[0].images[0].get_alpha() is None
    images = figures.contact_sheet(store, ["img00000.png"], channel=None)
    assert any("the source" in text for text in texts(images, tmp_path / "fig"))


def test_a_photograph_that_has_changed_is_not_drawn_above_the_maps_of_another(client, tmp_path, command):
    source = make_images(tmp_path / "source", 2, [(50, 60)])
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    shutil.copy(source / "img00001.png", source / "img00000.png")
    with pytest.raises(UsageError, match=r"'img00000\.png' has changed since its maps were computed.* nothing was drawn; bring"):
        figures.show(pipeline.open_store(tmp_path / "f.zarr"), "img00000.png")
    assert command("show", tmp_path / "f.zarr", "img00000.png", "-o", tmp_path / "fig.png")[0] == 2
    assert not (tmp_path / "fig.png").exists()
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    figures.show(pipeline.open_store(tmp_path / "f.zarr"), "img00000.png")


def test_an_image_is_found_by_the_name_that_a_shell_completes(client, tmp_path):
    source = make_images(tmp_path / "source", 1, [(50, 60)])
    (source / "img00000.png").rename(source / "50% off.png")
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    figure = figures.show(pipeline.open_store(tmp_path / "f.zarr"), "50% off.png")
    assert "the source image cannot be read any more" not in texts(figure, tmp_path / "fig")


def test_layers_and_channels_that_are_not_there_are_refused(opened):
    with pytest.raises(
        UsageError, match=r"layer 'conv3' cannot be drawn: .*grey\.zarr has maps of conv1, conv2, and of no other"
    ):
        figures.show(opened("grey"), "img00000.png", layers=["conv1", "conv3"])
    with pytest.raises(UsageError, match=r"channel 1 of conv2 cannot be drawn: the layer has one channel, 0; choose"):
        figures.show(opened("grey"), "img00000.png", channels=1)
    for channel in (-1, 2):
        with pytest.raises(
            UsageError, match=rf"channel {channel} of conv1 cannot be drawn: the layer has channels 0 to 1; choose"
        ):
            figures.contact_sheet(opened(), channel=channel)
    for choice in ({"layers": []}, {"channels": []}):
        with pytest.raises(UsageError, match=r"no (layer|channel) was chosen, so there is nothing to draw: name at least one"):
            figures.show(opened(), "img00000.png", **choice)


def test_a_layer_without_maps_says_so(opened, monkeypatch):
    store = opened("grey")
    monkeypatch.setattr(type(store), "map_layers", ("conv2",))  # as of a store that keeps the pooled values of conv1 alone
    message = (
        r"layer 'conv1' cannot be drawn: .*grey\.zarr has maps of conv2, and of conv1 only the pooled values were kept; name"
    )
    for draw in (lambda: figures.show(store, "img00000.png", layers="conv1"), lambda: figures.histograms(store, "conv1")):
        with pytest.raises(UsageError, match=message):
            draw()
    assert [axes.get_title() for axes in panels(figures.show(store, "img00000.png"))[1:]] == ["conv2, channel 0"]
    monkeypatch.setattr(type(store), "map_layers", ())
    with pytest.raises(
        UsageError, match=r"layer 'conv1' cannot be drawn: .* has maps of no layer, and of conv1, conv2 only the pooled"
    ):
        figures.contact_sheet(store)


# -- a sheet of many --------------------------------------------------------------------------------------------------------------


def test_a_contact_sheet_is_spread_over_the_store_in_one_range_of_greys(opened):
    figure = figures.contact_sheet(opened("point"), n=4)
    drawn = panels(figure)
    paths = sorted(opened("point").images["path"])
    assert [axes.get_title()[:4] for axes in drawn] == [paths[i][:4] for i in (0, 2, 4, 6)]
    assert len({axes.images[0].get_clim() for axes in drawn}) == 1
    assert len({tuple(axes.get_subplotspec().get_position(figure).size.round(3)) for axes in drawn}) == 1
    assert len([axes for axes in figure.axes if axes.get_label() == "<colorbar>"]) == 1
    figure._repr_png_()
    check_boxes(figure, 0.1)


def test_a_contact_sheet_of_chosen_images_and_of_the_images_themselves(folder, opened):
    chosen = ["wide.png", LONG, "tall.png"]
    maps = panels(figures.contact_sheet(opened("grey"), chosen, layer="conv1", channel=2))
    assert np.array_equal(maps[2].images[0].get_array(), opened("grey").image("tall.png")["conv1"].values[2])
    short = maps[1].get_title()
    assert (short.startswith("longlong"), "..." in short, short.endswith(".png")) == (True, True, True)
    images = panels(figures.contact_sheet(opened(), chosen, channel=None))
    assert np.array_equal(images[0].images[0].get_array(), np.asarray(Image.open(folder / "source" / "wide.png")))


def test_a_contact_sheet_of_nothing_or_of_too_much_is_refused(client, folder, opened, tmp_path):
    with pytest.raises(UsageError, match=r"'nope\.png' is not an image of"):
        figures.contact_sheet(opened(), ["nope.png"])
    with pytest.raises(UsageError, match=r"a sheet of 0 images was asked for, and one holds 1 to 64: nothing was drawn"):
        figures.contact_sheet(opened(), [])
    with pytest.raises(UsageError, match=r"n of 65 images cannot be drawn: a sheet holds 1 to 64"):
        figures.contact_sheet(opened(), n=65)
    with pytest.raises(UsageError, match=r"n of 2\.5 images cannot be drawn"):
        figures.contact_sheet(opened(), n=2.5)
    with pytest.raises(UsageError, match=r"'row\.png' has no maps in .*: it is rejected \(too_small"):
        figures.contact_sheet(opened(), ["row.png"])
    source = make_images(tmp_path / "small", 1, [(5, 5)])
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    for draw in (figures.contact_sheet, figures.histograms):
        with pytest.raises(
            UsageError, match=r"no image of .*f\.zarr has maps that could be drawn: it is 1 rejected; `featuremaps"
        ):
            draw(pipeline.open_store(tmp_path / "f.zarr"))


# -- charts -----------------------------------------------------------------------------------------------------------------------


def test_histograms_count_every_value_once(opened):
    store = opened("grey")
    figure = figures.histograms(store, "conv1")
    done = store.images[store.images["status"] == "done"]["path"]
    values = np.concatenate([store.image(path)["conv1"].values.reshape(3, -1) for path in done], 1)
    for channel, axes in enumerate(figure.axes):
        heights, edges, _ = axes.patches[0].get_data()
        assert np.allclose(heights, 100 * np.histogram(values[channel], edges)[0] / values.shape[1], atol=1e-3)
        assert heights.sum() == pytest.approx(100)
        assert axes.get_title().startswith(f"channel {channel}: mean {values[channel].mean():.3g}, standard deviation ")
    assert len({axes.get_xlim() for axes in figure.axes}) == len({axes.get_ylim() for axes in figure.axes}) == 1


def test_histograms_of_integers_have_equally_many_levels_in_each_bin(opened):
    store = opened("point")
    _, edges, _ = figures.histograms(store).axes[0].patches[0].get_data()
    (layer,) = store.spec.layers
    assert np.allclose((edges - layer.add_offset) / layer.scale_factor % 1, 0.5, atol=1e-6)
    assert len({*np.diff(edges).round(9)}) == 1


def test_histograms_of_a_sample_are_the_same_each_time(opened):
    first, second = (figures.histograms(opened("point"), n_images=3).axes[1].patches[0].get_data() for _ in range(2))
    assert np.array_equal(first.values, second.values)
    title = figures.histograms(opened("point"), n_images=3).get_suptitle()
    assert title == "conv1, 3 of 7 images: mean ± standard deviation of each channel"
    with pytest.raises(UsageError, match=r"histograms of 0 images were asked for: nothing was drawn; take a whole number"):
        figures.histograms(opened(), n_images=0)
    with pytest.raises(UsageError, match=r"histograms of 2\.5 images were asked for"):
        figures.histograms(opened(), n_images=2.5)


def test_filters_are_drawn_part_by_part_about_zero_with_their_biases(opened):
    store = opened()
    figure = figures.filters(store)
    first, second = panels(figure)
    drawn = first.images[0].get_array()
    weights = store.weights["conv1_weight"]
    assert np.array_equal(drawn[:, 10:19], weights[0, 1])
    assert [label.get_text() for label in first.get_xticklabels()] == ["R", "G", "B"]
    assert first.images[0].get_clim() == second.images[0].get_clim() == (-np.abs(weights).max(), np.abs(weights).max())
    assert second.get_title() == f"1: bias {store.weights['conv1_bias'][1]:+.2g}"
    check_boxes(figure)


def test_of_many_filters_the_first_are_drawn_and_of_many_inputs_the_mean(client, opened, tmp_path):
    assert len(panels(figures.filters(opened("many")))) == MAX_PANELS
    assert figures.filters(opened("many")).get_suptitle() == "conv1: 70 filters, the first 64 of 70"
    assert len(panels(figures.filters(opened("grey"), "conv2"))) == 1
    source = make_images(tmp_path / "source", 1, [(30, 30)])
    layers = [{"filters": 9, "kernel": 3}, {"filters": 2, "kernel": 3}]
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "extractor": {"layers": layers}}), client)
    store = pipeline.open_store(tmp_path / "f.zarr")
    figure = figures.filters(store, "conv2")
    assert np.allclose(panels(figure)[1].images[0].get_array(), store.weights["conv2_weight"][1].mean(0))
    assert "the mean over 9 input channels" in figure.get_supxlabel()
    with pytest.raises(
        UsageError, match=r"'conv3' is not a layer of the extractor of .*f\.zarr: it has conv1, conv2; name one of"
    ):
        figures.filters(store, "conv3")


def test_the_times_of_a_run_are_those_of_its_receipt(client, folder, opened, tmp_path):
    store = opened()
    (receipt,) = store.receipts
    (axes,) = figures.stage_times(store).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["read", "decode", "extract", "write", "waiting"]
    assert widths[:4] == list(receipt["stage_s"].values())
    assert sum(widths) == pytest.approx(max(receipt["slot_s"], sum(widths[:4])))
    shares = [text.get_text().rpartition(", ")[2] for text in axes.texts]
    assert shares == [f"{share:.0%}" for share in receipt["shares"].values()]
    run_job(make_job({"source": str(folder / "source"), "store": str(folder / "two.zarr")}), client)  # which has nothing to do
    assert len(opened().receipts) == 2
    for choice in (None, receipt["run_id"], receipt):
        assert receipt["run_id"] in figures.stage_times(opened(), choice).get_supxlabel()
    with pytest.raises(UsageError, match=r"two\.zarr has no receipt of a run 'r': the last ones are .*; name one of them"):
        figures.stage_times(opened(), "r")
    with pytest.raises(UsageError, match=r"there are no times to draw: of 1 run of .*two\.zarr that could be looked at none"):
        figures.stage_times(opened(), opened().receipts[-1])


def test_a_sample_takes_no_memory_for_one_long_path():
    paths = ["folder/" * 500 + "a.png", *(f"{i:06}.png" for i in range(100_000))]
    tracemalloc.start()
    sample = figures._sample(paths, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(sample)) == 64
    assert peak < 10e6  # it was 1.4 GB


# -- the command ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["img00000.png", "--overlay", "--layer", "conv1", "--channel", "1", "--channel", "0"],
        ["--figure", "contact", "-n", "2", "--channel", "1"],
        ["img00000.png", "tall.png", "--figure", "contact"],
        ["--figure", "histogram", "-n", "2"],
        ["--figure", "filters", "--layer", "conv1"],
        ["--figure", "stages"],
    ],
)
def test_each_figure_has_its_command(command, folder, tmp_path, arguments):
    output = tmp_path / "fig.png"
    assert command("show", folder / "two.zarr", *arguments, "-o", output) == (0, f"wrote {output}\n", "")
    assert output.stat().st_size > 5000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"an image is missing, and nothing was drawn: name one .* with --figure contact, histogram, filters or stages"),
        (["a.png", "b.png"], r"--figure maps takes one PATH, and there were 2, so nothing was drawn: leave out the surplus"),
        (["--figure", "maps"], r"--figure maps needs the PATH of one image"),
        (["--figure", "filters", "a.png"], r"--figure filters takes no PATH, so nothing was drawn: .*; it takes --layer"),
        (["--figure", "stages", "--overlay"], r"--figure stages takes no --overlay, .*; it takes nothing but STORE and -o"),
        (["--figure", "contact", "--channel", "0", "--channel", "1"], r"--figure contact takes one --channel, and there were 2"),
        (
            ["--figure", "contact", "a.png", "b.png", "-n", "2"],
            r"--figure contact takes PATHs or -n, and there were both \(2 and -n\)",
        ),
    ],
)
def test_what_a_figure_would_not_heed_is_refused(command, folder, tmp_path, arguments, message):
    code, _, err = command("show", folder / "two.zarr", *arguments, "-o", tmp_path / "fig.png")
    assert code == 2
    assert re.search(message, err)
    assert not (tmp_path / "fig.png").exists()


def test_a_figure_of_an_unknown_kind_is_refused_before_anything_is_read(command, tmp_path):
    with pytest.raises(UsageError, match=r"fig\.webp would be of an unknown kind '\.webp': name it \.png, \.svg or \.pdf"):
        figures.check_format(tmp_path / "fig.webp")
    code, _, err = command("show", tmp_path / "there is no store", "a.png", "-o", tmp_path / "fig.webp")
    assert (code, "would be of an unknown kind" in err) == (2, True)


def test_a_part_of_an_image_is_drawn_at_its_true_place(opened, command, folder, tmp_path):
    figure = figures.show(opened(), "img00000.png", crop=(20, 10, 15, 12))
    image, *maps = (axes.images[0] for axes in figure.axes if axes.images)
    assert image.get_extent() == [19.5, 34.5, 21.5, 9.5]
    assert all(drawn.get_array().shape == (12, 15) and drawn.get_extent() == [19.5, 34.5, 21.5, 9.5] for drawn in maps)
    with pytest.raises(UsageError, match=r"crop 0 0 2 2 .*holds no value of layer 'conv1', whose y goes from 4 to"):
        figures.show(opened(), "img00000.png", crop=(0, 0, 2, 2))


def test_a_figure_that_cannot_be_written_says_so(opened, tmp_path):
    figure = figures.show(opened(), "img00000.png")
    with pytest.raises(UsageError, match=r"fig\.png cannot be written \(.*No such file.*\): check its folder"):
        figures.save(figure, tmp_path / "missing" / "fig.png")


def test_without_matplotlib_the_extra_is_named(folder, tmp_path):
    script = (
        "import json, sys\nsys.modules['matplotlib'] = None\nimport pipeline\nfrom pipeline import figures\n"
        "store = pipeline.open_store(sys.argv[1])\nfound = []\n"
        "for draw in (lambda: figures.show(store, 'img00000.png'), lambda: figures.contact_sheet(store), lambda: figures.filters(store)):\n"
        "    try:\n        draw()\n    except figures.UsageError as error:\n        found.append(str(error))\nprint(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", script, folder / "two.zarr"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) == 3
    for text in found:
        assert re.fullmatch(
            r"a figure needs matplotlib, which is not installed \(.*\): .*; pip install 'featuremaps\[figures\]'", text
        )
