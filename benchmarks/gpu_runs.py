"""Whole runs on a GPU: beside the limit of the processors' stages, for numbers of processes; and killed and resumed.

    python -m benchmarks.gpu_runs limit|runs|resume FOLDER

Writes FOLDER/PART.json after each figure. IMAGES_PER_CORE is the size of the large runs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.gpu_report import save
from benchmarks.images import FOLDER, command, make
from pipeline.config import make_job
from pipeline.extract.devices import may_have_gpus
from pipeline.run import tasks
from pipeline.source import decoding
from pipeline.store import codecs, objects
from pipeline.store.settings import layout_of, store_spec
from pipeline.store.store import Store

SIZE = (516, 639) if may_have_gpus() else (64, 80)
CORES = len(os.sched_getaffinity(0))
N_LARGE = CORES * int(os.environ.get("IMAGES_PER_CORE", "1250"))
N_SMALL = N_LARGE // 5
LIMIT_S = 5.0
STORE = FOLDER / "gpu.zarr"


def photographs(n: int) -> Path:
    return make(f"gpu-{SIZE[0]}-{SIZE[1]}", n, [SIZE], distinct=min(n, 400))


# -- the limit of the processors' stages -------------------------------------------------------------------------------------------


def limit(folder: Path) -> None:
    """Images/s of bare processes, one on each core, that read, decode, digest, encode and write, and extract nothing."""
    files = [str(path) for path in sorted(photographs(N_SMALL).glob("*/*.jpg"))[:64]]
    shards = {dtype: shard(dtype, files[:16]) for dtype in ("uint8", "float32")}
    context = multiprocessing.get_context("spawn")
    together, rates = context.Barrier(CORES), context.Queue()
    workers = [context.Process(target=all_stages, args=(i, files, shards, together, rates)) for i in range(CORES)]
    for worker in workers:
        worker.start()
    found: dict[str, Any] = {}
    for dtype in shards:
        each = [rates.get() for _ in workers]
        stages = {name: statistics.mean(stage[name] for _, stage in each) for name in each[0][1]}
        found[dtype] = {"images_per_s": sum(rate for rate, _ in each), "cores": CORES, "ms an image of a core": stages}
        print(dtype, found[dtype])
        save(folder, "limit", found)
    for worker in workers:
        worker.join()


def shard(dtype: str, files: list[str]) -> tuple[str, int, float]:
    """The maps of a shard in a file, rows of a chunk, and what stands for no value."""
    from pipeline.extract.cpu import Extractor
    from pipeline.extract.weights import load_weights

    job = make_job({"source": ".", "store": str(STORE), "dtype": dtype})
    weights = load_weights(job.extractor, 3)
    (stored,) = store_spec(job, ".", weights).layers
    extractor = Extractor(job.extractor, weights, [stored])
    layout = layout_of(SIZE, job.extractor, np.dtype(dtype).itemsize, 3)
    maps = [extractor.extract(decoding.decode(Path(file).read_bytes(), job.decode))["conv1"] for file in files]
    path = FOLDER / f"maps-{dtype}.npy"
    np.save(path, np.stack([maps[i % len(maps)] for i in range(min(layout.shard_rows, 64))]))
    return str(path), layout.layers[0].chunk_rows, stored.fill_value


def all_stages(number: int, files: list[str], shards: dict[str, tuple[str, int, float]], together: Any, rates: Any) -> None:
    """On one core, for each dtype: images/s, and milliseconds of each stage."""
    tasks.keep_memory()
    target, decode = FOLDER / f"limit-object-{number}", make_job({"source": ".", "store": str(STORE)}).decode
    for path, chunk_rows, fill in shards.values():
        block, n, spent = np.load(path), 0, dict.fromkeys(("read and decode", "digest", "encode and write"), 0.0)
        together.wait()
        started = last = time.perf_counter()
        while last - started < LIMIT_S:
            for row in block:
                data = Path(files[n % len(files)]).read_bytes()
                hashlib.sha256(data).hexdigest()
                decoding.decode(data, decode)
                decoded = time.perf_counter()
                tasks.maps_digest([row])
                spent["read and decode"] += decoded - last
                spent["digest"] += (last := time.perf_counter()) - decoded
                n += 1
            objects.put(target, *codecs.encode_shard(block, chunk_rows, len(block), fill))
            spent["encode and write"] += (now := time.perf_counter()) - last
            last = now
        rates.put((n / (last - started), {name: 1e3 * seconds / n for name, seconds in spent.items()}))
    target.unlink()


# -- whole runs --------------------------------------------------------------------------------------------------------------------


class Watch(threading.Thread):
    """Until `end`: the share of time in which the GPU was busy, by nvidia-smi, its used memory, and the largest worker."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.over, self.worker_bytes, self.lines = pid, threading.Event(), 0, list[str]()
        query = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "100"]
        try:
            self.smi = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            self.smi = None
        else:
            threading.Thread(target=lambda: self.lines.extend(self.smi.stdout), daemon=True).start()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.5):
            with contextlib.suppress(psutil.Error):  # of processes that have just ended
                for child in psutil.Process(self.pid).children(recursive=True):
                    self.worker_bytes = max(self.worker_bytes, child.memory_info().rss)

    def end(self) -> dict[str, Any]:
        self.over.set()
        self.join()
        if self.smi is not None:
            self.smi.kill()
        numbers = [[float(part) for part in line.split(",")] for line in self.lines if line.count(",") == 1 and "N/A" not in line]
        busy = sorted((share for share, _ in numbers), reverse=True)
        return {
            "largest_worker_mib": self.worker_bytes // 2**20,
            "gpu_busy_percent_of_command": statistics.mean(busy) if busy else None,
            "gpu_busy_percent_at_most": busy[0] if busy else None,
            "gpu_memory_mib": max((used for _, used in numbers), default=None),
        }


