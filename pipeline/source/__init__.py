"""Images: list a collection, fetch the bytes of its files, decode them to pixels.

Nothing here knows of Dask, Zarr or torch. A new file format is one module that `decoding` calls.
"""
