"""The commands about clusters: submit a run, show what would be launched, and check what a run needs."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.arguments import cluster_file_option, log_format_option
from pipeline.cli.terminal import log_lines, start_logging, stop_on_signal
from pipeline.config import JOB_SUFFIXES, load_job
from pipeline.errors import EXIT_COMPLETE, EXIT_FAILED

if TYPE_CHECKING:
    from pipeline.checks.verify import Audit


@click.command()
@click.argument("job_file", metavar="JOB.yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--cluster", metavar="NAME", help="A cluster of a batch system (default: the one that the job names).")
@cluster_file_option
@click.option(
    "--attempts", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Give up after N without progress."
)
@click.option(
    "--sample", "n_sample", type=click.IntRange(0), default=20, show_default=True, metavar="N", help="Images to recompute."
)
@click.option("--verify/--no-verify", default=True, show_default=True, help="Audit the store at the end.")
@click.option("--dry-run", is_flag=True, help="Only print the job script.")
@click.option("--attend", is_flag=True, hidden=True, help="What the driver's job calls.")
@click.option("-v", "--verbose", count=True, help="More log lines; twice for Dask's own.")
@log_format_option
def submit(
    job_file: Path,
    cluster: str | None,
    cluster_file: Path,
    dry_run: bool,
    attend: bool,
    verbose: int,
    log_format: str,
    **options: Any,
) -> int:
    """Hand the whole run to a batch system such as Slurm.

    The driver is a job of its own. It comes back until the store is complete, and then audits it.
    """
    from pipeline.cluster.submit.script import Order, driver_script

    start_logging(verbose, as_json=log_format == "json")
    job = load_job(job_file, {"cluster": cluster} if cluster else {})
    order = Order(job, job_file, cluster_file, **options)
    if dry_run:
        click.echo(driver_script(order), nl=False)
        return EXIT_COMPLETE
    if not attend:
        from pipeline.cluster.submit.hand_in import submit as hand_in

        submission = hand_in(order)
        click.echo(f"job {submission.job_id} was submitted; featuremaps status {job.store} tells how far it is")
        return EXIT_COMPLETE

    from pipeline.cluster.submit.inside_job import attend as attend_run

    def report(what: Any) -> None:
        from pipeline.run.summary import Summary
        from pipeline.run.summary_text import describe

        click.echo(describe(what, job.store) if isinstance(what, Summary) else what if isinstance(what, str) else what.describe())

    def audit() -> Audit:
        from pipeline.checks.verify import verify_store

        return verify_store(job.store, n_sample=order.n_sample, workers=order.spec.driver.threads)

    with stop_on_signal() as stop:
        return attend_run(order, stop=stop, signalled=stop.signalled, on_progress=log_lines(), report=report, audit=audit)


@click.command()
@click.argument("what", required=False, metavar="[JOB.yaml | STORE]")
@click.option("--cluster", metavar="NAME", help="A cluster of cluster.yaml (default: that of the job, or this machine).")
@cluster_file_option
@click.option("--start", is_flag=True, help="Start the cluster, look at its workers, and stop it again.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(what: str | None, as_json: bool, **options: Any) -> int:
    """Check what a run needs, and name a remedy for what is missing.

    Checks versions, GPUs, limits, the cluster, the store's place and the source. With JOB.yaml it lists the source and reads the
    headers, as plan does.
    """
    start_logging(0, as_json=False)
    from pipeline.checks.doctor import diagnose

    is_job = what is not None and what.endswith(JOB_SUFFIXES)
    job = load_job(what, {}) if what and is_job else None
    with stop_on_signal() if options["start"] else nullcontext() as stop:  # only a cluster that was started has to be stopped
        diagnosis = diagnose(
            job,
            None if is_job else what,
            stop=stop,
            on_wait=lambda text: click.echo(f"waiting for workers ({text})", err=True),
            **options,
        )
    click.echo(json.dumps(diagnosis.to_dict(), indent=1) if as_json else diagnosis.describe())
    return EXIT_COMPLETE if diagnosis.is_well else EXIT_FAILED


@click.group()
def cluster() -> None:
    """Show the clusters of cluster.yaml. Starts nothing."""


@cluster.command("list")
@cluster_file_option
def cluster_list(cluster_file: Path) -> int:
    """List the clusters, their kinds and groups, and which cannot be used from here."""
    from pipeline.cluster.show import list_clusters

    click.echo(list_clusters(cluster_file))
    return EXIT_COMPLETE


@cluster.command("show")
@click.argument("name")
@cluster_file_option
def cluster_show(name: str, cluster_file: Path) -> int:
    """Print what `run --cluster NAME` would launch: job scripts, ssh commands, manifests or processes. Launches nothing."""
    from pipeline.cluster.show import show_cluster

    click.echo(show_cluster(name, cluster_file))
    return EXIT_COMPLETE
