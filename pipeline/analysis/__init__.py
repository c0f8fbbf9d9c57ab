"""Stores in a notebook: images as a table, maps as arrays, neighbours and reductions.

Nothing here changes a store.
"""
