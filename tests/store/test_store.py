from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import tensorstore
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import FeaturemapsError, StaleWriterError, UsageError
from pipeline.extract.quantise import dequantise, quantisation
from pipeline.store import folder, schema
from pipeline.store.create import create_store, prepare_folder
from pipeline.store.layout import ClassLayout, LayerLayout, class_layout, class_name
from pipeline.store.lock import LOCK_TTL_S, require_lock
from pipeline.store.objects import free_bytes, place, put, put_parts, read_json
from pipeline.store.schema import (
    COLUMN_ROWS,
    EXTRACTOR,
    FORMAT,
    REJECTED,
    RUNS,
    STATISTICS,
    Status,
    StoredLayer,
    StoreSpec,
    difference,
    pooled_chunk,
    stack,
)
from pipeline.store.store import Store, is_store, read_maps, write_maps

DTYPES = ("float32", "float16", "uint16", "uint8")
RUN = "20261123T000000Z-0"
SIZE = (12, 14)
GROUP = class_name(SIZE)
MAPS = {"conv1": (2, 10, 12), "conv2": (3, 8, 10)}
WEIGHTS = {
    "conv1_weight": np.arange(54, dtype=np.float32).reshape(2, 3, 3, 3),
    "conv1_bias": np.array([0.5, -1.5], np.float32),
    "conv2_weight": np.ones((3, 2, 3, 3), np.float32),
    "conv2_bias": np.zeros(3, np.float32),
}
DOCS = Path(__file__).parents[2] / "docs" / "store-format.md"
CLASS_COLUMNS = {
    "path": "string",
    "source_height": "int32",
    "source_width": "int32",
    "input_height": "int32",
    "input_width": "int32",
    "size_bytes": "int64",
    "fingerprint": "string",
    "digest": "string",
    "maps_digest": "string",
    "error": "string",
    "status": "uint8",
}
REJECTED_COLUMNS = ("path", "size_bytes", "fingerprint", "error", "status")


# -- stores made by hand ---------------------------------------------------------------------------------------------------------


def spec_of(dtype: str = "float32") -> StoreSpec:
    q = quantisation((0.0, 1.0), dtype)
    layers = tuple(
        StoredLayer(name, channels, dtype, q.scale_factor, q.add_offset, q.fill_value, q.error_bound)
        for name, (channels, _, _) in MAPS.items()
    )
    extractor = {"layers": [{"filters": 2}, {"filters": 3}], "outputs": list(MAPS), "channels": 3, "sha256": "e" * 64}
    decode = {"color": "rgb", "pixel_limit": 9, "formats": ["PNG"], "decoder": "pillow", "sha256": "d" * 64}
    return StoreSpec("/photos/*.jpg", "/photos", dtype, extractor, decode, layers, "0.1.0", "0.1.0")


def layout_of(dtype: str = "float32") -> ClassLayout:
    """Shards of 4 rows: conv1 in inner chunks of 2, conv2 in plain chunks that are cut in y and x as well."""
    itemsize = np.dtype(dtype).itemsize
    first = LayerLayout("conv1", *MAPS["conv1"], itemsize, 2, 10, 12)
    return ClassLayout(SIZE, 4, (first, LayerLayout("conv2", *MAPS["conv2"], itemsize, 4, 3, 4)))


def listed(start: int, n: int) -> dict[str, np.ndarray]:
    """What the driver appends."""
    rows = np.arange(start, start + n)
    return {
        "path": stack([f"photos/ä {i}\n%25.jpg" for i in rows]),
        "size_bytes": rows * 1_000_000_000_000,
        "fingerprint": stack([f"{i}:{i}" for i in rows]),
        **{name: (rows + k).astype(np.int32) for k, name in enumerate(CLASS_COLUMNS) if name.endswith(("height", "width"))},
    }


def rejected(start: int, n: int) -> dict[str, np.ndarray]:
    columns = {name: values for name, values in listed(start, n).items() if name in REJECTED_COLUMNS}
    return columns | {"error": stack([f"truncated: {i}" for i in range(start, start + n)]), "status": np.full(n, 2, np.uint8)}


def computed(layer: str, rows) -> np.ndarray:
    """Maps in [0, 1], float32: (n, channel, y, x); each row is its own."""
    maps = [np.random.default_rng([len(layer), int(layer[-1]), int(row)]).random(MAPS[layer], np.float32) for row in rows]
    return np.array(maps, np.float32).reshape(-1, *MAPS[layer])


def as_stored(values: np.ndarray, layer: StoredLayer) -> np.ndarray:
    if layer.dtype.startswith("float"):
        return values.astype(layer.dtype)
    return np.round((values.astype(np.float64) - layer.add_offset) / layer.scale_factor).astype(layer.dtype)


def reported(rows, status: Status = Status.DONE) -> dict[str, np.ndarray]:
    """What the driver commits; the order is the wrong one on purpose."""
    done = status is Status.DONE
    columns = {
        "status": np.full(len(rows), status, np.uint8),
        "maps_digest": stack([f"m{row}" if done else "" for row in rows]),
        "digest": stack([f"d{row}" for row in rows]),
        "error": stack(["" if done else f"missing: {row}" for row in rows]),
    }
    for layer in MAPS:
        for k, statistic in enumerate(STATISTICS):
            values = computed(layer, rows)[:, :, k, k] if done else np.full((len(rows), MAPS[layer][0]), np.nan, np.float32)
            columns[f"{layer}_{statistic}"] = values
    return columns


def make_store(path: Path, dtype: str = "float32") -> Store:
    prepare_folder(path)
    hold(path)
    return create_store(path, spec_of(dtype), WEIGHTS)


def hold(path: Path, run_id: str = RUN) -> None:
    (path / RUNS / "lock.json").write_text(json.dumps({"run_id": run_id}))


def write_rows(path: Path, dtype: str, start: int, stop: int, skip=()) -> None:
    """Write all layers of the rows of one shard; ``skip`` stays fill."""
    layout, spec = layout_of(dtype), spec_of(dtype)
    for layer, stored in zip(layout.layers, spec.layers, strict=True):
        block = as_stored(computed(layer.name, range(start, stop)), stored)
        for row in skip:
            block[row - start] = stored.fill_value
        write_maps(path, RUN, layout, layer, start, block, stored.fill_value)


def fill_store(path: Path, dtype: str = "float32") -> Store:
    """Six rows: 0 to 3 done, a whole shard; 4 quarantined; 5 pending; and two rejected."""
    store = make_store(path, dtype)
    store.create_class(layout_of(dtype), "exact", listed(0, 6))
    write_rows(path, dtype, 0, 4)
    store.commit(GROUP, np.arange(4), reported(np.arange(4)))
    store.commit(GROUP, np.array([4]), reported([4], Status.QUARANTINED))
    store.append(REJECTED, rejected(100, 2))
    return store


@pytest.fixture
def small_chunks(monkeypatch):
    """Columns of several chunks, also the pooled ones."""
    monkeypatch.setattr(schema, "COLUMN_ROWS", 4)
    monkeypatch.setattr(schema, "MAX_COLUMN_BYTES", 24)  # conv1: 3 rows, conv2: 2


