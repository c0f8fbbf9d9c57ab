"""featuremaps: image collections in, feature maps in a Zarr store out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.analysis.feature_store import open_store as open_store

__version__ = "0.1.0"
__all__ = ["__version__", "open_store"]


def __getattr__(name: str) -> Any:
    """Import `open_store` on first use, so that ``import pipeline`` stays fast."""
    if name == "open_store":
        from pipeline.analysis.feature_store import open_store  # noqa: PLC0415 (lazy on purpose)

        return open_store
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
