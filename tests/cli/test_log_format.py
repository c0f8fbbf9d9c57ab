from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline.cli import log_format
from pipeline.run import failures
from pipeline.run.results import note_batch
from pipeline.run.summary import Progress, Summary, working
from pipeline.run.tasks import BatchResult, PieceResult, WorkPiece
from pipeline.store.schema import Status

COMMAND = "from pipeline.cli.commands import main; main()"
HOSTILE = "a\nb\x1b[2J\udcff.png"


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("pipeline.x", logging.WARNING, "x.py", 1, message, arguments, None)
    made.__dict__.update(extra)
    made.created = 1_700_000_000.25
    return made


def test_a_json_line_holds_what_came_with_the_record_and_the_run_that_is_at_work():
    formatter = log_format.JsonFormatter()
    with working("/s.zarr", Summary("r1"), Progress()):
        line = formatter.format(record("bad image %s", HOSTILE, path=HOSTILE, where=Path("/p"), n=3))
    assert line.isascii()
    assert line.isprintable()
    expected = {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "WARNING",
        "logger": "pipeline.x",
        "run_id": "r1",
        "store": "/s.zarr",
    }
    assert json.loads(line) == {
        **expected,
        "message": r"bad image a\nb\x1b[2J\udcff.png",
        "path": HOSTILE,
        "where": "/p",
        "n": 3,
    }
    assert json.loads(formatter.format(record("it failed")))["run_id"] == "r1"  # the final error comes after the run


def test_a_traceback_is_a_field_of_its_line():
    made = record("it broke")
    error = ValueError(HOSTILE)
    made.exc_info = (ValueError, error, None)
    found = json.loads(log_format.JsonFormatter().format(made))
    assert found["error"] == f"ValueError: {HOSTILE}"
    assert found["traceback"].startswith("ValueError: a\nb")


def test_a_line_of_text_is_one_line_whatever_it_says():
    line = log_format.TextFormatter().format(record("%s is odd", HOSTILE))
    assert line.endswith(r" WARNING pipeline.x: a\nb\x1b[2J\udcff.png is odd")


def test_of_many_bad_images_the_first_are_warned_of(caplog):
    with caplog.at_level(logging.INFO, "pipeline.run.failures"):
        for n_before in range(failures.MAX_WARNINGS + 5):
            failures.warn_of_image(f"{n_before}.png", "empty: the file has 0 bytes", n_before)
    levels = [found.levelname for found in caplog.records]
    assert levels == ["WARNING"] * (failures.MAX_WARNINGS + 1) + ["INFO"] * 5
    assert (
        caplog.records[failures.MAX_WARNINGS]
        .getMessage()
        .startswith("20 bad images so far: the next ones are logged at level INFO")
    )
    assert (caplog.records[0].path, caplog.records[0].error) == ("0.png", "empty: the file has 0 bytes")


def test_a_batch_says_what_became_of_its_images(caplog):
    status = np.array([Status.DONE, Status.QUARANTINED, Status.PENDING, Status.DONE], np.uint8)
    piece = WorkPiece(None, 0, 4, (0, 1, 2, 3), ("a", "b", "c", "d"), ("",) * 4)
    outcome = PieceResult(None, 0, 4, piece.rows, status, [""] * 4, [""] * 4, [""] * 4)
    result = BatchResult([outcome], "node7", {"read": 0.5, "write": 0.25}, 100, 200)
    with caplog.at_level(logging.INFO, "pipeline.run.results"):
        note_batch("process-1", [piece], result)
    (found,) = caplog.records
    expected = "batch process-1 on node7: 2 of 4 images done, 1 quarantined, 1 left to the next run, read 0.50 s, write 0.25 s"
    assert found.getMessage() == expected
    assert (found.batch, found.host, found.n_images, found.n_done, found.n_quarantined, found.n_pending) == (
        "process-1",
        "node7",
        4,
        2,
        1,
        1,
    )
    assert (found.stage_s, found.bytes_read, found.bytes_written) == ({"read": 0.5, "write": 0.25}, 100, 200)
    assert outcome.paths == piece.paths


def errors_of(code: str, *arguments: str) -> tuple[int, list[dict[str, object]]]:
    """Exit code and the objects on stderr."""
    call = [sys.executable, "-c", code, *arguments]
    ended = subprocess.run(call, capture_output=True, text=True, check=False)
    assert ended.stdout == ""
    return ended.returncode, [json.loads(line) for line in ended.stderr.splitlines()]


@pytest.mark.parametrize("arguments", [["--log-format", "json", "--dtpye", "uint8"], ["--dtype", "int4", "--log-format=json"]])
def test_a_command_line_that_makes_no_sense_is_json_too_where_json_was_asked_for(arguments):
    code, (line,) = errors_of(COMMAND, "run", "a", "b", *arguments)
    assert (code, line["level"], line["exit_code"]) == (2, "ERROR", 2)
    assert "int4" in line["message"] or "No such option" in line["message"]


def test_an_error_is_json_and_names_the_store(tmp_path):
    code, lines = errors_of(COMMAND, "plan", str(tmp_path / "none"), str(tmp_path / "f.zarr"), "--log-format", "json")
    assert code == 2
    assert lines[-1]["message"].startswith(f"featuremaps: source '{tmp_path / 'none'}' does not exist")
    assert (lines[-1]["store"], lines[-1]["error"]) == (str(tmp_path / "f.zarr"), "UsageError")


def test_a_fault_of_our_own_is_one_line_of_json_and_a_traceback_in_text(tmp_path):
    broken = f"import pipeline.checks.plan as p; p.plan_job = lambda *_: 1 / 0; {COMMAND}"
    code, lines = errors_of(broken, "plan", "a", str(tmp_path / "f.zarr"), "--log-format", "json")
    assert (code, [line["level"] for line in lines]) == (1, ["CRITICAL"])
    assert lines[0]["message"] == "featuremaps has a fault: division by zero"
    assert "ZeroDivisionError" in lines[0]["traceback"]
    call = [sys.executable, "-c", broken, "plan", "a", str(tmp_path / "f.zarr")]
    ended = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (ended.returncode, "Traceback (most recent call last)" in ended.stderr) == (1, True)
