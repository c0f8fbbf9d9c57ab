"""The ``featuremaps`` command: parses arguments, calls functions, prints results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.cli.arguments import as_place, cluster_file_option, log_format_option, store_argument
from pipeline.cli.clusters import cluster, doctor, submit
from pipeline.cli.figures import report, show
from pipeline.cli.groups import GroupedCommands
from pipeline.cli.job_options import job_options, job_values
from pipeline.cli.output import is_output_lost, lasting_output
from pipeline.cli.terminal import (
    asks_for_json,
    complain,
    ignore_signals,
    interrupt_on_signal,
    is_json,
    logger,
    say_end,
    serve_metrics,
    show_progress,
    start_logging,
    stop_on_signal,
)
from pipeline.config import JOB_SUFFIXES, Job, load_job, make_job
from pipeline.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_RUN_AGAIN,
    FeaturemapsError,
    UsageError,
)

if TYPE_CHECKING:
    from pipeline.store.objects import Place


_WORKING = {"run", "submit", "vacuum"}
"""Commands that change more than they print; they keep their exit code if output is lost."""


@click.group(cls=GroupedCommands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="featuremaps")
def cli() -> None:
    """Turn image collections of any size into feature maps in a Zarr store."""


@cli.result_callback()
@click.pass_context
def _ended(context: click.Context, code: int | None) -> tuple[str, int]:
    """The command that was executed, and its exit code."""
    return context.invoked_subcommand or "", int(code or EXIT_COMPLETE)


def _job_command(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the arguments of ``run`` and ``plan``: a job, whether to print JSON, and how to log."""
    what = click.argument("what", nargs=-1, required=True, metavar="SOURCE STORE | JOB.yaml")
    as_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
    verbose = click.option("-v", "--verbose", count=True, help="More log lines, one per batch; twice for Dask's own.")
    return what(job_options(cluster_file_option(as_json(verbose(log_format_option(command))))))


def _make_job(what: tuple[str, ...], options: dict[str, Any]) -> Job:
    """Make a job from the command line; options override the job file."""
    values = job_values(options)
    if len(what) == 1 and what[0].endswith(JOB_SUFFIXES):
        return load_job(what[0], values)
    if len(what) != 2:
        raise UsageError(
            f"SOURCE and STORE, or one JOB.yaml, are needed, but {'this was' if len(what) == 1 else f'these {len(what)} were'} given: "
            f"{' '.join(what[:5])}; nothing was started. Name both, and quote a pattern, so that the shell does not expand it"
        )
    return make_job({"source": what[0], "store": what[1], **values})


def _begin(what: tuple[str, ...], options: dict[str, Any], verbose: int, log_format: str) -> Job:
    """Start logging, and make the job."""
    from pipeline.cli import log_format as logs

    start_logging(verbose, as_json=log_format == "json")
    job = _make_job(what, options)
    logs.about(str(as_place(job.store).absolute()))
    return job


@cli.command()
@_job_command
@click.option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics here while the run lasts; port 0 is any free one.")
def run(
    what: tuple[str, ...],
    as_json: bool,
    verbose: int,
    log_format: str,
    metrics: str | None,
    cluster_file: Path,
    **options: Any,
) -> int:
    """Write the feature maps of SOURCE to STORE, or update them.

    The same command makes the first run, resumes a run that ended early, and adds tonight's new images.

    SOURCE is a folder, a glob pattern, or a .txt, .csv or .parquet list of paths.
    """
    job = _begin(what, options, verbose, log_format)
    from pipeline.api import run_job
    from pipeline.run.summary import receipt
    from pipeline.run.summary_text import describe

    on_terminal = sys.stderr.isatty() and not as_json and log_format == "text"
    with serve_metrics(metrics), stop_on_signal() as stop, show_progress(on_terminal, stop) as on_progress:
        summary = run_job(job, on_progress=on_progress, stop=stop, cluster_file=cluster_file)
    say_end(summary)
    click.echo(json.dumps(receipt(summary), indent=1) if as_json else describe(summary, job.store))
    return summary.exit_code


