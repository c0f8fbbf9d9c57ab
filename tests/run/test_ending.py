from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from pipeline.errors import FeaturemapsError
from pipeline.run.ending import Ending

STORE = Path("features.zarr")


def test_only_the_first_failure_counts_and_nothing_new_is_sent_after_it():
    ending = Ending(threading.Event(), STORE, lambda: True)
    assert (ending.failure, ending.draining) == (None, False)
    first = FeaturemapsError("first")
    ending.fail(first)
    ending.fail(FeaturemapsError("second"))
    assert (ending.failure, ending.draining) == (first, True)


def test_nothing_new_is_sent_once_a_run_was_asked_to_stop():
    stop = threading.Event()
    ending = Ending(stop, STORE, lambda: True)
    stop.set()
    assert (ending.failure, ending.draining) == (None, True)


@pytest.mark.parametrize(
    ("is_connected", "message"), [(True, r"the disk of features.zarr is full"), (False, r"scheduler .* was lost")]
)
def test_an_error_is_the_schedulers_where_the_scheduler_is_gone(is_connected, message):
    ending = Ending(threading.Event(), STORE, lambda: is_connected)
    ending.fail_or_lose(OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(FeaturemapsError, match=message):
        raise ending.failure


def test_an_error_of_the_store_stays_the_stores_also_where_the_scheduler_is_gone():
    ending = Ending(threading.Event(), STORE, lambda: False)
    ending.fail_with(OSError(errno.ENOSPC, "No space left"))
    with pytest.raises(FeaturemapsError, match=r"the disk of features.zarr is full"):
        raise ending.failure
