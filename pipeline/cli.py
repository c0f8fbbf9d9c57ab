"""The ``featuremaps`` command: parses, calls, prints."""

from __future__ import annotations

import io
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.config import Job, LayerSpec, load_job, make_job
from pipeline.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_RUN_AGAIN,
    FeaturemapsError,
    UsageError,
)

if TYPE_CHECKING:
    from pipeline.objects import Place
    from pipeline.summary import Progress, Summary

logger = logging.getLogger(__name__)

LOG_LINE_S = 10.0
_JOB_SUFFIXES = (".yaml", ".yml")


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


def _place(store: str) -> Place:
    from pipeline.objects import place

    return place(store)


_store_argument = click.argument(  # which a job file may name
    "store",
    callback=lambda _context, _parameter, store: _place(load_job(store).store if store.endswith(_JOB_SUFFIXES) else store),
    metavar="STORE | JOB.yaml",
)


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
    values |= {key: value for key, value in (("decode", decode), ("extractor", extractor)) if value}
    if len(what) == 1 and what[0].endswith(_JOB_SUFFIXES):
        return load_job(what[0], values)
    if len(what) != 2:
        raise UsageError(
            f"SOURCE and STORE, or one JOB.yaml, are needed, but {'this was' if len(what) == 1 else f'these {len(what)} were'} given: "
            f"{' '.join(what[:5])}; nothing was started. Name both, and quote a pattern, so that the shell does not expand it"
        )
    return make_job({"source": what[0], "store": what[1], **values})


def _begin(what: tuple[str, ...], options: dict[str, Any], verbose: int, log_format: str) -> Job:
    """Start logging, and make the job."""
    from pipeline import logs

    _start_logging(verbose, as_json=log_format == "json")
    job = _make_job(what, options)
    logs.about(str(_place(job.store).absolute()))
    return job


@cli.command()
@_job_options
@click.option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics here while the run lasts; port 0 is any free one.")
def run(what: tuple[str, ...], as_json: bool, verbose: int, log_format: str, metrics: str | None, **options: Any) -> int:
    """Bring STORE up to date with SOURCE: also resume, also tonight's new images.

    SOURCE is a folder, a glob pattern, or a .txt, .csv or .parquet list of paths.
    """
    job = _begin(what, options, verbose, log_format)
    from pipeline.run import run_job
    from pipeline.summary import describe, receipt

    on_terminal = sys.stderr.isatty() and not as_json and log_format == "text"
    with _serve_metrics(metrics), _stop_on_signal() as stop, _show_progress(on_terminal) as on_progress:
        summary = run_job(job, on_progress=on_progress, stop=stop)
    _say_end(summary)
    click.echo(json.dumps(receipt(summary), indent=1) if as_json else describe(summary, job.store))
    return summary.exit_code


@cli.command()
@_job_options
def plan(what: tuple[str, ...], as_json: bool, verbose: int, log_format: str, **options: Any) -> int:
    """Say what run would do: images, classes, shards, bytes, memory, disk. Changes nothing."""
    job = _begin(what, options, verbose, log_format)
    from pipeline.preview import plan_job

    preview = plan_job(job)
    click.echo(json.dumps(preview.to_dict(), indent=1) if as_json else preview.describe())
    return EXIT_COMPLETE if preview.fits else EXIT_FAILED


@cli.command()
@_store_argument
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
@click.option("--quarantined", "n_listed", type=int, default=20, show_default=True, metavar="N", help="Bad images to list.")
def status(store: Place, as_json: bool, n_listed: int) -> int:
    """Say how far a store is: counts, throughput, who works on it, and the bad images with their reasons."""
    from pipeline.preview import store_status

    found = store_status(store, n_listed)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.describe())
    return EXIT_COMPLETE


@cli.command()
@_store_argument
@click.argument("path")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Figure to write: .png, .svg or .pdf.")
def show(store: Place, path: str, output: Path) -> int:
    """Draw the image PATH of STORE with its maps below it."""
    from pipeline.report import show_image

    show_image(store, path, output)
    click.echo(f"wrote {output}")
    return EXIT_COMPLETE


@cli.command()
@_store_argument
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
    from pipeline.verify import verify_store

    audit = verify_store(store, read_source=not no_source, **options)
    click.echo(json.dumps(audit.to_dict(), indent=1) if as_json else audit.describe())
    return EXIT_COMPLETE if audit.is_sound else EXIT_FAILED


