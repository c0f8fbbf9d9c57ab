from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.errors import FeaturemapsError, StaleWriterError, StoreBusyError
from pipeline.store import lock
from pipeline.store.lock import LOCK_TTL_S, Holder, StoreLock, current_holder, holds, require_lock


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


HOLD = """
import pathlib, sys, time
from pipeline.store.lock import StoreLock
StoreLock(pathlib.Path(sys.argv[1]), "other")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other_process(runs):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(runs)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_is_held_and_given_back(runs):
    with StoreLock(runs, "mine") as held:
        assert holds(runs, "mine")
        assert current_holder(runs.parent)["pid"] == os.getpid()
        assert not held.took_over
        require_lock(runs, "mine")
    assert not holds(runs, "mine")
    assert current_holder(runs.parent) is None
    assert not list(runs.glob("*.partial"))


def test_a_second_run_is_told_who_holds_the_store(runs, other_process):
    with pytest.raises(
        StoreBusyError, match=rf"held by run other, process {other_process.pid} on .*two runs on one store never mix"
    ):
        StoreLock(runs, "mine")
    assert holds(runs, "other")


def test_a_killed_holder_of_this_host_is_taken_over_at_once(runs, other_process):
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.wait()
    with StoreLock(runs, "mine") as held:
        assert held.took_over
        assert holds(runs, "mine")


def test_a_holder_of_another_host_is_taken_over_only_after_its_silence(runs):
    other = {**_current(), "host": "elsewhere", "job_id": "77"}
    path = runs / "lock.json"
    path.write_text(json.dumps(other))
    with pytest.raises(StoreBusyError, match=r"on elsewhere \(job 77\)"):
        StoreLock(runs, "mine")
    long_ago = time.time() - LOCK_TTL_S - 1
    os.utime(path, (long_ago, long_ago))
    with StoreLock(runs, "mine") as held:
        assert held.took_over


def _current():
    holder = Holder.current("x")
    return {name: getattr(holder, name) for name in Holder.__slots__}


def test_a_reused_pid_is_not_taken_for_the_holder(runs):
    (runs / "lock.json").write_text(json.dumps({**_current(), "process_started": 1.0}))
    with StoreLock(runs, "mine") as held:
        assert held.took_over


def test_a_lock_that_this_process_could_not_remove_does_not_keep_it_from_the_next_run(runs):
    with StoreLock(runs, "mine"):
        copy = (runs / "lock.json").read_text()
        with pytest.raises(StoreBusyError, match="held by run mine"):
            StoreLock(runs, "another")
    (runs / "lock.json").write_text(copy)  # as on a disk that had become read-only
    with StoreLock(runs, "next") as held:
        assert held.took_over


def test_a_lock_that_cannot_be_understood_is_refused(runs):
    (runs / "lock.json").write_text("{")
    with pytest.raises(FeaturemapsError, match=r"lock .* cannot be parsed .* delete that file"):
        StoreLock(runs, "mine")
    assert current_holder(runs.parent) is None


def test_only_one_of_many_contenders_wins(runs):
    code = (
        "import sys, pathlib; from pipeline.store.lock import StoreLock\n"
        "from pipeline.errors import StoreBusyError\n"
        "try:\n    StoreLock(pathlib.Path(sys.argv[1]), sys.argv[2]); print('won', flush=True); sys.stdin.read()\n"
        "except StoreBusyError:\n    print('busy')\n"
    )
    (runs / "lock.json").write_text(json.dumps({**_current(), "process_started": 1.0}))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(runs), str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for i in range(6)
    ]
    said = [process.stdout.readline() for process in processes]  # the winner holds it until all have said theirs
    for process in processes:
        process.communicate()
    assert sorted(said) == ["busy\n"] * 5 + ["won\n"]


def test_a_task_of_a_run_that_lost_the_store_is_refused(runs):
    with StoreLock(runs, "mine") as held:
        (runs / "lock.json").write_text(json.dumps({**_current(), "run_id": "other"}))
        with pytest.raises(StaleWriterError, match=r"run mine no longer holds the store"):
            require_lock(runs, "mine")
        held.release()
        assert holds(runs, "other")


def test_the_heartbeat_shows_that_the_holder_lives(runs, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    with StoreLock(runs, "mine"):
        path = runs / "lock.json"
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 900
        while path.stat().st_mtime < 2.0:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_the_batch_systems_job_is_on_record(runs, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with StoreLock(runs, "mine"):
        assert current_holder(runs.parent)["job_id"] == "4711"


def test_a_step_of_the_clock_does_not_declare_a_live_holder_dead(runs, other_process, monkeypatch):
    monkeypatch.setattr("psutil.boot_time", lambda: 1.0)
    with pytest.raises(StoreBusyError):
        StoreLock(runs, "mine")
    assert current_holder(runs.parent) is not None


def test_a_holder_elsewhere_that_fell_silent_is_not_said_to_work(runs):
    path = runs / "lock.json"
    path.write_text(json.dumps({**_current(), "host": "elsewhere"}))
    assert current_holder(runs.parent)["host"] == "elsewhere"
    long_ago = time.time() - LOCK_TTL_S - 1
    os.utime(path, (long_ago, long_ago))
    assert current_holder(runs.parent) is None
