"""Submits a whole run to a batch system: the job's script, its record, and what the job does.

The command line calls `hand_in`; the batch system calls `inside_job`, which uses `clock`, `attempts`, `next_attempt` and `ending`.
"""
