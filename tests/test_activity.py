from __future__ import annotations

import threading
from types import SimpleNamespace

from distributed.worker import thread_state

from pipeline import activity


def test_a_worker_reports_what_its_threads_are_at_but_not_what_they_were_at():
    def work():
        thread_state.key = "process-run-1"
        activity.note("cats/tom.jpg")
        noted.set()
        ended.wait(10)

    noted, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=work)
    thread.start()
    assert noted.wait(10)
    ((key, what, since_s),) = activity.report(SimpleNamespace(active_threads={thread.ident: "process-run-1"}))
    assert (key, what) == ("process-run-1", "cats/tom.jpg")
    assert 0 <= since_s < 10
    assert activity.report(SimpleNamespace(active_threads={thread.ident: "process-run-2"})) == []  # which has not begun an image
    assert activity.report(SimpleNamespace(active_threads={})) == []
    ended.set()
    thread.join()
