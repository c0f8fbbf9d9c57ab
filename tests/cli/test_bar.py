from __future__ import annotations

import io
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


pytestmark = pytest.mark.parametrize("columns", [60, 120])


def test_what_is_said_beside_a_bar_has_a_line_of_its_own_above_it(columns, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: False) as update:
        update(Progress(2880, 148, stage="running"))
        terminal.say("Dask's dashboard: http://127.0.0.1:37013/status")
        update(Progress(2880, 149, stage="running"))
    assert re.search(r"\r\x1b\[2K(\x1b\[0m)?Dask's dashboard: http://127\.0\.0\.1:37013/status *(\x1b\[0m)?\n", screen.shown), (
        screen.shown
    )


def test_a_bar_leaves_room_for_the_ctrl_c_that_a_terminal_shows(columns, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: False) as update:
        update(Progress(2880, 148, stage="running (with many words that fill the line to its end, and more)" * 2))
        terminal.say("text")
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.shown)
    widths = {len(line) for line in re.split(r"[\r\n]", plain)}
    assert max(widths) == columns - 3


def test_a_bar_is_one_line_and_gives_way_to_what_it_says(columns, monkeypatch):
    screen, stop = terminal_of(columns, monkeypatch), threading.Event()
    queue = "waiting for workers (local: 0 of 2 workers; " + "all of them are in the queue; " * 4
    with bar(stop.is_set) as update:
        for stage, is_whole in [("starting workers", True), (queue, False), ("stopping (296 images in flight)", True)]:
            if stage.startswith("stopping"):
                stop.set()
            update(Progress(2880, 148, stage=stage))
            line = screen.shown.rpartition("\x1b[2K")[2]
            assert not is_whole or (stage in line and "148/2880" in line)
        assert "\x1b[1A" not in screen.shown, "the cursor went up over a second line"


def test_a_bar_says_at_once_that_it_stops(columns, monkeypatch):
    screen = terminal_of(columns, monkeypatch)
    with bar(lambda: True) as update:
        update(Progress(10, 1, stage="running"))
        terminal.say("SIGINT")
    assert "stopping" in screen.shown
    assert "running" not in screen.shown
    assert "left" not in screen.shown
