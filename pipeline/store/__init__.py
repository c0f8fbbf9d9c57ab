"""Maps and ledger in Zarr: the layout, the codecs, the lock, and the objects that hold them.

Only this folder uses zarr. `layout` and `schema` are plain values that planning shares.
"""

from __future__ import annotations

from pipeline import lazily

__all__ = ["Store", "StoreLock", "create_store", "vacuum_store"]
__getattr__ = lazily(__name__, {"Store": "store", "StoreLock": "lock", "create_store": "create", "vacuum_store": "vacuum"})
