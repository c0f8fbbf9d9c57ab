from __future__ import annotations

from types import SimpleNamespace

import pytest

from pipeline.errors import FeaturemapsError
from pipeline.run import workers as fleet
from pipeline.run.driver import Driver
from pipeline.run.in_flight import BatchTask, Sent
from pipeline.run.plan.memory import WorkerKind
from pipeline.run.slots import WorkerSlots
from pipeline.run.workers import Fleet

GIB = 2**30
WHOLE = WorkerSlots(2, 2, 2 * GIB, False, True)
READER = WorkerSlots(3, 0, GIB, False, False)
EXTRACTOR = WorkerSlots(0, 2, 4 * GIB, True, False)


@pytest.fixture
def workers(monkeypatch):
    """Stands for the scheduler's list of workers, which no test can time."""
    found: dict[str, WorkerSlots] = {}

    def slots(_):
        if not found:
            raise FeaturemapsError("none of the 0 workers offers the resource 'read'")
        return dict(found)

    monkeypatch.setattr(fleet, "worker_slots", slots)
    return found


def test_whole_workers_hold_no_images_of_batches_that_wait(workers):
    workers |= {"a": WHOLE, "b": WHOLE}
    found = Fleet(None)
    assert (found.slots, found.window, found.memory_limit_bytes, found.is_whole) == (4, 8, 2 * GIB, True)
    assert found.kind == WorkerKind(2)


def test_readers_have_batches_of_their_own_in_flight_and_extractors_hold_their_share(workers):
    workers |= {"a": READER, "b": READER, "c": EXTRACTOR, "d": EXTRACTOR}
    found = Fleet(None)
    assert (found.slots, found.window, found.memory_limit_bytes, found.is_whole) == (4, 8 + 6, GIB, False)
    assert found.kind == WorkerKind(2, 4 + 3, has_gpu=True)


def test_a_run_whose_workers_all_went_ends_after_a_while(workers, monkeypatch):
    workers["a"] = WHOLE
    found = Fleet(None)
    assert not found.has_lost_workers()
    workers.clear()
    found.check()
    assert found.has_lost_workers()
    monkeypatch.setattr(fleet, "NO_WORKERS_S", 0.0)
    with pytest.raises(FeaturemapsError, match=r"none has come for 0 s: .*what was committed stands.*offers the resource 'read'"):
        found.check()


def test_workers_that_share_the_roles_cannot_take_over_from_whole_ones(workers, monkeypatch):
    workers["a"] = WHOLE
    found = Fleet(None)
    workers.clear()
    workers |= {"b": READER, "c": EXTRACTOR}
    monkeypatch.setattr(fleet, "NO_WORKERS_S", 0.0)
    with pytest.raises(FeaturemapsError, match="each worker that is left has only some of the roles"):
        found.check()
    workers["d"] = WHOLE
    found.check()
    assert found.slots == 4


def test_while_nobody_is_there_one_batch_may_still_be_sent_for_those_who_come_back(workers):
    workers["a"] = WHOLE
    found = Fleet(None)
    workers.clear()
    found.check()
    assert (found.slots, found.window) == (0, 1)


def test_workers_that_went_are_counted_once_and_again_when_they_went_again(workers):
    workers |= {"a": WHOLE, "b": WHOLE}
    found = Fleet(None)
    del workers["b"]
    for _ in range(2):
        found.check()
        assert (found.n_lost, found.n_workers) == (1, 1)
    workers["c"] = WHOLE
    found.check()
    assert (found.n_lost, found.n_workers) == (1, 2)
    assert found.has_lost_workers()  # b is, although another came
    workers.clear()
    found.check()
    assert found.n_lost == 3


@pytest.mark.parametrize("status", ["lost", "pending"])
def test_a_result_that_was_lost_with_its_worker_is_waited_for_again(status):
    """Stands for a worker that dies between the end of its task and the driver's look at it."""
    followed = []
    driver = SimpleNamespace(flight=SimpleNamespace(follow=followed.append))
    sent = Sent(BatchTask([]), SimpleNamespace(status=status))
    Driver._take(driver, sent)
    assert followed == [sent]
