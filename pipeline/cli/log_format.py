"""Log lines as text or JSON: one line per record, whatever a file's name contains."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from pipeline.run.summary import at_work
from pipeline.text import printable

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}

logger = logging.getLogger(__name__)


class TextFormatter(logging.Formatter):
    """Time, level, logger and message on one line, without control characters; a traceback follows below."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        """The line."""
        record.message = printable(record.message)
        return super().formatMessage(record)


class JsonFormatter(logging.Formatter):
    """A JSON object per record: time (UTC), level, logger, message, run_id, store, and the record's ``extra``."""

    def __init__(self) -> None:
        super().__init__()
        self.context: dict[str, Any] = {}
        """The store, and the id of the last run in progress: a run's final error is logged when it is no longer in progress."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line, in ASCII."""
        for run in list(at_work.values()):
            self.context = {"run_id": run.summary.run_id, "store": run.store}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        found = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": printable(record.getMessage()),
            **self.context,
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info and record.exc_info[1]:
            found["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            found["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(found, default=str)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to the current stderr: a progress bar replaces stderr, and log lines go above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def start(*, as_json: bool, level: int) -> None:
    """Log to stderr: this package from ``level`` on, all other packages from WARNING on."""
    handler = _StderrHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(as_json)  # otherwise they would be lines of text
    logging.getLogger("pipeline").setLevel(level)


def about(store: str) -> None:
    """Add the store's name to JSON lines from now on, even before a run holds it."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, JsonFormatter):
            handler.formatter.context = {"store": store}


def is_json() -> bool:
    """Whether log lines are JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)
