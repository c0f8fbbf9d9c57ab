"""``python -m workflows.lenet``: the whole of it, with results and figures; 0 all that it has to show holds, 1 it does not, 2 bad input."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from pipeline.errors import FeaturemapsError, UsageError
from workflows.lenet import data, tell
from workflows.lenet.end_to_end import HERE, end_to_end, work_folder
from workflows.lenet.train import ACTIVATIONS, N_EPOCHS


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, do it all, tell; return the exit code."""
    options = _parser().parse_args(arguments)
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {line}", flush=True)

    try:
        options.work.mkdir(parents=True, exist_ok=True)
        options.output.mkdir(parents=True, exist_ok=True)
        if options.folder:
            images = data.labelled_folder(options.folder, options.seed)
        else:
            images = data.fashion_mnist(options.data, options.work, options.seed, options.n_train, options.n_test)
        parts = f"{len(images.train)} train, {len(images.validation)} validate, {len(images.test)} test"
        say(f"{len(images.paths)} images of {len(images.classes)} classes: {parts}")
        n_epochs = N_EPOCHS if options.epochs is None else dict.fromkeys(ACTIVATIONS, options.epochs)
        work = work_folder(options.work, images, options.seed, n_epochs)
        with ProcessPoolExecutor(2, get_context("spawn")) as pool:
            results = end_to_end(images, work, options.seed, n_epochs, each=pool.map, say=say)
        tell.write(results, images, work, options.output)
    except FeaturemapsError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"Error: {error}: check the folders --work and --output", file=sys.stderr)
        return UsageError.exit_code
    print(tell.table(results))
    print(tell.verdict(results))
    return 0 if all(criterion["holds"] for criterion in results["criteria"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workflows.lenet", description=main.__doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, default=data.DEBIAN, help="folder of Fashion-MNIST's four files (default: %(default)s)"
    )
    source.add_argument("--folder", type=Path, help="learn from a folder with a sub-folder per class instead")
    parser.add_argument(
        "--work", type=Path, default=HERE / "build", help="where images, weights and stores go, 4 GB (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=HERE / "build" / "results", help="where results and figures go (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=23455)
    parser.add_argument("--epochs", type=int, help=f"of training (default: {N_EPOCHS})")
    parser.add_argument("--n-train", type=int, default=data.N_TRAIN, help="only the first N training images")
    parser.add_argument("--n-test", type=int, default=data.N_TEST, help="only the first N test images")
    return parser


if __name__ == "__main__":  # Dask's workers import this file again
    sys.exit(main())
