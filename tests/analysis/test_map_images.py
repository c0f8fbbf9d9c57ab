from __future__ import annotations

import tracemalloc

import dask
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import open_store
from pipeline.analysis import map_images
from pipeline.analysis.map_images import split
from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError, UsageError
from tests.conftest import make_images

pytestmark = pytest.mark.cluster

SIZES = [(50, 60), (70, 40), (31, 33)]
LAYERS = [{"filters": 3, "kernel": 5, "pool": 2, "activation": "tanh"}, {"filters": 2, "kernel": [3, 1]}]


@pytest.fixture(scope="module")
def folder(client, tmp_path_factory):
    """Stores of twelve images: of three exact classes with one layer, and of one padded class with two."""
    folder = tmp_path_factory.mktemp("map_images")
    source = make_images(folder / "source", 12, SIZES)
    run_job(make_job({"source": str(source), "store": str(folder / "plain.zarr"), "dtype": "uint8"}), client)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.store.layout.assign_classes.__defaults__", (0,))
        extractor = {"layers": LAYERS, "outputs": ["conv1", "conv2"]}
        run_job(make_job({"source": str(source), "store": str(folder / "padded.zarr"), "extractor": extractor}), client)
    return folder


@pytest.fixture
def threads():
    """Dask's threads, as in a notebook without a cluster."""
    with dask.config.set(scheduler="threads"):
        yield


def by_hand(store, layer, function):
    done = store.images[store.images["status"] == "done"]
    return [function(store.image(path)[layer].values) for path in done["path"]]


@pytest.mark.parametrize("where", ["threads", "the client"])
@pytest.mark.parametrize(("name", "layer"), [("plain", "conv1"), ("padded", "conv1"), ("padded", "conv2")])
def test_the_function_gets_every_images_maps_as_image_gives_them(folder, client, name, layer, where):
    store = open_store(folder / f"{name}.zarr")
    with dask.config.set(scheduler="threads") if where == "threads" else dask.config.set({}):
        found = store.map_images(lambda maps: maps.mean((1, 2)), layer=layer)
    assert found.index.tolist() == store.images["path"].tolist()
    assert found.index.name == "path"
    np.testing.assert_array_equal(found.to_numpy(), by_hand(store, layer, lambda maps: maps.mean((1, 2))))


def test_numbers_make_a_series_arrays_and_dicts_a_table(folder, threads):
    store = open_store(folder / "plain.zarr")
    series = store.map_images(lambda maps: maps.max())
    assert isinstance(series, pd.Series)
    assert series.dtype == np.float32
    assert store.map_images(lambda maps: int((maps > 0.5).sum())).dtype == np.int64
    assert list(store.map_images(lambda maps: maps.max((1, 2))).columns) == [0, 1]
    table = store.map_images(lambda maps: {"height": maps.shape[1], "largest": maps.max(), "wide": maps.shape[2] > maps.shape[1]})
    assert table.dtypes.astype(str).tolist() == ["int64", "float32", "bool"]
    assert table["height"].tolist() == (store.images["input_height"] - 8).tolist()
    np.testing.assert_array_equal(table["largest"], series)


def test_a_selection_is_what_is_mapped(folder, threads):
    store = open_store(folder / "plain.zarr")
    few = store.select(["img00009.png", "img00003.png", "img00004.png"])
    assert few.map_images(np.mean).index.tolist() == few.images["path"].tolist()
    pd.testing.assert_series_equal(few.map_images(np.mean), store.map_images(np.mean)[few.images["path"]])
    assert store.select(status="pending").map_images(np.mean).tolist() == []


def test_a_function_may_change_its_maps(folder, threads):
    def spoil(maps):
        maps[:] = 0
        return maps.sum()

    store = open_store(folder / "plain.zarr")
    assert store.map_images(spoil).tolist() == [0] * 12
    assert store.map_images(np.sum).gt(0).all()


@pytest.mark.parametrize("where", ["threads", "the client"])
def test_what_the_function_raises_names_the_image(folder, client, where):
    store = open_store(folder / "plain.zarr")
    path = store.images["path"][7]
    height = int(store.images["input_height"][7])
    few = store.select(input_height=[height]).select([path, store.images["path"][0]] if height == 31 else [path])

    def fail(maps):
        raise ZeroDivisionError("a slip of the user's")

    chosen = dask.config.set(scheduler="threads") if where == "threads" else dask.config.set({})
    with chosen, pytest.raises(ZeroDivisionError, match="a slip of the user's") as raised:
        few.map_images(fail)
    assert any(repr(path) in note for note in raised.value.__notes__)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            lambda maps: maps.mean((0, 1)),
            r"gave an array of 25 for 'img.*' and an array of .* for 'img.*', which do not make one table",
        ),
        (lambda maps: maps.mean() if maps.shape[1] == 23 else {"a": 1}, r"gave a number for .* and a dict of \['a'\] for"),
        (lambda maps: {str(maps.shape): 1}, r"gave a dict of \['\(2, 23, 25\)'\] for .* which do not make one table"),
        (lambda maps: maps, r"gave an array of 3 dimensions \(2, .*\) for 'img.*', where it is to give a number"),
        (lambda maps: None, "gave NoneType for 'img.*', where it is to give a number"),
        (lambda maps: "large", "gave str for 'img.*', where it is to give a number"),
        (lambda maps: [1, "a"], "gave list for 'img.*', where it is to give a number"),
        (lambda maps: [[1], [1, 2]], "gave list for 'img.*', where it is to give a number"),
    ],
)
def test_results_that_make_no_table_are_refused(folder, threads, function, expected):
    with pytest.raises(UsageError, match=expected):
        open_store(folder / "plain.zarr").map_images(function)


