from __future__ import annotations

import contextlib
import json

import pytest

from pipeline.errors import FeaturemapsError, UsageError
from pipeline.run.summary import STAGES, Failure, Progress, Summary, at_work, failure, receipt, working


def test_the_shares_of_the_stages_and_of_waiting_sum_to_one():
    summary = Summary(
        "r", compute_s=10.0, slots=2, slot_s=20.0, stage_s={"read": 1.0, "decode": 3.0, "extract": 10.0, "write": 2.0}
    )
    assert summary.shares() == pytest.approx({"read": 0.05, "decode": 0.15, "extract": 0.5, "write": 0.1, "waiting": 0.2})
    assert summary.bottleneck == "extract"


def test_stages_that_overlap_still_sum_to_one():
    summary = Summary("r", compute_s=1.0, slots=1, slot_s=1.0, stage_s={"read": 3.0, "decode": 0.0, "extract": 1.0, "write": 0.0})
    assert summary.shares() == pytest.approx({"read": 0.75, "decode": 0.0, "extract": 0.25, "write": 0.0, "waiting": 0.0})
    assert summary.bottleneck == "read"


def test_a_run_that_computed_nothing_has_no_rate_no_shares_and_no_bottleneck():
    summary = Summary("r")
    assert (summary.images_per_s, summary.megapixels_per_s, summary.shares(), summary.bottleneck) == (0.0, 0.0, {}, "")
    assert set(summary.stage_s) == set(STAGES)


def test_rates_count_the_time_between_the_first_task_and_the_last():
    summary = Summary("r", n_done=30, pixels=6_000_000, compute_s=2.0, elapsed_s=100.0, slots=1)
    assert (summary.images_per_s, summary.megapixels_per_s) == (15.0, 3.0)


def test_a_receipt_is_json_and_holds_what_follows_from_the_numbers():
    summary = Summary("r", n_done=30, compute_s=2.0, slots=1, slot_s=2.0, hosts={"here": 30})
    found = json.loads(json.dumps(receipt(summary)))
    assert (found["run_id"], found["images_per_s"], found["bottleneck"], found["hosts"]) == ("r", 15.0, "waiting", {"here": 30})
    assert found["shares"] == {"read": 0.0, "decode": 0.0, "extract": 0.0, "write": 0.0, "waiting": 1.0}


def test_the_time_of_the_slots_counts_those_that_there_were():
    summary = Summary("r", slots=2)
    summary.count_time(10.0)
    summary.slots = 5
    summary.count_time(12.0)
    assert (summary.compute_s, summary.slot_s) == (12.0, 30.0)


def test_a_receipt_that_is_written_while_a_run_is_at_work_says_when_and_after_how_long():
    summary = Summary("r", started="2026-01-01T00:00:00+00:00")
    summary.touch(2.5)
    assert summary.updated > summary.started
    assert summary.elapsed_s == 2.5


def test_a_run_is_at_work_until_it_ends_or_fails():
    with contextlib.suppress(OSError), working("/s", Summary("r"), Progress()):
        assert [run.store for run in at_work.values()] == ["/s"]
        raise OSError("full")
    assert at_work == {}


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (UsageError("5 of 6 images are gone"), 2, "5 of 6 images are gone"),
        (FeaturemapsError("a: b"), 1, "a: b"),
        (PermissionError(13, "no"), 1, "[Errno 13] no"),
        (KeyError(1), 1, "KeyError: 1"),
    ],
)
def test_what_a_failure_notes_its_receipt_tells(error, code, reason):
    summary = Summary("r")
    summary.note_failure(error)
    assert summary.exit_code == code
    assert failure(receipt(summary)["message"]) == Failure(code, reason)
