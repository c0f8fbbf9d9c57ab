"""The ``featuremaps`` command: parses, calls, prints."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.cli.arguments import as_place, store_argument
from pipeline.cli.clusters import cluster, doctor, submit
from pipeline.cli.figures import report, show
from pipeline.cli.terminal import (
    asks_for_json,
    complain,
    is_json,
    logger,
    say_end,
    serve_metrics,
    show_progress,
    start_logging,
    stop_on_signal,
)
from pipeline.config import JOB_SUFFIXES, Job, LayerSpec, load_job, make_job
from pipeline.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_RUN_AGAIN,
    FeaturemapsError,
    UsageError,
)

if TYPE_CHECKING:
    from pipeline.store.objects import Place


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="featuremaps")
def cli() -> None:
    """Turn image collections of any size into feature maps in a Zarr store."""


def _job_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that describe a job, shared by ``run`` and ``plan``."""
    options = [
        click.argument("what", nargs=-1, required=True, metavar="SOURCE STORE | JOB.yaml"),
        click.option("--dtype", type=click.Choice(["float32", "float16", "uint16", "uint8"]), help="How maps are stored."),
        click.option("--resize", type=int, nargs=2, metavar="HEIGHT WIDTH", help="Resize every image to this input size."),
        click.option("--color", type=click.Choice(["rgb", "grey"]), help="Channels that the extractor sees."),
        click.option(
            "--layers", multiple=True, metavar="FxHxW[:ACT][:poolN]", help="A layer of the extractor; repeat for a stack."
        ),
        click.option(
            "--outputs", multiple=True, metavar="NAME", help="conv1, ... to keep maps (default: the last); pooled for none."
        ),
        click.option("--weights", metavar="FILE.safetensors", help="Weights of the layers, instead of seeded ones."),
        click.option("--seed", type=int, help="Seed of the weights (default 23455)."),
        click.option("--limit", type=int, metavar="N", help="Only the first N images of the listing."),
        click.option("--pixel-limit", type=int, metavar="N", help="Reject images of more pixels than this."),
        click.option("--workers", type=int, metavar="N", help="Batches at work at once (default: one per core)."),
        click.option("--gpus", type=int, metavar="N", help="GPUs to use, 0 for none (default: all)."),
        click.option("--memory-limit", type=int, metavar="MIB", help="Memory of one worker."),
        click.option("--cluster", metavar="NAME", help="A cluster of cluster.yaml (default: all local cores)."),
        click.option(
            "--check", type=click.Choice(["fingerprint", "digest"]), help="Look for changes by size and time, or by content."
        ),
        click.option("--retry-quarantined", is_flag=True, default=None, help="Try quarantined and rejected images again."),
        click.option("--max-quarantined", type=int, metavar="N", help="Exit with 3 when more images than this are bad."),
        click.option("--max-removed", type=float, metavar="SHARE", help="Largest share that one run may mark removed (0.10)."),
        click.option("--durability", type=click.Choice(["process", "machine"]), help="What may die without loss (process)."),
        click.option("--sole-writer", is_flag=True, default=None, help="Vouch that nobody else writes to a bucket's store."),
        click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
        click.option("-v", "--verbose", count=True, help="More log lines, one per batch; twice for Dask's own."),
        click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="One JSON object per log line."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _make_job(what: tuple[str, ...], options: dict[str, Any]) -> Job:
    """Turn the command line into a job; options replace what a job file says."""
    values: dict[str, Any] = {}
    for key in (
        *("dtype", "limit", "workers", "gpus", "cluster", "durability", "sole_writer"),
        *("check", "retry_quarantined", "max_quarantined", "max_removed"),
    ):
        if options[key] is not None:
            values[key] = options[key]
    if options["memory_limit"] is not None:
        values["memory_limit_bytes"] = options["memory_limit"] * 2**20
    decode = {key: options[key] for key in ("resize", "color", "pixel_limit") if options[key] is not None}
    extractor = {key: options[key] for key in ("weights", "seed") if options[key] is not None}
    if options["layers"]:
        extractor["layers"] = [LayerSpec.parse(text).model_dump() for text in options["layers"]]
    if options["outputs"]:
        extractor["outputs"] = options["outputs"]
    values |= {key: value for key, value in (("decode", decode), ("extractor", extractor)) if value}
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
@_job_options
@click.option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics here while the run lasts; port 0 is any free one.")
def run(what: tuple[str, ...], as_json: bool, verbose: int, log_format: str, metrics: str | None, **options: Any) -> int:
    """Bring STORE up to date with SOURCE: also resume, also tonight's new images.

    SOURCE is a folder, a glob pattern, or a .txt, .csv or .parquet list of paths.
    """
    job = _begin(what, options, verbose, log_format)
    from pipeline.api import run_job
    from pipeline.run.summary import receipt
    from pipeline.run.summary_text import describe

    on_terminal = sys.stderr.isatty() and not as_json and log_format == "text"
    with serve_metrics(metrics), stop_on_signal() as stop, show_progress(on_terminal) as on_progress:
        summary = run_job(job, on_progress=on_progress, stop=stop)
    say_end(summary)
    click.echo(json.dumps(receipt(summary), indent=1) if as_json else describe(summary, job.store))
    return summary.exit_code


@cli.command()
@_job_options
def plan(what: tuple[str, ...], as_json: bool, verbose: int, log_format: str, **options: Any) -> int:
    """Say what run would do: images, classes, shards, bytes, memory, disk, exit code. Changes nothing.

    Ends with the exit code that the run would have, as far as listing, headers and store tell: 0 complete, 1 failed (source, storage
    or disk), 2 refused (settings, memory, too many removed), 3 too many bad images or none that is done, 75 another run has the store.
    """
    job = _begin(what, options, verbose, log_format)
    from pipeline.checks.plan import plan_job

    preview = plan_job(job)
    click.echo(json.dumps(preview.to_dict(), indent=1) if as_json else preview.describe())
    return preview.exit_code


@cli.command()
@store_argument
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
@click.option("--quarantined", "n_listed", type=int, default=20, show_default=True, metavar="N", help="Bad images to list.")
def status(store: Place, as_json: bool, n_listed: int) -> int:
    """Say how far a store is: counts, throughput, who works on it, and the bad images with their reasons."""
    from pipeline.checks.plan import store_status

    found = store_status(store, n_listed)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.describe())
    return EXIT_COMPLETE