def rows_of(path: Path) -> dict[tuple[str, int], dict[str, object]]:
    """Every row that a reader sees: its columns and the bytes of its maps."""
    store, found = Store(path), {}
    for group, names in [*((c.name, tuple(CLASS_COLUMNS)) for c in store.classes.values()), (REJECTED, REJECTED_COLUMNS)]:
        columns = {name: store.column(group, name) for name in names}
        layers = MAPS if group != REJECTED else {}
        pooled = {
            f"{layer}_{statistic}": store.column(group, f"{layer}_{statistic}") for layer in layers for statistic in STATISTICS
        }
        maps = {layer: np.asarray(store.array(group, layer)[: store.length(group)]) for layer in layers}
        for row in range(store.length(group)):
            values = {name: column[row] for name, column in columns.items()}
            arrays = {name: values_[row].tobytes() for name, values_ in (pooled | maps).items()}
            found[group, row] = values | arrays
    return found


def tree(path: Path) -> dict[str, bytes]:
    """Every file of a store but the lock."""
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("lock."))
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


# -- (a) plain Zarr, Xarray and TensorStore --------------------------------------------------------------------------------------


@pytest.fixture(params=DTYPES)
def filled(request, tmp_path) -> tuple[Path, str]:
    fill_store(tmp_path / "features.zarr", request.param)
    return tmp_path / "features.zarr", request.param


@pytest.mark.filterwarnings("error")
def test_plain_zarr_opens_the_store_without_a_warning(filled):
    path, dtype = filled
    root = zarr.open_group(str(path), mode="r", zarr_format=3)
    assert sorted(name for name, _ in root.members()) == [GROUP, EXTRACTOR, REJECTED, RUNS]
    about = root.attrs["featuremaps"]
    assert set(about) == {
        *("format", "source", "source_root", "dtype", "extractor", "decode", "layers", "created_version", "written_version"),
        "sha256",
    }
    assert (about["format"], about["dtype"], about["source_root"]) == (1, dtype, "/photos")
    assert dict(root[GROUP].attrs) == {"shape_class": {"height": 12, "width": 14, "kind": "exact", "shard_rows": 4}}
    pooled = {f"{layer}_{statistic}" for layer in MAPS for statistic in STATISTICS}
    assert {name for name, _ in root[GROUP].members()} == {*CLASS_COLUMNS, *MAPS, *pooled}
    assert {name for name, _ in root[REJECTED].members()} == set(REJECTED_COLUMNS)
    assert dict(root[EXTRACTOR].attrs) == {"sha256": "e" * 64}
    for name, values in WEIGHTS.items():
        np.testing.assert_array_equal(root[EXTRACTOR][name][...], values)
        assert root[EXTRACTOR][name].dtype == np.float32
    assert list(root[RUNS].attrs) == []


def test_every_array_has_the_type_dimensions_chunks_fill_and_codecs_of_the_format(filled):
    path, dtype = filled
    group = zarr.open_group(str(path), mode="r")[GROUP]
    for name, kind in CLASS_COLUMNS.items():
        document = read_json(path / GROUP / name / "zarr.json")
        assert (document["data_type"], document["dimension_names"], document["shape"]) == (kind, ["image"], [6])
        assert document["chunk_grid"]["configuration"]["chunk_shape"] == [16_384]
        assert document["fill_value"] == ("" if kind == "string" else 0)
    for name, (channels, height, width) in MAPS.items():
        array, axes = group[name], [f"{name}_{axis}" for axis in ("channel", "y", "x")]
        assert array.dtype == np.dtype(dtype)
        assert array.shape == (6, channels, height, width)
        assert list(array.metadata.dimension_names) == ["image", *axes]
        assert np.isnan(array.fill_value) if dtype.startswith("float") else array.fill_value == 0
        for statistic in STATISTICS:
            pooled = group[f"{name}_{statistic}"]
            assert (pooled.dtype, pooled.shape, pooled.chunks) == (np.float32, (6, channels), (16_384, channels))
            assert list(pooled.metadata.dimension_names) == ["image", axes[0]]
            assert np.isnan(pooled.fill_value)
    assert (group["conv1"].shards, group["conv1"].chunks) == ((4, 2, 10, 12), (2, 2, 10, 12))
    assert (group["conv2"].shards, group["conv2"].chunks) == (None, (4, 3, 3, 4))
    for document in path.rglob("zarr.json"):
        content = read_json(document)
        if content["node_type"] == "array":
            assert content["chunk_key_encoding"]["configuration"]["separator"] == "."
            codecs = content["codecs"]
            inner = codecs[0]["configuration"]["codecs"] if codecs[0]["name"] == "sharding_indexed" else codecs
            assert [codec["name"] for codec in inner][1:] == ["blosc", "crc32c"]


def test_every_object_costs_one_inode(filled):
    path, _ = filled
    for document in path.glob("*/*/zarr.json"):
        names = sorted(entry.name for entry in document.parent.iterdir())
        assert all(entry.is_file() for entry in document.parent.iterdir())
        assert all(re.fullmatch(r"zarr\.json|c(\.\d+)+", name) for name in names)
    assert sorted(entry.name for entry in (path / GROUP / "conv1").iterdir()) == ["c.0.0.0.0", "zarr.json"]


def test_plain_zarr_reads_the_ledger_and_the_maps_as_stored(filled):
    path, dtype = filled
    group = zarr.open_group(str(path), mode="r")[GROUP]
    assert group["path"][...].tolist() == listed(0, 6)["path"].tolist()
    assert group["size_bytes"][...].tolist() == [i * 10**12 for i in range(6)]
    assert group["status"][...].tolist() == [1, 1, 1, 1, 2, 0]
    assert group["error"][...].tolist() == ["", "", "", "", "missing: 4", ""]
    assert group["maps_digest"][...].tolist() == ["m0", "m1", "m2", "m3", "", ""]
    for layer in spec_of(dtype).layers:
        maps = group[layer.name][...]
        np.testing.assert_array_equal(maps[:4], as_stored(computed(layer.name, range(4)), layer))
        np.testing.assert_array_equal(maps[4:], np.full_like(maps[4:], layer.fill_value))
        np.testing.assert_array_equal(group[f"{layer.name}_std"][:4], computed(layer.name, range(4))[:, :, 1, 1])
        assert np.isnan(group[f"{layer.name}_std"][4:]).all()


def test_xarray_opens_a_class_and_decodes_it_by_itself(filled):
    path, dtype = filled
    dataset = xr.open_zarr(path, group=GROUP, consolidated=False)
    assert dict(dataset.sizes) == {
        "image": 6,
        **{f"conv1_{axis}": n for axis, n in zip(("channel", "y", "x"), MAPS["conv1"], strict=True)},
        **{f"conv2_{axis}": n for axis, n in zip(("channel", "y", "x"), MAPS["conv2"], strict=True)},
    }
    for layer in spec_of(dtype).layers:
        maps = dataset[layer.name].values
        bound = layer.error_bound + 1e-6
        np.testing.assert_allclose(maps[:4], computed(layer.name, range(4)), rtol=0, atol=bound)
        assert np.isnan(maps[4:]).all()
        assert dataset[layer.name].attrs["error_bound"] == layer.error_bound
        if not dtype.startswith("float"):
            encoding = dataset[layer.name].encoding
            found = encoding["scale_factor"], encoding["add_offset"], encoding["_FillValue"]
            assert found == (layer.scale_factor, layer.add_offset, 0)
    assert dataset["path"].values.tolist() == listed(0, 6)["path"].tolist()
    assert dataset["status"].values.tolist() == [1, 1, 1, 1, 2, 0]
    assert dataset["status"].dtype == np.uint8
    assert list(dataset["status"].attrs["flag_values"]) == [0, 1, 2, 3, 4]
    assert dataset["status"].attrs["flag_meanings"].split() == ["pending", "done", "quarantined", "removed", "superseded"]


