"""Values to HTML: the template with its filters, its style and script, and the policy under which a browser shows it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.report.facts import count_of
from pipeline.run.summary_text import describe_bottleneck
from pipeline.text import printable


def asset(name: str) -> str:
    """A text that lies beside this module."""
    return files("pipeline.report").joinpath(name).read_text(encoding="utf-8")


def policy(css: str, script: str) -> str:
    """A content security policy under which nothing is loaded, and only our own style and script count."""
    allowed = {"style-src": css, "script-src": script}
    hashes = (
        f"{kind} 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for kind, text in allowed.items()
    )
    return "; ".join(["default-src 'none'", "img-src data:", *hashes, "base-uri 'none'", "form-action 'none'"])


def page(values: Mapping[str, Any]) -> str:
    """The page, complete in itself; every value of the template is escaped."""
    css, script = asset("report.css"), asset("report.js")
    own = {"css": Markup(css), "script": Markup(script), "policy": policy(css, script)}  # noqa: S704 (our own files)
    return _environment().from_string(asset("report.html.j2")).render({**values, **own})


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {
        "printable": lambda value: printable(str(value)),
        "number": lambda value: f"{value:,}",
        "images": count_of,
        "size": lambda value: human_size(value).replace(" ", "\u00a0"),
        "duration": human_duration,
        "moment": human_moment,
        "small": lambda value: f"{value:.3g}" if value else "0",
        "value": lambda value: f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}",
        "shorten": lambda text, n: text if len(text) <= n else f"{text[: n - 1]}…",
        "bottleneck": describe_bottleneck,
    }
    return environment


def human_size(n_bytes: float) -> str:
    """Bytes in a unit that suits them.

    Examples
    --------
    >>> human_size(0), human_size(999), human_size(1_234_567), human_size(5e15)
    ('0 bytes', '999 bytes', '1.2 MB', '5,000 TB')
    """
    if n_bytes < 1000:
        return f"{n_bytes:.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        n_bytes /= 1000
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}"
    return f"{n_bytes / 1000:,.1f} TB".replace(".0 TB", " TB")


def human_duration(seconds: float) -> str:
    """Seconds in words.

    Examples
    --------
    >>> human_duration(1.234), human_duration(75), human_duration(7384)
    ('1.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def human_moment(stamp: str) -> str:
    """A receipt's time, UTC, to the second.

    Examples
    --------
    >>> human_moment("2026-11-23T21:51:59+00:00")
    '2026-11-23 21:51:59'
    """
    return stamp[:19].replace("T", " ") or "not said"
