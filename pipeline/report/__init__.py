"""Figures of a store, and one HTML page about it.

matplotlib lives here and nowhere else.
"""

from __future__ import annotations

from pipeline import lazily

__all__ = ["write_report"]
__getattr__ = lazily(__name__, {"write_report": "page"})