@cli.command()
@_store_argument
@click.option("--dry-run", is_flag=True, help="Only say what would be freed.")
@click.option("--sole-writer", is_flag=True, help="Vouch that nobody else writes to a bucket's store.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def vacuum(store: Place, dry_run: bool, sole_writer: bool, as_json: bool) -> int:
    """Free the space of the maps in STORE whose images have left the source or were replaced; rows keep their numbers."""
    from pipeline.vacuum import vacuum_store

    result = vacuum_store(store, dry_run=dry_run, sole_writer=sole_writer)
    click.echo(json.dumps(result.to_dict(), indent=1) if as_json else result.describe())
    return EXIT_FAILED if result.n_damaged else EXIT_COMPLETE


@cli.command()
@click.argument("job_file", metavar="JOB.yaml", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--cluster", metavar="NAME", help="A cluster of a batch system (default: the one that the job names).")
@click.option("--cluster-file", type=click.Path(path_type=Path), default=Path("cluster.yaml"), show_default=True)
@click.option(
    "--attempts", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Give up after N without progress."
)
@click.option(
    "--sample", "n_sample", type=click.IntRange(0), default=20, show_default=True, metavar="N", help="Images to recompute."
)
@click.option("--dry-run", is_flag=True, help="Only print the job script.")
@click.option("--attend", is_flag=True, hidden=True, help="What the driver's job calls.")
@click.option("-v", "--verbose", count=True, help="More log lines; twice for Dask's own.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", help="One JSON object per log line.")
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
    """Hand the whole run to a batch system: a driver's job that comes back until the store is complete, and then audits it."""
    from pipeline import submit as submitting

    _start_logging(verbose, as_json=log_format == "json")
    job = load_job(job_file, {"cluster": cluster} if cluster else {})
    order = submitting.Order(job, job_file, cluster_file, **options)
    if dry_run:
        click.echo(submitting.driver_script(order), nl=False)
        return EXIT_COMPLETE
    if not attend:
        submission = submitting.submit(order)
        click.echo(f"job {submission.job_id} was handed in; featuremaps status {job.store} tells how far it is")
        return EXIT_COMPLETE

    def report(what: Any) -> None:
        from pipeline.summary import Summary, describe

        click.echo(describe(what, job.store) if isinstance(what, Summary) else what if isinstance(what, str) else what.describe())

    with _stop_on_signal() as stop:
        return submitting.attend(order, stop=stop, on_progress=_log_lines(), report=report)


@cli.command()
@click.argument("what", required=False, metavar="[JOB.yaml | STORE]")
@click.option("--cluster", metavar="NAME", help="A cluster of cluster.yaml (default: that of the job, or this machine).")
@click.option(
    "--cluster-file", type=click.Path(path_type=Path), default="cluster.yaml", show_default=True, help="Where clusters are named."
)
@click.option("--start", is_flag=True, help="Start the cluster, look at its workers, and stop it again.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(what: str | None, as_json: bool, **options: Any) -> int:
    """Say what stands between this installation and a run: versions, GPUs, limits, the cluster, the store's place, the source.

    With JOB.yaml its source is listed and its headers are read, as by plan.
    """
    _start_logging(0, as_json=False)
    from pipeline.doctor import diagnose

    is_job = what is not None and what.endswith(_JOB_SUFFIXES)
    diagnosis = diagnose(load_job(what, {}) if what and is_job else None, None if is_job else what, **options)
    click.echo(json.dumps(diagnosis.to_dict(), indent=1) if as_json else diagnosis.describe())
    return EXIT_COMPLETE if diagnosis.is_well else EXIT_FAILED


@cli.group()
def cluster() -> None:
    """Look at the clusters of cluster.yaml, without starting anything."""


_cluster_file = click.option(
    "--cluster-file", type=click.Path(path_type=Path), default="cluster.yaml", show_default=True, help="Where clusters are named."
)


@cluster.command("list")
@_cluster_file
def cluster_list(cluster_file: Path) -> int:
    """Say which clusters there are, of what kind and groups, and which cannot be used from here."""
    from pipeline.show_cluster import list_clusters

    click.echo(list_clusters(cluster_file))
    return EXIT_COMPLETE


@cluster.command("show")
@click.argument("name")
@_cluster_file
def cluster_show(name: str, cluster_file: Path) -> int:
    """Print what `run --cluster NAME` would launch: job scripts, ssh commands, manifests or processes. Launches nothing."""
    from pipeline.show_cluster import show_cluster

    click.echo(show_cluster(name, cluster_file))
    return EXIT_COMPLETE


def _start_logging(verbose: int, *, as_json: bool) -> None:
    from pipeline import logs

    logs.start(as_json=as_json, level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    logger.setLevel(logging.INFO)  # what this module logs is what is shown without -v in text
    if verbose < 2:
        import dask  # before distributed, which sets its loggers up when it is imported

        dask.config.set({"logging": {"distributed": "critical", "distributed.client": "critical", "bokeh": "critical"}})


def _is_json() -> bool:
    """Whether log lines are JSON; logs are only imported where they were started."""
    logs = sys.modules.get("pipeline.logs")
    return logs is not None and bool(logs.is_json())


def _say(text: str, level: int = logging.INFO, *, before: str = "", **extra: Any) -> None:
    """Put a line on stderr whatever the verbosity."""
    if _is_json():
        logger.log(level, "%s", text, extra=extra)
    else:
        click.echo(f"{before}{text}", err=True)


def _say_end(summary: Summary) -> None:
    """Log how a run ended, with its receipt; text has that on stdout."""
    from pipeline.summary import headline, receipt

    if _is_json():
        level = logging.INFO if summary.outcome == "complete" else logging.WARNING
        _say(headline(summary), level, outcome=summary.outcome, receipt=receipt(summary))


@contextmanager
def _serve_metrics(address: str | None) -> Iterator[None]:
    if address is None:
        yield
        return
    from pipeline.metrics import served

    with served(address) as url:
        _say(f"metrics: {url}", url=url)
        yield


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks for a drain, a second SIGINT ends at once."""
    stop = threading.Event()

    def ask(number: int, _frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        name = signal.Signals(number).name
        _say(f"{name}: finishing what is in flight; nothing is lost, run again to go on", before="\n", signal=name)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _show_progress(on_terminal: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar with the time left on a terminal, a line at intervals elsewhere."""
    if not on_terminal:
        yield _log_lines()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(
        *columns,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        speed_estimate_period=600,
    ) as bar:
        task = bar.add_task("listing", total=None)

        def update(progress: Any) -> None:
            text = f"{progress.stage}{f', {progress.n_quarantined} bad' if progress.n_quarantined else ''}"
            bar.update(task, description=text, total=progress.n_total or None, completed=progress.n_finished)

        yield update


def _log_lines() -> Callable[[Progress], None]:
    import time

    last, began, stage = 0.0, 0.0, ""

    def update(progress: Progress) -> None:
        nonlocal last, began, stage
        now = time.monotonic()
        is_news = progress.stage.partition(",")[0] != stage and _is_json()  # so that each stage has a line, with the run's id
        stage = progress.stage.partition(",")[0]
        if progress.stage == "running" and not began:
            began = now
        if not last or now - last >= LOG_LINE_S or is_news:
            last = now
            finished = progress.n_finished - progress.n_start
            left_s = (now - began) / finished * (progress.n_total - progress.n_finished) if began and finished else 0.0
            left = f", about {left_s:.0f} s left" if left_s else ""
            counts = f": {progress.n_finished} of {progress.n_total} images" if progress.n_total else ""
            bad = f", {progress.n_quarantined} bad" if progress.n_quarantined else ""
            _say(
                f"{progress.stage}{counts}{bad}{left}",
                stage=progress.stage,
                n_finished=progress.n_finished,
                n_total=progress.n_total,
                n_bad=progress.n_quarantined,
                left_s=round(left_s, 1) if left_s else None,
            )

    return update


def main() -> None:
    """Run the command; errors that the user can mend are a paragraph and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names that are not UTF-8 go out as they came in
    try:
        code = cli.main(standalone_mode=False)
    except FeaturemapsError as error:
        code = _complain(error, " ".join(line.strip() for line in str(error).splitlines()), error.exit_code)
    except OSError as error:
        code = _complain(
            error,
            f"the file system failed ({error}): what was committed stands; check the disk, its space and the permissions, and run the "
            "same command again",
            EXIT_FAILED,
        )
    except click.ClickException as error:
        if _asks_for_json(sys.argv):
            _start_logging(0, as_json=True)  # click stopped before the command began
            _complain(error, error.format_message(), error.exit_code)
        else:
            error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        code = _complain(error, "interrupted; what was committed stands, run again to go on", EXIT_RUN_AGAIN)
    except Exception as error:
        if not _is_json():
            raise
        logger.critical("featuremaps has a fault: %s", error, exc_info=error)  # a traceback of many lines is no log line
        code = EXIT_FAILED
    sys.exit(code)


def _complain(error: BaseException, paragraph: str, code: int) -> int:
    """Say why the command ends; return its exit code."""
    _say(f"featuremaps: {paragraph}", logging.ERROR, error=type(error).__name__, exit_code=code)
    return code


def _asks_for_json(arguments: list[str]) -> bool:
    """Whether log lines were to be JSON, of a command line that click could not make sense of."""
    return "--log-format=json" in arguments or ("--log-format", "json") in pairwise(arguments)
