"""Finds what would prevent a run, with a remedy for each; changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.checks import cluster as check_cluster
from pipeline.checks import installation, storage, workers
from pipeline.checks.finding import Finding, look
from pipeline.checks.plan import Preview, plan_job
from pipeline.cluster.config import load_cluster
from pipeline.cluster.spec import ClusterSpec
from pipeline.config import Job
from pipeline.store.objects import Place, place


@dataclass(slots=True)
class Diagnosis:
    """All findings."""

    findings: list[Finding]

    @property
    def is_well(self) -> bool:
        """Whether nothing failed."""
        return not _failed(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"is_well": self.is_well, "findings": [asdict(finding) for finding in self.findings]}

    def describe(self) -> str:
        """A line per finding."""
        return "\n".join(map(str, self.findings))


def diagnose(
    job: Job | None = None,
    store: str | None = None,
    *,
    cluster: str | None = None,
    cluster_file: Path = Path("cluster.yaml"),
    start: bool = False,
    stop: threading.Event | None = None,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Diagnosis:
    """Check the installation and, if given, a job or a store, and a cluster.

    Parameters
    ----------
    job : Job, optional
        Its source is listed and its headers are read, as by ``plan``.
    store : str, optional
        Used if there is no job.
    cluster : str, optional
        None means the job's cluster, or this machine.
    cluster_file : Path
    start : bool
        Start the cluster and check its workers; by default a cluster is only asked what it can answer without starting.
    stop, on_wait
        Same as for `cluster.connect`: an event that ends the wait for workers, and a callable with the state of the wait.
    """
    wanted = place(store) if store is not None else place(job.store) if job is not None else None
    name = cluster or (job.cluster if job is not None else None)
    findings = [
        *look("packages", installation.packages),
        *look("hidden modules", installation.hidden_modules, Path.cwd()),
        *look("first layer", installation.compiled_kernel),
        *look("GPUs", installation.gpus),
    ]
    specs: list[ClusterSpec] = []
    about_cluster = look(f"cluster {name}", _load, name, cluster_file, specs)
    for spec in specs:
        about_cluster += look("open files", installation.open_files, spec.n_connections(job))
        entry = look(f"cluster {name or 'local'}", check_cluster.entry, name, spec)
        about_cluster += entry
        about_cluster += [] if _failed(entry[:1]) else look("cluster", check_cluster.can_be_reached, spec)
    findings += about_cluster
    if wanted is not None:
        findings += _look_at_storage(wanted, job, cluster_file)
    for spec in specs:
        if (start or spec.runs_already) and not _failed(about_cluster):
            findings += look("workers", workers.started, spec, wanted, stop, on_wait)
    return Diagnosis(findings)


def _failed(findings: list[Finding]) -> bool:
    return any(finding.level == "FAIL" for finding in findings)


def _load(name: str | None, path: Path, specs: list[ClusterSpec]) -> Iterator[Finding]:
    """Append the cluster's entry to ``specs``, or report what is wrong with it."""
    specs.append(load_cluster(name, path))
    return iter(())


def _look_at_storage(store: Place, job: Job | None, cluster_file: Path) -> list[Finding]:
    findings = look("store", storage.stored, store) + look("writing", storage.writing, store)
    plans: list[Preview] = []
    if job is None:
        findings += look("source", storage.source_of_store, store)
    else:
        findings += look("source", _plan, job, cluster_file, plans)
    return findings + look("space", storage.space, store, plans[0] if plans else None)


def _plan(job: Job, cluster_file: Path, plans: list[Preview]) -> Iterator[Finding]:
    plans.append(plan_job(job, cluster_file))
    return storage.planned(plans[0])
