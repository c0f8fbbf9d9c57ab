"""The main job's own promises, measured: many sizes, memory, a run with nothing to do, a plan of a million images.

    python -m benchmarks.main_job sizes|memory|nothing|start|million|durability|bucket

Each prints ratios of one run on one machine and asserts the number of images.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.images import FOLDER, command, machine, make, picture, run

STORE = FOLDER / "store.zarr"


def fresh(*arguments: object) -> dict:
    shutil.rmtree(STORE, ignore_errors=True)
    return json.loads(run("run", *arguments, STORE, "--json"))


def sizes(n: int = 10_000) -> None:
    """Images of 3,000 sizes against as many pixels in images of one size."""
    many = [(100 + i % 60, 100 + i // 60) for i in range(3000)]
    mean = [(round(sum(h for h, _ in many) / 3000), round(sum(w for _, w in many) / 3000))]
    folders = {"one size": make("one-size", n, mean), "3,000 sizes": make("many-sizes", n, many)}
    times: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(3):
        for name, folder in folders.items():
            receipt = fresh(folder)
            assert receipt["n_done"] == n, receipt
            times[name].append(receipt["elapsed_s"])
            print(
                f"{name}: {receipt['elapsed_s']:.1f} s, of which with workers {receipt['compute_s']:.1f} s; {receipt['shares']}"
            )
    one, several = (sorted(values)[1] for values in times.values())
    print(
        f"{n} images of 3,000 sizes take {several / one:.2f} times as long as of one size (medians of 3: {several:.1f} s, {one:.1f} s)"
    )


class Peak(threading.Thread):
    """Largest resident memory of a process and of any of its descendants, bytes, and when its first maps are in `STORE`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.driver, self.worker, self.over = psutil.Process(pid), 0, 0, threading.Event()
        self.started, self.first_maps_s = time.monotonic(), 0.0
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.02):
            try:
                self.driver = max(self.driver, self.process.memory_info().rss)
                for child in self.process.children(recursive=True):
                    self.worker = max(self.worker, child.memory_info().rss)
            except psutil.Error:
                pass
            if not self.first_maps_s and next(STORE.glob("*x*/conv1/c.?.0.0.0"), None):
                self.first_maps_s = time.monotonic() - self.started


