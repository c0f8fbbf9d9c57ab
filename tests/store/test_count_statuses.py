from __future__ import annotations

import numpy as np
import pytest

from pipeline.store.contents import count_class, count_statuses
from pipeline.store.schema import REJECTED, Status


@pytest.fixture
def store():
    """Stands for a store of two classes, whose columns are all that counting reads."""
    columns = {
        "30x40": [Status.DONE, Status.PENDING, Status.DONE],
        "36x32": [Status.QUARANTINED, Status.SUPERSEDED, Status.REMOVED],
        REJECTED: [Status.QUARANTINED, Status.SUPERSEDED, Status.QUARANTINED, Status.REMOVED],
    }

    class Named:
        def __init__(self, name):
            self.name = name

    class Columns:
        classes = {(30, 40): Named("30x40"), (36, 32): Named("36x32")}

        def column(self, group, name):
            assert name == "status"
            return np.array(columns[group], np.uint8)

    return Columns()


def test_a_class_is_counted_by_what_there_is(store):
    assert count_class(store, "30x40") == {Status.DONE: 2, Status.PENDING: 1}


def test_statuses_are_counted_over_all_classes_and_only_live_entries_are_rejected(store):
    assert count_statuses(store) == {"pending": 1, "done": 2, "quarantined": 1, "superseded": 1, "removed": 1, "rejected": 2}


def test_a_damaged_status_is_not_counted(store):
    store.column = lambda group, name: np.array([Status.DONE, 200], np.uint8)
    assert count_class(store, "30x40") == {Status.DONE: 1}