def test_xarray_opens_the_rejected_images(filled):
    path, _ = filled
    dataset = xr.open_zarr(path, group=REJECTED, consolidated=False)
    assert dataset["error"].values.tolist() == ["truncated: 100", "truncated: 101"]
    assert dataset["status"].values.tolist() == [2, 2]


def test_padding_reads_as_nan(tmp_path):
    """A smaller image in a padded class leaves fill to the right and below."""
    for dtype in DTYPES:
        path = tmp_path / f"{dtype}.zarr"
        store = make_store(path, dtype)
        store.create_class(layout_of(dtype), "padded", listed(0, 1))
        layer, stored = layout_of(dtype).layers[0], spec_of(dtype).layers[0]
        block = np.full((1, *MAPS["conv1"]), stored.fill_value, dtype)
        block[:, :, :7, :5] = as_stored(computed("conv1", [0]), stored)[:, :, :7, :5]
        write_maps(path, RUN, layout_of(dtype), layer, 0, block, stored.fill_value)
        maps = xr.open_zarr(path, group=GROUP, consolidated=False)["conv1"].values[0]
        assert not np.isnan(maps[:, :7, :5]).any()
        assert np.isnan(maps[:, 7:]).all()
        assert np.isnan(maps[:, :, 5:]).all()


def test_tensorstore_reads_every_array_of_numbers(filled):
    path, dtype = filled
    for layer in spec_of(dtype).layers:  # conv1 is sharded, conv2 is not
        found = open_with_tensorstore(path / GROUP / layer.name)
        assert found.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(found[:4], as_stored(computed(layer.name, range(4)), layer))
        np.testing.assert_array_equal(found[4:], np.full_like(found[4:], layer.fill_value))
        mean = open_with_tensorstore(path / GROUP / f"{layer.name}_mean")
        np.testing.assert_array_equal(mean[:4], computed(layer.name, range(4))[:, :, 0, 0])
        assert np.isnan(mean[4:]).all()
    assert open_with_tensorstore(path / GROUP / "status").tolist() == [1, 1, 1, 1, 2, 0]
    assert open_with_tensorstore(path / GROUP / "size_bytes").tolist() == [i * 10**12 for i in range(6)]
    assert open_with_tensorstore(path / GROUP / "input_width").tolist() == [i + 4 for i in range(6)]
    for name, values in WEIGHTS.items():
        np.testing.assert_array_equal(open_with_tensorstore(path / EXTRACTOR / name), values)


def open_with_tensorstore(folder: Path) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


def test_plain_zarr_reads_columns_and_maps_of_several_chunks(tmp_path, small_chunks):
    store = fill_store(tmp_path / "s")
    store.append(GROUP, listed(6, 9))
    group = zarr.open_group(str(tmp_path / "s"), mode="r")[GROUP]
    assert (group["path"].chunks, group["conv1_mean"].chunks, group["conv2_mean"].chunks) == ((4,), (3, 2), (2, 3))
    assert group["path"][...].tolist() == store.column(GROUP, "path").tolist() == listed(0, 15)["path"].tolist()
    np.testing.assert_array_equal(group["conv2_max"][...], store.column(GROUP, "conv2_max"))
    np.testing.assert_array_equal(group["conv2_max"][:4], computed("conv2", range(4))[:, :, 3, 3])
    assert sorted(p.name for p in (tmp_path / "s" / GROUP / "path").glob("c.*")) == ["c.0", "c.1", "c.2", "c.3"]


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, (16_384, 1)), (64, (16_384, 64)), (65, (16_131, 65)), (512, (2048, 512)), (2**21, (1, 2**21))]
)
def test_a_chunk_of_a_pooled_column_is_at_most_4_mib(channels, expected):
    assert pooled_chunk(channels) == expected


def test_what_is_read_back_of_a_store_is_what_it_was_made_with(filled):
    path, dtype = filled
    store = Store(path)
    assert replace(store.spec, layers=()) == replace(spec_of(dtype), layers=())
    assert repr(store.spec.layers) == repr(spec_of(dtype).layers)  # NaN does not equal itself
    (shape_class,) = store.classes.values()
    assert (shape_class.name, shape_class.size, shape_class.length, shape_class.kind) == (GROUP, SIZE, 6, "exact")
    assert shape_class.layout == layout_of(dtype)
    assert store.n_rejected == store.length(REJECTED) == 2
    assert {name: values.tolist() for name, values in store.weights().items()} == {k: v.tolist() for k, v in WEIGHTS.items()}
    layer = store.spec.layers[0]
    decoded = dequantise(np.asarray(store.array(GROUP, "conv1")[...]), layer)
    np.testing.assert_allclose(decoded[:4], computed("conv1", range(4)), rtol=0, atol=layer.error_bound + 1e-7)
    assert np.isnan(decoded[4:]).all()


# -- the driver's writing --------------------------------------------------------------------------------------------------------


def test_appended_rows_are_pending_and_have_no_maps(tmp_path, small_chunks):
    store = fill_store(tmp_path / "s")
    before = rows_of(tmp_path / "s")
    assert store.append(GROUP, listed(6, 5)).tolist() == [6, 7, 8, 9, 10]
    assert store.length(GROUP) == Store(tmp_path / "s").length(GROUP) == 11
    after = rows_of(tmp_path / "s")
    assert before.items() <= after.items()
    for row in range(6, 11):
        assert after[GROUP, row]["status"] == Status.PENDING
        assert after[GROUP, row]["digest"] == after[GROUP, row]["error"] == ""
        assert np.isnan(np.frombuffer(after[GROUP, row]["conv1"], np.float32)).all()
        assert np.isnan(np.frombuffer(after[GROUP, row]["conv2_min"], np.float32)).all()
    for name in MAPS:
        assert store.array(GROUP, name).shape[0] == 11


def test_a_class_of_no_rows_can_be_read_and_appended_to(tmp_path):
    store = make_store(tmp_path / "s")
    store.create_class(layout_of(), "exact", listed(0, 0))
    store = Store(tmp_path / "s")
    assert store.length(GROUP) == 0
    assert store.column(GROUP, "path").tolist() == []
    assert store.column(GROUP, "path").dtype == object
    assert (store.column(GROUP, "status").shape, store.column(GROUP, "status").dtype) == ((0,), np.uint8)
    assert (store.column(GROUP, "conv2_mean").shape, store.column(GROUP, "conv2_mean").dtype) == ((0, 3), np.float32)
    assert store.append(GROUP, listed(0, 0)).tolist() == []
    assert store.append(GROUP, listed(0, 3)).tolist() == [0, 1, 2]
    assert store.column(GROUP, "path").tolist() == listed(0, 3)["path"].tolist()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), min_size=1, max_size=9))
def test_any_text_is_kept_as_it_is(tmp_path, small_chunks, texts):
    path = tmp_path / uuid.uuid4().hex
    store = make_store(path)
    columns = {name: values for name, values in rejected(0, len(texts)).items() if name not in {"path", "error"}}
    store.append(REJECTED, columns | {"path": stack(texts), "error": stack(texts[::-1])})
    assert Store(path).column(REJECTED, "path").tolist() == texts
    assert zarr.open_group(str(path), mode="r")[REJECTED]["error"][...].tolist() == texts[::-1]


