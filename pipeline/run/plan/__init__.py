"""Pure planning: what changed, which batches, how much memory.

Integers and tuples go in, frozen values come out. Nothing here imports Dask, Zarr or torch.
"""
