"""Guarantee 2: killing any process, or all of them, at any moment loses no committed row, and the next run finishes the work."""

from __future__ import annotations

import os
import signal
import time

import pytest
from distributed import Client

from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError
from pipeline.store.schema import RUNS
from pipeline.store.store import Store
from tests.conftest import make_images
from tests.system.kill.kill_rounds import (
    Cluster,
    done_rows,
    hashed_content,
    litter,
    marked,
    prepare,
    run_round,
    wait_until,
    worker_processes,
)

pytestmark = [pytest.mark.kill, pytest.mark.cluster]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("kill"), 120)


@pytest.fixture
def cluster(tmp_path):
    started = Cluster(tmp_path, n_workers=1)
    started.wait_for_workers()
    yield started
    started.end()


@pytest.mark.parametrize(
    ("victim", "seed"),  # seed 1 kills the driver twice, and 2 kills once; `tests.system.kill.kill_rounds` tries many moments
    [("driver", 1), ("worker", 1), ("nanny", 1), ("scheduler", 2), ("all", 2)],
)
def test_a_killed_process_costs_no_committed_row_and_the_next_run_finishes(place, tmp_path, victim, seed):
    result = run_round(place, victim, seed, tmp_path / "round", at_commit=True)
    assert not result.faults, result.describe()
    assert any(kill.is_live for kill in result.kills), result.describe()
    assert result.codes[-1] == 0


def test_any_number_of_workers_gives_equal_stores(place, tmp_path):
    """Four; `Place.expected` is of two, and the runs that are sent signals have one."""
    command = place.command(tmp_path / "features.zarr", "--workers", "4")
    assert command.wait(900) == 0, command.output()
    assert Store(tmp_path / "features.zarr").receipts()[0]["slots"] == 4
    assert hashed_content(tmp_path / "features.zarr") == place.expected


@pytest.mark.parametrize("send", ["SIGTERM to the command", "SIGINT to the command", "SIGINT to its whole process group"])
def test_a_signal_drains_a_run_and_the_next_finishes(place, tmp_path, send):
    path = tmp_path / "features.zarr"
    command = place.command(path, "--workers", "1")
    wait_until(lambda: shards(path) or not command.is_running, 900)
    number = signal.SIGTERM if "SIGTERM" in send else signal.SIGINT
    (os.killpg if "group" in send else os.kill)(command.popen.pid, number)
    assert command.wait(900) == 75, command.output()
    assert "finishing what is in flight; nothing is lost, run again to go on" in command.output()
    assert "Traceback" not in command.output()
    assert wait_until(lambda: not marked(command.mark), 900)
    (receipt,) = Store(path).receipts()
    assert receipt["outcome"] == "stopped"
    assert 0 < receipt["n_done"] == len(done_rows(path)) < 120
    assert all((Store(path).column(name, "status") != 0).any() for name in shards(path))  # all that was written is committed
    assert {found for found in hashed_content(path).items() if found[1].startswith("DONE")} <= place.expected.items()
    assert not (path / RUNS / "lock.json").exists()
    if "group" in send:  # each drain leaves a store like this one
        assert place.command(path, "--workers", "1").wait(900) == 0
        assert hashed_content(path) == place.expected
    assert not litter(path)


def test_a_ctrl_c_while_workers_start_drains_too(place, tmp_path):
    path = tmp_path / "features.zarr"
    command = place.command(path, "--workers", "2")
    wait_until((path / "zarr.json").exists, 900)
    time.sleep(1.0)
    os.killpg(command.popen.pid, signal.SIGINT)
    assert command.wait(900) == 75, command.output()
    assert "Traceback" not in command.output()
    assert wait_until(lambda: not marked(command.mark), 900)


def test_a_run_whose_workers_are_all_gone_ends_by_itself(place, cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.driver.COMMIT_S", 0.02)  # so that there is work left when the first progress comes
    monkeypatch.setattr("pipeline.run.driver.RECEIPT_S", 0.5)
    monkeypatch.setattr("pipeline.run.workers.NO_WORKERS_S", 2.0)
    path = tmp_path / "features.zarr"
    job = make_job({"source": str(place.source), "store": str(path)})

    def kill(progress):
        if progress.stage == "running":
            cluster.workers[0].end()

    with Client(cluster.address) as client, pytest.raises(FeaturemapsError, match=r"none has come for 2 s.*start workers"):
        run_job(job, client, on_progress=kill)
    assert not (path / RUNS / "lock.json").exists()


def test_a_scheduler_that_dies_before_the_first_task_is_named(place, cluster, tmp_path):
    job = make_job({"source": str(place.source), "store": str(tmp_path / "features.zarr")})

    def kill(progress):
        if progress.stage == "starting workers":
            cluster.scheduler.end()

    with (
        Client(cluster.address, timeout=20) as client,  # for so long it may look for the scheduler that is gone
        pytest.raises(FeaturemapsError, match="scheduler or its connection was lost"),
    ):
        run_job(job, client, on_progress=kill)


def test_a_worker_that_wakes_after_its_run_was_replaced_changes_nothing(place, cluster, tmp_path):
    store = tmp_path / "features.zarr"
    first = place.command(store, "--cluster", "running")
    assert wait_until(lambda: shards(store) or not first.is_running, 900)
    (sleeper,) = worker_processes(cluster.workers[0].mark)
    sleeper.suspend()  # SIGSTOP, in the middle of a batch
    first.popen.kill()
    first.wait(900)
    assert len(done_rows(store)) < place.n_good
    second = place.command(store, "--workers", "2")
    assert second.wait(900) == 0, second.output()
    before = objects(store)
    sleeper.resume()
    time.sleep(3.0)  # ten times what its batch takes
    assert objects(store) == before
    assert hashed_content(store) == place.expected


def test_what_a_killed_worker_left_half_written_is_swept(client, tmp_path):
    source = make_images(tmp_path / "source", 6, [(50, 60)])
    job = make_job({"source": str(source), "store": str(tmp_path / "features.zarr")})
    run_job(job.model_copy(update={"limit": 3}), client)
    (tmp_path / "features.zarr" / "50x60" / "conv1" / "c.0.0.0.0.abc.partial").write_bytes(b"torn")
    (receipt,) = (tmp_path / "features.zarr" / "runs").glob("*Z-*.json")
    receipt.write_text(receipt.read_text().replace('"outcome": "complete"', '"outcome": "running"'))
    run_job(job, client)
    assert not litter(tmp_path / "features.zarr")


def shards(path):
    """Classes whose maps have objects."""
    return sorted({p.parent.parent.name for p in path.glob("[0-9]*x[0-9]*/conv1/c.*") if p.suffix != ".partial"})


def objects(store):
    """Inode and time of change of everything in a store."""
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in store.rglob("*") if path.is_file()}
