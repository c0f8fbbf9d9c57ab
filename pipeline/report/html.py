"""Values to HTML: the template with its filters, its style and script, and the policy under which a browser shows it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from pipeline.run.summary import receipt
from pipeline.run.summary_text import describe_bottleneck
from pipeline.text import count, human_duration, human_moment, human_size, printable, rounded


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
        "images": lambda n, noun="image": count(n, noun, commas=True),
        "size": lambda value: human_size(value).replace(" ", "\u00a0"),
        "duration": lambda seconds: _tenths(seconds, "s") if seconds < 1 else human_duration(seconds),
        "percent": lambda share: _tenths(100 * share, "%"),
        "rounded": rounded,
        "moment": human_moment,
        "small": lambda value: f"{value:.3g}" if value else "0",
        "value": lambda value: f"{value:.3f}" if 0.001 <= abs(value) < 100 or not value else f"{value:.4g}",
        "shorten": lambda text, n: text if len(text) <= n else f"{text[: n - 1]}…",
        "bottleneck": lambda summary: describe_bottleneck(receipt(summary)),
    }
    return environment


def _tenths(value: float, unit: str) -> str:
    """A number to one decimal; a small one that would read as zero is said to be less than the smallest that does not.

    Examples
    --------
    >>> _tenths(0, "%"), _tenths(0.04, "%"), _tenths(33.33, "%")
    ('0.0 %', '< 0.1 %', '33.3 %')
    """
    return f"< 0.1 {unit}" if 0 < value < 0.05 else f"{value:.1f} {unit}"
