from __future__ import annotations

import pytest

from pipeline.run import timer
from pipeline.run.timer import Every


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the test moves."""
    now = [100.0]
    monkeypatch.setattr(timer.time, "monotonic", lambda: now[0])
    return now


def test_it_is_due_every_few_seconds_from_when_it_was_done(clock):
    every = Every(10.0)
    assert (every.left_s, every.is_due) == (10.0, False)
    clock[0] += 13.0
    assert (every.left_s, every.is_due) == (-3.0, True)
    every.done()
    assert (every.left_s, every.is_due) == (10.0, False)


def test_the_first_time_may_come_sooner(clock):
    every = Every(10.0, 1.0)
    clock[0] += 1.0
    assert every.is_due
    every.done()
    assert every.left_s == 10.0
