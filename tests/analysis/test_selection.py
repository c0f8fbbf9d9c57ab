from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipeline import open_store
from pipeline.analysis.feature_store import FeatureStore
from pipeline.analysis.tables import write_parquet
from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.errors import UsageError
from pipeline.store.schema import Status
from pipeline.store.store import Store
from tests.conftest import make_images

pytestmark = pytest.mark.cluster
BAD = os.fsdecode(b"caf\xe9.png")
"""As a shell gives the name of a file that is not UTF-8."""
BIG = 2**53 + 1
"""No float64 holds it."""


@pytest.fixture(scope="module")
def path(client, tmp_path_factory) -> Path:
    """A store of ten images of two sizes, of which two have names that are stored in another form; and a bad one."""
    folder = tmp_path_factory.mktemp("selection")
    source = make_images(folder / "source", 10, [(50, 60), (31, 33)])
    (source / "img00008.png").rename(source / "100%.png")
    (source / "img00009.png").rename(source / BAD)
    (source / "bad.png").touch()
    run_job(make_job({"source": str(source), "store": str(folder / "f.zarr")}), client)
    return folder / "f.zarr"


@pytest.fixture
def store(path) -> FeatureStore:
    return open_store(path)


def named(store: FeatureStore) -> list[str]:
    return store.images["path"].tolist()


# -- masks -----------------------------------------------------------------------------------------------------------------------


def test_a_mask_over_another_selection_is_no_mask_of_this_one(store):
    a, b = store.select(["img00000.png", "img00001.png"]), store.select(["img00002.png", "img00003.png"])
    with pytest.raises(
        UsageError, match=r"the boolean Series has 2 lines, and its index is not that of the 2 images of .*f\.zarr"
    ):
        a.select(b.images["path"] == "img00003.png")
    with pytest.raises(UsageError, match="the boolean Series has 2 lines, and its index is not that of the 11 images"):
        store.select(a.images["path"] == "img00000.png")


def test_a_mask_over_more_images_is_matched_line_by_line(store):
    few = store.select(status="done").select(store.images["input_width"] == 33)
    assert named(few) == [p for p, width in zip(named(store), store.images["input_width"], strict=True) if width == 33]
    assert few.images.index.tolist() == store.images.index[store.images["input_width"] == 33].tolist()
    again = few.select((store.images["path"] > "img00003.png")[::-1])
    assert named(again) == [p for p in named(few) if p > "img00003.png"]
    assert named(few.select(few.images["path"] == "img00005.png")) == ["img00005.png"]


def test_a_mask_over_the_images_of_a_store_that_grew_is_refused(store, path):
    longer = pd.Series(True, range(len(store.images) + 1))
    for one in (store, store.select(status="done")):
        with pytest.raises(UsageError, match="the boolean Series has 12 lines"):
            one.select(longer)


def test_a_mask_over_pooled_values_is_matched_by_path(store):
    pooled = store.pooled("conv1", "mean")
    bright = pooled["conv1_mean_0"] > pooled["conv1_mean_0"].median()
    assert sorted(named(store.select(bright))) == sorted(bright.index[bright])
    joined = store.join(pd.DataFrame({"path": ["img00000.png"], "old": [True]}))
    assert named(joined.select(joined.images["old"])) == ["img00000.png"]
    assert named(store.select((store.images["path"] == "img00004.png").to_numpy())) == ["img00004.png"]


def test_all_that_is_made_of_a_selection_is_of_its_images(store, tmp_path):
    labels = pd.DataFrame({"path": ["img00005.png", "img00000.png"], "label": ["five", "zero"]})
    few = store.select(["img00007.png", "img00000.png", "img00005.png"]).join(labels)
    assert few.images["label"].dropna().to_dict() == {
        store.images.index[store.images["path"] == name][0]: label for name, label in labels.to_numpy().tolist()
    }
    assert (few.image("img00005.png")["label"].item(), few.image("img00000.png")["label"].item()) == ("five", "zero")
    dataset = few.dataset("31x33")
    assert dict(zip(dataset["path"].values, dataset["label"].values, strict=True))["img00005.png"] == "five"
    np.testing.assert_array_equal(few.pooled().to_numpy(), store.pooled().loc[few.pooled().index].to_numpy())
    few.to_parquet(tmp_path / "few.parquet")
    read = pd.read_parquet(tmp_path / "few.parquet")
    assert read["path"].tolist() == named(few)
    assert read.set_index("path")["label"].dropna().to_dict() == {"img00005.png": "five", "img00000.png": "zero"}
    assert read.set_index("path")["conv1_mean_0"].to_dict() == pytest.approx(store.pooled()["conv1_mean_0"][named(few)].to_dict())


