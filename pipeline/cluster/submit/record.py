"""The record of what was submitted for a store: written by ``submit``, read by ``status``."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.cluster import batch_commands
from pipeline.errors import StaleWriterError, StoreBusyError
from pipeline.source.urls import Url
from pipeline.store.objects import Place, delete, fetch, modified_s, put, put_json
from pipeline.store.schema import RUNS

_NAME = "submitted.json"
GONE = "not in the queue any more"
CLAIM_S = 600.0
"""The longest time that submitting a job may take; after it, whoever did so counts as dead."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A driver's job."""

    kind: str
    """Of the batch system."""
    cluster: str
    job_id: str
    """Empty from just before the job is submitted until its number is known."""
    job_name: str
    host: str
    """Host on which it was submitted."""
    submitted: str
    """When, UTC."""
    since: str
    """When the user submitted the first job; jobs that the driver submits itself take over this time."""
    n_vain: int = 0
    """Attempts in a row without progress, since the user submitted."""
    n_settled: int = 0
    """The most ledger rows that were not pending at the end of any attempt."""
    n_checked: int = 0
    """The most images that any attempt compared with their digests."""
    claim: str = ""
    """Tells apart two processes that submit in the same second, until there is a number."""

    def write(self, store: Place) -> None:
        """Leave it in the store."""
        put_json(store / RUNS / _NAME, asdict(self), indent=1)

    def look(self) -> tuple[str, list[dict[str, str]]]:
        """The state of the job in words, and all jobs that work for the store, as far as visible from here."""
        if not self.job_id:
            return (
                "its number is not known: it is being submitted now, or that was interrupted; the job records its number when it begins",
                [],
            )
        if not batch_commands.has_commands(self.kind):
            return f"{batch_commands.SYSTEMS[self.kind].name} cannot be asked from this machine", []
        try:
            own = batch_commands.queue(self.kind, [self.job_id]).get(self.job_id)
            jobs = batch_commands.jobs_named(self.kind, self.job_name)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{batch_commands.SYSTEMS[self.kind].name} does not answer: {batch_commands.said(error)}", []
        return (GONE if own is None else str(own)), [job._asdict() for job in jobs]


def last_submission(store: Place) -> Submission | None:
    """The last record; None if there is none or it cannot be parsed."""
    try:
        return _parse(fetch(store / RUNS / _NAME)[0])
    except OSError:
        return None


def _parse(content: bytes | None) -> Submission | None:
    try:
        values: dict[str, Any] = json.loads(content or b"")
        return Submission(**values)
    except (ValueError, TypeError):
        return None


class Claim:
    """The right to submit a job for a store: only one process can replace ``submitted.json`` as it was when read.

    Parameters
    ----------
    store : Place
        Must have its folder ``runs``.
    """

    def __init__(self, store: Place) -> None:
        self._store, self._path = store, store / RUNS / _NAME
        self._before, self._condition = fetch(self._path)
        self.known = _parse(self._before)

    def require_no_other(self) -> None:
        """Refuse while somebody else is submitting a job.

        Raises
        ------
        StoreBusyError
        """
        known = self.known
        if known is None or known.job_id:
            return
        if abs(self._age_s()) < CLAIM_S:  # a claim further in the future was written while a clock was wrong
            raise StoreBusyError(
                f"a job for store {self._store} is being submitted on {known.host} since {known.submitted}, or that was interrupted: two "
                f"runs on one store never mix, so nothing was submitted; look at `featuremaps status {self._store}`, and submit again when "
                f"{CLAIM_S / 60:.0f} minutes are over"
            )

    def _age_s(self) -> float:
        """Age of the claim on the clock of the file server, so that the clocks of hosts do not matter."""
        probe = self._store / RUNS / f"{_NAME}.{uuid.uuid4().hex}.partial"
        try:
            put(probe, b"")
            return modified_s(probe) - modified_s(self._path)
        except FileNotFoundError:  # given back meanwhile
            return CLAIM_S
        finally:
            delete(probe)

    def take(self, submission: Submission) -> None:
        """Replace the record that was read by a submission without a number.

        Raises
        ------
        StoreBusyError
            When somebody else was faster.
        """
        content = json.dumps(asdict(replace(submission, claim=uuid.uuid4().hex)), indent=1).encode()
        try:
            if isinstance(self._path, Url):
                put(self._path, content, only=self._condition)
            else:
                self._replace(self._path, content)
        except (StaleWriterError, FileExistsError, FileNotFoundError):
            raise StoreBusyError(
                f"a job for store {self._store} was just submitted by somebody else: two runs on one store never mix, so nothing was "
                f"submitted; featuremaps status {self._store} tells its state"
            ) from None

    def _replace(self, path: Path, content: bytes) -> None:
        """Compare and swap, by a rename and a hard link: only one process can succeed with each, also on a network file system."""
        temporary, aside = (path.with_name(f"{_NAME}.{uuid.uuid4().hex}.partial") for _ in range(2))
        temporary.write_bytes(content)
        try:
            if self._before is not None:
                path.rename(aside)
                if aside.read_bytes() != self._before:  # somebody else's claim
                    with contextlib.suppress(FileExistsError):
                        os.link(aside, path)
                    raise FileExistsError(path)
            os.link(temporary, path)
        finally:
            temporary.unlink()
            aside.unlink(missing_ok=True)

    def give_back(self) -> None:
        """Restore the earlier record, because nothing was submitted."""
        if self._before is None:
            delete(self._path)
        else:
            put(self._path, self._before)
