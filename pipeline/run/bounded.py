"""Runs what may hang or take too much in its own process, with limits on threads and memory; never waits long for its end."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

END_S = 1.0
"""How long to wait for a process that was killed: it cannot end while its file system hangs."""


@contextmanager
def bounded_process(
    command: Sequence[str], *, n_threads: int, limits: Mapping[int, int], **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """Start a process in its own session, and kill the session if the process still runs at the end of the block.

    Parameters
    ----------
    command : sequence of str
    n_threads : int
        Threads of the numerical libraries; each thread takes address space.
    limits : mapping of int to int
        Limits of `resource`, such as ``{resource.RLIMIT_AS: 2**30}``; a lower limit that is already set stays.
    **options
        Further arguments of `subprocess.Popen`; by default there is no input, and output is discarded.
    """
    n = str(n_threads)
    threads = {"OMP_NUM_THREADS": n, "OPENBLAS_NUM_THREADS": n, "MALLOC_ARENA_MAX": "2", "TOKIO_WORKER_THREADS": "2"}
    settings: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL) | options
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | threads, **settings)  # noqa: S603 (this program)
    try:
        for what, most in limits.items():
            with suppress(ProcessLookupError):  # it has ended already
                _limit(process.pid, what, most)
        yield process
    finally:
        if process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_S)


def _limit(pid: int, what: int, most: int) -> None:
    _, allowed = resource.prlimit(pid, what)
    limit = most if allowed == resource.RLIM_INFINITY else min(allowed, most)
    resource.prlimit(pid, what, (limit, limit))
