"""What a program of yours calls: a job, its run, and what a store says. `import pipeline` gives the same names."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.cluster.connection import connector
from pipeline.config import Job
from pipeline.run import lifecycle
from pipeline.run.summary import Progress, Summary


def run_job(
    job: Job,
    client: Any = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
    cluster_file: Path = Path("cluster.yaml"),
) -> Summary:
    """Bring a store up to date with its source: the first run, a resumed one and tonight's are the same call.

    Parameters
    ----------
    job : Job
    client : distributed.Client, optional
        The cluster to use; it is left as it is. None starts the one that the job names, and only if there is work.
    on_progress : callable, optional
        Called about every second with the `Progress`.
    stop : threading.Event, optional
        Once set, the run finishes what is in flight, commits it and ends as ``stopped``.
    cluster_file : Path
        Where ``job.cluster`` is looked up.

    Returns
    -------
    Summary
        Also left in the store as the run's receipt.

    Raises
    ------
    UsageError
        When source, settings, store or cluster do not fit; nothing was started.
    StoreBusyError
        When another run holds the store.
    FeaturemapsError
        When the run had to end early; what was committed stands and the same call goes on from there.

    Examples
    --------
    >>> from distributed import Client
    >>> import pipeline
    >>> job = pipeline.load_job("job.yaml")  # doctest: +SKIP
    >>> with Client("tcp://scheduler:8786") as client:  # doctest: +SKIP
    ...     summary = pipeline.run_job(job, client)
    >>> summary.outcome, summary.n_done  # doctest: +SKIP
    ('complete', 28)
    """
    return lifecycle.run_job(job, connector(job, client, cluster_file), on_progress=on_progress, stop=stop)
