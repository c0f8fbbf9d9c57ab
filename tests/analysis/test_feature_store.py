from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from PIL import Image

import pipeline
from pipeline import open_store
from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.store.schema import Status
from pipeline.store.store import Store
from tests.conftest import make_images

pytestmark = pytest.mark.cluster

SIZES = [(50, 60), (70, 40), (31, 33)]
LAYERS = [{"filters": 3, "kernel": 5, "pool": 2, "activation": "tanh"}, {"filters": 2, "kernel": [3, 1]}]
COLUMNS = ["path", "class", "row", "source_height", "source_width", "input_height", "input_width"]
COLUMNS += ["size_bytes", "digest", "status", "error"]


@pytest.fixture(autouse=True)
def in_this_thread():
    """Compute as a notebook without a cluster does, not on the one that the other tests share."""
    with dask.config.set(scheduler="synchronous"):
        yield


@pytest.fixture(scope="module")
def folder(client, tmp_path_factory):
    """A source of three sizes with two bad images, and stores of it."""
    folder = tmp_path_factory.mktemp("analysis")
    source = make_images(folder / "source", 9, SIZES)
    (source / "bad.png").touch()
    (source / "folder" / "deep").mkdir(parents=True)
    shutil.copy(source / "img00000.png", source / "folder" / "deep" / "img00000.png")
    specs = {
        "plain": {},
        "quantised": {"dtype": "uint8"},
        "half": {"dtype": "float16"},
        "stack": {"extractor": {"layers": LAYERS, "outputs": ["conv1", "conv2"]}, "dtype": "uint16"},
    }
    for name, values in specs.items():
        run_job(make_job({"source": str(source), "store": str(folder / f"{name}.zarr"), **values}), client)
    return folder


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of a store with rows of every status: 50x60 has rows 0 pending, 1 quarantined, 2 removed, 3 done."""
    shutil.copytree(folder / "plain.zarr", tmp_path / "f.zarr")
    store = Store(tmp_path / "f.zarr")
    statuses = np.array([Status.PENDING, Status.QUARANTINED, Status.REMOVED], np.uint8)
    errors = np.array(["", "truncated: the file ends before the image does", ""], object)
    store.commit("50x60", np.arange(3), {"error": errors, "status": statuses})
    return tmp_path / "f.zarr", store.column("50x60", "path").tolist()


def test_an_open_store_can_be_pickled_also_after_use_and_as_a_selection(folder):
    store = open_store(folder / "plain.zarr")
    for made in (store, store.select(store.images["input_width"] == 33)):
        nearest = made.nearest(made.images.path.iloc[0])
        again = pickle.loads(pickle.dumps(made))
        pd.testing.assert_frame_equal(again.images, made.images)
        pd.testing.assert_frame_equal(again.nearest(made.images.path.iloc[0]), nearest)
        xr.testing.assert_equal(again.image(made.images.path.iloc[0]), made.image(made.images.path.iloc[0]))


@pytest.mark.parametrize("method", ["image", "pixels", "nearest"])
def test_an_image_is_named_by_its_path(folder, method):
    with pytest.raises(UsageError, match=r"3 is no path of an image of .*give a path as text.*store\.images\.path\[3\]"):
        getattr(open_store(folder / "plain.zarr"), method)(3)


def test_a_store_is_found_by_its_home_its_file_url_or_its_job_file(folder, tmp_path, monkeypatch):
    (tmp_path / "job.yaml").write_text(f"source: nowhere\nstore: {folder / 'plain.zarr'}\n")
    monkeypatch.setenv("HOME", str(folder))
    spellings = ["~/plain.zarr", Path("~/plain.zarr"), (folder / "plain.zarr").as_uri(), tmp_path / "job.yaml"]
    assert {open_store(spelt).path for spelt in spellings} == {folder / "plain.zarr"}
    assert pipeline.store_status(spellings[-1]).counts == pipeline.store_status(folder / "plain.zarr").counts


# -- the table of images ---------------------------------------------------------------------------------------------------------


def test_the_table_has_a_line_for_every_image_of_the_source(folder):
    images = open_store(folder / "plain.zarr").images
    assert list(images.columns) == COLUMNS
    files = (p for p in (folder / "source").rglob("*") if p.is_file())
    assert sorted(images["path"]) == sorted(p.relative_to(folder / "source").as_posix() for p in files)
    by_path = images.set_index("path")
    content = (folder / "source" / "img00001.png").read_bytes()
    assert by_path.loc["img00001.png", ["size_bytes", "digest"]].tolist() == [len(content), hashlib.sha256(content).hexdigest()]
    assert by_path.loc["bad.png", ["size_bytes", "digest"]].tolist() == [0, ""]
    assert by_path.loc["folder/deep/img00000.png", ["class", "source_height", "input_width", "status", "error"]].tolist() == [
        "50x60",
        50,
        60,
        "done",
        "",
    ]
    assert by_path.loc["bad.png", ["class", "row", "input_height", "status", "error"]].tolist() == [
        "",
        0,
        0,
        "rejected",
        "empty: the file has 0 bytes",
    ]


@pytest.mark.parametrize("what", ["all", "only good", "only rejected"])
def test_the_types_of_the_table_do_not_depend_on_what_is_in_it(client, folder, tmp_path, what):
    if what == "all":
        store = folder / "plain.zarr"
    else:
        source = make_images(tmp_path / "source", 2 if what == "only good" else 0, SIZES)
        if what == "only rejected":
            (source / "bad.png").touch()
        run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
        store = tmp_path / "f.zarr"
    images = open_store(store).images
    assert {str(images[name].dtype) for name in COLUMNS if name.endswith(("height", "width"))} == {"int32"}
    assert str(images["row"].dtype) == "int64"
    assert {pd.api.types.infer_dtype(images[name]) for name in ("path", "class", "status", "error")} == {"string"}


def test_removed_and_superseded_rows_are_not_in_the_table(changed):
    path, names = changed
    images = open_store(path).images.set_index("path")
    assert names[2] not in images.index
    assert images.loc[names[0], "status"] == "pending"
    assert images.loc[names[1], ["status", "error"]].tolist() == ["quarantined", "truncated: the file ends before the image does"]


def test_a_store_without_a_class_can_be_looked_at(client, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "bad.png").touch()
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    store = open_store(tmp_path / "f.zarr")
    assert (store.classes, len(store.images)) == ((), 1)
    assert "1 images in 0 shape classes: 1 rejected" in repr(store)
    with pytest.raises(UsageError, match="has no shape class '50x60'; it has none yet"):
        store.dataset("50x60")
    with pytest.raises(UsageError, match=r"'bad\.png' has no maps in .*: it is rejected \(empty: the file has 0 bytes\)"):
        store.image("bad.png")


# -- lazy datasets ---------------------------------------------------------------------------------------------------------------


def test_a_dataset_is_lazy_decoded_and_chunked_like_the_store(folder, monkeypatch):
    store = open_store(folder / "quantised.zarr")
    read = []
    real = zarr.Array.__getitem__

    def count(array, key):
        values = real(array, key)
        read.extend([array.name] * bool(np.size(values)))  # Dask asks for nothing, to learn the type
        return values

    monkeypatch.setattr(zarr.Array, "__getitem__", count)
    dataset = store.dataset("50x60")
    assert read == []
    maps = dataset["conv1"]
    assert isinstance(maps.data, da.Array)
    assert (maps.dtype, maps.dims, maps.shape) == (
        np.float32,
        ("image", "conv1_channel", "conv1_y", "conv1_x"),
        (4, 2, 42, 52),
    )
    assert all(isinstance(dataset[name].data, da.Array) for name in dataset.data_vars)
    maps[0].compute()
    assert read


def test_a_chunk_of_a_dataset_is_a_whole_shard(client, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.layout.MAX_SHARD_ROWS", 4)
    source = make_images(tmp_path / "source", 10, [(50, 60)])
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    assert Store(tmp_path / "f.zarr").classes[50, 60].layout.shard_rows == 4
    assert open_store(tmp_path / "f.zarr").dataset("50x60")["conv1"].chunks == ((4, 4, 2), (2,), (42,), (52,))


@pytest.mark.parametrize("name", ["plain", "quantised", "half", "stack"])
def test_values_equal_those_of_xarray_without_this_package(folder, name):
    ours = open_store(folder / f"{name}.zarr")
    for group in ours.classes:
        dataset = ours.dataset(group).load()
        theirs = xr.open_zarr(folder / f"{name}.zarr", group=group, consolidated=False).load()
        for layer in ours.layers:
            np.testing.assert_allclose(dataset[layer].values, theirs[layer].values, rtol=0, atol=1e-6)
            np.testing.assert_array_equal(dataset[f"{layer}_mean"].values, theirs[f"{layer}_mean"].values)
            assert dataset[layer].attrs["error_bound"] == theirs[layer].attrs["error_bound"]
        for column in ("path", "status", "digest", "maps_digest", "fingerprint", "size_bytes"):
            assert dataset[column].values.tolist() == theirs[column].values.tolist()


def test_values_equal_a_decode_by_hand_of_the_plain_array(folder):
    array = zarr.open_array(str(folder / "quantised.zarr" / "31x33" / "conv1"), mode="r")
    by_hand = array[:].astype(np.float64) * array.attrs["scale_factor"] + array.attrs["add_offset"]
    np.testing.assert_allclose(open_store(folder / "quantised.zarr").dataset("31x33")["conv1"].values, by_hand, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "quantised"])
def test_rows_without_maps_read_as_nan(client, tmp_path, name):
    source = make_images(tmp_path / "source", 3, [(50, 60)])
    job = make_job(
        {"source": str(source), "store": str(tmp_path / "f.zarr"), "dtype": "uint8" if name == "quantised" else "float32"}
    )

    def vanish(progress):
        if progress.stage == "starting workers":
            (source / "img00001.png").write_bytes((source / "img00001.png").read_bytes()[:-30])

    run_job(job, client, on_progress=vanish)
    maps = open_store(tmp_path / "f.zarr").dataset("50x60")
    assert maps["status"].values.tolist() == [1, 2, 1]
    assert [bool(np.isnan(row).all()) for row in maps["conv1"].values] == [False, True, False]
    assert np.isnan(maps["conv1_mean"].values[1]).all()
    assert not np.isnan(maps["conv1"].values[[0, 2]]).any()


def test_coordinates_are_the_centres_of_the_receptive_fields(folder):
    dataset = open_store(folder / "stack.zarr").dataset("50x60")
    # conv1: kernel 5 and pool 2 see 6 pixels, 2 apart; conv2: 3 rows of those see 10, and 1 column sees 6
    np.testing.assert_array_equal(dataset["conv1_y"], 2.5 + 2 * np.arange(23))
    np.testing.assert_array_equal(dataset["conv2_y"], 4.5 + 2 * np.arange(21))
    np.testing.assert_array_equal(dataset["conv2_x"], 2.5 + 2 * np.arange(28))
    assert dataset["conv1_x"].attrs == {"units": "input pixel"}
    assert dataset["path"].dims == ("image",)
    assert "path" in dataset.coords
    plain = open_store(folder / "plain.zarr").dataset("50x60")
    np.testing.assert_array_equal(plain["conv1_y"], np.arange(4, 46))


def test_an_unknown_class_is_refused_with_those_that_there_are(folder):
    store = open_store(folder / "plain.zarr")
    with pytest.raises(UsageError, match=r"plain\.zarr has no shape class '1x1'; it has 31x33, 50x60, 70x40"):
        store.dataset("1x1")
    with pytest.raises(UsageError, match="has no shape class 'rejected'"):
        store.dataset("rejected")


def test_arrays_that_a_crash_left_longer_than_the_status_are_clamped(folder, tmp_path):
    shutil.copytree(folder / "plain.zarr", tmp_path / "f.zarr")
    whole = open_store(folder / "plain.zarr").dataset("50x60").load()
    for array in (tmp_path / "f.zarr" / "50x60").iterdir():
        if array.is_dir() and array.name != "status":
            document = json.loads((array / "zarr.json").read_text())
            document["shape"][0] += 7
            (array / "zarr.json").write_text(json.dumps(document))
    store = open_store(tmp_path / "f.zarr")
    assert len(store.images) == 11
    xr.testing.assert_identical(store.dataset("50x60").load(), whole)


def test_a_store_shows_what_was_there_when_it_was_opened(client, tmp_path):
    source = make_images(tmp_path / "source", 2, [(50, 60)])
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    run_job(job, client)
    store = open_store(tmp_path / "f.zarr")
    make_images(source / "more", 3, [(50, 60)], seed=1)
    run_job(job, client)
    assert store.dataset("50x60").sizes["image"] == len(store.images) == 2
    assert len(open_store(tmp_path / "f.zarr").images) == 5


# -- one image -------------------------------------------------------------------------------------------------------------------


def test_an_image_has_its_maps_and_pooled_values_in_memory(folder):
    image = open_store(folder / "stack.zarr").image("folder/deep/img00000.png")
    assert image["conv1"].dims == ("conv1_channel", "conv1_y", "conv1_x")
    assert (image["conv1"].shape, image["conv2"].shape, image["conv1_mean"].shape) == ((3, 23, 28), (2, 21, 28), (3,))
    assert isinstance(image["conv1"].data, np.ndarray)
    assert "status" not in image
    np.testing.assert_allclose(image["conv1"].mean(("conv1_y", "conv1_x")), image["conv1_mean"], atol=1e-4)
    xr.testing.assert_identical(
        image.drop_vars("path"), open_store(folder / "stack.zarr").image("img00000.png").drop_vars("path")
    )


def test_an_image_of_a_padded_class_is_cropped_to_its_own_extent(client, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.layout.assign_classes.__defaults__", (1,))
    run_job(make_job({"source": str(folder / "source"), "store": str(tmp_path / "f.zarr")}), client)
    padded, exact = open_store(tmp_path / "f.zarr"), open_store(folder / "plain.zarr")
    assert len(padded.classes) < 4
    assert "padded" in {padded.dataset(name).attrs["kind"] for name in padded.classes}
    for path in ("img00000.png", "img00001.png", "img00002.png"):
        xr.testing.assert_equal(padded.image(path), exact.image(path))
        assert not np.isnan(padded.image(path)["conv1"]).any()


def test_an_unknown_path_is_refused_with_the_nearest(folder):
    store = open_store(folder / "plain.zarr")
    expected = (
        r"'image00000\.png' is not an image of .*plain\.zarr: paths are relative to .*source, .*; did you mean 'img00000\.png'"
    )
    with pytest.raises(UsageError, match=expected):
        store.image("image00000.png")
    with pytest.raises(UsageError, match=r"as in `\.images`$"):
        store.image("")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (0, r"has no maps in .*: it is pending \(no run has reached it yet: run again\)"),
        (1, r"has no maps in .*: it is quarantined \(truncated: the file ends before the image does\)"),
        (2, r"is not an image of"),
    ],
)
def test_an_image_without_maps_says_why(changed, row, expected):
    path, names = changed
    with pytest.raises(UsageError, match=expected):
        open_store(path).image(names[row])


def test_a_store_is_read_without_its_source(folder, tmp_path):
    shutil.copytree(folder / "plain.zarr", tmp_path / "f.zarr")
    document = json.loads((tmp_path / "f.zarr" / "zarr.json").read_text())
    document["attributes"]["featuremaps"]["source_root"] = str(tmp_path / "gone")
    (tmp_path / "f.zarr" / "zarr.json").write_text(json.dumps(document))
    store = open_store(tmp_path / "f.zarr")
    assert store.source_root == str(tmp_path / "gone")
    xr.testing.assert_equal(store.image("img00003.png"), open_store(folder / "plain.zarr").image("img00003.png"))


def test_there_must_be_a_store(tmp_path):
    with pytest.raises(UsageError, match=r"there is no store at .*none"):
        open_store(tmp_path / "none")


# -- the package -----------------------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, pipeline\n"
        "heavy = {'torch', 'dask', 'distributed', 'zarr', 'xarray', 'numpy', 'pandas', 'PIL', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "from pipeline import open_store\n"
        "assert 'torch' not in sys.modules\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_the_package_has_no_other_names():
    wanted = (
        "Job __version__ errors figures load_job open_store plan_job run_job store_status vacuum_store verify_store write_report"
    )
    assert pipeline.__all__ == wanted.split()
    assert all(getattr(pipeline, name) is not None for name in pipeline.__all__)
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'nonsense'"):
        _ = pipeline.nonsense


def test_a_damaged_object_is_named_for_people(folder, tmp_path):
    store = tmp_path / "f.zarr"
    shutil.copytree(folder / "plain.zarr", store)
    path = open_store(store).images.query("status == 'done'").iloc[0]
    for part in (store / path["class"] / "conv1").glob("c.*"):
        part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(FeaturemapsError, match=r"maps of .* cannot be read \(.*is damaged or out of reach"):
        open_store(store).image(path["path"])


def test_images_that_left_or_changed_have_no_part_in_a_dataset(client, tmp_path):
    source = make_images(tmp_path / "source", 8, [(30, 40)])
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "max_removed": 0.5, "dtype": "uint8"})
    run_job(job, client)
    (source / "img00001.png").unlink()
    shutil.copy(source / "img00003.png", source / "img00002.png")
    run_job(job, client)
    dataset = open_store(tmp_path / "f.zarr").dataset("30x40")
    assert dataset["status"].values.tolist() == [1, 3, 4, 1, 1, 1, 1, 1, 1]
    is_done = dataset["status"].values == 1
    for name in ("conv1", "conv1_mean", "conv1_max"):
        nan = np.isnan(dataset[name].values).reshape(9, -1)
        assert nan[~is_done].all()
        assert not nan[is_done].any()
        assert dataset[name].dtype == np.float32
    assert dataset["status"].attrs["flag_meanings"] == "pending done quarantined removed superseded"
    paths = dataset["path"].values[is_done].tolist()
    assert paths == [*sorted(set(paths) - {"img00002.png"}), "img00002.png"]


def test_an_image_that_was_replaced_meanwhile_is_no_map_of_nothing(client, tmp_path):
    source = make_images(tmp_path / "source", 2, [(30, 40)])
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    run_job(job, client)
    opened = open_store(tmp_path / "f.zarr")
    assert len(opened.images) == 2
    shutil.copy(source / "img00001.png", source / "img00000.png")
    run_job(job, client)
    with pytest.raises(UsageError, match=r"'img00000\.png' is not an image .* any more: .* replaced .* open the store again"):
        opened.image("img00000.png")


# -- what a store says of itself -------------------------------------------------------------------------------------------------


def test_a_store_says_what_it_was_made_with(folder):
    store = open_store(folder / "stack.zarr")
    assert (store.spec.dtype, store.layers, store.map_layers) == ("uint16", ("conv1", "conv2"), ("conv1", "conv2"))
    assert [layer.filters for layer in store.extractor.layers] == [3, 2]
    assert {name: values.shape for name, values in store.weights.items()} == {
        "conv1_weight": (3, 3, 5, 5),
        "conv1_bias": (3,),
        "conv2_weight": (2, 3, 3, 1),
        "conv2_bias": (2,),
    }
    assert [receipt["outcome"] for receipt in store.receipts] == ["complete"]


def test_images_are_counted_by_their_status(folder, changed):
    assert open_store(folder / "plain.zarr").counts == {"pending": 0, "done": 10, "quarantined": 0, "rejected": 1}
    assert open_store(changed[0]).counts == {"pending": 1, "done": 7, "quarantined": 1, "rejected": 1}


def test_pixels_are_those_that_the_extractor_saw(folder):
    store = open_store(folder / "plain.zarr")
    np.testing.assert_array_equal(store.pixels("img00003.png"), np.asarray(Image.open(folder / "source" / "img00003.png")))
    assert store.pixels("bad.png") is None


def test_a_store_opened_by_a_relative_path_stays_where_it_is(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    store = open_store("plain.zarr")
    monkeypatch.chdir(tmp_path)
    assert store.counts["done"] == 10
    assert np.isfinite(store.image("img00000.png")["conv1"].values).all()
    assert np.isfinite(store.dataset("50x60")["conv1"].compute().values).all()


def test_damaged_weights_are_said_to_be_so(folder, tmp_path):
    shutil.copytree(folder / "plain.zarr", tmp_path / "f.zarr")
    (chunk,) = (tmp_path / "f.zarr" / "extractor" / "conv1_weight").glob("c.*")
    chunk.write_bytes(chunk.read_bytes()[:-7])
    with pytest.raises(
        FeaturemapsError, match=r"the weights in .*f.zarr cannot be read .* restore it from a copy, or create a new store"
    ):
        open_store(tmp_path / "f.zarr").weights  # noqa: B018 (a property that reads)


@pytest.mark.parametrize("name", ["plain", "stack"])
def test_xarray_opens_a_whole_store_as_a_tree_of_the_same_values(folder, name):
    ours = open_store(folder / f"{name}.zarr")
    with pytest.warns(UserWarning, match="not recognized as a component of a Zarr hierarchy"):  # of what is in runs/
        theirs = xr.open_datatree(folder / f"{name}.zarr", engine="zarr", consolidated=False)
    tree = ours.tree()
    assert set(theirs.children) == {*tree.children, "extractor", "rejected", "runs"}
    assert set(tree.children) == set(ours.classes)
    for group, node in tree.children.items():
        for layer in ours.layers:
            is_done = node["status"].values == 1
            np.testing.assert_allclose(node[layer].values[is_done], theirs[group][layer].values[is_done], rtol=0, atol=1e-6)
