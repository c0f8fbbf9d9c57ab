"""A file system that never answers, as a lost NFS server: ``python -m tests.stuck_disk FOLDER`` mounts it until it is killed.

It speaks just enough of the kernel's FUSE protocol to be mounted. Whoever then looks into the folder waits: by default in
uninterruptible sleep, which not even SIGKILL ends, because the server took the request; with ``--killable`` as one can be killed.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path

import click

FUSE_INIT = 26


def mount(folder: Path) -> int:
    """Mount a FUSE file system that this process serves."""
    fd = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"stuck", os.fsencode(folder), b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return fd


def answer_init(fd: int) -> None:
    """The only request that is answered."""
    request = os.read(fd, 1 << 20)
    _, opcode, unique = struct.unpack_from("=IIQ", request)
    assert opcode == FUSE_INIT
    out = struct.pack("=IIIIHHIIHHI7I", 7, 31, 0, 0, 12, 9, 1 << 16, 1, 1, 0, 0, *[0] * 7)
    os.write(fd, struct.pack("=IiQ", 16 + len(out), 0, unique) + out)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--killable", is_flag=True)
def main(folder: Path, killable: bool) -> None:
    """Mount, say so, and never answer."""
    fd = mount(folder)
    answer_init(fd)
    click.echo("mounted")
    while True:
        if killable:
            time.sleep(60)
        os.read(fd, 1 << 20)


if __name__ == "__main__":
    main()