def test_dicts_of_another_order_are_the_same(folder, threads):
    store = open_store(folder / "plain.zarr")
    table = store.map_images(lambda maps: {"a": 1, "b": 2} if maps.shape[1] == 23 else {"b": 2, "a": 1})
    assert (table["a"].tolist(), table["b"].tolist()) == ([1] * 12, [2] * 12)


def test_a_layer_is_to_be_named_where_there_are_several(folder):
    with pytest.raises(UsageError, match=r"padded\.zarr has maps of conv1, conv2: say of which, for instance layer='conv1'"):
        open_store(folder / "padded.zarr").map_images(np.mean)


def test_damaged_and_missing_maps_are_named(folder, tmp_path, threads, client):
    run_job(make_job({"source": str(folder / "source"), "store": str(tmp_path / "f.zarr")}), client)
    for chunk in (tmp_path / "f.zarr" / "50x60" / "conv1").glob("c.*"):
        chunk.write_bytes(chunk.read_bytes()[:-5])
    expected = (
        r"maps of 'img00000\.png' to 'img00009\.png' in .* cannot be read \(.*an object of class 50x60 is damaged or out of reach"
    )
    with pytest.raises(FeaturemapsError, match=expected):
        open_store(tmp_path / "f.zarr").map_images(np.mean)
    for chunk in (tmp_path / "f.zarr" / "50x60" / "conv1").glob("c.*"):
        chunk.unlink()
    with pytest.raises(
        FeaturemapsError, match=r"cannot be read \(the ledger says done, but there are no values: an object is missing"
    ):
        open_store(tmp_path / "f.zarr").map_images(np.mean)


@pytest.fixture(scope="module")
def large(client, tmp_path_factory):
    """A store of 24 images of 500 x 500, whose maps take 2 MB each."""
    folder = tmp_path_factory.mktemp("large")
    source = make_images(folder / "source", 24, [(508, 508)])
    run_job(make_job({"source": str(source), "store": str(folder / "f.zarr")}), client)
    return open_store(folder / "f.zarr")


@pytest.mark.parametrize(
    "function",
    [
        lambda maps: maps[0, 0],
        lambda maps: {"first": maps[0, 0], "nested": [(maps[0, 1], 1)]},
        lambda maps: pd.Series(maps[0, 0]),
        lambda maps: np.broadcast_to(maps[:, 0, 0], (2,)),
    ],
    ids=["an array", "a dict", "a series", "a broadcast"],
)
def test_results_that_are_parts_of_the_maps_do_not_keep_them_in_memory(large, monkeypatch, function):
    image_bytes = 4 * 2 * 500 * 500
    monkeypatch.setattr(map_images, "TASK_BYTES", 2 * image_bytes)
    tracemalloc.start()
    with dask.config.set(scheduler="synchronous"):
        large.map_images(function)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * image_bytes  # two images stored and decoded, and what decoding takes; all decoded are 24


def test_results_that_are_parts_of_the_maps_are_right(folder, threads):
    store = open_store(folder / "plain.zarr")
    rows = store.map_images(lambda maps: maps[0, 0, :25])
    np.testing.assert_array_equal(rows.to_numpy(), by_hand(store, "conv1", lambda maps: maps[0, 0, :25]))
    table = store.map_images(lambda maps: {"row": maps[0, 0], "n": 1})
    assert [row.tolist() for row in table["row"]] == [row.tolist() for row in by_hand(store, "conv1", lambda maps: maps[0, 0])]


# -- how the work is cut ---------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.sets(st.integers(0, 200)), st.integers(1, 60), st.integers(1, 3 * map_images.TASK_BYTES))
def test_a_task_holds_rows_of_one_shard_within_its_bytes(rows, shard_rows, row_bytes):
    rows = np.array(sorted(rows), int)
    parts = split(rows, shard_rows, row_bytes)
    assert np.concatenate([np.empty(0, int), *parts]).tolist() == list(range(len(rows)))
    for part in parts:
        assert len({row // shard_rows for row in rows[part].tolist()}) == 1
        assert len(part) == 1 or len(part) * row_bytes <= map_images.TASK_BYTES


def test_a_shard_in_pieces_gives_the_same(folder, threads, monkeypatch):
    store = open_store(folder / "plain.zarr")
    whole = store.map_images(lambda maps: maps.std((1, 2)))
    monkeypatch.setattr(map_images, "TASK_BYTES", 4 * 2 * 42 * 52 * 2)  # two images of 50x60
    pd.testing.assert_frame_equal(store.map_images(lambda maps: maps.std((1, 2))), whole)
    scattered = store.select([f"img{i:05d}.png" for i in (0, 6, 9)])
    monkeypatch.undo()
    pd.testing.assert_frame_equal(scattered.map_images(lambda maps: maps.std((1, 2))), whole.loc[scattered.images["path"]])
