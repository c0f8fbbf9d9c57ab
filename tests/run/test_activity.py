from __future__ import annotations

import threading
from collections import deque
from types import SimpleNamespace

import pytest
from distributed.core import Status
from distributed.worker import thread_state

from pipeline.errors import StaleWriterError
from pipeline.run import activity
from pipeline.source import current


def test_a_worker_reports_what_its_threads_are_at_but_not_what_they_were_at():
    def work():
        thread_state.key = "process-run-1"
        current.note("cats/tom.jpg")
        noted.set()
        ended.wait(900)

    noted, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert noted.wait(900)
    ((key, what, since_s),) = activity.report(SimpleNamespace(active_threads={thread.ident: "process-run-1"}))
    assert (key, what) == ("process-run-1", "cats/tom.jpg")
    assert 0 <= since_s < 10
    assert activity.report(SimpleNamespace(active_threads={thread.ident: "process-run-2"})) == []  # which has not begun an image
    assert activity.report(SimpleNamespace(active_threads={})) == []
    ended.set()
    thread.join()


def test_a_worker_that_was_silent_waits_for_its_scheduler_before_it_writes(monkeypatch):
    worker = SimpleNamespace(status=Status.running, address="tcp://here", active_threads={})
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(activity, "_reports", {id(worker): deque([900.0, 999.0], maxlen=2)})
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        now[0] += 1
        activity.report(worker)

    monkeypatch.setattr("time.sleep", sleep)
    activity.require_lease(worker)  # the answer to the second heartbeat after the silence tells
    assert len(slept) == 1
    activity.require_lease(worker)
    assert len(slept) == 1
    now[0] += 100

    def close(_):
        worker.status = Status.closing

    monkeypatch.setattr("time.sleep", close)
    with pytest.raises(StaleWriterError, match="silent for so long"):
        activity.require_lease(worker)
