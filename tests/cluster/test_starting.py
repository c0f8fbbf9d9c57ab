from __future__ import annotations

import signal
import subprocess

from pipeline.cluster import starting


def test_what_starts_without_interrupts_never_sees_what_a_terminal_sends_to_all():
    def blocked() -> set[int]:
        status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
        mask = int(next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1], 16)
        return {number for number in signal.Signals if mask >> (number - 1) & 1}

    for_driver = {signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}
    before = blocked()
    with starting._without_interrupts():
        assert blocked() >= for_driver
    assert blocked() == before
