"""Maps and ledger in Zarr: the layout, the codecs, the lock, and the objects that they lie in.

zarr lives here and nowhere else. `layout` and `schema` are plain values that planning shares.
"""
