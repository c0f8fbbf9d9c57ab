"""The driver of a run and the tasks of its workers: what is missing is read, extracted, written and committed once.

A run is handed its workers; it does not know what kind of cluster they come from.
"""
