from __future__ import annotations

import io
import itertools
import re
import sys
import threading

import pytest

from pipeline.cli import terminal
from pipeline.cli.bar import bar
from pipeline.run.summary import Progress


class Terminal(io.TextIOWrapper):
    """What was written to it, as to a terminal: also past the text, to the bytes below."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8", write_through=True)

    def isatty(self) -> bool:
        return True

    @property
    def shown(self) -> str:
        return self.buffer.getvalue().decode()


def terminal_of(columns: int, monkeypatch) -> Terminal:
    """A terminal as stderr; not in a fixture, after which pytest puts its own there."""
    made = Terminal()
    for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", made)
    return made


def last_line(screen: Terminal) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.shown.rpartition("\x1b[2K")[2])


wide = pytest.mark.parametrize("columns", [60, 120])


@wide
def test_what_is_said_beside_a_bar_has_a_line_of_its_own_above_it(columns, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: False) as update:
        update(Progress(2880, 148, stage="running"))
        terminal.say("Dask's dashboard: http://127.0.0.1:37013/status")
        update(Progress(2880, 149, stage="running"))
    assert re.search(r"\r\x1b\[2K(\x1b\[0m)?Dask's dashboard: http://127\.0\.0\.1:37013/status *(\x1b\[0m)?\n", screen.shown), (
        screen.shown
    )


@wide
def test_a_bar_leaves_room_for_the_ctrl_c_that_a_terminal_shows(columns, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: False) as update:
        update(Progress(2880, 148, stage="running with many words that fill the line to its end, and more" * 2))
        terminal.say("text")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.shown)
    widths = {len(line) for line in re.split(r"[\r\n]", plain)}
    assert columns - 4 <= max(widths) <= columns - 3


@wide
def test_a_bar_is_one_line_and_gives_way_to_what_it_says(columns, monkeypatch):
    screen, stop = terminal_of(columns, monkeypatch), threading.Event()
    queue = "waiting for workers (local: 0 of 2 workers; " + "all of them are in the queue; " * 4
    with bar(stop.is_set) as update:
        stopping = "stopping (up to 296 images in flight)"
        for stage in ["starting workers", queue, "running", stopping]:
            if stage == stopping:
                stop.set()
            update(Progress(2880, 148, stage=stage))
            line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.shown.rpartition("\x1b[2K")[2])
            short = stage.partition(" (")[0] if columns < 80 else stage[:60]
            assert re.search(rf"^\S {re.escape(short)}[^━╸╺]* [━╸╺]{{9,40}}  148/2880 0:00:00 *$", line), line
        assert "\x1b[1A" not in screen.shown, "the cursor went up over a second line"


@wide
def test_a_bar_says_at_once_that_it_stops(columns, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: True) as update:
        update(Progress(10, 1, stage="running"))
        terminal.say("SIGINT")
    assert "stopping" in screen.shown
    assert "running" not in screen.shown
    assert "left" not in screen.shown


@wide
def test_the_time_left_is_said_while_the_run_works_and_not_while_it_stops(columns, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: False) as update:
        for n in range(3):
            update(Progress(10, n, stage="running"))
        assert re.search(r" \d:\d\d:\d\d left", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.shown))
        update(Progress(10, 3, stage="stopping"))  # a failure stops it, not a signal
        assert "left" not in screen.shown.rpartition("\x1b[2K")[2]


@pytest.mark.parametrize("columns", [20, 25, 30, 35, 40, 45, 50, 55])
@pytest.mark.parametrize(
    "stage", ["running", "waiting for workers (local: 0 of 2 workers)", "stopping (up to 296 images in flight)"]
)
def test_a_narrow_terminal_has_one_line_with_the_whole_count(columns, stage, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: False) as update:
        for n_total, n_quarantined in itertools.product([0, 9, 2880, 12_345_678], [0, 3]):
            n = n_total // 2
            update(Progress(n_total, n, n_quarantined=n_quarantined, stage=stage))
            line = last_line(screen)
            assert len(line) <= columns - 3, "the terminal's ^C would break it in two"
            assert f" {n}/{n_total or '?'}" in line, line
            if n_total <= 2880:
                assert re.search("[━╸╺]{4}" if stage == "running" else "stop|wait", line), line
        assert "\x1b[1A" not in screen.shown, "the cursor went up over a second line"
