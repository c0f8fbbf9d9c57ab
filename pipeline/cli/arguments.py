"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from pipeline.store.objects import Place


def as_place(store: str) -> Place:
    """Place of a store, given as a folder, a bucket's URL, or a job file."""
    from pipeline.store.named import named_store

    return named_store(store)


store_argument = click.argument(  # a job file may name the store
    "store",
    callback=lambda _context, _parameter, store: as_place(store),
    metavar="STORE | JOB.yaml",
)
log_format_option = click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", help="One JSON object per log line."
)
cluster_file_option = click.option(
    "--cluster-file", type=click.Path(path_type=Path), default="cluster.yaml", show_default=True, help="Where clusters are named."
)
