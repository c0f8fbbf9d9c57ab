from __future__ import annotations

import os
import re
import socket

import numpy as np
import pytest

from pipeline.api import run_job
from pipeline.checks.status import StoreStatus, store_status
from pipeline.errors import UsageError
from pipeline.run.summary import Summary, receipt
from pipeline.store.lock import StoreLock
from pipeline.store.schema import REJECTED, RUNS, Status
from pipeline.store.store import Store
from tests.checks.conftest import job_of
from tests.conftest import make_images

pytestmark = pytest.mark.cluster


def test_the_status_counts_and_lists_bad_images_with_their_reasons(finished):
    status = store_status(finished)
    assert {name: n for name, n in status.counts.items() if n} == {"done": 120, "rejected": 4}
    assert (status.n_classes, status.dtype, status.holder) == (12, "float32", None)
    described = status.describe()
    assert "  empty.png  empty: the file has 0 bytes" in described
    assert "  small.png  too_small: 8 x 100 pixels, smaller than the 9 x 9 that one output needs" in described
    assert ", 120 done at " in described
    assert "more bad images" not in described


def test_of_many_bad_images_the_first_are_listed_and_the_number_of_the_others_is_said(finished):
    status = store_status(finished, 1)
    assert len(status.bad) == 1
    assert status.describe().endswith("  and 3 more bad images: --quarantined N lists N")
    assert "more bad images" in store_status(finished, 0).describe()


def test_a_bad_image_is_listed_on_one_line_whatever_its_name(client, tmp_path):
    source = make_images(tmp_path / "source", 1, [(50, 60)])
    (source / "two\nlines\x1b[2J.png").touch()
    run_job(job_of(source, tmp_path / "f.zarr"), client)
    status = store_status(tmp_path / "f.zarr")
    assert status.bad[0]["path"] == "two\nlines\x1b[2J.png"
    assert status.describe().splitlines()[-1] == r"  two\nlines\x1b[2J.png  empty: the file has 0 bytes"


def test_quarantined_rows_are_listed_after_rejected_images_and_superseded_ones_never(finished, source, client):
    store = Store(finished)
    name = next(iter(store.classes.values())).name
    path, error = store.column(name, "path")[0], np.array(["truncated: cut"], object)
    store.commit(name, np.array([0]), {"error": error, "status": np.array([Status.QUARANTINED], np.uint8)})
    store.commit(REJECTED, np.array([0]), {"status": np.array([Status.SUPERSEDED], np.uint8)})
    status = store_status(finished)
    assert len(status.bad) == 4
    assert status.bad[-1] == {"path": path, "error": "truncated: cut"}
    assert (status.counts["quarantined"], status.counts["rejected"], status.counts["done"]) == (1, 3, 119)


def receipt_of(store, run_id, **values):
    store.write_receipt(run_id, {**store.receipts()[0], "run_id": run_id, **values})


def test_while_a_run_works_the_status_says_who_and_how_long_it_takes(finished):
    with StoreLock(finished / RUNS, "20990101T000000Z-999999-ee") as lock:
        status = store_status(finished)
        assert status.left_s is None  # its receipt is not there yet, and the last run's pace says nothing of its own
        receipt_of(
            Store(finished),
            lock.run_id,
            n_listed=1000,
            n_unchanged=120,
            n_done=300,
            images_per_s=10.0,
            outcome="running",
            n_rejected=0,
        )
        status = store_status(finished)
        assert status.holder["run_id"] == lock.run_id
        assert status.left_s == pytest.approx(58.0)
        where = re.escape(f"run {lock.run_id} works on it: process {os.getpid()} on {socket.gethostname()}")
        assert re.search(rf"{where}, last heard \d+ s ago, about 58 s left", status.describe())
    status = store_status(finished)
    assert (status.holder, status.left_s) == (None, None)


def test_the_time_left_of_a_limited_run_is_not_negative(finished):
    with StoreLock(finished / RUNS, "20990101T000000Z-999999-ee") as lock:
        receipt_of(Store(finished), lock.run_id, n_listed=5, n_unchanged=3, n_done=1, n_rejected=0, images_per_s=0.5)
        assert store_status(finished).left_s == pytest.approx(2.0)


def test_a_run_that_failed_says_why_and_one_that_did_nothing_claims_no_pace(finished):
    receipt_of(
        Store(finished), "20990101T000000Z-999999-ee", outcome="failed", n_done=0, bottleneck="waiting", message="OSError: no"
    )
    described = store_status(finished).describe()
    assert "last run 20990101T000000Z-999999-ee: failed, 0 done, 4 found bad -- no" in described


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"outcome": "complete", "n_removed": 2}, "complete, 2 removed"),
        ({"outcome": "complete", "n_new": 2, "n_rejected": 2}, "complete, 2 found bad"),
        ({"outcome": "complete"}, "complete, there was nothing to do"),
        ({"outcome": "stopped", "n_new": 9}, "stopped, 0 done"),
        ({"outcome": "complete", "n_done": 1, "compute_s": 50.0, "slots": 1}, "complete, 1 done at 0.02 images/s on 1 slot"),
        ({"outcome": "failed", "message": "UsageError: source /a is not there"}, "refused -- source /a is not there"),
        ({"outcome": "failed", "message": "RunFailedError: gone"}, "failed, 0 done -- RunFailedError: gone"),
    ],
)
def test_the_last_run_is_described_by_what_it_did(values, said):
    run = receipt(Summary("r", **values))
    described = StoreStatus("s", "a", "float32", True, 1, {"done": 1, "quarantined": 0, "rejected": 0}, [], None, run).describe()
    assert described.splitlines()[2] == f"last run r: {said}"


def test_a_store_without_a_run_has_a_status(finished):
    for path in (finished / RUNS).glob("*Z-*.json"):
        path.unlink()
    status = store_status(finished)
    assert status.last_run is None
    assert "last run" not in status.describe()


def test_there_is_no_status_without_a_store(tmp_path):
    with pytest.raises(UsageError, match=r"there is no store at .*none: check the path"):
        store_status(tmp_path / "none")
    assert not (tmp_path / "none").exists()
