"""The progress bar of a run: one line at the bottom of the terminal, below all other output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

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
from rich.table import Column
from rich.text import Text

from pipeline.run.summary import Progress

ROOM = len("^C") + 1
"""Columns on the right that stay free: if a terminal's own ``^C`` broke the line in two, one part would remain on the screen."""

REST = len("x  ---------- / 0:00:00 ")
"""Columns that the rest of a line takes beside the stage and the digits of the count; the time left shrinks the bar."""

NARROW = 80
"""On fewer columns, a stage that does not fit leaves out what is in brackets."""


class _Narrow(NamedTuple):
    """Content that is a little narrower than the terminal."""

    content: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Constrain(self.content, options.max_width - ROOM)


class _NarrowBar(Bar):
    def get_renderable(self) -> RenderableType:
        return _Narrow(super().get_renderable())


class _Stage(ProgressColumn):
    """The stage of the run, in few words if many do not fit; a stop shows at once, before the run has noticed it."""

    def __init__(self, is_stopping: Callable[[], bool], columns: Callable[[], int]) -> None:
        super().__init__(table_column=Column(no_wrap=True))  # a second line would remain on the screen after a ^C
        self.is_stopping, self.columns = is_stopping, columns

    def render(self, task: Task) -> Text:
        progress, is_stopping = task.fields["progress"], self.is_stopping()
        columns = self.columns() - ROOM - REST - 2 * len(str(progress.n_total))
        text = Text(stage_text(progress, is_stopping=is_stopping))
        if len(text) > columns and self.columns() < NARROW:
            text = Text(stage_text(progress, is_stopping=is_stopping, short=True))
        text.truncate(max(1, columns), overflow="ellipsis")
        return text


class _Left(TimeRemainingColumn):
    """The time left, if it is known; not shown during a stop, which does not wait for all images."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.is_stopping = is_stopping

    def render(self, task: Task) -> Text:
        is_known = task.time_remaining is not None and task.fields["progress"].stage == "running"
        return Text.assemble(super().render(task), " left") if is_known and not self.is_stopping() else Text()


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
    console = Console(stderr=True)
    columns = [
        SpinnerColumn(),
        _Stage(is_stopping, lambda: console.width),
        BarColumn(None, table_column=Column(max_width=40)),  # the one column that shrinks
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        _Left(is_stopping),
    ]
    with _NarrowBar(*columns, console=console, transient=True, speed_estimate_period=600) as shown:
        task = shown.add_task("", total=None, progress=Progress())

        def update(progress: Progress) -> None:
            n_total = progress.n_total or None
            shown.update(task, total=n_total, completed=progress.n_finished, progress=progress, refresh=True)

        yield update