@pytest.mark.parametrize(
    ("choose", "expected"),
    [
        (lambda s: s.select(3), "images cannot be selected by a int: give a boolean Series"),
        (lambda s: s.select(colour="red"), r"have no column 'colour' to be selected by; they have 'path', .*: give one of"),
        (lambda s: s.select(status="dome"), "has no images of status 'dome': give one of 'pending', 'done', 'quarantined'"),
        (lambda s: s.select(["img0000.png"]), r"1 of 1 paths are not among .* 'img0000\.png': .*; did you mean 'img0000"),
        (
            lambda s: s.select(status="done").image("bad.png"),
            "is an image of .*, but none of the 10 of this selection: ask the whole",
        ),
        (lambda s: s.pooled([]), r"no layer of .*f\.zarr was chosen: name at least one of conv1, or leave the layers out"),
        (lambda s: s.nearest("img00000.png", layer=[]), "no layer of .* was chosen"),
        (lambda s: s.image("img00000.png", []), "no layer of .* was chosen"),
        (lambda s: s.map_images(np.mean, layer=""), "has no layer ''; it has conv1"),
        (lambda s: s.pooled(statistics=[]), r"statistics \[\] are not what stores have: give one or some of mean, std, min, max"),
        (lambda s: s.nearest("img00000.png", 2.5), r"2\.5 neighbours were asked for, .*: give a whole number, 1 or more"),
        (lambda s: s.nearest("img00000.png", True), "True neighbours were asked for"),
        (lambda s: s.most_alike(0), "0 pairs were asked for"),
    ],
)
def test_what_cannot_be_chosen_is_refused(store, choose, expected):
    with pytest.raises(UsageError, match=expected):
        choose(store)


def test_numbers_of_numpy_are_numbers(store):
    assert len(store.nearest("img00000.png", np.int64(2))) == 2


# -- names that are not UTF-8 ----------------------------------------------------------------------------------------------------


def test_a_file_whose_name_is_not_utf8_is_found_by_it(store, path, tmp_path):
    assert store.image(BAD)["path"].item() == "caf%E9.png"
    np.testing.assert_array_equal(store.image(BAD)["conv1"], store.image("caf%E9.png")["conv1"])
    assert store.pixels(BAD).shape == store.pixels("img00001.png").shape
    assert named(store.select([BAD, "100%.png"])) == [name for name in named(store) if "%" in name]
    assert store.nearest(BAD, 1)["path"].tolist() == store.nearest("caf%E9.png", 1)["path"].tolist()
    labels = pd.DataFrame({"path": pd.Series([BAD, "100%.png"], dtype=object), "label": ["odd", "full"]})
    assert store.join(labels).image(BAD)["label"].item() == "odd"
    with pytest.raises(UsageError, match=r"'cuf\\udce9\.png' is not an image of .*; did you mean 'caf%E9\.png'"):
        store.image(os.fsdecode(b"cuf\xe9.png"))
    with pytest.raises(UsageError, match=r"'\\ud800' is not an image of"):
        store.image("\ud800")  # half a character, as JSON may have
    with pytest.raises(UsageError, match=r"1 of 1 paths are not among .* 'cuf\\udce9\.png'"):
        store.select([os.fsdecode(b"cuf\xe9.png")])


@pytest.mark.parametrize("arguments", [[BAD], ["--figure", "contact", BAD, "100%.png"]])
def test_the_command_takes_a_name_that_is_not_utf8(path, tmp_path, arguments):
    command = [
        sys.executable,
        "-c",
        "from pipeline.cli.commands import main; main()",
        "show",
        path,
        *arguments,
        "-o",
        tmp_path / "f.png",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "f.png").stat().st_size > 1000


# -- joined columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "paths",
    [["100%.png", "100%25.png"], [Path("img00000.png"), "img00000.png"], [BAD, "caf%E9.png"], ["other.png", Path("other.png")]],
)
def test_keys_that_mean_the_same_image_are_there_twice(store, paths):
    table = pd.DataFrame({"path": pd.Series([*paths, "img00001.png"], dtype=object), "label": [1, 2, 3]})
    expected = (
        r"1 lines whose 'path' was there before, .*\.png.* for instance.*; a path counts in the form in which `.images` has it"
    )
    with pytest.raises(UsageError, match=expected):
        store.join(table)


def test_integers_keep_their_digits(store, path, tmp_path):
    paths = named(store)
    everything = pd.DataFrame({"path": paths, "id": [BIG] * 11, "score": [0.5] * 11, "ok": [True] * 11})
    joined = store.join(everything)
    image = joined.image("img00000.png")
    assert (image["id"].item(), image["id"].dtype, image["score"].item(), image["ok"].dtype) == (BIG, np.int64, 0.5, bool)
    assert joined.dataset("50x60")["id"].values.tolist() == [BIG] * 5
    some = everything.iloc[:3].assign(few=np.arange(3, dtype=np.uint8))
    partly = store.join(some)
    assert partly.images[["id", "ok", "few", "score"]].dtypes.astype(str).tolist() == ["Int64", "boolean", "UInt8", "float64"]
    assert (partly.images["id"].isna().sum(), partly.images["id"].tolist()[:3]) == (8, [BIG] * 3)
    assert partly.image(paths[1])["id"].item() == BIG
    assert np.isnan(partly.image(paths[-2])["id"].item())
    name = partly.images["class"][0]
    dataset = partly.dataset(name)
    assert (dataset["id"].dtype, dataset["few"].dtype, dataset["ok"].dtype) == (object, float, object)
    assert dataset["id"].values[:3].tolist() == [BIG] * 3
    assert np.isnan(dataset["few"].values[3:]).all()
    assert partly.select(paths[:2]).dataset(name)["few"].dtype == np.uint8
    partly.to_parquet(tmp_path / "f.parquet")
    read = pd.read_parquet(tmp_path / "f.parquet")
    assert (read["id"].tolist()[:3], str(read["id"].dtype), str(read["ok"].dtype)) == ([BIG] * 3, "Int64", "boolean")
    assert named(partly.select(id=BIG)) == paths[:3]


