"""Clocks that are ahead, behind, or mended: they decide neither the order of runs nor who holds a store."""

from __future__ import annotations

import json
import os
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from pipeline.analysis.feature_store import FeatureStore
from pipeline.checks.status import store_status
from pipeline.cluster.submit.record import Claim, Submission
from pipeline.errors import StoreBusyError
from pipeline.report.facts import gather
from pipeline.run import lifecycle, summary
from pipeline.store import lock, run_ids
from pipeline.store.lock import Holder, StoreLock, current_holder
from pipeline.store.run_ids import next_number, run_number, run_order
from pipeline.store.store import Store
from tests.conftest import make_images

DAYS_3 = 3 * 86_400


@pytest.fixture
def command_at(command, monkeypatch):
    """The command on a machine whose clock is wrong by some seconds."""

    def call(shift_s: float, *arguments: object) -> str:
        class Shifted(datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.now(tz) + timedelta(seconds=shift_s)

        with monkeypatch.context() as patched:
            for module in (lifecycle, summary, run_ids):
                patched.setattr(module, "datetime", Shifted)
            code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return call


def test_the_last_run_is_the_last_whatever_its_clock_said(command_at, tmp_path):
    source, store = tmp_path / "source", tmp_path / "f.zarr"
    outcomes: list[str] = []
    for n, shift_s in enumerate((DAYS_3, 0, -400 * 86_400), 1):
        make_images(source / str(n), 1, [(30, 40)])
        made = json.loads(command_at(shift_s, "run", source, store, "--json"))
        outcomes.append(made["run_id"])
        last = json.loads(command_at(0, "status", store, "--json"))["last_run"]
        assert (last["run_id"], last["n_done"], last["n_unchanged"]) == (made["run_id"], 1, n - 1)
        assert f"last run {made['run_id']}: complete" in command_at(0, "status", store)
        assert last["number"] == n
        assert 0 <= last["compute_s"] <= last["elapsed_s"]
    assert Store(store).run_ids() == outcomes
    assert [receipt["run_id"] for receipt in FeatureStore(store).receipts] == outcomes
    facts = gather(Store(store), None, 5)
    assert facts.last["run_id"] == facts.last_working["run_id"] == outcomes[-1]
    assert facts.first_run[:10].replace("-", "") == outcomes[0][:8]
    command_at(0, "report", store, "-o", tmp_path / "page.html")
    command_at(0, "verify", store)


def test_the_run_that_goes_on_repairs_what_the_last_one_left_not_what_the_latest_clock_left(run, tmp_path):
    """A receipt of long ago that lies in the future said "complete", and what a dead run left stayed."""
    source, store = make_images(tmp_path / "source", 3, [(30, 40)]), tmp_path / "features.zarr"
    ahead = run(source)
    future = store / "runs" / f"2{ahead.run_id[1:].replace('2', '9', 1)}.json"
    (store / "runs" / f"{ahead.run_id}.json").rename(future)
    died = Store(store)
    run_id = f"20200101T000000.000Z-{next_number(died.run_ids()):06}-00000000"
    died.write_receipt(run_id, {**died.receipts()[0], "run_id": run_id, "outcome": "running"})
    assert store_status(store).last_run["run_id"] == run_id
    litter = store / "30x40" / "conv1" / "c.0.0.0.0.abc.partial"
    litter.write_bytes(b"torn")
    run(source)
    assert not litter.exists()


def test_receipts_of_versions_before_numbers_come_first_in_the_order_of_their_time(run, tmp_path):
    source, store = make_images(tmp_path / "source", 3, [(30, 40)]), tmp_path / "features.zarr"
    runs = store / "runs"
    made = run(source).run_id
    for name in ("20991123T215159.378Z-f45a62a9", "20251123T215159.378Z-f45a62a9"):  # as version 0.1 left them
        old = json.loads((runs / f"{made}.json").read_text())
        del old["number"]
        (runs / f"{name}.json").write_text(json.dumps(old | {"run_id": name}))
    (runs / f"{made}.json").unlink()
    assert Store(store).run_ids() == ["20251123T215159.378Z-f45a62a9", "20991123T215159.378Z-f45a62a9"]
    make_images(source / "new", 1, [(30, 40)])
    summary = run(source)
    assert (summary.number, summary.n_done, summary.n_unchanged) == (1, 1, 3)
    assert Store(store).run_ids()[-1] == store_status(store).last_run["run_id"] == summary.run_id


def test_a_run_that_died_before_it_left_a_receipt_has_had_its_number(run, tmp_path):
    source, store = make_images(tmp_path / "source", 2, [(30, 40)]), tmp_path / "features.zarr"
    run(source)
    dead = {name: getattr(Holder.current("x"), name) for name in Holder.__slots__}
    dead |= {"run_id": "20990101T000000.000Z-000041-00000000", "process_started": 1}
    (store / "runs" / "lock.json").write_text(json.dumps(dead))
    assert run(source).number == 42


def test_a_run_that_came_and_went_before_the_lock_was_ours_is_counted(run, tmp_path, monkeypatch):
    source, store = make_images(tmp_path / "source", 2, [(30, 40)]), tmp_path / "features.zarr"
    run(source)
    between = ["20200101T000000.000Z-000002-00000000"]

    def slow_lock(folder: Path, run_id: str, **options):
        if between:
            (folder / f"{between.pop()}.json").write_text("{}")
        return StoreLock(folder, run_id, **options)

    monkeypatch.setattr("pipeline.run.lifecycle.StoreLock", slow_lock)
    assert run(source).number == 3
    assert Store(store).last_receipt()["number"] == 3


def test_numbers_are_compared_as_numbers():
    ids = ["20260101T000000.000Z-1000000-00000000", "20260101T000000.000Z-999999-00000000", "20990101T000000.000Z-00000000"]
    assert sorted(ids, key=run_order) == ids[::-1]
    assert next_number(ids) == 1_000_001
    assert [run_number(run_id) for run_id in ("", "mine", "20990101T000000.000Z-00000000")] == [0, 0, 0]


# -- the lock ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ahead(tmp_path, monkeypatch):
    """The lock of a run of another host, whose last heartbeat lies three days ahead."""
    monkeypatch.setattr(lock, "LOCK_TTL_S", 0.5)
    monkeypatch.setattr(lock, "WATCH_S", 0.01)
    runs = tmp_path / "runs"
    runs.mkdir()
    holder = {name: getattr(Holder.current("x"), name) for name in Holder.__slots__} | {"host": "elsewhere"}
    path = runs / "lock.json"
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() + DAYS_3,) * 2)
    return path


