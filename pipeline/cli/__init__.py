"""The command ``featuremaps``: its options, what it prints, and its exit codes."""

from __future__ import annotations

from pipeline import lazily

__all__ = ["main"]
__getattr__ = lazily(__name__, {"main": "commands"})
