"""Pixels to maps: the layers, their weights, and the extractors for processors and GPUs.

torch lives here and nowhere else. Nothing here knows of files, stores or Dask.
"""

from __future__ import annotations

from pipeline import lazily

__all__ = ["best_extractor", "load_weights"]
__getattr__ = lazily(__name__, {"best_extractor": "choice", "load_weights": "weights"})