def fresh(n: int, *options: object) -> dict[str, Any]:
    """A run into a new store."""
    shutil.rmtree(STORE, ignore_errors=True)
    process = subprocess.Popen(command("run", photographs(n), STORE, "--json", *options), stdout=subprocess.PIPE, text=True)
    watch = Watch(process.pid)
    output, _ = process.communicate()
    seen = watch.end()
    receipt = json.loads(output)
    assert receipt["n_done"] == n, receipt
    kept = (
        "n_done",
        "compute_s",
        "elapsed_s",
        "images_per_s",
        "slots",
        "stage_s",
        "shares",
        "bottleneck",
        "kernels",
        "bytes_written",
    )
    return {name: receipt[name] for name in kept if name in receipt} | seen


def runs(folder: Path) -> None:
    """For each number of processes a small run and a large one; what is between them is without the start."""
    found: list[dict[str, Any]] = []
    kinds: list[tuple[str, tuple[object, ...]]] = [("uint8", ("--gpus", 1))]
    kinds += [("uint8", ("--gpus", 1, "--processes-per-gpu", k)) for k in (1, 8, 2, 4) if k <= max(2, CORES)]
    kinds += [("uint8", ("--gpus", 0)), ("float32", ("--gpus", 1))]
    for dtype, options in kinds:
        shrink = 4 if dtype == "float32" else 1
        small, large = (fresh(n // shrink, "--dtype", dtype, *options) for n in (N_SMALL, N_LARGE))
        n, seconds = large["n_done"] - small["n_done"], large["compute_s"] - small["compute_s"]
        rate = n / seconds if seconds > 0 else None
        found.append(
            {"dtype": dtype, "options": [str(option) for option in options], "images_per_s": rate, "small": small, "large": large}
        )
        shown = "no figure, the large run was the shorter one" if rate is None else f"{rate:.0f} images/s"
        print(
            f"{dtype} {' '.join(map(str, options))}: {shown}, GPU busy {large['gpu_busy_percent_of_command']} %, {large['shares']}"
        )
        save(folder, "runs", found)
    shutil.rmtree(STORE, ignore_errors=True)


# -- killed and resumed ------------------------------------------------------------------------------------------------------------


def digests() -> str:
    """Of all maps, by the paths of their images."""
    found: dict[str, str] = {}
    store = Store(STORE)
    for shape_class in store.classes.values():
        columns = (store.column(shape_class.name, name) for name in ("path", "status", "maps_digest"))
        found |= {str(path): f"{status} {digest}" for path, status, digest in zip(*columns, strict=True)}
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def resume(folder: Path) -> None:
    """A run whose processes are all killed, and the same command again: maps equal those of a run that nothing disturbed."""
    n = N_SMALL // 2
    fresh(n, "--dtype", "uint8", "--gpus", 1)
    undisturbed = digests()
    shutil.rmtree(STORE)
    again = command("run", photographs(n), STORE, "--json", "--dtype", "uint8", "--gpus", 1)
    process = psutil.Popen(again, stdout=subprocess.DEVNULL)
    while process.poll() is None and not next(STORE.glob("*x*/conv1/c.*"), None):
        time.sleep(0.01)
    for each in [*process.children(recursive=True), process]:
        each.kill()
    process.wait()
    done = subprocess.run(again, check=False, capture_output=True, text=True)
    receipt = json.loads(done.stdout)
    found = {
        "images": n,
        "computed again": receipt["n_done"],
        "exit code": done.returncode,
        "stores are equal": digests() == undisturbed,
    }
    print(found)
    save(folder, "resume", found)
    sys.exit(not found["stores are equal"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"limit": limit, "runs": runs, "resume": resume}
    parser.add_argument("part", choices=parts)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts[given.part](given.folder)


if __name__ == "__main__":
    main()