def test_a_class_notes_that_it_holds_smaller_images(tmp_path):
    store = fill_store(tmp_path / "s")
    before = tree(tmp_path / "s")
    store.mark_padded(SIZE)
    assert store.classes[SIZE].kind == Store(tmp_path / "s").classes[SIZE].kind == "padded"
    after = tree(tmp_path / "s")
    assert {name for name in after if before.get(name) != after[name]} == {f"{GROUP}/zarr.json"}
    assert Store(tmp_path / "s").classes[SIZE].layout == layout_of()


def test_a_class_that_exists_is_never_made_anew(tmp_path):
    store = fill_store(tmp_path / "s")
    before = tree(tmp_path / "s")
    with pytest.raises(FeaturemapsError, match=r"class .*12x14 exists already: creating it again would lose its rows"):
        store.create_class(layout_of(), "exact", listed(0, 1))
    assert tree(tmp_path / "s") == before


def test_the_version_that_wrote_last_is_noted_once(tmp_path):
    store = fill_store(tmp_path / "s")
    root = tmp_path / "s" / "zarr.json"
    inode = root.stat().st_ino
    store.take_up(store.spec)
    assert root.stat().st_ino == inode
    store.take_up(replace(store.spec, written_version="0.2.0"))
    assert (Store(tmp_path / "s").spec.created_version, Store(tmp_path / "s").spec.written_version) == ("0.1.0", "0.2.0")
    assert math.isnan(Store(tmp_path / "s").spec.layers[0].fill_value)


def test_receipts_come_oldest_first_without_the_lock(tmp_path):
    store = make_store(tmp_path / "s")
    assert store.receipts() == []
    store.write_receipt("20261123T100000Z-ff", {"n_done": 2})
    store.write_receipt("20261122T100000Z-00", {"n_done": 1, "message": "ü"})
    store.write_receipt("20261123T100000Z-ff", {"n_done": 3})
    assert store.receipts() == [{"n_done": 3}, {"n_done": 1, "message": "ü"}]


def test_a_commit_writes_status_last_and_the_digest_of_the_maps_before_it(tmp_path, monkeypatch):
    store = fill_store(tmp_path / "s")
    written: list[str] = []
    monkeypatch.setattr("pipeline.store.columns.put", lambda path, data, **_: written.append(path.parent.name))
    store.commit(GROUP, np.array([5]), reported([5]))
    assert len(written) == 12
    assert written[-2:] == ["maps_digest", "status"]


def test_status_alone_can_be_committed(tmp_path):
    store = fill_store(tmp_path / "s")
    before = tree(tmp_path / "s")
    store.commit(GROUP, np.array([0, 2]), {"status": np.array([Status.REMOVED, Status.SUPERSEDED], np.uint8)})
    assert store.column(GROUP, "status").tolist() == [3, 1, 4, 1, 2, 0]
    after = tree(tmp_path / "s")
    assert {name for name in after if before[name] != after[name]} == {f"{GROUP}/status/c.0"}


def test_only_pending_done_and_quarantined_rows_stand_for_an_image():
    assert [status.is_live for status in Status] == [True, True, True, False, False]


# -- (b) crashes -----------------------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """A kill."""


@contextmanager
def crash_after(n_puts: int, *, torn: bool = False) -> Iterator[None]:
    """Let the process end at its put number ``n_puts``; ``torn`` leaves half of the object under its temporary name."""
    left, real = n_puts, folder.put

    def put_or_crash(path: Path, parts: Sequence[bytes], **options: object) -> None:
        nonlocal left
        if left == 0:
            if torn:
                data = b"".join(parts)
                path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial").write_bytes(data[: len(data) // 2])
            raise Crash
        left -= 1
        real(path, parts, **options)

    with patch.object(folder, "put", put_or_crash):
        yield


def open_or_create(path: Path) -> Store:
    """As a run does."""
    prepare_folder(path)
    return Store(path) if is_store(path) else create_store(path, spec_of(), WEIGHTS)


def take_up(store: Store, version: str) -> None:
    """As a run of that version does, with limits as wide as the store's and wider ones."""
    store.take_up(replace(store.spec, written_version=version))
    store.take_up(replace(store.spec, decode=store.spec.decode | {"pixel_limit": 99}))


def create_another_class(path: Path) -> None:
    open_or_create(path).create_class(replace(layout_of(), size=(30, 40)), "padded", listed(50, 7))


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "create_store": open_or_create,
    "create_class": create_another_class,
    "append": lambda path: open_or_create(path).append(GROUP, listed(6, 7)),
    "append_rejected": lambda path: open_or_create(path).append(REJECTED, rejected(102, 7)),
    "commit": lambda path: open_or_create(path).commit(GROUP, np.array([4, 5]), reported([4, 5])),
    "commit_removed": lambda path: open_or_create(path).commit(GROUP, np.array([0, 5]), {"status": np.array([3, 3], np.uint8)}),
    "mark_padded": lambda path: open_or_create(path).mark_padded(SIZE),
    "write_maps": lambda path: write_rows(path, "float32", 4, 6),
    "take_up": lambda path: take_up(open_or_create(path), "9.9.9"),
    "write_receipt": lambda path: open_or_create(path).write_receipt("20261123T100000Z-ff", {"n_done": 3}),
}


