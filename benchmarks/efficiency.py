"""The whole pipeline beside the sum of its own stages: one process per core, no Dask, no driver, no ledger.

    python -m benchmarks.efficiency [--images 2000] [--repeats 3] [--dtype uint8]

The bare processes read, decode, extract, digest, encode and write the same images in the same batches as workers do, all cores at
once; their stages are timed by the same code. Rates of the pipeline are between its first task and its last.

On a machine that others use, too, compare the processor time of an image. The pipeline's is that of all its processes, driver and
scheduler included: the difference between a run over all images and one over a quarter of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.bare_worker import NAME, work_alone
from benchmarks.images import FOLDER, machine, make
from benchmarks.main_job import STORE, fresh
from pipeline.run import tasks
from pipeline.run.summary import STAGES
from pipeline.source.fetch import Source
from pipeline.source.listing import list_collection
from pipeline.store.lock import StoreLock
from pipeline.store.schema import RUNS, Status
from pipeline.store.settings import decode_spec, extractor_spec
from pipeline.store.store import Store

SIZE = (516, 639)


def bare(store_path: str, *arguments: Any) -> None:
    """`compute` in a thread of its own, as workers do: in a main thread, Blosc would use threads of its own, too."""
    store = Store(Path(store_path))
    work_alone(extractor_spec(store.spec), store.weights(), store.spec.layers)
    thread = threading.Thread(target=compute, args=(store, *arguments))
    thread.start()
    thread.join()


def compute(store: Store, folder: str, start: Any, rates: Any, first: int, step: int) -> None:
    """Compute every ``step``-th shard again, into the store that the pipeline has just made."""
    shape_class = store.classes[SIZE]
    layout, n = shape_class.layout, shape_class.length
    paths, fingerprints = (store.column(shape_class.name, name) for name in ("path", "fingerprint"))
    source, target = Source(list_collection(folder).root, decode_spec(store.spec)), tasks.Target(str(store.path), "bare", NAME)
    pieces = []
    for shard in range(first, -(-n // layout.shard_rows), step):
        rows = range(shard * layout.shard_rows, min(n, (shard + 1) * layout.shard_rows))
        texts = (tuple(str(values[row]) for row in rows) for values in (paths, fingerprints))
        pieces.append(tasks.WorkPiece(layout, rows.start, rows.stop, tuple(rows), *texts))
    start.wait()
    started, cpu_s, n_done = time.perf_counter(), time.process_time(), sum(len(piece.rows) for piece in pieces)
    results = [tasks.process(source, target, [piece]) for piece in pieces]
    elapsed_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_s
    assert all((result.pieces[0].status == Status.DONE).all() for result in results)
    stages_ms = {name: 1e3 * sum(r.stage_s[name] for r in results) / n_done for name in STAGES}
    rates.put((n_done / elapsed_s, 1e3 * cpu_s / n_done, stages_ms))


def bare_rate(folder: Path) -> tuple[float, float, dict[str, float]]:
    """Images per second of bare processes on all cores (the sum of theirs, so that who ends first costs nothing).

    Then milliseconds of the processor for each image, and those of each stage.
    """
    shape_class = Store(STORE).classes[SIZE]
    n_shards = -(-shape_class.length // shape_class.layout.shard_rows)
    n = min(len(os.sched_getaffinity(0)), n_shards)  # each has a shard at least
    context = multiprocessing.get_context("spawn")
    start, rates = context.Barrier(n), context.Queue()
    for path in STORE.glob("*x*/conv1/c.*"):
        path.unlink()
    with StoreLock(STORE / RUNS, "bare"):
        arguments = ((str(STORE), str(folder), start, rates, i, n) for i in range(n))
        workers = [context.Process(target=bare, args=each) for each in arguments]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not any(worker.exitcode for worker in workers)
        found = [rates.get() for _ in workers]
    stages = {name: statistics.mean(stages[name] for _, _, stages in found) for name in STAGES}
    return sum(rate for rate, _, _ in found), statistics.mean(cpu_ms for _, cpu_ms, _ in found), stages


def in_words(stages_ms: dict[str, float]) -> str:
    return "ms an image: " + ", ".join(f"{name} {value:.2f}" for name, value in stages_ms.items())


def measured(folder: Path, *options: object) -> tuple[dict, float]:
    """Receipt of a run into a new store, and the processor seconds of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    receipt = fresh(folder, *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return receipt, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def of_receipt(receipt: dict) -> dict[str, float]:
    """Milliseconds of one core per image, of each stage and of waiting."""
    n = receipt["n_done"]
    waiting_s = receipt["compute_s"] * receipt["slots"] - sum(receipt["stage_s"].values())
    return {name: 1e3 * seconds / n for name, seconds in {**receipt["stage_s"], "waiting": waiting_s}.items()}


def compare(folder: Path, n: int, dtype: str, repeats: int) -> tuple[float, float, dict[str, int]]:
    """Images per second of the pipeline and of bare processes, medians, and the images that each kernel computed in a run."""
    rates: dict[str, list[float]] = {"featuremaps": [], "bare processes": []}
    cpus: dict[str, list[float]] = {"featuremaps": [], "bare processes": []}

    def note(who: str, rate: float, cpu_ms: float, stages_ms: dict[str, float]) -> None:
        rates[who].append(rate)
        cpus[who].append(cpu_ms)
        print(
            f"  {dtype} {who}: {rate:.0f} images/s; {cpu_ms:.2f} ms of the processor an image; {in_words(stages_ms)}", flush=True
        )

    kernels: dict[str, int] = {}
    for _ in range(repeats):
        few, few_s = measured(folder, "--dtype", dtype, "--limit", n // 4)
        receipt, all_s = measured(folder, "--dtype", dtype)
        assert receipt["n_done"] == n
        kernels = receipt["kernels"]
        note("featuremaps", receipt["images_per_s"], 1e3 * (all_s - few_s) / (n - few["n_done"]), of_receipt(receipt))
        note("bare processes", *bare_rate(folder))
    ours, floor = (statistics.median(values) for values in cpus.values())
    print(f"  {dtype} by processor time: {floor:.2f} of {ours:.2f} ms an image = {100 * floor / ours:.0f} % (medians)")
    ours, floor = (statistics.median(values) for values in rates.values())
    return ours, floor, kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", action="append", choices=["float32", "float16", "uint16", "uint8"])
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(FOLDER).free < given.images * 3e6 * 1.2:
        sys.exit(
            f"{FOLDER} needs {given.images * 3.6e-3:.0f} GB free: set FEATUREMAPS_BENCHMARKS to a larger disk, or --images to fewer"
        )
    print(machine())
    folder = make("photos", given.images, [SIZE])
    for dtype in given.dtype or ["uint8", "float32"]:
        ours, floor, _ = compare(folder, given.images, dtype, given.repeats)
        print(f"{dtype}: {ours:.0f} images/s, {100 * ours / floor:.0f} % of the {floor:.0f} of bare processes (medians)")


if __name__ == "__main__":
    main()
