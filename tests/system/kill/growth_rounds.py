"""More histories of `tests.support.growth` than the suite has: ``python -m tests.system.kill.growth_rounds --examples 500``."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

import click

from tests.support.growth import Growth, grow


@click.command()
@click.option("--examples", default=500, show_default=True)
@click.option("--steps", default=30, show_default=True, help="The most that is done in one example.")
@click.option("--seed", type=int, help="Other histories than those of the test suite.")
def main(examples: int, steps: int, seed: int | None) -> None:
    """Do random things to collections and stores, and compare."""
    logging.disable(logging.WARNING)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="growth_rounds-") as folder:
        grow(Path(folder), examples, steps, seed)
    click.echo(
        f"{examples} examples: {Growth.n_runs} runs, {Growth.n_kills} more to be killed, {Growth.n_late_kills} of which ended before; "
        f"every store equals one made of its final collection; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
