"""The summary of all benchmarks: a part that fails is named, the others still run; nothing is measured here."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import pytest

from benchmarks import summary
from benchmarks.summary import FailedError, Row, run_part

ROW = Row("extraction", 3.8, "ms an image", 8.6, "F.conv2d", "6x", "avx2-winograd")


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_the_rows_of_a_part_are_the_last_line_that_it_prints() -> None:
    assert run_part(python(f"print('progress'); print('''{json.dumps([ROW])}''')"), 600) == [ROW]


@pytest.mark.parametrize(
    ("code", "limit_s", "message"),
    [
        ("raise ValueError('no disk')", 600, "ValueError: no disk"),
        ("import os; os._exit(3)", 600, "it ended with 3"),
        ("while True: pass", 0, "it took longer than 0 s"),
    ],
)
def test_a_part_that_gives_no_figures_says_why(code: str, limit_s: float, message: str) -> None:
    with pytest.raises(FailedError, match=message):
        run_part(python(code), limit_s)


def test_the_others_run_after_a_failure_and_the_exit_code_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], _: float) -> list[Row]:
        if command[-1] == "start":
            raise FailedError("no cluster")
        return [ROW]

    monkeypatch.setattr(summary, "run_part", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["summary", "--only", "start", "deep", "--json", str(tmp_path / "all.json")])
    assert summary.main() == 1
    printed = capsys.readouterr().out
    assert str(ROW) in printed
    assert "start failed: no cluster" in printed
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["errors"] == {"start": "no cluster"}
    assert written["rows"] == [{"part": "deep", **ROW._asdict()}]


def test_ctrl_c_leaves_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(command: list[str], _: float) -> list[Row]:
        if command[-1] == "start":
            raise KeyboardInterrupt
        return [ROW]

    monkeypatch.setattr(summary, "run_part", run)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(summary, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["summary", "--only", "deep", "start"])
    assert summary.main() == 130
    assert str(ROW) in capsys.readouterr().out.split("Stopped by Ctrl-C")[1]
