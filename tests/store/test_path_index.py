from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import FeaturemapsError
from pipeline.store import path_index
from pipeline.store.codecs import compress, decompress_bytes, find_text
from pipeline.store.create import create_store, prepare_folder
from pipeline.store.layout import class_layout
from pipeline.store.path_index import PathIndex, similar_names, stored_name
from pipeline.store.schema import COLUMN_ROWS, REJECTED, Status, stack
from pipeline.store.store import Store
from tests.store.test_store import spec_of

NAMES = [f"train/{i % 7}/n{i:05d}.jpg" for i in range(COLUMN_ROWS + 50)]


def columns(names, status) -> dict[str, np.ndarray]:
    zeros = np.zeros(len(names), np.int32)
    sizes = dict.fromkeys(("source_height", "source_width", "input_height", "input_width"), zeros)
    listed = {"path": stack(names), "size_bytes": zeros.astype(np.int64), "fingerprint": stack(names), **sizes}
    return listed | {"status": np.array(status, np.uint8)}


@pytest.fixture
def store(tmp_path) -> Store:
    """A class of two chunks, one of three rows of which two are of one image, and a rejected image."""
    path = tmp_path / "f.zarr"
    prepare_folder(path)
    (path / "runs" / "lock.json").write_text('{"run_id": "r"}')
    made = create_store(path, spec_of(), {"conv1_weight": np.ones((2, 3, 9, 9), np.float32)})
    layers = [("conv1", 2, (20, 20)), ("conv2", 3, (5, 6))]
    made.create_class(class_layout((28, 28), layers, 4), "exact", columns(NAMES, [Status.DONE] * len(NAMES)))
    others = ["twice.png", "gone.png", "twice.png", "pending.png"]
    statuses = [Status.DONE, Status.REMOVED, Status.PENDING, Status.PENDING]
    made.create_class(class_layout((40, 40), layers, 4), "exact", columns(others, statuses))
    rejected = {
        name: values
        for name, values in columns(["bad\n.png"], [Status.QUARANTINED]).items()
        if "_h" not in name and "_w" not in name
    }
    made.append(REJECTED, rejected | {"error": stack(["empty: 0 bytes"])})
    return made


@pytest.mark.parametrize("scans", [0, 10_000])
def test_an_image_is_found_by_the_ledgers_bytes_and_by_the_index(store, monkeypatch, scans):
    monkeypatch.setattr(path_index, "SCANS", scans)
    index = PathIndex(store)
    for i in (0, 1, COLUMN_ROWS - 1, COLUMN_ROWS, len(NAMES) - 1):
        assert index.find(NAMES[i]) == ("28x28", i)
    assert index.find("twice.png") == ("40x40", 0)  # the row that is done, of the two that a crash left
    assert index.find("gone.png") == ("40x40", 1)
    assert index.find("bad\n.png") == (REJECTED, 0)
    assert index.find("n00001.jpg") is None
    assert index.find("") is None
    assert index.find("caf\udce9.png") is None  # stands for a byte that is no UTF-8
    assert index.status(("40x40", 1)) is Status.REMOVED
    assert sorted(index.names()) == sorted([*NAMES, "twice.png", "twice.png", "pending.png", "bad\n.png"])


def test_the_index_is_made_after_some_lookups_and_finds_the_same(store, monkeypatch):
    monkeypatch.setattr(path_index, "SCANS", 3)
    index = PathIndex(store)
    for i in random.Random(0).sample(range(len(NAMES)), 10):
        assert index.find(NAMES[i]) == ("28x28", i)
    assert index._raw == {}


def test_rows_that_are_appended_later_are_not_seen(store):
    index = PathIndex(Store(store.path))
    store.append("40x40", columns(["new.png"], [Status.DONE]))
    assert index.find("new.png") is None
    assert PathIndex(Store(store.path)).find("new.png") == ("40x40", 4)


def test_a_damaged_column_is_named(store):
    chunk = next((Path(store.path) / "40x40" / "path").glob("c.*"))
    chunk.write_bytes(chunk.read_bytes()[:-3])
    with pytest.raises(FeaturemapsError, match=r"40x40/path/c\.0: an object of .* does not fit its crc32c checksum"):
        PathIndex(store).find("pending.png")


@settings(deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=20), st.data())
def test_a_text_is_found_where_it_is_and_only_there(names, data):
    raw = decompress_bytes(compress(stack(names)))
    wanted = data.draw(st.sampled_from(names) | st.text(max_size=5))
    assert find_text(raw, wanted) == [i for i, name in enumerate(names) if name == wanted]


# -- names that somebody may have meant ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("train/3/n00010.jpeg", "train/3/n00010.jpg"),  # another end
        ("n00010.jpg", "train/3/n00010.jpg"),  # no folder
        ("/photos/train/3/n00010.jpg", "train/3/n00010.jpg"),  # an absolute path
        ("TRAIN/3/N00010.JPG", "train/3/n00010.jpg"),
        ("train\\3\\n00010.jpg", "train/3/n00010.jpg"),
        ("train/3/n000x10.jpg", "train/3/n00010.jpg"),  # a slip in the middle
    ],
)
def test_what_was_meant_comes_first(wanted, expected):
    assert similar_names(wanted, NAMES)[0] == expected


def test_nothing_is_like_nonsense():
    assert similar_names("", NAMES) == []
    assert similar_names("§§§", NAMES) == []
    assert similar_names("a.png", []) == []
    assert len(similar_names("train/3/n0001.jpg", NAMES)) == 3


TEXT = st.text(st.characters(exclude_characters="\0"), max_size=8)  # no file's name has a NUL


@settings(deadline=None)
@given(st.lists(TEXT, max_size=20), TEXT)
def test_hints_are_names_of_the_list(names, wanted):
    assert set(similar_names(wanted, names)) <= set(names)


def test_a_name_is_asked_for_as_the_shell_gives_it():
    assert stored_name("50%.jpg") == "50%25.jpg"
    assert stored_name(b"caf\xe9.jpg".decode("utf-8", "surrogateescape")) == "caf%E9.jpg"
