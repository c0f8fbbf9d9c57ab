"""Names of runs, and their order, which no clock affects."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime

_NUMBER = re.compile(r"Z-(\d{6,})-[0-9a-f]+$")


def new_run_id(number: int = 0, now: datetime | None = None) -> str:
    """A name for a run: its time for readers, its number for the order, and random digits.

    Parameters
    ----------
    number : int
        From `next_number`; 0 if there will be no receipt.
    now : datetime, optional
        UTC.

    Examples
    --------
    >>> new_run_id(12, datetime(2026, 11, 23, 21, 51, 59, 378000, UTC))[:27]
    '20261123T215159.378Z-000012'
    """
    time = (now or datetime.now(UTC)).isoformat(timespec="milliseconds")[:23].replace(":", "").replace("-", "")
    return f"{time}Z-{f'{number:06}-' if number else ''}{secrets.token_hex(4)}"


def run_number(run_id: str) -> int:
    """The number of a run; 0 if it has none, as in versions before numbers.

    Examples
    --------
    >>> run_number("20261123T215159.378Z-000012-f45a62a9"), run_number("20261123T215159.378Z-f45a62a9")
    (12, 0)
    """
    found = _NUMBER.search(run_id)
    return int(found[1]) if found else 0


def run_order(run_id: str) -> tuple[int, str]:
    """Sort key for runs: first those without a number, by time, then the others by number.

    Examples
    --------
    >>> later = "20261123T215159.378Z-000013-00000000"  # after the clock was corrected
    >>> sorted(["20291123T215159.378Z-000012-f45a62a9", later, "20990101T000000.000Z-00000000"], key=run_order)[-1] == later
    True
    """
    return run_number(run_id), run_id


def next_number(run_ids: Iterable[str]) -> int:
    """One more than the highest number of these runs.

    Examples
    --------
    >>> next_number([]), next_number(["20261123T215159.378Z-000012-f45a62a9", "20261123T215159.378Z-f45a62a9"])
    (1, 13)
    """
    return 1 + max(map(run_number, run_ids), default=0)
