"""Pixels to maps: the layers, their weights, and the extractors for processors and GPUs.

torch lives here and nowhere else. Nothing here knows of files, stores or Dask.
"""
