"""Output that never fails: a closed pipe, a full disk or a lost terminal does not interrupt what a command does."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Outlet(io.FileIO):
    """A file descriptor that discards what it cannot write."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "w", closefd=False)
        self.error: OSError | None = None
        """Why output was first lost."""

    @property
    def is_lost(self) -> bool:
        """Whether output was lost, other than to a reader that closed its pipe."""
        return self.error is not None and self.error.errno != errno.EPIPE

    def write(self, data: Any) -> int:
        """Write what can be written; count all of it as written."""
        rest = memoryview(data).cast("B")
        n_bytes = len(rest)
        try:
            while rest:
                n = super().write(rest)
                if n is None:  # another program has made it non-blocking, and it is busy
                    select.select([], [self], [])
                rest = rest[n or 0 :]
        except OSError as error:
            self.error = self.error or error
        return n_bytes


def is_output_lost() -> bool:
    """Whether something written to stdout inside `lasting_output` was lost, other than to a reader that closed its pipe."""
    sys.stdout.flush()
    outlet = getattr(sys.stdout, "buffer", None)
    return isinstance(outlet, _Outlet) and outlet.is_lost


@contextmanager
def lasting_output() -> Iterator[None]:
    """Make stdout and stderr never fail; at the end, say why output was lost, unless its reader just closed the pipe."""
    _fill_closed()
    before = sys.stdout, sys.stderr
    out, sys.stdout = _lasting(sys.stdout, 1)
    _, sys.stderr = _lasting(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        if out is not None and out.error is not None and out.is_lost:
            print(
                f"featuremaps: output was lost, as it could not be written ({out.error.strerror}); nothing else was affected",
                file=sys.stderr,
            )
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _fill_closed() -> None:
    """Open /dev/null for each closed standard stream: otherwise the next file would get its number, and stray output."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number


def _lasting(stream: TextIO | None, fd: int) -> tuple[_Outlet | None, TextIO]:
    """The stream, replaced by one on an `_Outlet`; a stream in memory stays."""
    if stream is not None:
        try:
            fd = stream.fileno()
        except (OSError, ValueError):
            return None, stream
        stream.flush()
    outlet = _Outlet(fd)
    lasting = io.TextIOWrapper(
        outlet,  # no byte buffer: that would refuse what a signal handler writes in the middle of another line
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="surrogateescape",  # names that are not UTF-8 are printed as they are
        line_buffering=fd == 2 or os.isatty(fd),
    )
    return outlet, lasting
