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


def test_a_signal_that_stops_the_command_waits_until_what_was_started_is_taken_back():
    """A terminal that closes sends SIGHUP twice: the second one must not leave jobs behind."""
    order: list[object] = []
    before = {number: signal.signal(number, lambda number, _: order.append(number)) for number in (signal.SIGHUP, signal.SIGINT)}
    try:
        with starting._deaf():
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGHUP):
                signal.raise_signal(number)
            order.append("taken back")
        signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert order == ["taken back", signal.SIGHUP, signal.SIGINT]
