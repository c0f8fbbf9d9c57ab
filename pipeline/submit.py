"""A whole run in the hands of a batch system: a driver's job that comes back until the store is complete."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import batch
from pipeline.cluster import job_name
from pipeline.cluster_spec import BatchSpec, load_cluster
from pipeline.config import Job
from pipeline.creation import prepare_folder
from pipeline.errors import EXIT_FAILED, EXIT_RUN_AGAIN, FeaturemapsError, StoreBusyError, UsageError
from pipeline.launch_batch import clock, margin_s
from pipeline.objects import place
from pipeline.run import run_job
from pipeline.store import Store, is_store
from pipeline.submission import Submission, last_submission
from pipeline.summary import Progress, Summary

logger = logging.getLogger(__name__)

DEFAULT_ATTEMPTS = 5
WARNING_S = 60
"""How long before it is preempted the driver's job wants to be told."""
KILLED_S = 120.0
_JOB_IDS = {"slurm": "SLURM_JOB_ID", "pbs": "PBS_JOBID", "sge": "JOB_ID", "htcondor": ""}


@dataclass(frozen=True, slots=True)
class Order:
    """What ``featuremaps submit`` was asked for."""

    job: Job
    job_file: Path
    cluster_file: Path
    attempts: int = DEFAULT_ATTEMPTS
    """Attempts in a row that may end without one image more."""
    n_sample: int = 20
    """Images that are computed anew at the end."""
    verify: bool = True
    """Whether the store is audited at the end, within the time that the job has left."""

    @property
    def spec(self) -> BatchSpec:
        """The cluster.

        Raises
        ------
        UsageError
            When it is none of a batch system.
        """
        spec = load_cluster(self.job.cluster, self.cluster_file)
        if not isinstance(spec, BatchSpec):
            raise UsageError(
                f"cluster {self.job.cluster or 'local'!r} is of kind {spec.kind}, and only a batch system "
                f"({', '.join(batch.SYSTEMS)}) can be handed a whole run: nothing was started; name one of its "
                "clusters with --cluster, or use `featuremaps run`"
            )
        return spec


def driver_script(order: Order) -> str:
    """The job script: the driver in place of the shell, so that signals reach it, with a walltime after which it comes back."""
    spec, driver = order.spec, order.spec.driver
    name = job_name(order.job.store)
    walltime, queue = clock(driver.walltime or spec.walltime), driver.queue or spec.queue
    log = f"{spec.log_folder}/{name}-driver"
    memory = int(driver.memory) // 2**20
    account = spec.account
    if spec.kind == "slurm":
        directives = [
            f"--job-name={name}-driver",
            f"--output={log}-%j.log",
            "--open-mode=append",
            "--requeue",
            f"--signal=B:TERM@{WARNING_S}",
            "--ntasks=1",
            f"--cpus-per-task={driver.threads}",
            f"--mem={memory}M",
            f"--time={walltime}",
            *([f"--partition={queue}"] if queue else []),
            *([f"--account={account}"] if account else []),
        ]
        prefix = "#SBATCH"
    elif spec.kind == "pbs":
        directives = [
            f"-N {name}-drive",
            "-j oe",
            f"-o {log}.log",
            f"-l select=1:ncpus={driver.threads}:mem={memory}mb",
            f"-l walltime={walltime}",
            *([f"-q {queue}"] if queue else []),
            *([f"-A {account}"] if account else []),
        ]
        prefix = "#PBS"
    elif spec.kind == "sge":
        directives = [
            f"-N {name}-driver",
            "-j y",
            f"-o {log}.log",
            f"-l h_rt={walltime}",
            f"-l h_vmem={memory // driver.threads}M",
            *([f"-pe smp {driver.threads}"] if driver.threads > 1 else []),
            *([f"-q {queue}"] if queue else []),
            *([f"-P {account}"] if account else []),
        ]
        prefix = "#$"
    else:
        return _condor_description(order, name, log)
    lines = ["#!/bin/sh", *(f"{prefix} {line}" for line in [*directives, *driver.options]), *_shell(order)]
    return "\n".join(lines) + "\n"


def _shell(order: Order) -> list[str]:
    return [f"cd {shlex.quote(str(Path.cwd()))} || exit 1", *order.spec.prologue, f"exec {shlex.join(attend_command(order))}"]


def _condor_description(order: Order, name: str, log: str) -> str:
    """HTCondor takes a description and not a script; the shell's lines are the argument of a shell."""
    driver = order.spec.driver
    text = " && ".join(_shell(order)).replace('"', '""').replace("'", "''")
    lines = {
        "executable": "/bin/sh",
        "arguments": f"\"-c '{text}'\"",
        "batch_name": f"{name}-driver",
        "output": f"{log}.out",
        "error": f"{log}.err",
        "log": f"{log}.log",
        "request_cpus": str(driver.threads),
        "request_memory": f"{int(driver.memory) // 2**20}MB",
        "stream_output": "true",
        **({"accounting_group": order.spec.account} if order.spec.account else {}),
        **dict(line.split("=", 1) for line in driver.options),
    }
    return "\n".join([*(f"{key.strip()} = {value.strip()}" for key, value in lines.items()), "queue"]) + "\n"


def attend_command(order: Order) -> list[str]:
    """What runs in the driver's job."""
    command = [order.spec.python or sys.executable, "-m", "pipeline", "submit", str(order.job_file.absolute())]
    command += ["--cluster", str(order.job.cluster), "--cluster-file", str(order.cluster_file.absolute())]
    audit = ["--sample", str(order.n_sample), "--verify" if order.verify else "--no-verify"]
    return [*command, "--attempts", str(order.attempts), *audit, "--attend"]