def test_a_dead_run_whose_clock_was_ahead_does_not_hold_a_store_for_days(ahead):
    with StoreLock(ahead.parent, "mine") as held:
        assert held.took_over


def test_a_run_at_work_whose_clock_is_ahead_is_not_taken_over(ahead, monkeypatch):
    beats = iter(range(1000))
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(ahead, (time.time() + DAYS_3 + next(beats),) * 2))
    with pytest.raises(StoreBusyError, match=r"at an unknown time .* s ahead: a clock is or was wrong\): two runs"):
        StoreLock(ahead.parent, "mine")


def test_the_status_says_that_a_heartbeat_lies_ahead(ahead):
    holder = current_holder(ahead.parent.parent)
    assert holder["silent_s"] == 0
    assert DAYS_3 - 60 < holder["ahead_s"] <= DAYS_3


# -- submitting --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift_s", [DAYS_3, -DAYS_3])
def test_a_claim_is_as_old_as_its_file_whatever_the_clock_that_wrote_it(tmp_path, shift_s):
    """It named the time of the host that handed in, and one three days ahead kept everybody out for three days."""
    (tmp_path / "runs").mkdir()
    when = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + shift_s))
    Submission("slurm", "s", "", "name", "elsewhere", when, when).write(tmp_path)
    with pytest.raises(StoreBusyError, match="is being submitted on elsewhere"):
        Claim(tmp_path).require_no_other()
    os.utime(tmp_path / "runs" / "submitted.json", (time.time() + DAYS_3,) * 2)  # until the clock was mended
    Claim(tmp_path).require_no_other()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["submitted.json"]