@cli.command()
@store_argument
@click.option(
    "--sample", "n_sample", type=click.IntRange(0), default=20, show_default=True, metavar="N", help="Images to recompute."
)
@click.option("--seed", type=int, help="Of the choice of these images.")
@click.option("--repair", is_flag=True, help="Set rows with bad maps to pending.")
@click.option("--no-source", is_flag=True, help="Do not read the images: compare no digests of theirs, recompute none.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes (default: one per core).")
@click.option("--sole-writer", is_flag=True, help="Vouch that nobody else writes to a bucket's store.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(store: Place, no_source: bool, as_json: bool, **options: Any) -> int:
    """Audit STORE: metadata, every column, map and image against checksums and digests, some images computed anew."""
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
    """Free the space of the maps in STORE whose images have left the source or were replaced; rows keep their numbers."""
    from pipeline.store.vacuum import vacuum_store

    result = vacuum_store(store, dry_run=dry_run, sole_writer=sole_writer)
    click.echo(json.dumps(result.to_dict(), indent=1) if as_json else result.describe())
    return EXIT_FAILED if result.n_damaged else EXIT_COMPLETE


for _command in (show, submit, doctor, cluster, report):
    cli.add_command(_command)


def main() -> None:
    """Run the command; errors that the user can mend are a paragraph and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names that are not UTF-8 go out as they came in
    try:
        code = cli.main(standalone_mode=False)
    except FeaturemapsError as error:
        code = complain(error, " ".join(line.strip() for line in str(error).splitlines()), error.exit_code)
    except OSError as error:
        code = complain(
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
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        code = complain(error, "interrupted; what was committed stands, run again to go on", EXIT_RUN_AGAIN)
    except Exception as error:
        if not is_json():
            raise
        logger.critical("featuremaps has a fault: %s", error, exc_info=error)  # a traceback of many lines is no log line
        code = EXIT_FAILED
    sys.exit(code)
