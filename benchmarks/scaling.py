"""How time and memory grow: with the number of images, of workers and of pixels.

    python -m benchmarks.scaling images|workers|sizes

``images`` needs 1 GB and some 10 minutes; ``sizes`` goes up to 8000 x 6000 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from benchmarks.images import FOLDER, machine, make
from benchmarks.main_job import STORE, measured

SIZES = [(64, 64), (256, 256), (516, 639), (1080, 1920), (3000, 4000), (6000, 8000)]


def one(*arguments: object) -> tuple[dict, str]:
    """A run from nothing: its receipt, and its memory in words."""
    shutil.rmtree(STORE, ignore_errors=True)
    receipt, peak, elapsed_s = measured("run", *arguments)
    assert receipt["n_done"] == receipt["n_listed"] > 0
    receipt |= {
        "elapsed_s": elapsed_s,
        "first_maps_s": peak.first_maps_s,
        "driver_bytes": peak.driver,
        "worker_bytes": peak.worker,
    }
    return receipt, f"driver with scheduler {peak.driver / 2**20:.0f} MiB, largest worker {peak.worker / 2**20:.0f} MiB"


def images() -> list[dict]:
    """1,000, 10,000 and 100,000 small pictures."""
    found = []
    for n in (1_000, 10_000, 100_000):
        receipt, memory = one(make("small", n, [(96, 96)], distinct=1000), STORE)
        assert receipt["n_done"] == n
        per_image = 1e3 * receipt["compute_s"] / n
        print(
            f"{n:7d} images: {receipt['elapsed_s']:.1f} s, first maps after {receipt['first_maps_s']:.1f} s; {per_image:.3f} ms an image "
            f"between first and last task; {memory}",
            flush=True,
        )
        found.append({"n": n, "ms_per_image": per_image, **few(receipt)})
    return found


def few(receipt: dict) -> dict:
    """What of a receipt is kept with the results."""
    return {name: receipt[name] for name in ("elapsed_s", "first_maps_s", "driver_bytes", "worker_bytes")}


def workers() -> list[dict]:
    """One, two and four worker processes on the same photographs."""
    found = []
    folder = make("photos", 1000, [(516, 639)])
    cores = len(os.sched_getaffinity(0))
    for n in (1, 2, 4):
        receipt, memory = one(folder, STORE, "--workers", n, "--dtype", "uint8")
        rate = receipt["n_done"] / receipt["compute_s"]
        print(f"{n} workers on {cores} cores: {rate:.0f} images/s; {memory}", flush=True)
        found.append({"n": n, "images_per_s": rate, **few(receipt)})
    return found


def sizes() -> list[dict]:
    """The same 300 megapixels in pictures of many sizes."""
    found = []
    for height, width in SIZES:
        n = max(6, min(5000, int(300e6 / (height * width))))
        receipt, memory = one(make(f"of-{height}x{width}", n, [(height, width)]), STORE, "--dtype", "uint8", "--workers", 2)
        megapixels = n * height * width / 1e6
        print(
            f"{height:5d} x {width:5d}: {n} images, {1e3 * receipt['compute_s'] / n:.1f} ms an image, "
            f"{1e3 * receipt['compute_s'] / megapixels:.1f} ms a megapixel; {memory}",
            flush=True,
        )
        per_megapixel = 1e3 * receipt["compute_s"] / megapixels
        found.append({"height": height, "width": width, "n": n, "ms_per_megapixel": per_megapixel, **few(receipt)})
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["images", "workers", "sizes"])
    parser.add_argument("--json", type=Path, help="Write the results there; `python -m benchmarks.plot` draws them.")
    given = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(FOLDER).free < 12e9:
        sys.exit(f"{FOLDER} needs 12 GB free: set FEATUREMAPS_BENCHMARKS to a larger disk")
    print(machine())
    results = globals()[given.what]()
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "what": given.what, "results": results}, indent=1))