@pytest.mark.parametrize("torn", [False, True], ids=["before", "torn"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_at_any_put_loses_nothing_and_can_be_done_again(tmp_path, small_chunks, name, torn):
    operation, before, base = OPERATIONS[name], {}, tmp_path / "base"
    base.mkdir()
    if name != "create_store":
        fill_store(base)
        before = rows_of(base)
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(base, undisturbed)
    operation(undisturbed)
    expected, target = rows_of(undisturbed), tree(undisturbed)
    for n_puts in range(1000):
        path = tmp_path / f"{n_puts}"
        shutil.copytree(base, path)
        try:
            with crash_after(n_puts, torn=torn):
                operation(path)
        except Crash:
            if is_store(path):
                check_after_crash(before, rows_of(path), expected)
            else:
                assert name == "create_store"
            store = open_or_create(path)
            store.repair()
            operation(path)
            assert tree(path) == target, f"after a crash at put {n_puts}"
        else:
            break
    assert n_puts > (0 if name in {"mark_padded", "take_up", "write_receipt", "commit_removed"} else 5)
    assert tree(path) == target


def check_after_crash(before, found, expected) -> None:
    """Every row is the old one, or wholly the new one; a row that is not done in either is not done."""
    assert before.keys() <= found.keys() <= expected.keys()
    for key, row in found.items():
        if key not in before or row["status"] != before[key]["status"]:
            assert row == expected[key]
        elif row["status"] == Status.DONE:
            assert row == before[key]
        else:
            assert (row["path"], row["fingerprint"]) == (before[key]["path"], before[key]["fingerprint"])


def test_a_store_whose_creation_crashed_can_be_made_with_another_extractor(tmp_path):
    """Weights of the extractor that was given first must not stay."""
    for n_puts in range(1, 12):
        path = tmp_path / f"{n_puts}"
        with pytest.raises(Crash), crash_after(n_puts, torn=True):
            open_or_create(path)
        prepare_folder(path)
        store = create_store(path, spec_of(), {"conv1_bias": WEIGHTS["conv1_bias"]})
        assert list(store.weights()) == ["conv1_bias"]
        assert sorted(p.name for p in (path / EXTRACTOR).iterdir()) == ["conv1_bias", "zarr.json"]


def test_a_class_whose_creation_crashed_is_not_there_and_is_swept(tmp_path):
    store = fill_store(tmp_path / "s")
    before = tree(tmp_path / "s")
    with pytest.raises(Crash), crash_after(26, torn=True):
        store.create_class(replace(layout_of(), size=(30, 40)), "exact", listed(0, 3))
    assert list(store.classes) == list(Store(tmp_path / "s").classes) == [SIZE]
    Store(tmp_path / "s").repair()
    assert tree(tmp_path / "s") == before
    assert not (tmp_path / "s" / "30x40").exists()


def test_a_class_whose_creation_crashed_is_made_anew_in_the_same_run(tmp_path, small_chunks):
    """Without `repair` between the two, and with fewer rows: nothing of the first attempt stays."""
    layout = replace(layout_of(), size=(30, 40))
    fill_store(tmp_path / "clean").create_class(layout, "exact", listed(0, 3))
    for n_puts in (1, 20, 30, 40):
        path = tmp_path / f"{n_puts}"
        store = fill_store(path)
        with pytest.raises(Crash), crash_after(n_puts, torn=True):
            store.create_class(layout, "exact", listed(70, 17))
        store.create_class(layout, "exact", listed(0, 3))
        assert tree(path) == tree(tmp_path / "clean")


def test_a_failed_put_leaves_no_litter_and_the_old_object(tmp_path, monkeypatch):
    put(tmp_path / "o", b"old")

    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path / "o", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"o": b"old"}


def test_parts_are_written_as_they_come_and_the_object_has_its_name_after_the_last(tmp_path):
    put(tmp_path / "o", b"old")
    seen = []

    def parts() -> Iterator[bytes]:
        for _ in range(3):
            yield bytes(1 << 20)
            seen.append({p.suffix: p.stat().st_size for p in tmp_path.iterdir()})

    put_parts(tmp_path / "o", parts())
    assert seen == [{"": 3, ".partial": n << 20} for n in (1, 2, 3)]
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == {"o": 3 << 20}


def test_arrays_that_a_crashed_append_left_longer_are_clamped_and_then_trimmed(tmp_path, small_chunks):
    store = fill_store(tmp_path / "s")
    before = rows_of(tmp_path / "s")
    n_puts = 0
    while store.array(GROUP, "conv1").shape[0] == 6 or store.array(GROUP, "error").shape[0] == 6:
        with pytest.raises(Crash), crash_after(n_puts):
            Store(tmp_path / "s").append(GROUP, listed(6, 6))
        n_puts += 1
    assert store.array(GROUP, "status").shape == (6,)
    assert rows_of(tmp_path / "s") == before
    assert Store(tmp_path / "s").column(GROUP, "path").shape == (6,)
    with pytest.raises(StaleWriterError, match="has 12 rows, but a task was about to write rows 4 to 6"):
        write_rows(tmp_path / "s", "float32", 4, 6)
    Store(tmp_path / "s").repair()
    lengths = {store.array(GROUP, folder.name).shape[0] for folder in (tmp_path / "s" / GROUP).iterdir() if folder.is_dir()}
    assert lengths == {6}
    assert rows_of(tmp_path / "s") == before
    write_rows(tmp_path / "s", "float32", 4, 6)
    xr.open_zarr(tmp_path / "s", group=GROUP, consolidated=False)  # which wants all of one length


def test_nothing_of_a_crashed_append_shows_up_in_later_ones(tmp_path, small_chunks):
    """The next appends are shorter, and reach the rows of the crashed one only later."""
    fill_store(tmp_path / "base")
    fill_store(tmp_path / "clean").append(GROUP, listed(6, 9))
    expected = rows_of(tmp_path / "clean")
    for n_puts in range(60):
        path = tmp_path / f"{n_puts}"
        shutil.copytree(tmp_path / "base", path)
        try:
            with crash_after(n_puts):
                Store(path).append(GROUP, listed(1000, 9))
        except Crash:
            pass
        else:
            break
        store = Store(path)
        store.repair()
        store.append(GROUP, listed(6, 2))
        store.append(GROUP, listed(8, 1))
        store.append(GROUP, listed(9, 6))
        assert rows_of(path) == expected
    assert n_puts > 20


steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "append_rejected", "commit", "quarantine", "remove"]),
        st.integers(0, 6),  # rows
        st.one_of(st.none(), st.integers(0, 30)),  # put of the crash
        st.booleans(),  # torn
    ),
    max_size=10,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_a_store_equals_a_plain_list_after_any_sequence_of_writes_and_crashes(tmp_path, small_chunks, sequence):
    path = tmp_path / uuid.uuid4().hex
    store = make_store(path)
    store.create_class(layout_of(), "exact", listed(0, 0))
    model: dict[str, list[dict[str, object]]] = {GROUP: [], REJECTED: []}
    used = 0
    for kind, n, n_puts, torn in sequence:
        group = REJECTED if kind == "append_rejected" else GROUP
        rows, columns = np.arange(len(model[group]), dtype=int), {}
        if kind.startswith("append"):
            columns = rejected(used, n) if group == REJECTED else listed(used, n)
            used += n
        elif kind == "remove":
            rows = rows[:n]
            columns = {"status": np.full(len(rows), Status.REMOVED, np.uint8)}
        else:
            rows = np.array([row for row in rows if model[GROUP][row]["status"] == 0][-n:], int)
            columns = reported(rows, Status.DONE if kind == "commit" else Status.QUARANTINED)
        names = {name: columns[name] for name in columns if not name.startswith("conv")}
        new = [{name: values[k] for name, values in names.items()} for k in range(len(columns.get("path", rows)))]
        crashed = False
        try:
            with crash_after(10**9 if n_puts is None else n_puts, torn=torn):
                if kind.startswith("append"):
                    store.append(group, columns)
                else:
                    store.commit(group, rows, columns)
        except Crash:
            crashed = True
            store = Store(path)
            store.repair()
        if kind.startswith("append"):
            empty = {"status": 0, "error": "", "digest": "", "maps_digest": ""} if group == GROUP else {}
            model[group] += [] if crashed else [empty | row for row in new]
        else:
            status = store.column(group, "status")
            for row, values in zip(rows.tolist(), new, strict=True):
                if not crashed or status[row] == values["status"]:
                    model[group][row] |= values
        compare_with_model(store, path, model)
    assert not list(path.rglob("*.partial"))


def compare_with_model(store: Store, path: Path, model) -> None:
    for group, rows in model.items():
        assert store.length(group) == Store(path).length(group) == len(rows)
        names = REJECTED_COLUMNS if group == REJECTED else CLASS_COLUMNS
        found = {name: store.column(group, name).tolist() for name in names}
        for row, values in enumerate(rows):
            uncommitted = group == GROUP and not values["digest"]  # a crashed commit may have begun with the other columns
            for name in ("path", "size_bytes", "fingerprint", "status") if uncommitted else values:
                assert found[name][row] == values[name], (group, row, name)
            if group == GROUP and values.get("maps_digest") and values["status"] == Status.DONE:
                np.testing.assert_array_equal(store.column(GROUP, "conv2_std")[row], computed("conv2", [row])[0, :, 1, 1])


