from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from pipeline.errors import FeaturemapsError
from pipeline.run import watch as watching
from pipeline.run.ending import Ending
from pipeline.run.hangs import Stall
from pipeline.run.summary import Summary
from pipeline.run.watch import MAX_STALLS, Watch


def fail(*_):
    raise FeaturemapsError("it cannot be done")


@pytest.fixture
def watch(monkeypatch):
    """Stands for a cluster with one worker that waits for a storage whenever it is looked at."""
    monkeypatch.setattr(watching, "find_stalls", lambda *_: [Stall("tcp://w", "process-RUN-0", "a.png", 70.0)])
    stop = threading.Event()
    store = SimpleNamespace(path="features.zarr")
    context = SimpleNamespace(summary=Summary("RUN"), job=SimpleNamespace(deadline_s=60.0), store=store, stop=stop)
    fleet = SimpleNamespace(check=lambda: None, slots=4, n_workers=2, n_lost=1)
    flight = SimpleNamespace(begin_anew=lambda stall: None, check_progress=lambda: None)
    return Watch(context, None, fleet, flight, Ending(stop, "features.zarr", lambda: True))


def test_a_run_waits_no_longer_after_some_stalls_in_a_row(watch):
    for _ in range(MAX_STALLS - 1):
        watch.check_stalls()
    assert not watch.ending.is_stuck
    watch.check_stalls()
    assert (watch.ending.is_stuck, watch.ending.failure) == (True, None)
    assert watch.context.summary.faults == [
        "a.png: the storage did not answer for 70 s, for 3 tasks in a row: the run did not wait for the others"
    ]


def test_stalls_are_counted_anew_once_something_was_read(watch):
    for anything in (False, True):
        for _ in range(MAX_STALLS - 1):
            watch.check_stalls()
        watch.note_read(anything=True)
        watch.note_read(anything=anything)
    assert not watch.ending.is_stuck
    watch.note_read(anything=False)
    for _ in range(MAX_STALLS):
        watch.check_stalls()
        watch.note_read(anything=False)
    assert watch.ending.is_stuck


def test_a_worker_that_cannot_be_replaced_ends_the_run(watch):
    watch.flight.begin_anew = fail
    watch.check_stalls()
    assert (watch.ending.is_stuck, str(watch.ending.failure)) == (True, "it cannot be done")
    assert watch.context.summary.faults == []


def test_the_summary_says_what_workers_there_are_and_a_run_that_nobody_works_for_ends(watch):
    watch.check_workers()
    summary = watch.context.summary
    assert (summary.slots, summary.workers, summary.n_workers_lost) == (4, 2, 1)
    assert (watch.ending.is_lost, watch.ending.failure) == (False, None)
    watch.fleet.check = fail
    watch.check_workers()
    assert (watch.ending.is_lost, str(watch.ending.failure)) == (True, "it cannot be done")


@pytest.mark.parametrize("was_asked", [False, True])
def test_work_in_vain_ends_a_run_and_one_that_was_asked_to_stop_leaves_the_rest(watch, was_asked):
    watch.flight.check_progress = fail
    if was_asked:
        watch.context.stop.set()
    watch.check_progress()
    assert watch.ending.is_stuck
    assert (watch.ending.failure is None, watch.context.summary.faults) == (was_asked, ["it cannot be done"] * was_asked)
