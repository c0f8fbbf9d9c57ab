from __future__ import annotations

import pytest

from pipeline.run.summary import Summary, receipt
from pipeline.run.summary_text import describe, describe_bottleneck
from pipeline.text import printable


def test_one_image_is_singular_and_a_run_that_did_nothing_says_so():
    lines = describe(
        Summary("r", outcome="complete", n_listed=1, n_unchanged=1, n_bad_total=1, n_done_total=1), "s.zarr"
    ).splitlines()
    assert lines[0].startswith("complete: 0 images done, 1 unchanged, ")
    assert lines[1] == "there was nothing to do, so no worker was started: the store has every image as it is listed"
    assert lines[2] == "1 bad image in all: featuremaps status s.zarr lists them with their reasons"
    lines = describe(
        Summary(
            "r",
            outcome="complete",
            n_done=1,
            slots=1,
            workers=1,
            compute_s=2.0,
            slot_s=2.0,
            n_checked=1,
            pixels=5400,
            bytes_read=1234,
        ),
        "s.zarr",
    ).splitlines()
    assert lines[0].startswith("complete: 1 image done, ")
    assert "0.5 images/s, 0.0027 megapixels/s on 1 slot; read 1.2 kB, wrote 0 bytes" in lines[1]
    assert lines[2].startswith(
        "time of the worker: waiting 100%; the worker was idle 100% of the time: too little work (1 image)"
    )
    assert lines[3].startswith("1 image was read and compared with their digests, 0 could not be")
    assert "nothing to do" not in "".join(lines)
    assert "no worker" not in "".join(lines)
    removed = Summary("r", outcome="complete", n_listed=1, n_unchanged=1, n_removed=2, n_done_total=1)
    assert "\nno image had to be computed, so no worker was started\n" in describe(removed, "s.zarr")
    bad = Summary("r", outcome="complete", n_listed=1, n_new=1, n_rejected=1, start_s=4.0)
    assert "no worker was started" not in describe(bad, "s.zarr")
    many = Summary("r", outcome="complete", n_done=1000, slots=2, compute_s=60.0, slot_s=120.0)
    assert "idle 100% of the time: they waited for headers, for the last batches, " in describe(many, "s.zarr")
    assert (
        describe_bottleneck({"bottleneck": "read", "shares": {"read": 0.5}})
        == "most of the workers' time went into reading (50%)"
    )


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"n_done": 1000, "workers": 2}, ": too little work (1000 images) to keep 2 workers busy"),  # in two seconds
        ({"n_done": 1000, "workers": 1}, ": too little work (1000 images) to keep 2 slots busy"),
        ({"n_done": 10, "n_pending": 1000, "outcome": "stopped"}, ": they waited for headers, "),
        ({"n_done": 10, "outcome": "running"}, ""),
        ({"n_done": 10, "outcome": "failed"}, ""),
    ],
)
def test_idle_workers_had_too_little_work_only_where_the_run_says_so(values, why):
    run = receipt(Summary("r", **{"outcome": "complete", "slots": 2, "compute_s": 2.0, "slot_s": 4.0, **values}))
    found = describe_bottleneck(run)
    idle = "the worker was" if values.get("workers") == 1 else "the workers were"
    assert found.startswith(f"{idle} idle 100% of the time{why}")
    assert why or found.endswith("time")


def test_a_summary_says_how_long_the_workers_took_to_start():
    summary = Summary("r", outcome="complete", n_done=1, slots=1, compute_s=2.0, slot_s=2.0, elapsed_s=27.04, start_s=15.04)
    lines = describe(summary, "s.zarr").splitlines()
    assert str(summary) == lines[0]
    assert repr(summary) == f"<Summary of run r: {lines[0]}>"
    assert lines[0].endswith(" in 27.0 s, of which 15.0 s to start workers")
    assert " on 1 slot once the workers had started; read" in lines[1]
    summary.start_s = 0.02  # on a client that is there
    assert describe(summary, "s.zarr").splitlines()[0].endswith(" in 27.0 s")


def test_one_worker_is_singular():
    run = receipt(Summary("r", outcome="complete", n_done=1000, slots=1, workers=1, start_s=2.0, compute_s=60.0, slot_s=60.0))
    assert describe_bottleneck(run) == (
        "the worker was idle 100% of the time: it waited for headers, for the last batches, for a replaced worker or for the driver"
    )
    one = Summary("r", outcome="complete", n_done=1, slots=1, workers=1, start_s=2.0, compute_s=1.0, slot_s=1.0)
    one.stage_s["write"] = 0.9
    assert " on 1 slot once the worker had started; read" in describe(one, "s.zarr")
    assert describe_bottleneck(receipt(one)) == "most of the worker's time went into writing (90%)"


def test_a_run_that_ends_with_3_says_why():
    limited = Summary("r", outcome="complete", n_bad_total=3, n_done_total=1, config={"max_quarantined": 2})
    assert "\nexit code 3: more images are bad than --max-quarantined 2 allows\n" in describe(limited, "s.zarr")
    limited.config["max_quarantined"] = 3
    assert "exit code" not in describe(limited, "s.zarr")


@pytest.mark.parametrize(
    ("name", "shown"),
    [("plain name 50%25.jpg", "plain name 50%25.jpg"), ("ü日本.png", "ü日本.png"), ("a\nb\t\x1b[2J", r"a\nb\t\x1b[2J")],
)
def test_a_name_is_printed_on_one_line_and_moves_no_cursor(name, shown):
    assert printable(name) == shown
