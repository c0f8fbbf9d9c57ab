"""What scheduling costs: 1,000,000 images whose batches do nothing.

    python -m benchmarks.driver [--images 1000000] [--workers 1]

Driver and scheduler share this process, the workers have their own; the CPU time of this one is what driver and scheduler spend. It
is stated whole and without what the idle cluster takes in the same time. The ledger is really written.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from array import array
from typing import Any, NamedTuple

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


class Scheduling(NamedTuple):
    """What a run of empty batches took of the process of driver and scheduler."""

    batches: int
    elapsed_s: float
    cpu_s: float
    idle: float
    """Cores that the idle cluster takes."""
    first_s: float
    peak_bytes: int
    bytes_an_image: float

    @property
    def per_batch_ms(self) -> tuple[float, float]:
        """CPU of a batch, whole and without what the idle cluster takes."""
        whole, own = (1e3 * seconds / self.batches for seconds in (self.cpu_s, self.cpu_s - self.idle * self.elapsed_s))
        return whole, own


def replace_work(n: int) -> None:
    """``n`` images that are nowhere, probes and tasks that do nothing, and no check of what the machine has."""
    paths = [f"{i // 1000:04d}/{i:07d}.jpg" for i in range(n)]
    listing = Listing("/photos", paths, array("q", [100_000]) * n, array("q", [1]) * n)
    lifecycle.list_job = lambda _: listing  # type: ignore[attr-defined]
    create.check_apart = lambda *_: None  # type: ignore[assignment]
    batch_queue.require_space = lambda *_: None  # type: ignore[attr-defined,assignment]
    batch_queue.require_memory = lambda *_: None  # type: ignore[attr-defined,assignment]
    fetch.probe_block = probe  # type: ignore[assignment]
    tasks.process = process  # type: ignore[assignment]
    tasks.ExtractorPlugin = NoExtractor  # type: ignore[assignment,misc]


def measure(n: int, workers: int) -> Scheduling:
    replace_work(n)
    taken: list[float] = []
    take = driver.Driver._take_batch

    def take_and_note(self: driver.Driver, result: tasks.BatchResult) -> None:
        taken.append(time.monotonic())
        take(self, result)

    driver.Driver._take_batch = take_and_note  # type: ignore[method-assign]
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder, connect(LocalSpec(workers=workers)) as client:
        started, cpu = time.monotonic(), time.process_time()
        time.sleep(IDLE_S)
        idle = (time.process_time() - cpu) / (time.monotonic() - started)
        started, cpu = time.monotonic(), time.process_time()
        summary = run_job(make_job({"source": "/photos", "store": f"{folder}/f.zarr"}), client)
        elapsed_s, cpu_s = time.monotonic() - started, time.process_time() - cpu
    assert summary.n_done == n, summary
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Scheduling(len(taken), elapsed_s, cpu_s, idle, taken[0] - started, peak, (peak - before) / n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    print(machine())
    found = measure(given.images, given.workers)
    whole, own = found.per_batch_ms
    print(
        f"{given.images} images in {found.batches} batches: {found.elapsed_s:.1f} s, {found.batches / found.elapsed_s:.0f} batches/s; "
        f"driver and scheduler {whole:.1f} ms of CPU per batch, {own:.1f} without what the idle cluster takes "
        f"({100 * found.idle:.1f} % of a core); {1e6 * found.cpu_s / given.images:.1f} us per image; first batch after "
        f"{found.first_s:.1f} s; peak {found.peak_bytes / 2**20:.0f} MiB, {found.bytes_an_image:.0f} bytes an image above the start"
    )


if __name__ == "__main__":
    main()