def test_integers_keep_their_digits_beside_rows_that_left(store, path, tmp_path):
    shutil.copytree(path, tmp_path / "f.zarr")
    changed = Store(tmp_path / "f.zarr")
    changed.commit("50x60", np.arange(1), {"status": np.array([Status.REMOVED], np.uint8)})
    ids = pd.DataFrame({"path": named(store), "id": BIG})
    values = open_store(tmp_path / "f.zarr").join(ids).dataset("50x60")["id"].values
    assert np.isnan(values[0])
    assert values[1:].tolist() == [BIG] * 4


def test_what_matched_is_said(store, caplog):
    with caplog.at_level(logging.INFO, "pipeline.analysis.selection"):
        joined = store.join(pd.DataFrame({"path": ["img00000.png", "none.png"], "label": ["a", "b"]}))
    assert "1 of 11 images matched; 1 of 2 lines of the table match no image" in caplog.text
    assert joined.joined == {"label": 1}
    by_class = store.join(pd.DataFrame({"large": [True]}, index=pd.Index(["50x60"], name="class")), on="class")
    assert by_class.images["large"].sum() == 5


@pytest.mark.parametrize(
    ("table", "on", "expected"),
    [
        ([1], "path", "a table to be joined is a pandas DataFrame, and this is a list: make one"),
        (pd.DataFrame({"file": ["a"]}), "path", "has no column 'path' to match images by; it has 'file': give `on=` one"),
        (pd.DataFrame({"file": ["a"]}), "file", "have no column 'file' to match a table by; they have 'path'"),
        (pd.DataFrame({"path": ["a"], 3: [1]}), "path", "need names that are text, and 3 is none: rename them"),
        (pd.DataFrame({"path": ["a"], "conv1_x": [1]}), "path", r"uses itself, or that are there twice: 'conv1_x'; rename"),
        (
            pd.DataFrame({"path": ["/a.png"], "x": [1]}),
            "path",
            r"none of the 11 images .* matches .*: its 'path' begins with '/a\.png'",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(store, table, on, expected):
    with pytest.raises(UsageError, match=expected):
        store.join(table, on)


# -- what goes wrong beside them -------------------------------------------------------------------------------------------------


def test_an_image_that_was_done_after_the_table_was_read_has_no_neighbours(path, tmp_path):
    shutil.copytree(path, tmp_path / "f.zarr")
    changed = Store(tmp_path / "f.zarr")
    changed.commit("50x60", np.arange(1), {"status": np.array([Status.PENDING], np.uint8)})
    store = open_store(tmp_path / "f.zarr")
    name = store.images.query("status == 'pending'")["path"].item()
    changed.commit("50x60", np.arange(1), {"status": np.array([Status.DONE], np.uint8)})
    with pytest.raises(
        UsageError, match=r"has no finite pooled values in .*f\.zarr as it was when it was first read: open the store"
    ):
        store.nearest(name)
    assert len(open_store(tmp_path / "f.zarr").nearest(name)) == 5


def test_a_parquet_file_that_cannot_be_written_is_refused(store, tmp_path, monkeypatch):
    with pytest.raises(
        UsageError, match=r"s3://b/f\.parquet is a URL, and Parquet files are written to this machine's folders only"
    ):
        store.to_parquet("s3://b/f.parquet")
    with pytest.raises(UsageError, match=r"f\.parquet cannot be written .*: check its folder, permissions and space"):
        store.to_parquet(tmp_path / "none" / "f.parquet")
    mixed = pd.DataFrame({"path": ["img00000.png", "img00001.png"], "label": pd.Series([1, "a"], dtype=object)})
    with pytest.raises(UsageError, match=r"the table cannot be written to .*: a joined column may hold values of several kinds"):
        store.join(mixed).to_parquet(tmp_path / "f.parquet")
    table = pd.DataFrame({"a": [1]})  # made here: with pyarrow installed pandas imports it now and then
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'featuremaps\[parquet\]'"):
        write_parquet(table, tmp_path / "f.parquet")
    assert list(tmp_path.iterdir()) == []
