"""Submits a whole run to a batch system, as a driver's job that is repeated until the store is complete."""

from __future__ import annotations

import logging
import socket
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pipeline.cluster import batch_commands
from pipeline.cluster.session import job_name
from pipeline.cluster.submit.record import Claim, Submission, last_submission
from pipeline.cluster.submit.script import Order, driver_script
from pipeline.errors import FeaturemapsError, StoreBusyError
from pipeline.store.contents import count_statuses
from pipeline.store.create import prepare_folder
from pipeline.store.objects import Place, place
from pipeline.store.store import Store, is_store

logger = logging.getLogger(__name__)


def submit(order: Order) -> Submission:
    """Submit the run.

    Raises
    ------
    UsageError
        When the cluster or the store cannot be used.
    StoreBusyError
        When a job for this store is already in the queue, or is being submitted.
    FeaturemapsError
        When the batch system refuses, or does not answer.
    """
    spec, store = order.spec, place(order.job.store)
    batch_commands.require_commands(spec.kind, f"cluster {order.job.cluster!r}")
    Path(spec.log_folder).mkdir(parents=True, exist_ok=True)
    prepare_folder(store)
    claim = Claim(store)
    queued = _queued(order, claim.known)
    if queued is not None:
        known = claim.known
        when = f" ({known.submitted}, on {known.host})" if known is not None and known.job_id == queued.job_id else ""
        raise StoreBusyError(
            f"{queued} was already submitted for store {store}{when}: two runs on one store never "
            f"mix, so nothing was submitted; wait for it, or cancel it with {batch_commands.SYSTEMS[spec.kind].cancel} {queued.job_id}"
        )
    claim.require_no_other()
    new = replace(new_submission(order), n_settled=_n_settled_before(store))
    claim.take(new)
    return hand_in(order, new, claim)


def new_submission(order: Order) -> Submission:
    """The record before the job has a number; attempts are counted from now on."""
    now = _now()
    return Submission(order.spec.kind, str(order.job.cluster), "", job_name(order.job.store), socket.gethostname(), now, now)


def _n_settled_before(store: Place) -> int:
    try:
        return n_settled(store)
    except (OSError, FeaturemapsError) as error:
        logger.info("the store's ledger cannot be read, and the driver will report it: %s", error)
        return 0


def n_settled(store: Place) -> int:
    """Settled entries of the ledger: rows that are not pending, and images without a row; 0 without a store."""
    if not is_store(store):
        return 0
    counts = count_statuses(Store(store))
    return sum(counts.values()) - counts["pending"]


def hand_in(order: Order, new: Submission, claim: Claim | None = None) -> Submission:
    """Submit the driver's job and record its number.

    Raises
    ------
    FeaturemapsError
    """
    store = place(order.job.store)
    try:
        job_id = batch_commands.submit(new.kind, driver_script(order))
    except FeaturemapsError as error:
        # After a timeout the job may exist all the same. Then the claim stands until it is too old, or the job records its own number.
        if claim is not None and not isinstance(error.__cause__, subprocess.TimeoutExpired):
            claim.give_back()
        raise
    submission = replace(new, job_id=job_id, submitted=_now(), host=socket.gethostname())
    try:
        submission.write(store)
    except (OSError, FeaturemapsError) as error:
        logger.warning(
            "job %s was submitted, but its number could not be recorded (%s); the job records it when it begins", job_id, error
        )
    return submission


def _queued(order: Order, known: Submission | None) -> batch_commands.QueuedJob | None:
    """A queued driver's job for this store: the one on record, or one without a recorded number, which Slurm finds by its name."""
    kind, name = order.spec.kind, f"{job_name(order.job.store)}-driver"
    try:
        if known is not None and known.kind == kind and known.job_id:
            queued = batch_commands.queue(kind, [known.job_id]).get(known.job_id)
            if queued is not None:
                return queued
        return next((job for job in batch_commands.jobs_named(kind, name) if job.name == name), None)
    except (OSError, subprocess.SubprocessError) as error:
        raise FeaturemapsError(
            f"{batch_commands.SYSTEMS[kind].name} does not answer ({batch_commands.said(error)}), "
            "so nobody can tell whether a job still works for "
            f"store {order.job.store}: nothing was submitted; check that this machine is a login node, or try again later"
        ) from error


def adopt(order: Order, job_id: str) -> None:
    """Record the number of this job, in case whoever submitted it could not."""
    store = place(order.job.store)
    known = last_submission(store)
    if known is None or not job_id or known.job_id == job_id:
        return
    try:
        if known.job_id and known.job_id in batch_commands.queue(known.kind, [known.job_id]):
            return
        replace(known, kind=order.spec.kind, job_id=job_id).write(store)
    except (OSError, subprocess.SubprocessError, FeaturemapsError) as error:
        logger.info("the number of this job was not written down: %s", batch_commands.said(error))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
