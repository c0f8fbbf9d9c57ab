"""What was handed to a batch system for a store: written by ``submit``, looked at by ``status``."""

from __future__ import annotations

import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from pipeline import batch
from pipeline.errors import FeaturemapsError
from pipeline.objects import Place, put_json, read_json
from pipeline.schema import RUNS

_NAME = "submitted.json"
GONE = "not in the queue any more"


@dataclass(frozen=True, slots=True)
class Submission:
    """A driver's job."""

    kind: str
    """Of the batch system."""
    cluster: str
    job_id: str
    job_name: str
    host: str
    """Where it was handed in."""
    submitted: str
    """When, UTC."""
    since: str
    """When a person asked for it; jobs that the driver hands in after itself have this from the first."""

    def write(self, store: Place) -> None:
        """Leave it in the store."""
        put_json(store / RUNS / _NAME, asdict(self), indent=1)

    def look(self) -> tuple[str, list[dict[str, str]]]:
        """In words how the job stands, and all jobs that work for the store, as far as can be seen from here."""
        if not batch.has_commands(self.kind):
            return f"{batch.SYSTEMS[self.kind].name} cannot be asked from this machine", []
        try:
            own = batch.queue(self.kind, [self.job_id]).get(self.job_id)
            jobs = batch.jobs_named(self.kind, self.job_name)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{batch.SYSTEMS[self.kind].name} does not answer: {batch.said(error)}", []
        return (GONE if own is None else str(own)), [job._asdict() for job in jobs]


def last_submission(store: Place) -> Submission | None:
    """What was handed in last; None where nothing was, or what is there cannot be understood."""
    try:
        values: dict[str, Any] = read_json(store / RUNS / _NAME)
        return Submission(**values)
    except (FeaturemapsError, TypeError):
        return None
