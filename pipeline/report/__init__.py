"""Figures of a store, and one HTML page about it.

matplotlib lives here and nowhere else.
"""
