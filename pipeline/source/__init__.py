"""Images: list a collection, fetch the bytes of its files, decode them to pixels.

Nothing here imports Dask, Zarr or torch. A new file format is one module that `decoding` calls.
"""

from __future__ import annotations

from pipeline import lazily

__all__ = ["Listing", "decode", "list_collection", "probe"]
__getattr__ = lazily(
    __name__, {"Listing": "fingerprints", "decode": "decoding", "list_collection": "listing", "probe": "decoding"}
)
