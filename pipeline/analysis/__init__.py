"""Stores in a notebook: images as a table, maps as arrays, neighbours and reductions.

Nothing here changes a store.
"""

from __future__ import annotations

from pipeline import lazily

__all__ = ["FeatureStore", "open_store"]
__getattr__ = lazily(__name__, {"FeatureStore": "feature_store", "open_store": "feature_store"})