def submit(order: Order) -> Submission:
    """Hand the run in.

    Raises
    ------
    UsageError
        When the cluster or the store cannot be used.
    StoreBusyError
        When a job for this store is in the queue already.
    FeaturemapsError
        When the batch system refuses.
    """
    spec, store = order.spec, place(order.job.store)
    batch.require_commands(spec.kind, f"cluster {order.job.cluster!r}")
    Path(spec.log_folder).mkdir(parents=True, exist_ok=True)
    prepare_folder(store)
    known = last_submission(store)
    if known is not None and known.kind == spec.kind:
        queued = _ask(spec.kind, known.job_id)
        if queued is not None:
            raise StoreBusyError(
                f"{queued} was handed in for store {store} already ({known.submitted}, on {known.host}): two runs on one store never "
                f"mix, so nothing was handed in; wait for it, or take it back with {batch.SYSTEMS[spec.kind].cancel} {known.job_id}"
            )
    return _hand_in(order)


def _hand_in(order: Order, since: str = "") -> Submission:
    kind, store = order.spec.kind, order.job.store
    job_id = batch.submit(kind, driver_script(order))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    host = socket.gethostname()
    submission = Submission(kind, str(order.job.cluster), job_id, job_name(store), host, now, since or now)
    submission.write(place(store))
    return submission


def _ask(kind: str, job_id: str) -> batch.QueuedJob | None:
    try:
        return batch.queue(kind, [job_id]).get(job_id)
    except (OSError, subprocess.SubprocessError) as error:
        raise FeaturemapsError(
            f"{batch.SYSTEMS[kind].name} does not answer ({batch.said(error)}), so nobody can tell whether job {job_id} still works for "
            "this store: nothing was handed in; try again later"
        ) from error


# -- inside the driver's job ------------------------------------------------------------------------------------------------------


def attend(order: Order, *, stop: threading.Event, on_progress: Callable[[Progress], None], report: Callable[[Any], None]) -> int:
    """Run until the store is complete or this job's time is nearly over, and see to it that the rest is done by another attempt.

    Parameters
    ----------
    order : Order
    stop : threading.Event
        Set from outside when the job is to end.
    on_progress, report : callable
        Called with the `Progress`, and with what a person wants to read: the `Summary`, the `verify.Audit`, or text.

    Returns
    -------
    int
        Exit code of the job.
    """
    is_late = threading.Event()

    def end_in_time() -> None:
        is_late.set()
        stop.set()

    walltime_s = order.spec.driver.walltime or order.spec.walltime
    timers = [
        threading.Timer(walltime_s - margin_s(walltime_s), end_in_time),
        # A drain may take longer, where a storage hangs: then the batch system ends this process.
        threading.Timer(walltime_s - margin_s(walltime_s) / 4, lambda: _come_back(order, report, was_asked_to_end=False)),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        summary = run_job(order.job, on_progress=on_progress, stop=stop, cluster_file=order.cluster_file)
        report(summary)
        is_complete = summary.outcome == "complete"
    except UsageError:
        raise
    except (FeaturemapsError, OSError) as error:
        report(str(error))
        is_complete = False
    finally:
        for timer in timers:
            timer.cancel()
    if is_complete:
        return _finish(order, summary, report)
    return _come_back(order, report, was_asked_to_end=stop.is_set() and not is_late.is_set())


def _finish(order: Order, summary: Summary, report: Callable[[Any], None]) -> int:
    """Audit the store, if that is wanted."""
    if not order.verify:
        return summary.exit_code
    from pipeline.verify import verify_store  # noqa: PLC0415 (only at the end)

    audit = verify_store(place(order.job.store), n_sample=order.n_sample, workers=order.spec.driver.threads)
    report(audit)
    if not audit.is_sound:
        return EXIT_FAILED
    return summary.exit_code


def _come_back(order: Order, report: Callable[[Any], None], *, was_asked_to_end: bool) -> int:
    """Have the batch system start another attempt, unless these lead nowhere or somebody took the job back."""
    kind = order.spec.kind
    n = attempts_without_progress(order)
    if n >= order.attempts:
        report(
            f"{n} attempts in a row ended without one image more, so there is no further one: what was committed stands; see why in "
            f"`featuremaps status {order.job.store}` and in {order.spec.log_folder}, then submit again"
        )
        return EXIT_FAILED
    job_id = os.environ.get(_JOB_IDS[kind], "")
    if kind == "slurm":
        own = _ask(kind, job_id)
        if own is None or own.state != "RUNNING":
            report(
                f"Slurm is ending job {job_id}: nothing is lost; requeued it goes on by itself, cancelled it waits for another submit"
            )
            return EXIT_RUN_AGAIN
        report(f"job {job_id} goes back into the queue")
        batch.requeue(job_id)
        time.sleep(KILLED_S)  # the batch system ends this process
    elif was_asked_to_end:
        report("the job was asked to end: nothing is lost; submit again to go on")
    else:
        known = last_submission(place(order.job.store))
        report(f"another attempt was handed in as job {_hand_in(order, known.since if known else '').job_id}")
    return EXIT_RUN_AGAIN


def attempts_without_progress(order: Order) -> int:
    """How many of the last runs, one after another, ended without an image done, refused or looked at."""
    store = place(order.job.store)
    if not is_store(store):
        return int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
    n, submission = 0, last_submission(store)
    for known in Store(store).receipts(order.attempts):
        if submission is not None and known["started"] < submission.since:
            break
        if known["outcome"] == "complete" or sum(known[key] for key in ("n_done", "n_quarantined", "n_rejected", "n_checked")):
            break
        n += 1
    return n
