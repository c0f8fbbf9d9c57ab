"""A file system that never answers, as a lost NFS server: ``python -m tests.support.stuck_disk FOLDER`` mounts it until it is killed.

It speaks just enough of the kernel's FUSE protocol to be mounted. Whoever then looks into the folder waits: by default in
uninterruptible sleep, which not even SIGKILL ends, because the server took the request; with ``--killable`` as one can be killed.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import click

from tests.support.needs import MOUNTS, leave_out

FUSE_INIT = 26


class StuckDisk:
    """The file system on a folder, served by a process."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        arguments = [sys.executable, "-m", "tests.support.stuck_disk", str(folder), *options]
        self.server = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.is_mounted = self.server.stdout.readline() == b"mounted\n"

    def release(self) -> None:
        self.server.kill()
        self.server.communicate()
        if self.is_mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)
            self.is_mounted = False


def mount_stuck(folder: Path, *options: str) -> StuckDisk:
    """Have a folder answer no more, until it is released."""
    disk = StuckDisk(folder, *options)
    if not disk.is_mounted:
        disk.release()
        leave_out(f"{MOUNTS}, with /dev/fuse")
    return disk


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
