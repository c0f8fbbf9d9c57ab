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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline import __version__
from pipeline.config import Job, LayerSpec, load_job, make_job
from pipeline.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_QUARANTINED,
    EXIT_RUN_AGAIN,
    FeaturemapsError,
    UsageError,
)

if TYPE_CHECKING:
    from pipeline.objects import Place
    from pipeline.summary import Progress, Summary

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
        click.option("-v", "--verbose", count=True, help="More log lines; twice for Dask's own."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _place(store: str) -> Place:
    from pipeline.objects import place

    return place(store)


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


@cli.command()
@_job_options
def run(what: tuple[str, ...], as_json: bool, verbose: int, **options: Any) -> int:
    """Bring STORE up to date with SOURCE: also resume, also tonight's new images.

    SOURCE is a folder, a glob pattern, or a .txt, .csv or .parquet list of paths.
    """
    _start_logging(verbose)
    job = _make_job(what, options)
    from pipeline.run import run_job
    from pipeline.summary import receipt

    with _stop_on_signal() as stop, _show_progress(sys.stderr.isatty() and not as_json) as on_progress:
        summary = run_job(job, on_progress=on_progress, stop=stop)
    click.echo(json.dumps(receipt(summary), indent=1) if as_json else _describe(summary, job))
    if summary.outcome == "stopped":
        return EXIT_RUN_AGAIN
    if summary.outcome != "complete":
        return EXIT_FAILED
    too_many = job.max_quarantined is not None and summary.n_bad_total > job.max_quarantined
    too_many |= summary.n_bad_total > 0 and summary.n_done_total == 0
    return EXIT_QUARANTINED if too_many else EXIT_COMPLETE


@cli.command()
@_job_options
def plan(what: tuple[str, ...], as_json: bool, verbose: int, **options: Any) -> int:
    """Say what run would do: images, classes, shards, bytes, memory, disk. Changes nothing."""
    _start_logging(verbose)
    job = _make_job(what, options)
    from pipeline.preview import plan_job

    preview = plan_job(job)
    click.echo(json.dumps(preview.to_dict(), indent=1) if as_json else preview.describe())
    return EXIT_COMPLETE if preview.fits else EXIT_FAILED


@cli.command()
@click.argument("store", callback=lambda _context, _parameter, store: _place(store))
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
@click.option("--quarantined", "n_listed", type=int, default=20, show_default=True, metavar="N", help="Bad images to list.")
def status(store: Place, as_json: bool, n_listed: int) -> int:
    """Say how far a store is: counts, throughput, who works on it, and the bad images with their reasons."""
    from pipeline.preview import store_status

    found = store_status(store, n_listed)
    click.echo(json.dumps(found.to_dict(), indent=1) if as_json else found.describe())
    return EXIT_COMPLETE


@cli.command()
@click.argument("store", callback=lambda _context, _parameter, store: _place(store))
@click.argument("path")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Figure to write: .png, .svg or .pdf.")
def show(store: Place, path: str, output: Path) -> int:
    """Draw the image PATH of STORE with its maps below it."""
    from pipeline.report import show_image

    show_image(store, path, output)
    click.echo(f"wrote {output}")
    return EXIT_COMPLETE


@cli.command()
@click.argument("store", callback=lambda _context, _parameter, store: _place(store))
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
@click.argument("store", callback=lambda _context, _parameter, store: _place(store))
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
    _start_logging(0)
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


def _start_logging(verbose: int) -> None:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("pipeline").setLevel(level)
    if verbose < 2:
        import dask  # before distributed, which sets its loggers up when it is imported

        dask.config.set({"logging": {"distributed": "critical", "distributed.client": "critical", "bokeh": "critical"}})


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """The first SIGINT or SIGTERM asks for a drain, a second SIGINT ends at once."""
    stop = threading.Event()

    def ask(number: int, _frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        click.echo(f"\n{signal.Signals(number).name}: finishing what is in flight; nothing is lost, run again to go on", err=True)

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

    last, began = 0.0, 0.0

    def update(progress: Progress) -> None:
        nonlocal last, began
        now = time.monotonic()
        if progress.stage == "running" and not began:
            began = now
        if not last or now - last >= LOG_LINE_S:
            last = now
            finished = progress.n_finished - progress.n_start
            left_s = (now - began) / finished * (progress.n_total - progress.n_finished) if began and finished else 0.0
            left = f", about {left_s:.0f} s left" if left_s else ""
            counts = f": {progress.n_finished} of {progress.n_total} images" if progress.n_total else ""
            bad = f", {progress.n_quarantined} bad" if progress.n_quarantined else ""
            click.echo(f"{progress.stage}{counts}{bad}{left}", err=True)

    return update


def _describe(summary: Summary, job: Job) -> str:
    """The closing summary of a run."""
    from pipeline.summary import printable

    lines = [
        (
            f"{summary.outcome}: {summary.n_done} images done, {summary.n_unchanged} unchanged, {summary.n_quarantined} quarantined, "
            f"{summary.n_rejected} rejected, {summary.n_pending} pending, {summary.n_removed} removed of {summary.n_listed} listed, "
            f"in {summary.elapsed_s:.1f} s"
        ),
    ]
    if summary.n_done:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in summary.shares().items() if share >= 0.005)
        lines += [
            (
                f"{summary.images_per_s:.1f} images/s, {summary.megapixels_per_s:.1f} megapixels/s on {summary.slots} slots; read "
                f"{summary.bytes_read / 1e6:.1f} MB, wrote {summary.bytes_written / 1e6:.1f} MB"
            ),
            f"time of the workers: {shares}; bottleneck: {summary.bottleneck}",
        ]
    if summary.n_checked or summary.n_unchecked:
        lines.append(
            f"{summary.n_checked} images were read and compared with their digests, {summary.n_unchecked} could not be; "
            f"{summary.n_touched} had a new time only"
        )
    if summary.faults:
        faults = "; ".join(map(printable, summary.faults[:3]))
        lines.append(f"faults that may pass: {faults}; run again to try these images again")
    if summary.unreadable_folders:
        lines.append(
            "folders that could not be read, whose images keep what they have: "
            + ", ".join(map(printable, summary.unreadable_folders[:5]))
        )
    if summary.n_unreachable:
        lines.append(
            f"{summary.n_unreachable} images could not be looked at and keep what they have: check links and permissions"
        )
    if summary.ignored:
        suffixes = ", ".join(printable(suffix) or "none" for suffix in list(summary.ignored)[:8])
        lines.append(f"{sum(summary.ignored.values())} other files were passed over, by their suffix: {suffixes}")
    if summary.n_bad_total and not summary.n_done_total:
        lines.append(
            "the store holds no maps at all: look at the reasons; if the settings were wrong, delete it and run with others"
        )
    if summary.n_bad_total:
        lines.append(f"{summary.n_bad_total} bad images in all: featuremaps status {job.store} lists them with their reasons")
    lines.append(f"store {job.store}, receipt runs/{summary.run_id}.json")
    return "\n".join(lines)


def main() -> None:
    """Run the command; errors that the user can mend are a paragraph and an exit code, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names that are not UTF-8 go out as they came in
    try:
        code = cli.main(standalone_mode=False)
    except FeaturemapsError as error:
        paragraph = " ".join(line.strip() for line in str(error).splitlines())
        click.echo(f"featuremaps: {paragraph}", err=True)
        code = error.exit_code
    except OSError as error:
        click.echo(
            f"featuremaps: the file system failed ({error}): what was committed stands; check the disk, its space and the "
            "permissions, and run the same command again",
            err=True,
        )
        code = EXIT_FAILED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("featuremaps: interrupted; what was committed stands, run again to go on", err=True)
        code = EXIT_RUN_AGAIN
    sys.exit(code)
