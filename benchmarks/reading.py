"""What a notebook pays: one random image, and a whole class reduced with Dask, for every dtype.

python -m benchmarks.reading
"""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path

from benchmarks.images import machine, make
from benchmarks.main_job import STORE, fresh

N = 500


def main() -> None:
    print(machine())
    folder = make("photos", N, [(516, 639)])
    for dtype in ("float32", "float16", "uint16", "uint8"):
        assert fresh(folder, "--dtype", dtype)["n_done"] == N
        from pipeline import open_store

        size = sum(path.stat().st_size for path in Path(STORE).rglob("*") if path.is_file())
        started = time.perf_counter()
        store = open_store(STORE)
        paths = list(store.images["path"])
        opened_s = time.perf_counter() - started
        chosen, times = random.Random(0).sample(paths, 20), []
        for path in chosen:
            started = time.perf_counter()
            assert store.image(path)["conv1"].shape == (2, 508, 631)
            times.append(time.perf_counter() - started)
        started = time.perf_counter()
        mean = store.dataset("516x639")["conv1"].mean("image").compute()
        assert mean.shape == (2, 508, 631)
        class_s = time.perf_counter() - started
        print(
            f"{dtype:8s}: {size / N / 1e6:.2f} MB an image; open and list {opened_s:.2f} s; one image {1e3 * statistics.median(times):.0f} "
            f"ms; mean of the class {1e3 * class_s / N:.2f} ms an image, {N * 2 * 508 * 631 * 4 / class_s / 1e9:.2f} GB/s of float32",
            flush=True,
        )


if __name__ == "__main__":
    main()
