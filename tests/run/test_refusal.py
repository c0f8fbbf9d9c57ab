"""A refused run leaves a receipt and changes nothing else: no living run's lock, no store of another format."""

from __future__ import annotations

import json
import os
import time

import pytest

from pipeline.config import make_job
from pipeline.errors import UsageError
from pipeline.run import lifecycle
from pipeline.store.create import check_job, create_store, list_job, prepare_folder
from pipeline.store.lock import LOCK_TTL_S, StoreLock
from pipeline.store.receipts import last_work, read_receipts, write_receipt
from pipeline.store.schema import RUNS
from tests.conftest import make_images


@pytest.fixture
def store(tmp_path):
    job = make_job({"source": str(make_images(tmp_path / "in", 1, [(30, 40)])), "store": str(tmp_path / "f.zarr")})
    prepare_folder(tmp_path / "f.zarr")
    create_store(tmp_path / "f.zarr", *check_job(job, list_job(job)))
    return tmp_path / "f.zarr"


def refuse(store, reason: str = "does not exist") -> None:
    def connect(*_):
        raise AssertionError("a refused run needs no workers")

    job = make_job({"source": str(store.parent / "nowhere"), "store": str(store)})
    with pytest.raises(UsageError, match=reason):
        lifecycle.run_job(job, connect)


def test_it_leaves_a_receipt_that_says_so(store):
    refuse(store)
    (receipt,) = read_receipts(store)
    assert (receipt["outcome"], receipt["is_refusal"]) == ("failed", True)
    assert receipt["message"].startswith("UsageError: source")


@pytest.mark.parametrize("silent_s", [0, 2 * LOCK_TTL_S, -3600])
def test_a_lock_of_a_living_run_is_neither_taken_over_nor_waited_for(store, monkeypatch, silent_s):
    monkeypatch.setattr("pipeline.store.lock.time.sleep", lambda _: pytest.fail("it waits for a lock"))
    with StoreLock(store / RUNS, "at work"):
        heard = time.time() - silent_s
        os.utime(store / RUNS / "lock.json", (heard, heard))
        refuse(store)
        assert json.loads((store / RUNS / "lock.json").read_bytes())["run_id"] == "at work"
    assert read_receipts(store) == []


def test_a_store_of_another_format_is_not_touched(store):
    document = json.loads((store / "zarr.json").read_text())
    document["attributes"]["featuremaps"]["format"] = 2
    (store / "zarr.json").write_text(json.dumps(document))
    before = sorted(store.rglob("*"))
    refuse(store, "is a store of format 2")
    assert sorted(store.rglob("*")) == before


def test_what_the_run_before_left_is_not_forgotten(store):
    stopped = {"outcome": "stopped", "n_listed": 1000, "dropped_total": {"alpha": 7}}
    write_receipt(store, "20260101T000000.000Z-000001-00000000", stopped, durable=False)
    refuse(store)
    newest = read_receipts(store, 1)[0]
    assert (newest["n_listed"], newest["dropped_total"]) == (1000, {"alpha": 7})
    assert last_work(store)["outcome"] == "stopped"


def test_what_else_is_wrong_does_not_hide_its_reason(store):
    write_receipt(store, "20260101T000000.000Z-000001-00000000", {"dropped_total": [1]}, durable=False)
    refuse(store)
    (store / RUNS / "lock.json").write_text("no lock")
    refuse(store)
