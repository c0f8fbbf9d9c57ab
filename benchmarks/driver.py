"""What scheduling costs: 1,000,000 images whose batches do nothing.

    python -m benchmarks.driver [--images 1000000] [--workers 1]

Driver and scheduler share this process, the workers have their own; the CPU time of this one is what driver and scheduler spend. It
is stated whole and without what the idle cluster takes in the same time. The ledger is really written.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from distributed import WorkerPlugin

from benchmarks.images import machine
from pipeline.api import run_job
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.run import batch_queue, driver, lifecycle, tasks
from pipeline.source import fetch
from pipeline.source.fetch import Probed, ProbedBlock
from pipeline.source.fingerprints import Listing
from pipeline.store import create
from pipeline.store.schema import STATISTICS, Status

SIZE = (516, 639)
IDLE_S = 5.0


class NoExtractor(WorkerPlugin):  # type: ignore[misc]
    def __init__(self, name: str, *_: Any) -> None:
        self.name = name


def probe(_: Any, paths: list[str], __: Any) -> ProbedBlock:
    return ProbedBlock([Probed(*SIZE, *SIZE)] * len(paths))


def process(_: Any, __: Any, pieces: list[tasks.WorkPiece]) -> tasks.BatchResult:
    result = tasks.BatchResult([], "here", dict.fromkeys(("read", "decode", "extract", "write"), 0.0))
    for piece in pieces:
        n = len(piece.rows)
        done = np.full(n, Status.DONE, np.uint8)
        pooled = {"conv1": np.zeros((n, len(STATISTICS), 2), np.float32)}
        texts = [f"{row:064x}" for row in piece.rows]
        short = [text[:32] for text in texts]
        result.pieces.append(
            tasks.PieceResult(piece.layout, piece.start, piece.stop, piece.rows, done, texts, short, [""] * n, pooled)
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    n = given.images
    print(machine())
    paths = [f"{i // 1000:04d}/{i:07d}.jpg" for i in range(n)]
    listing = Listing("/photos", paths, array("q", [100_000]) * n, array("q", [1]) * n)
    lifecycle.list_job = lambda _: listing  # type: ignore[attr-defined]
    create.check_apart = lambda *_: None  # type: ignore[assignment]
    batch_queue.require_space = lambda *_: None  # type: ignore[attr-defined,assignment]
    batch_queue.require_memory = lambda *_: None  # type: ignore[attr-defined,assignment]
    fetch.probe_block = probe  # type: ignore[assignment]
    tasks.process = process  # type: ignore[assignment]
    tasks.ExtractorPlugin = NoExtractor  # type: ignore[assignment,misc]
    taken: list[float] = []
    take = driver.Driver._take_batch

    def take_and_note(self: driver.Driver, result: tasks.BatchResult) -> None:
        taken.append(time.monotonic())
        take(self, result)

    driver.Driver._take_batch = take_and_note  # type: ignore[method-assign]
    folder = Path(tempfile.mkdtemp())
    before = psutil.Process().memory_info().rss
    with connect(LocalSpec(workers=given.workers)) as client:
        started, cpu = time.monotonic(), time.process_time()
        time.sleep(IDLE_S)
        idle = (time.process_time() - cpu) / (time.monotonic() - started)
        started, cpu = time.monotonic(), time.process_time()
        summary = run_job(make_job({"source": "/photos", "store": str(folder / "f.zarr")}), client)
        elapsed_s, cpu_s = time.monotonic() - started, time.process_time() - cpu
    assert summary.n_done == n, summary
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    per_batch = [1e3 * seconds / len(taken) for seconds in (cpu_s, cpu_s - idle * elapsed_s)]
    print(
        f"{n} images in {len(taken)} batches: {elapsed_s:.1f} s, {len(taken) / elapsed_s:.0f} batches/s; driver and scheduler "
        f"{per_batch[0]:.1f} ms of CPU per batch, {per_batch[1]:.1f} without what the idle cluster takes ({100 * idle:.1f} % of a core); "
        f"{1e6 * cpu_s / n:.1f} us per image; first batch after {taken[0] - started:.1f} s; peak {peak / 2**20:.0f} MiB, "
        f"{(peak - before) / n:.0f} bytes an image above the start"
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