@cli.command()
@_job_command
def plan(what: tuple[str, ...], as_json: bool, verbose: int, log_format: str, cluster_file: Path, **options: Any) -> int:
    """Show what run would do. Changes nothing.

    Shows images, classes, shards, bytes, memory and disk. Ends with the exit code that the run would have, as far as listing, headers
    and store tell. 0: complete. 1: failed (source, storage or disk). 2: refused (settings, memory, too many removed). 3: too many bad
    images, or no image done. 75: another run has the store.
    """
    job = _begin(what, options, verbose, log_format)
    from pipeline.checks.plan import plan_job

    preview = plan_job(job, cluster_file)
    click.echo(json.dumps(preview.to_dict(), indent=1) if as_json else preview.describe())
    return preview.exit_code


@cli.command()
@store_argument
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
@click.option("--quarantined", "n_listed", type=int, default=20, show_default=True, metavar="N", help="Bad images to list.")
def status(store: Place, as_json: bool, n_listed: int) -> int:
    """Show how far a store is, and which images are bad.

    Shows counts, throughput, who works on the store, and the reason of each bad image.
    """
    from pipeline.checks.status import store_status

    found = store_status(store, n_listed)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.describe())
    return EXIT_COMPLETE


@cli.command()
@store_argument
@click.option(
    "--sample", "n_sample", type=click.IntRange(0), default=20, show_default=True, metavar="N", help="Images to recompute."
)
@click.option("--seed", type=int, help="Seed of the choice of these images.")
@click.option("--repair", is_flag=True, help="Set rows with bad maps to pending.")
@click.option("--no-source", is_flag=True, help="Do not read the images: no digests are compared, none is recomputed.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes (default: one per core).")
@click.option("--sole-writer", is_flag=True, help="Vouch that nobody else writes to a bucket's store.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(store: Place, no_source: bool, as_json: bool, **options: Any) -> int:
    """Check every checksum of STORE, and recompute some images.

    Compares metadata, every column, every map and every image with its checksum or digest.
    """
    from pipeline.checks.verify import verify_store

    audit = verify_store(store, read_source=not no_source, **options)
    click.echo(json.dumps(audit.to_dict(), indent=1) if as_json else audit.describe())
    return EXIT_COMPLETE if audit.is_sound else EXIT_FAILED


@cli.command()
@store_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@click.option("--sole-writer", is_flag=True, help="Vouch that nobody else writes to a bucket's store.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def vacuum(store: Place, dry_run: bool, sole_writer: bool, as_json: bool) -> int:
    """Free the space of maps whose images are gone.

    These images have left the source or were replaced. Rows keep their numbers.
    """
    from pipeline.store.vacuum import vacuum_store

    result = vacuum_store(store, dry_run=dry_run, sole_writer=sole_writer)
    click.echo(json.dumps(result.to_dict(), indent=1) if as_json else result.describe())
    return EXIT_FAILED if result.n_damaged else EXIT_COMPLETE


for _command in (show, submit, doctor, cluster, report):
    cli.add_command(_command)


def main() -> None:
    """Run the command; an error that the user can correct prints a paragraph and sets an exit code, never a traceback."""
    with lasting_output(), interrupt_on_signal():
        code = _exit_code()
    sys.exit(code)


def _code_of(result: tuple[str, int] | int) -> int:
    """The exit code by what `cli` returned, a number for help and version; lost output is a failure of what does little but print."""
    command, code = result if isinstance(result, tuple) else ("", result)
    return EXIT_FAILED if not code and command not in _WORKING and is_output_lost() else code


def _exit_code() -> int:
    """Run the command and report what went wrong; return the exit code."""
    try:
        return _code_of(cli.main(standalone_mode=False))
    except FeaturemapsError as error:
        return complain(error, " ".join(line.strip() for line in str(error).splitlines()), error.exit_code)
    except OSError as error:
        return complain(
            error,
            f"the file system failed ({error}): what was committed stands; check the disk, its space and the permissions, and run the "
            "same command again",
            EXIT_FAILED,
        )
    except click.ClickException as error:
        if asks_for_json(sys.argv):
            start_logging(0, as_json=True)  # click stopped before the command began
            complain(error, error.format_message(), error.exit_code)
        else:
            error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        ignore_signals()
        return complain(error, "interrupted; what was committed stands, run again to go on", EXIT_RUN_AGAIN)
    except Exception as error:
        if not is_json():
            raise
        # A traceback of many lines does not fit into a log line.
        logger.critical("featuremaps has a fault: %s", error, exc_info=error)
        return EXIT_FAILED