def test_repair_leaves_the_lock_of_a_waiting_run_alone_and_a_sound_store_as_it_is(tmp_path):
    store = fill_store(tmp_path / "s")
    waiting = tmp_path / "s" / RUNS / "lock.json.1234.partial"
    waiting.touch()
    litter = [
        tmp_path / "s" / name for name in ("zarr.json.0.partial", f"{RUNS}/r.json.1.partial", f"{GROUP}/conv1/c.0.2.partial")
    ]
    for path in litter:
        path.touch()
    before = {p: p.stat().st_ino for p in (tmp_path / "s").rglob("*") if p not in litter}
    store.repair()
    assert {p: p.stat().st_ino for p in (tmp_path / "s").rglob("*")} == before
    assert waiting.exists()


def test_repair_sweeps_what_a_run_left_that_was_killed_while_it_took_the_lock(tmp_path):
    store = fill_store(tmp_path / "s")
    old, fresh = (tmp_path / "s" / RUNS / f"lock.json.{i}.partial" for i in range(2))
    for path in (old, fresh, tmp_path / "s" / RUNS / "lock.json"):
        path.touch()
    os.utime(old, (time.time() - LOCK_TTL_S - 1,) * 2)
    store.repair()
    assert (old.exists(), fresh.exists()) == (False, True)


# -- (c) what tasks write --------------------------------------------------------------------------------------------------------


def block_of(n: int, layer: str = "conv1") -> np.ndarray:
    return computed(layer, range(n))


@pytest.mark.parametrize(("start", "n"), [(1, 3), (2, 2), (0, 5), (4, 5), (3, 4)])
def test_rows_that_are_not_in_one_shard_are_refused(tmp_path, start, n):
    store = fill_store(tmp_path / "s")
    store.append(GROUP, listed(6, 10))
    before, layout = tree(tmp_path / "s"), layout_of()
    message = rf"rows {start} to {start + n} of .*conv1 do not lie in one shard of 4 rows: two tasks would write one object"
    with pytest.raises(FeaturemapsError, match=message):
        write_maps(tmp_path / "s", RUN, layout, layout.layers[0], start, block_of(n), math.nan)
    assert tree(tmp_path / "s") == before


@pytest.mark.parametrize(("start", "n"), [(0, 3), (0, 1), (4, 1), (4, 3), (4, 4), (8, 4)])
def test_a_block_that_is_not_its_whole_shard_is_refused(tmp_path, start, n):
    """The class has 6 rows: the second shard has two."""
    fill_store(tmp_path / "s")
    before, layout = tree(tmp_path / "s"), layout_of()
    message = (
        rf"conv1 has 6 rows, but a task was about to write rows {start} to {start + n} as a whole shard: .* it writes nothing"
    )
    with pytest.raises(StaleWriterError, match=message):
        write_maps(tmp_path / "s", RUN, layout, layout.layers[0], start, block_of(n), math.nan)
    assert tree(tmp_path / "s") == before


def test_a_task_of_before_an_append_or_of_a_lost_class_writes_nothing(tmp_path):
    store = fill_store(tmp_path / "s")
    layout = layout_of()
    store.append(GROUP, listed(6, 1))
    before = tree(tmp_path / "s")
    for layer in layout.layers:
        with pytest.raises(StaleWriterError, match=r"has 7 rows, but a task was about to write rows 4 to 6"):
            write_maps(tmp_path / "s", RUN, layout, layer, 4, block_of(2, layer.name), math.nan)
    assert tree(tmp_path / "s") == before
    with pytest.raises(FeaturemapsError, match=r"metadata .*30x40.*cannot be read"):
        write_maps(tmp_path / "s", RUN, replace(layout, size=(30, 40)), layout.layers[0], 4, block_of(2), math.nan)


@pytest.mark.parametrize("lock", ["another", None])
def test_a_run_that_lost_the_store_writes_nothing(tmp_path, lock):
    fill_store(tmp_path / "s")
    before = tree(tmp_path / "s")
    if lock:
        hold(tmp_path / "s", lock)
    else:
        (tmp_path / "s" / RUNS / "lock.json").unlink()
    with pytest.raises(StaleWriterError, match=f"run {RUN} no longer holds the store"):
        write_rows(tmp_path / "s", "float32", 4, 6)
    assert tree(tmp_path / "s") == before


def test_a_run_that_loses_the_store_while_it_writes_names_nothing(tmp_path, monkeypatch):
    fill_store(tmp_path / "s")
    before, real = tree(tmp_path / "s"), schema.encode_shard

    def encode_and_lose(*arguments: object) -> Iterator[bytes]:
        yield from real(*arguments)
        hold(tmp_path / "s", "another")

    monkeypatch.setattr(schema, "encode_shard", encode_and_lose)
    with pytest.raises(StaleWriterError, match=f"run {RUN} no longer holds the store"):
        write_rows(tmp_path / "s", "float32", 4, 6)
    assert tree(tmp_path / "s") == before


