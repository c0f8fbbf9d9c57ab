from __future__ import annotations

import pytest

from pipeline.run.summary import Summary
from pipeline.run.summary_text import describe, describe_bottleneck
from pipeline.text import printable


def test_one_image_is_singular_and_a_run_that_did_nothing_says_so():
    lines = describe(
        Summary("r", outcome="complete", n_listed=1, n_unchanged=1, n_bad_total=1, n_done_total=1), "s.zarr"
    ).splitlines()
    assert lines[0].startswith("complete: 0 images done, 1 unchanged, ")
    assert lines[1] == "there was nothing to do: the store has every image as it is listed"
    assert lines[2] == "1 bad image in all: featuremaps status s.zarr lists them with their reasons"
    lines = describe(
        Summary("r", outcome="complete", n_done=1, slots=1, compute_s=2.0, slot_s=2.0, n_checked=1), "s.zarr"
    ).splitlines()
    assert lines[0].startswith("complete: 1 image done, ")
    assert "0.5 images/s, 0.0 megapixels/s on 1 slot; read" in lines[1]
    assert lines[2].endswith("; the workers were idle 100% of the time: 1 image cannot keep 1 slot busy")
    assert lines[3].startswith("1 image was read and compared with their digests, 0 could not be")
    assert "nothing to do" not in "".join(lines)
    many = Summary("r", outcome="complete", n_done=1000, slots=2, compute_s=2.0, slot_s=4.0)
    assert "idle 100% of the time: they waited for headers, for the last batches, " in describe(many, "s.zarr")
    assert describe_bottleneck("read", {"read": 0.5}) == "most of the workers' time went into reading (50%)"


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
