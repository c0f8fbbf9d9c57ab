from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import KilledWorker

from pipeline.errors import StaleWriterError
from pipeline.run.failures import explain, scheduler_lost

STORE = Path("features.zarr")


def test_what_a_task_says_for_people_is_passed_on():
    error = StaleWriterError("late")
    assert explain(error, [], STORE) is error


@pytest.mark.parametrize(
    ("error", "pieces", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), [], r"the disk of features.zarr is full .*No space left.* free space and run"),
        (OSError(errno.EROFS, "Read-only"), [], r"store features.zarr cannot be written any more .*Read-only.* check the disk"),
        (
            KilledWorker("write-1", None, 10),
            [SimpleNamespace(paths=("cats/tom.jpg", "b.jpg"))],
            r"a batch of 2 images from 'cats/tom.jpg' on killed its worker, or ran out of memory, every time, though each image.* memory",
        ),
        (
            ZeroDivisionError("division by zero"),
            [],
            r"failed with an unexpected error \(ZeroDivisionError: division by zero\)",
        ),
    ],
)
def test_what_ends_a_run_is_said_for_a_person(error, pieces, message):
    failure = explain(error, pieces, STORE)
    assert failure.__cause__ is error
    with pytest.raises(type(failure), match=message):
        raise failure


def test_a_lost_scheduler_is_named():
    with pytest.raises(type(scheduler_lost(None)), match=r"scheduler or its connection was lost: what was committed stands"):
        raise scheduler_lost(None)
    with pytest.raises(type(scheduler_lost(None)), match=r"was lost \(gone\)"):
        raise scheduler_lost(OSError("gone"))