def test_a_run_that_loses_the_store_while_its_object_is_synced_names_nothing(tmp_path, monkeypatch):
    fill_store(tmp_path / "s")
    before, real = tree(tmp_path / "s"), os.fsync
    layer = spec_of("float32").layers[0]
    block = as_stored(computed(layer.name, range(4, 6)), layer)

    def sync_and_lose(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        real(descriptor)
        hold(tmp_path / "s", "another")

    monkeypatch.setattr(os, "fsync", sync_and_lose)
    with pytest.raises(StaleWriterError, match=f"run {RUN} no longer holds the store"):
        write_maps(
            tmp_path / "s", RUN, layout_of("float32"), layout_of("float32").layers[0], 4, block, layer.fill_value, durable=True
        )
    assert tree(tmp_path / "s") == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbouring_shards_never_touch_each_others_objects(tmp_path, dtype):
    store = make_store(tmp_path / "s", dtype)
    store.create_class(layout_of(dtype), "exact", listed(0, 10))
    touched = []
    for start, stop in ((4, 8), (0, 4), (8, 10)):
        before = inodes(tmp_path / "s")
        write_rows(tmp_path / "s", dtype, start, stop)
        after = inodes(tmp_path / "s")
        assert before.items() <= after.items()  # same inodes: nothing that was there has been written
        touched.append(after.keys() - before.keys())
    assert [len(names) for names in touched] == [1 + 3 * 3] * 3  # a shard, and the cuts of conv2
    for layer in spec_of(dtype).layers:
        expected = as_stored(computed(layer.name, range(10)), layer)
        np.testing.assert_array_equal(store.array(GROUP, layer.name)[...], expected)


def inodes(path: Path) -> dict[str, int]:
    return {str(p.relative_to(path)): p.stat().st_ino for p in path.rglob("*") if p.is_file()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rows_of_a_half_full_shard_survive_its_filling(tmp_path, dtype):
    path = tmp_path / "s"
    store = make_store(path, dtype)
    store.create_class(layout_of(dtype), "exact", listed(0, 2))
    write_rows(path, dtype, 0, 2)
    store.commit(GROUP, np.arange(2), reported([0, 1]))
    store.append(GROUP, listed(2, 3))
    for layer, stored in zip(layout_of(dtype).layers, spec_of(dtype).layers, strict=True):
        kept = read_maps(path, layout_of(dtype), layer.name, 0, 4)
        np.testing.assert_array_equal(kept[:2], as_stored(computed(layer.name, range(2)), stored))
        np.testing.assert_array_equal(kept[2:], np.full_like(kept[2:], stored.fill_value))
        kept[2:] = as_stored(computed(layer.name, range(2, 4)), stored)
        write_maps(path, RUN, layout_of(dtype), layer, 0, kept, stored.fill_value)
        maps = np.asarray(store.array(GROUP, layer.name)[...])
        np.testing.assert_array_equal(maps[:4], as_stored(computed(layer.name, range(4)), stored))
        np.testing.assert_array_equal(maps[4:], np.full_like(maps[4:], stored.fill_value))


def test_write_maps_says_how_many_bytes_it_wrote(tmp_path):
    store = make_store(tmp_path / "s")
    layout = layout_of()
    store.create_class(layout, "exact", listed(0, 4))
    for layer in layout.layers:
        n_bytes = write_maps(tmp_path / "s", RUN, layout, layer, 0, block_of(4, layer.name), math.nan)
        assert n_bytes == sum(p.stat().st_size for p in (tmp_path / "s" / GROUP / layer.name).glob("c.*")) > 0


# -- (d) refusals ----------------------------------------------------------------------------------------------------------------


def test_specs_that_agree_differ_in_nothing():
    assert difference(spec_of(), spec_of()) == []
    other = replace(spec_of(), source="/elsewhere", created_version="8", written_version="9")
    assert difference(spec_of(), other) == []
    origin = replace(spec_of(), extractor=spec_of().extractor | {"origin": {"seed": 1}})
    assert difference(spec_of(), origin) == []  # the weights are the same, wherever they came from


def test_every_setting_that_differs_gets_a_line():
    new = replace(
        spec_of("uint8"),
        source_root="/elsewhere",
        extractor=spec_of().extractor | {"outputs": ["conv2"], "sha256": "f" * 64},
        decode={
            "color": "grey",
            "resize": (64, 48),
            "pixel_limit": 8,
            "formats": ["GIF"],
            "decoder": "pillow",
            "sha256": "0" * 64,
        },
    )
    assert difference(spec_of(), new) == [
        'source_root: the store has "/photos", this run asks for "/elsewhere"',
        'dtype: the store has "float32", this run asks for "uint8"',
        'extractor.outputs: the store has ["conv1", "conv2"], this run asks for ["conv2"]',
        'decode.color: the store has "rgb", this run asks for "grey"',
        "decode.resize: the store has null, this run asks for [64, 48]",
    ]


@pytest.mark.parametrize("name", ["file://data/f.zarr", "file://~/f.zarr", "file://"])
def test_a_file_url_is_no_relative_folder(name):
    with pytest.raises(UsageError, match=rf"store '{name}' names another machine, so nothing was started; write file:///FOLDER"):
        place(name)


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "below a file"])
def test_where_there_is_no_store_none_is_opened(tmp_path, kind):
    path = tmp_path / "s"
    if kind == "empty folder":
        path.mkdir()
    if kind == "below a file":
        path.write_text("a file")
        path /= "s"
    assert not is_store(path)
    with pytest.raises(UsageError, match=r"there is no store at .* make one with `featuremaps run SOURCE "):
        Store(path)


@pytest.mark.parametrize("attributes", [{}, {"featuremaps": 3}, {"featuremaps": {"dtype": "float32"}}, None])
def test_a_zarr_group_that_is_no_store_is_refused(tmp_path, attributes):
    (tmp_path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
    with pytest.raises(UsageError, match=r"is a Zarr group but no featuremaps store, .* nothing was touched"):
        Store(tmp_path)


@pytest.mark.parametrize("number", [2, 0, "1"])
def test_a_store_of_another_format_is_refused(tmp_path, number):
    fill_store(tmp_path / "s")
    edit(tmp_path / "s" / "zarr.json", lambda content: content["attributes"]["featuremaps"].update(format=number))
    message = rf"is a store of format {number!r}, and this version reads and writes format {FORMAT} only: nothing was touched"
    with pytest.raises(UsageError, match=message):
        Store(tmp_path / "s")


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["zarr.json", f"{GROUP}/zarr.json", f"{GROUP}/status/zarr.json", f"{REJECTED}/status/zarr.json"])
def test_damaged_metadata_is_refused_by_name(tmp_path, name):
    path = tmp_path / "s"
    fill_store(path)
    whole = (path / name).read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"\xff\xfe\x00", b"{'a': 1}"):
        (path / name).write_bytes(damage)
        with pytest.raises(
            FeaturemapsError, match=rf"metadata .*{re.escape(name)} cannot be read \(.* restore that file from a copy"
        ):
            Store(path)
    (path / name).write_text("[1, 2]")
    with pytest.raises(
        FeaturemapsError, match=rf"metadata .*{re.escape(name)} holds list, not an object; restore it from a copy"
    ):
        Store(path)
    (path / name).unlink()
    (path / name).mkdir()
    with pytest.raises(FeaturemapsError, match=rf"metadata .*{re.escape(name)} cannot be read \(.*Is a directory"):
        Store(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda about: about.pop("dtype"), "dtype"),
        (lambda about: about.pop("layers"), "layers"),
        (lambda about: about.update(surprise=1), "surprise"),
        (lambda about: about["layers"][0].pop("fill_value"), "fill_value"),
        (lambda about: about["layers"][0].pop("channels"), "channels"),
        (lambda about: about.update(layers=None), "NoneType"),
    ],
)
def test_a_store_that_does_not_say_what_it_should_is_refused(tmp_path, change, said):
    fill_store(tmp_path / "s")
    edit(tmp_path / "s" / "zarr.json", lambda content: change(content["attributes"]["featuremaps"]))
    with pytest.raises(FeaturemapsError, match=rf"metadata of .* does not follow format 1 \(.*{said}"):
        Store(tmp_path / "s")


@pytest.mark.parametrize("name", ["status/c.0", "path/c.0", "conv1_mean/c.0.0"])
def test_a_damaged_column_is_refused_by_name_and_not_written_over(tmp_path, name):
    store = fill_store(tmp_path / "s")
    path = tmp_path / "s" / GROUP / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    message = rf"{re.escape(name)}: an object of {len(data)} bytes does not fit its crc32c checksum"
    with pytest.raises(FeaturemapsError, match=message):
        store.column(GROUP, name.split("/")[0])
    with pytest.raises(FeaturemapsError, match=message):
        store.commit(GROUP, np.array([5]), reported([5]) | {"path": stack(["x"])})
    assert path.read_bytes() == data


def test_a_folder_that_holds_something_else_is_not_written_to(tmp_path):
    for name in ("notes.txt", EXTRACTOR, REJECTED):  # a store in the making has `runs` before it has these
        path = tmp_path / f"with {name}"
        (path / name).mkdir(parents=True)
        with pytest.raises(
            UsageError, match=rf"holds '{name}' but is not a store, so writing there could overwrite somebody's files"
        ):
            prepare_folder(path)
        assert [p.name for p in path.rglob("*")] == [name]


