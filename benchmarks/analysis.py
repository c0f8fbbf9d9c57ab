"""What a notebook pays with a store of 1,000,000 images: opening it, one image, the table, pooled values, neighbours.

    python -m benchmarks.analysis [--json FILE]

The store is made by the store's own API and is synthetic in this: its names and pooled values are drawn, and maps are there (drawn,
too) for some shards of a few classes only. Its ledger is whole: 800,000 images of 28 x 28 pixels, and 200,000 of 255 other sizes. Each
line is a process of its own, and its peak is that of the process, imports included. Cold: the store's files were dropped from the page
cache first.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.images import FOLDER, machine

N = 1_000_000
N_28 = 800_000
N_SIZES = 255
STORE = FOLDER / "million.zarr"
RUN = "20260101T000000Z-benchmark"
STEPS = ("open", "image", "images", "pooled", "nearest", "select", "unknown", "parquet", "most_alike")


def make_store() -> None:
    """The synthetic store; takes half a minute."""
    if (STORE / "zarr.json").exists():
        return
    import numpy as np

    from pipeline.config import make_job
    from pipeline.extract.weights import load_weights
    from pipeline.store.create import create_store, prepare_folder
    from pipeline.store.schema import RUNS, Status, stack
    from pipeline.store.settings import extractor_spec, layout_of, store_spec
    from pipeline.store.store import write_maps

    shutil.rmtree(STORE, ignore_errors=True)
    rng = np.random.default_rng(0)
    job = make_job({"source": "/photos", "store": str(STORE), "dtype": "uint8"})
    weights = load_weights(job.extractor, 3)
    spec = store_spec(job, "/photos", weights)
    prepare_folder(STORE)
    (STORE / RUNS / "lock.json").write_text(json.dumps({"run_id": RUN}))
    store = create_store(STORE, spec, weights)
    sizes = [(28, 28)] + [(20 + i % 16, 30 + i // 16) for i in range(N_SIZES)]
    counts = [N_28] + [(N - N_28) // N_SIZES + (i < (N - N_28) % N_SIZES) for i in range(N_SIZES)]
    first = 0
    for number, (size, n) in enumerate(zip(sizes, counts, strict=True)):
        layout = layout_of(size, extractor_spec(spec), 1, 3)
        sides = [np.full(n, side, np.int32) for side in size]
        columns = {
            "path": stack([f"train/class{rng.integers(1000):04d}/n{i:08d}.JPEG" for i in range(first, first + n)]),
            "size_bytes": rng.integers(1000, 9000, n),
            "fingerprint": stack([f"{i}-1795479382886133772" for i in range(first, first + n)]),
            **dict(zip(("source_height", "source_width", "input_height", "input_width"), sides * 2, strict=True)),
        }
        store.create_class(layout, "exact", columns)
        group = f"{size[0]}x{size[1]}"
        hidden = rng.normal(size=(n, 3)) @ rng.normal(size=(3, 8)) + 0.1 * rng.normal(size=(n, 8))
        pooled = {
            f"conv1_{name}": hidden[:, 2 * k : 2 * k + 2].astype(np.float32)
            for k, name in enumerate(("mean", "std", "min", "max"))
        }
        done = {
            "digest": stack(["d" * 64] * n),
            "maps_digest": stack(["e" * 32] * n),
            **pooled,
            "status": np.full(n, Status.DONE, np.uint8),
        }
        store.commit(group, np.arange(n), done)
        if number % 32 == 0 or size == (34, 45):  # maps of the first and last shards of some classes
            layer, rows = layout.layers[0], layout.shard_rows
            for start in {*range(0, n, rows)[:3], *range(0, n, rows)[-3:]}:
                block = rng.integers(1, 256, (min(rows, n - start), layer.channels, layer.height, layer.width), dtype=np.uint8)
                write_maps(STORE, RUN, layout, layer, start, block, 0)
        first += n
    assert sum(c.length for c in store.classes.values()) == N


def drop_from_cache() -> None:
    """Have the next read of every file come from the disk."""
    os.sync()
    for path in STORE.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_mib() -> float:
    line = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def with_maps() -> list[str]:
    """Some paths whose maps are there, found without this package's look-up."""
    import random

    from pipeline.store.store import Store

    reader = Store(STORE)
    paths = reader.column("28x28", "path").tolist()
    rows = [*range(4096), *range(N_28 - 2048, N_28)]
    small = reader.column("34x45", "path").tolist()  # one of the last classes to be looked into
    return random.Random(0).sample([*(paths[row] for row in rows), *small], 400)


def child(step: str) -> dict[str, float]:
    """One line of the table, in a fresh process."""
    given = sys.stdin.read().split()
    found: dict[str, float] = {}
    imported = time.perf_counter()
    from pipeline import open_store

    found["import_ms"] = 1e3 * (time.perf_counter() - imported)
    started = time.perf_counter()
    store = open_store(STORE)
    found["open_ms"] = 1e3 * (time.perf_counter() - started)
    found["open_peak_mib"] = peak_mib()
    if step == "image":
        from pipeline.store.path_index import SCANS

        times = [ms(lambda p=path: store.image(p)) for path in given]  # type: ignore[misc]
        found |= {"first_ms": times[0], "next_ms": statistics.median(times[1:SCANS]), "next_largest_ms": max(times[1:SCANS])}
        found |= {"with_index_ms": times[SCANS], "later_ms": statistics.median(times[SCANS + 1 :])}
    elif step == "images":
        found["ms"] = ms(lambda: store.images)
        assert len(store.images) == N
    elif step == "pooled":
        assert len(store.images) == N
        found["ms"] = ms(store.pooled)
    elif step == "nearest":
        found["ms"] = ms(lambda: store.nearest(given[0]))
        found["again_ms"] = ms(lambda: store.nearest(given[1]))
    elif step == "select":
        images = store.images
        found["mask_ms"] = ms(lambda: store.select(images["row"] < 1000))
        found["paths_ms"] = ms(lambda: store.select(given))
        found["dataset_ms"] = ms(lambda: store.select(given).dataset("28x28"))
    elif step == "unknown":
        from pipeline.errors import UsageError

        def ask() -> None:
            message = ""
            try:
                store.image(given[0].replace("class", "clas"))
            except UsageError as error:
                message = str(error)
            assert given[0] in message, message

        found["first_ms"] = ms(ask)
        found["again_ms"] = ms(ask)
    elif step == "parquet":
        found["ms"] = ms(lambda: store.to_parquet(FOLDER / "million.parquet"))
    elif step == "most_alike":
        found["ms"] = ms(lambda: store.most_alike(3))
    found["peak_mib"] = peak_mib()
    return found


def measure() -> list[dict[str, object]]:
    paths = "\n".join(with_maps())
    results = []
    for step in STEPS:
        for state in ("cold", "warm", "warm", "warm") if step in {"open", "image"} else ("cold", "warm"):
            if state == "cold":
                drop_from_cache()
            arguments = [sys.executable, "-m", "benchmarks.analysis", "--child", step]
            printed = subprocess.run(arguments, check=True, capture_output=True, text=True, input=paths).stdout
            result = {"step": step, "state": state, **{name: round(value, 1) for name, value in json.loads(printed).items()}}
            print(result, flush=True)
            results.append(result)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", choices=STEPS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(child(given.child)))
        sys.exit()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(machine())
    make_store()
    results = measure()
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "n_images": N, "results": results}, indent=1))