def measured(*arguments: object, code: int = 0) -> tuple[dict, Peak, float]:
    """Output as JSON, memory and seconds of a command that ends with 0 or ``code``."""
    started = time.monotonic()
    process = subprocess.Popen(command(*arguments, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = Peak(process.pid)
    output, _ = process.communicate()
    peak.over.set()
    assert process.returncode in {0, code}
    return json.loads(output), peak, time.monotonic() - started


def memory() -> None:
    """Peak memory of driver and workers at 4,000 images against 400."""
    peaks = {}
    for n in (400, 4000):
        shutil.rmtree(STORE, ignore_errors=True)
        receipt, peak, _ = measured("run", make("photographs", n, [(516, 639)], distinct=400), STORE)
        assert receipt["n_done"] == n
        peaks[n] = peak
        print(f"{n} images: driver {peak.driver / 2**20:.0f} MiB, largest worker {peak.worker / 2**20:.0f} MiB")
    print(
        f"4,000 against 400 images: driver x {peaks[4000].driver / peaks[400].driver:.3f}, "
        f"worker x {peaks[4000].worker / peaks[400].worker:.3f}"
    )


def nothing(n: int = 10_000) -> None:
    """A run on a finished store of 10,000 files."""
    folder = make("one-size", n, [(130, 124)])
    assert fresh(folder)["n_done"] == n
    receipt, peak, elapsed_s = measured("run", folder, STORE)
    assert (receipt["n_done"], receipt["n_unchanged"]) == (0, n)
    print(f"nothing to do for {n} images: {elapsed_s:.2f} s for the whole command, peak {peak.driver / 2**20:.0f} MiB")


BARE_CLUSTER = """
from distributed import Client, LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        assert client.submit(abs, -1).result() == 1
"""


def start_times(n: int) -> dict[str, float]:
    """Seconds of a run with one new image, beside what a bare Dask cluster of one worker and importing torch take: medians."""
    folder = FOLDER / "start"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    bare = folder / "bare.py"
    bare.write_text(BARE_CLUSTER)
    images = folder / "images"
    images.mkdir()
    picture(rng, 516, 639).save(images / "first.jpg")
    assert fresh(images)["n_done"] == 1
    times: dict[str, list[float]] = {}
    for i in range(n):
        picture(rng, 516, 639).save(images / f"{i}.jpg")
        for name, arguments in (
            ("a run with one new image", command("run", images, STORE)),
            ("a bare Dask cluster with one task", [sys.executable, str(bare)]),
            ("import torch", [sys.executable, "-c", "import torch"]),
            ("import distributed, zarr", [sys.executable, "-c", "import distributed, zarr"]),
        ):
            started = time.monotonic()
            subprocess.run(arguments, check=True, capture_output=True)
            times.setdefault(name, []).append(time.monotonic() - started)
    return {name: sorted(values)[n // 2] for name, values in times.items()}


def start(n: int = 5) -> None:
    for name, seconds in start_times(n).items():
        print(f"{name}: {seconds:.1f} s (median of {n})")


def million(n: int = 1_000_000) -> None:
    """A plan of a million images; hard links to 3,000 pictures, so that disk is no matter."""
    many = [(100 + i % 60, 100 + i // 60) for i in range(3000)]
    folder = make("million", n, many, distinct=3000)
    paths = FOLDER / f"million-{n}.txt"
    if not paths.exists():
        paths.write_text("\n".join(str(Path(folder.name) / f"{i // 1000:04d}" / f"{i:07d}.jpg") for i in range(n)))
    for source in (paths, folder):
        preview, peak, elapsed_s = measured(
            "plan", source, FOLDER / "none.zarr", code=1
        )  # which says that it does not fit the disk
        assert preview["n_to_compute"] == n
        print(
            f"plan of {n} images from a {'list' if source is paths else 'folder'}: {elapsed_s:.1f} s, driver {peak.driver / 2**20:.0f} "
            f"MiB ({peak.driver / n:.0f} bytes an image with everything), largest helper {peak.worker / 2**20:.0f} MiB; "
            f"{preview['n_new_classes']} classes"
        )


def durability(n: int = 2000) -> None:
    """Every object synced to the disk before the ledger names it, against leaving that to the system."""
    folder = make("photographs", n, [(516, 639)], distinct=400)
    for dtype in ("uint8", "float32"):
        times: dict[str, list[float]] = {"process": [], "machine": []}
        for _ in range(3):
            for kind, values in times.items():
                os.sync()  # what the run before it left
                receipt = fresh(folder, "--dtype", dtype, "--durability", kind)
                assert receipt["n_done"] == n, receipt
                values.append(receipt["compute_s"])
        one, other = (sorted(values)[1] for values in times.values())
        print(f"{dtype}: {other / one:.2f} times as long with durability machine (medians of 3: {other:.1f} s, {one:.1f} s)")


def bucket(n: int = 1000, delay_s: float = 0.03) -> None:
    """From bucket to bucket on a server of this machine, as it is and with a delay before each answer, against from folder to folder."""
    from tests.support.services import environment, faulty, seaweedfs

    folder = make("photographs", n, [(516, 639)], distinct=400)
    receipt = fresh(folder, "--dtype", "uint8")
    times = {"folder to folder": receipt["compute_s"]}
    with tempfile.TemporaryDirectory() as place, seaweedfs(Path(place)) as endpoint:
        os.environ |= environment(endpoint)
        from pipeline.source.urls import Url

        for path in sorted(folder.rglob("*.jpg")):
            (Url.parse("s3://bucket/photographs") / path.name).put(path.read_bytes())

        def late(_method: str, _path: str) -> int:
            time.sleep(delay_s)
            return 0

        for name, judge in (("bucket to bucket", lambda *_: 0), (f"the same, {1000 * delay_s:.0f} ms before each answer", late)):
            with faulty(endpoint, judge) as proxy:
                os.environ |= environment(proxy)
                receipt = json.loads(
                    run("run", "s3://bucket/photographs", f"s3://bucket/{len(times)}.zarr", "--dtype", "uint8", "--json")
                )
                assert receipt["n_done"] == n, receipt
                times[name] = receipt["compute_s"]
    for name, seconds in times.items():
        print(f"{name}: {seconds:.1f} s, {n / seconds:.0f} images/s")
    print(f"one image after another would take {2 * n * delay_s / 2:.0f} s of waiting on each of two workers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sizes", "memory", "nothing", "start", "million", "durability", "bucket"])
    what = parser.parse_args().what
    FOLDER.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(FOLDER).free < 12e9:
        sys.exit(f"{FOLDER} needs 12 GB free: set FEATUREMAPS_BENCHMARKS to a larger disk")
    print(machine())
    globals()[what]()