def test_a_prepared_folder_can_be_prepared_again_and_is_no_store_yet(tmp_path):
    path = tmp_path / "deep" / "s"
    prepare_folder(path)
    before = inodes(path)
    prepare_folder(path)
    assert inodes(path) == before
    assert not is_store(path)
    create_store(path, spec_of(), WEIGHTS)
    assert is_store(path)
    (path / "notes.txt").write_text("beside a store it does no harm")
    prepare_folder(path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "s"):
        with pytest.raises(
            UsageError, match=r"store .* cannot be written \((File exists|Not a directory)\): nothing was started"
        ):
            prepare_folder(path)
    for look in (is_store, Store):
        with pytest.raises(UsageError, match=r"store .* cannot be accessed \(.*File name too long.*check its permissions"):
            look(tmp_path / ("x" * 300))


def said_by_nobody(action: Callable[[], object]) -> str:
    """What an action raises in a process without root's rights."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "nothing raised"
        try:
            if os.getuid() == 0:
                os.setuid(65534)
            action()
        except Exception as error:  # noqa: BLE001 (the parent looks at it)
            text = f"{type(error).__name__}: {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_folder_without_permission_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "locked").mkdir(mode=0o700)
        (path / "closed").mkdir(mode=0o000 if os.getuid() else 0o700)
        path.chmod(0o555)
        assert re.match(
            r"UsageError: store .*/new cannot be written \(Permission denied\): nothing was started",
            said_by_nobody(lambda: prepare_folder(path / "new")),
        )
        message = r"UsageError: store .*/closed cannot be accessed \(.*Permission denied.*\): check its permissions"
        assert re.match(message, said_by_nobody(lambda: Store(path / "closed")))
        assert re.match(message, said_by_nobody(lambda: prepare_folder(path / "closed")))
        path.chmod(0o755)


def test_free_space_is_known_of_a_store_that_does_not_exist_yet(tmp_path):
    status = os.statvfs(tmp_path)
    free = status.f_bavail * status.f_frsize
    assert abs(free_bytes(tmp_path / "not" / "there" / "yet") - free) < 2**30
    assert abs(free_bytes(tmp_path) - free) < 2**30


def test_a_column_of_names_is_an_array_of_objects_even_where_they_are_of_one_length():
    column = stack(["ab", "cd"])
    assert (column.dtype, column.shape, column.tolist()) == (object, (2,), ["ab", "cd"])
    assert stack([]).shape == (0,)


# -- the documentation -----------------------------------------------------------------------------------------------------------


def snippets() -> dict[str, str]:
    """The blocks of code of docs/store-format.md, by the library that they show."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    return {re.search(r"^import (zarr|xarray|tensorstore)$", block, re.MULTILINE)[1]: block for block in blocks}


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("library", ["zarr", "xarray", "tensorstore"])
def test_the_snippets_of_the_documentation_read_a_store(tmp_path, monkeypatch, library, dtype):
    monkeypatch.chdir(tmp_path)
    spec = spec_of(dtype)
    spec = replace(spec, layers=spec.layers[:1])
    prepare_folder(tmp_path / "features.zarr")
    hold(tmp_path / "features.zarr")
    store = create_store(tmp_path / "features.zarr", spec, {"conv1_weight": np.ones((2, 3, 9, 9), np.float32)})
    layout = class_layout((516, 639), [("conv1", 2, (508, 631))], np.dtype(dtype).itemsize)
    columns = listed(0, 3) | {
        "input_height": np.array([516, 500, 516], np.int32),
        "input_width": np.array([639, 600, 639], np.int32),
    }
    store.create_class(layout, "padded", columns)
    values = np.random.default_rng(5).random((3, 2, 508, 631), np.float32)
    block = as_stored(values, spec.layers[0])
    block[2] = block[1, :, 492:] = block[1, :, :, 592:] = spec.layers[0].fill_value
    write_maps(tmp_path / "features.zarr", RUN, layout, layout.layers[0], 0, block, spec.layers[0].fill_value)
    store.commit("516x639", np.arange(2), {"status": np.full(2, Status.DONE, np.uint8)})
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(snippets()[library], names)  # the documentation's own code
    image = np.asarray(names["image"])
    assert image.shape == (2, 492, 592)
    np.testing.assert_allclose(image, values[1, :, :492, :592], rtol=0, atol=spec.layers[0].error_bound + 1e-6)


def test_the_documentation_names_every_array_status_and_constant():
    text = DOCS.read_text(encoding="utf-8")
    for name in (*CLASS_COLUMNS, *(f"conv1_{statistic}" for statistic in STATISTICS), REJECTED, RUNS, EXTRACTOR):
        assert f"`{name}" in text, name
    for status in Status:
        assert re.search(rf"\| {status.value} \| {status.name.lower()} \|", text), status
    assert f"{COLUMN_ROWS:,}" in text
    assert f"format {FORMAT}" in text


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (f"{GROUP}/zarr.json", lambda content: content.update(attributes={})),
        (f"{GROUP}/zarr.json", lambda content: content.pop("attributes")),
        (f"{GROUP}/status/zarr.json", lambda content: content.pop("shape")),
        (f"{GROUP}/conv1/zarr.json", lambda content: content.update(codecs=[])),
        ("zarr.json", lambda content: content.update(attributes=[1])),
        ("zarr.json", lambda content: content["attributes"]["featuremaps"].update(extractor={})),
        (f"{REJECTED}/status/zarr.json", lambda content: content.update(shape=[])),
    ],
)
def test_metadata_that_says_something_else_is_refused(tmp_path, name, change):
    fill_store(tmp_path / "s")
    edit(tmp_path / "s" / name, change)
    with pytest.raises(FeaturemapsError, match=r"metadata of .* does not follow format 1 .* restore its zarr\.json"):
        Store(tmp_path / "s")


def test_a_foreign_group_in_a_store_is_left_alone(tmp_path):
    fill_store(tmp_path / "s")
    (tmp_path / "s" / "notes" / "status").mkdir(parents=True)
    (tmp_path / "s" / "notes" / "zarr.json").write_text("{}")
    store = Store(tmp_path / "s")
    store.repair()
    assert [c.name for c in store.classes.values()] == [GROUP]
    assert (tmp_path / "s" / "notes" / "zarr.json").exists()


def test_a_class_that_lost_its_metadata_is_never_cleared_away(tmp_path):
    store = fill_store(tmp_path / "s")
    layout = next(iter(store.classes.values())).layout
    (tmp_path / "s" / GROUP / "zarr.json").unlink()
    store = Store(tmp_path / "s")
    for clear in (store.repair, lambda: store.create_class(layout, "exact", listed(0, 6))):
        with pytest.raises(FeaturemapsError, match=r"has rows but no zarr\.json, so it was damaged .* nothing was touched"):
            clear()
    assert list((tmp_path / "s" / GROUP / "conv1").glob("c.*"))


def test_storage_that_cannot_tell_whether_an_object_exists_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    store = fill_store(tmp_path / "s")

    def stale(path, **_):
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr(Path, "stat", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        store.repair()


def test_a_driver_that_lost_the_store_writes_no_more(tmp_path):
    store = fill_store(tmp_path / "s")
    before = store.column(GROUP, "status").tolist()
    store.fence = partial(require_lock, tmp_path / "s" / RUNS, "late")
    with pytest.raises(StaleWriterError, match="run late no longer holds the store"):
        store.commit(GROUP, np.array([4]), {"status": np.array([1], np.uint8)})
    with pytest.raises(StaleWriterError):
        store.append(REJECTED, rejected(200, 1))
    assert Store(tmp_path / "s").column(GROUP, "status").tolist() == before
