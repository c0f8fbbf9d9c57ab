"""What the command writes to stderr, a terminal or a log: progress and messages. Also handles signals."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from pipeline.text import count

if TYPE_CHECKING:
    from pipeline.run.summary import Progress, Summary

logger = logging.getLogger(__name__)

LOG_LINE_S = 10.0


def start_logging(verbose: int, *, as_json: bool) -> None:
    """Start logging; Dask's own lines need ``-vv``."""
    from pipeline.cli import log_format

    log_format.start(as_json=as_json, level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    logger.setLevel(logging.INFO)  # without -v, text shows exactly what this module logs
    if verbose < 2:
        import dask  # before distributed, which sets its loggers up when it is imported

        dask.config.set({"logging": {"distributed": "critical", "distributed.client": "critical", "bokeh": "critical"}})


def is_json() -> bool:
    """Whether log lines are JSON; the module for logs is imported only if logging was started."""
    logs = sys.modules.get("pipeline.cli.log_format")
    return logs is not None and bool(logs.is_json())


def say(text: str, level: int = logging.INFO, *, before: str = "", **extra: Any) -> None:
    """Print a line on stderr, whatever the verbosity."""
    if is_json():
        logger.log(level, "%s", text, extra=extra)
    else:
        click.echo(f"{before}{text}", file=sys.stderr)  # the current stderr: a bar replaces it, and lines go above the bar


def say_end(summary: Summary) -> None:
    """Log how a run ended, with its receipt; in text mode stdout shows that already."""
    from pipeline.run.summary import receipt
    from pipeline.run.summary_text import headline

    if is_json():
        level = logging.INFO if summary.outcome == "complete" else logging.WARNING
        say(headline(summary), level, outcome=summary.outcome, receipt=receipt(summary))


@contextmanager
def serve_metrics(address: str | None) -> Iterator[None]:
    """Serve metrics if an address is given."""
    if address is None:
        yield
        return
    from pipeline.run.metrics import served

    with served(address) as url:
        say(f"metrics: {url}", url=url)
        yield


class Stop(threading.Event):
    """Asks for a drain. Others may set it too; only signals also set ``signalled``."""

    def __init__(self) -> None:
        super().__init__()
        self.signalled = threading.Event()


def stop_signals() -> set[int]:
    """Signals that ask a process to end: by hand, at the end of a session, or before a batch system's limit; ignored ones stay so."""
    asked = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    return {number for number in asked if signal.getsignal(number) is not signal.SIG_IGN}


@contextmanager
def _handled(handler: Callable[[int, Any], None], numbers: set[int]) -> Iterator[None]:
    """Call a function on signals."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def interrupt_on_signal() -> Iterator[None]:
    """Make every stop signal end the command like Ctrl-C."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt, stop_signals()):
        yield


def ignore_signals() -> None:
    """Ignore further signals while an interrupted command ends: a closing terminal sends SIGHUP twice."""
    for number in stop_signals():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """Let the first stop signal ask for a drain, and a second SIGINT end the command at once."""
    stop = Stop()

    def ask(number: int, _frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if stop.signalled.is_set():
            return  # it may arrive while the first one is handled, inside `set`, which would wait for itself
        stop.signalled.set()
        stop.set()
        name = signal.Signals(number).name
        text = f"{name}: finishing what is in flight; nothing is lost, run again to go on"
        say(text, before="\r" if sys.stderr.isatty() else "", signal=name)  # over the ^C that the terminal shows

    with _handled(ask, stop_signals() | {signal.SIGINT}):  # a shell script sets it to ignored for commands started with &
        yield stop


@contextmanager
def show_progress(on_terminal: bool, stop: threading.Event) -> Iterator[Callable[[Progress], None]]:
    """Show a bar with the time left on a terminal, or print a line at intervals elsewhere."""
    if not on_terminal:
        yield _with_dashboard(log_lines())
        return
    from pipeline.cli.bar import bar

    with bar(stop.is_set) as update:
        yield _with_dashboard(update)


def _with_dashboard(show: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Print the address of Dask's dashboard, once there is one."""
    is_said = False

    def update(progress: Progress) -> None:
        nonlocal is_said
        if progress.dashboard and not is_said:
            is_said = True
            say(f"Dask's dashboard: {progress.dashboard}", url=progress.dashboard)
        show(progress)

    return update


def log_lines() -> Callable[[Progress], None]:
    """A line at intervals."""
    last, began, stage = 0.0, 0.0, ""

    def update(progress: Progress) -> None:
        nonlocal last, began, stage
        now = time.monotonic()
        before, stage = stage, progress.stage.replace(" (", ",").partition(",")[0]
        is_news = stage != before and (
            is_json() or stage.startswith(("waiting", "stopping"))
        )  # in JSON each stage has a line, with the run's id
        if progress.stage == "running" and not began:
            began = now
        if not last or now - last >= LOG_LINE_S or is_news:
            last = now
            finished = progress.n_finished - progress.n_start
            left_s = (
                (now - began) / finished * (progress.n_total - progress.n_finished)
                if began and finished and progress.stage == "running"
                else 0.0
            )
            left = f", about {left_s:.0f} s left" if left_s else ""
            counts = f": {progress.n_finished} of {count(progress.n_total, 'image')}" if progress.n_total else ""
            bad = f", {progress.n_quarantined} bad" if progress.n_quarantined else ""
            say(
                f"{progress.stage}{counts}{bad}{left}",
                stage=progress.stage,
                n_finished=progress.n_finished,
                n_total=progress.n_total,
                n_bad=progress.n_quarantined,
                left_s=round(left_s, 1) if left_s else None,
            )

    return update


def complain(error: BaseException, paragraph: str, code: int) -> int:
    """Print why the command ends; return its exit code."""
    say(f"featuremaps: {paragraph}", logging.ERROR, error=type(error).__name__, exit_code=code)
    return code


def asks_for_json(arguments: list[str]) -> bool:
    """Whether a command line that click could not parse asked for JSON log lines."""
    return "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments)
