from __future__ import annotations

import weakref
from types import SimpleNamespace

from pipeline.run.driver import Driver
from pipeline.run.summary import Progress


class Sent:
    """Stands for a task and its future."""


def test_no_future_is_kept_of_what_was_taken():
    """Dask would compute its result again if the worker that holds it died."""
    sent = [Sent()]
    kept = weakref.ref(sent[0])
    driver = object.__new__(Driver)
    driver.flight = SimpleNamespace(finished=lambda timeout_s: (sent.pop() for _ in range(1)))
    driver._take = lambda sent: None
    driver._take_finished(0.0)
    assert not sent
    assert kept() is None


def test_a_drain_takes_back_once_and_counts_what_it_waits_for():
    taken = []
    driver = object.__new__(Driver)
    driver.is_taken_back, driver.ending = False, SimpleNamespace(draining=False)
    driver.flight = SimpleNamespace(take_back=lambda: taken.append(1), n_images=24)
    driver.context = SimpleNamespace(progress=Progress(stage="running"))
    stages = []
    for driver.ending.draining, driver.flight.n_images in [(False, 24), (True, 24), (True, 1), (True, 0)]:
        driver._drain()
        stages.append((driver.context.progress.stage, len(taken)))
    assert stages == [
        ("running", 0),
        ("stopping (up to 24 images in flight)", 1),
        ("stopping (up to 1 image in flight)", 1),
        ("stopping", 1),
    ]
