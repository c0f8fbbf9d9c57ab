from __future__ import annotations

import json

import pytest

from pipeline.summary import STAGES, Summary, printable, receipt


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


@pytest.mark.parametrize(
    ("name", "shown"),
    [("plain name 50%25.jpg", "plain name 50%25.jpg"), ("ü日本.png", "ü日本.png"), ("a\nb\t\x1b[2J", r"a\nb\t\x1b[2J")],
)
def test_a_name_is_printed_on_one_line_and_moves_no_cursor(name, shown):
    assert printable(name) == shown
