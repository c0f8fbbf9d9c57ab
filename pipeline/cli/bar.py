"""The progress bar of a run: one line at the bottom of the terminal, below all other output."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.constrain import Constrain
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from pipeline.run.summary import Progress

ROOM = len("^C") + 1
"""Columns on the right that stay free: if a terminal's own ``^C`` broke the line in two, one part would remain on the screen."""

BAR, STAGE = 4, 16
"""Columns that the bar takes at least, and that the words of the stage get before the times get any."""

CUT = 5
"""Columns on which a stage can still be guessed: ``stop…``."""

SPARE = 6
"""Of the columns left over, how many the bar gets before the stage does."""

NARROW = 80
"""On fewer columns, a stage that does not fit leaves out what is in brackets."""


class _Narrow(NamedTuple):
    """Content that is a little narrower than the terminal."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Constrain(self.content, options.max_width - ROOM)


class _Stage(ProgressColumn):
    """The stage of the run, in few words if many do not fit; a stop shows at once, before the run has noticed it."""

    def __init__(self, is_stopping: Callable[[], bool], columns: Callable[[], int]) -> None:
        super().__init__(table_column=Column(no_wrap=True))  # a second line would remain on the screen after a ^C
        self.is_stopping, self.columns = is_stopping, columns
        self.room = STAGE
        """Columns that it may take."""

    def text(self, task: Task, room: int) -> str:
        """The stage in words that fit, if there are any."""
        progress, is_stopping = task.fields["progress"], self.is_stopping()
        text = stage_text(progress, is_stopping=is_stopping)
        is_short = len(text) > room and self.columns() < NARROW
        return stage_text(progress, is_stopping=is_stopping, short=True) if is_short else text

    def render(self, task: Task) -> Text:
        text = Text(self.text(task, self.room))
        text.truncate(self.room, overflow="ellipsis")
        return text


class _Left(TimeRemainingColumn):
    """The time left, if it is known; not shown during a stop, which does not wait for all images."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.is_stopping = is_stopping

    def render(self, task: Task) -> Text:
        is_known = task.time_remaining is not None and task.fields["progress"].stage == "running"
        return Text.assemble(super().render(task), " left") if is_known and not self.is_stopping() else Text()


class _OneLine(Bar):
    """The columns that the terminal has room for, by their weight: the count always, the time left last."""

    def __init__(self, is_stopping: Callable[[], bool], console: Console) -> None:
        self.spinner, self.stage, self.left = SpinnerColumn(), _Stage(is_stopping, lambda: console.width), _Left(is_stopping)
        self.bar = BarColumn(None, table_column=Column(max_width=40))  # the one column that shrinks
        self.count = MofNCompleteColumn(table_column=Column(no_wrap=True))
        self.elapsed = TimeElapsedColumn(table_column=Column(no_wrap=True))
        self.all = (self.spinner, self.stage, self.bar, self.count, self.elapsed, self.left)
        super().__init__(*self.all, console=console, transient=True, speed_estimate_period=600)

    def get_renderable(self) -> RenderableType:
        return _Narrow(super().get_renderable())

    def make_tasks_table(self, tasks: Iterable[Task]) -> Table:
        tasks = list(tasks)
        self.columns = self._fitting(tasks[0]) if tasks else self.all
        return super().make_tasks_table(tasks)

    def _fitting(self, task: Task) -> tuple[ProgressColumn, ...]:
        """The columns that fit, in their order on the line; sets the room of the stage."""
        room = self.console.width - ROOM + 1  # each has a space behind it, but the last
        shown: list[ProgressColumn] = []
        is_running = self.stage.text(task, 0).startswith("running")
        weighty = (self.bar, self.stage) if is_running else (self.stage, self.bar)
        for column in (self.count, self.spinner, *weighty, self.elapsed, self.left):
            if column is self.stage:
                width = min(len(self.stage.text(task, STAGE)), STAGE, max(CUT, room - 1))
                self.stage.room = width
            else:
                width = BAR if column is self.bar else len(cast("Text", column(task)))
            if 0 < width < room or not shown:
                shown.append(column)
                room -= width + 1
        self.stage.room += max(0, room - SPARE)
        return tuple(column for column in self.all if column in shown)


def stage_text(progress: Progress, *, is_stopping: bool, short: bool = False) -> str:
    """The stage of the run, in words; a short text leaves out what is in brackets.

    Examples
    --------
    >>> stage_text(Progress(stage="running", n_quarantined=2), is_stopping=False)
    'running, 2 bad'
    >>> stage_text(Progress(stage="starting workers"), is_stopping=True)
    'stopping'
    >>> stage_text(Progress(stage="stopping (up to 5 images in flight)"), is_stopping=True)
    'stopping (up to 5 images in flight)'
    >>> stage_text(Progress(stage="waiting for workers (local: 0 of 2 workers)"), is_stopping=False, short=True)
    'waiting for workers'
    """
    stage = progress.stage if progress.stage.startswith("stopping") or not is_stopping else "stopping"
    stage = stage.partition(" (")[0] if short else stage
    return f"{stage}{f', {progress.n_quarantined} bad' if progress.n_quarantined else ''}"


@contextmanager
def bar(is_stopping: Callable[[], bool]) -> Iterator[Callable[[Progress], None]]:
    """Show a bar with the time left; yield the callable that takes the `Progress`.

    Parameters
    ----------
    is_stopping : callable
        Whether the run was asked to stop.
    """
    with _OneLine(is_stopping, Console(stderr=True)) as shown:
        task = shown.add_task("", total=None, progress=Progress())

        def update(progress: Progress) -> None:
            n_total = progress.n_total or None
            shown.update(task, total=n_total, completed=progress.n_finished, progress=progress, refresh=True)

        yield update
