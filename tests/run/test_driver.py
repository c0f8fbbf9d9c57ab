from __future__ import annotations

import weakref
from types import SimpleNamespace

from pipeline.run.driver import Driver


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
