"""The whole job beside PyTorch's DataLoader, Ray Data and Daft: a folder of JPEGs in, every feature map on disk.

    pip install -e ".[benchmarks]" && python -m benchmarks.end_to_end [--images 1000] [--repeats 3] [--dtype uint8]

Each peer is written as its documentation writes such a job: the images in batches to a model, which is `F.conv2d` and a sigmoid;
then once more with our extractor in the model's place, so that only reading, scheduling and writing differ. Start-up counts for
nobody: it is measured by a run over few images and subtracted. Every run asserts that all maps of all images were written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from benchmarks.images import FOLDER, command, machine, make

SIZE = (516, 639)
MAPS = (2, 508, 631)
BATCH = 32
OUTPUT = FOLDER / "peer-output"


def model(kind: str, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """(image, y, x, channel) uint8 to (image, channel, y, x) as stored: ``plain`` torch, or ``ours``."""
    import torch
    from torch.nn.functional import conv2d

    from pipeline.config import ExtractorSpec, make_job
    from pipeline.extract.cpu import Extractor, use_one_thread
    from pipeline.extract.weights import load_weights
    from pipeline.store.settings import store_spec

    job = make_job({"source": ".", "store": "./f.zarr", "dtype": dtype})
    weights = load_weights(ExtractorSpec(), 3)
    (stored,) = store_spec(job, ".", weights).layers
    if kind == "ours":
        use_one_thread()
        extractor = Extractor(job.extractor, weights, [stored])
        return lambda images: np.stack([extractor.extract(np.asarray(image))["conv1"] for image in images])
    weight, bias = (torch.from_numpy(weights[f"conv1_{part}"]) for part in ("weight", "bias"))

    def plain(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.as_tensor(np.array(images)).permute(0, 3, 1, 2).float() / 256
            maps = torch.sigmoid(conv2d(x, weight, bias))
            if dtype == "uint8":
                maps = ((maps - stored.add_offset) / stored.scale_factor + 0.5).to(torch.uint8)
            return maps.numpy()

    return plain


# -- the jobs --------------------------------------------------------------------------------------------------------------------


def featuremaps(folder: Path, _: str, dtype: str) -> int:
    store = OUTPUT / "f.zarr"
    run = subprocess.run(command("run", folder, store, "--dtype", dtype, "--json"), check=True, capture_output=True, text=True)
    return int(json.loads(run.stdout)["n_done"])


class Photos:
    """As in the Dataset tutorial of PyTorch."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*/*.jpg"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> np.ndarray:
        from PIL import Image

        return np.array(Image.open(self.paths[i]).convert("RGB"))


def dataloader(folder: Path, kind: str, dtype: str) -> int:
    import torch
    import zarr
    from torch.utils.data import DataLoader

    photos, extract, start = Photos(folder), model(kind, dtype), 0
    array = zarr.create_array(OUTPUT / "maps.zarr", shape=(len(photos), *MAPS), chunks=(1, *MAPS), dtype=dtype)
    workers = len(__import__("os").sched_getaffinity(0))
    torch.set_num_threads(1 if kind == "ours" else workers)
    for batch in DataLoader(photos, batch_size=BATCH, num_workers=workers):
        maps = extract(batch.numpy())
        array[start : start + len(maps)] = maps
        start += len(maps)
    assert array[start - 1].any()
    return start


def ray_data(folder: Path, kind: str, dtype: str) -> int:
    import logging

    import ray

    class Extract:
        def __init__(self) -> None:
            self.extract = model(kind, dtype)

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"maps": self.extract(batch["image"])}

    ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    ray.data.DataContext.get_current().enable_progress_bars = False
    paths = [str(path) for path in sorted(folder.glob("*/*.jpg"))]
    photos = ray.data.read_images(paths, mode="RGB")
    photos.map_batches(Extract, batch_size=BATCH, compute=ray.data.ActorPoolStrategy(size=1)).write_parquet(str(OUTPUT / "ray"))
    n = count_parquet(OUTPUT / "ray")
    ray.shutdown()
    return n


def daft_job(folder: Path, kind: str, dtype: str) -> int:
    import daft
    from daft import DataType, col

    kind_of = DataType.uint8() if dtype == "uint8" else DataType.float32()

    @daft.udf(return_dtype=DataType.tensor(kind_of, shape=MAPS), batch_size=BATCH)
    class Extract:
        def __init__(self) -> None:
            self.extract = model(kind, dtype)

        def __call__(self, images):  # type: ignore[no-untyped-def]
            return list(self.extract(np.stack(images.to_pylist())))

    photos = daft.from_glob_path(f"{folder}/**/*.jpg")
    photos = photos.with_column("image", col("path").download().decode_image(mode="RGB"))
    photos.select(Extract(col("image")).alias("maps")).write_parquet(str(OUTPUT / "daft"))
    return count_parquet(OUTPUT / "daft")


def count_parquet(folder: Path) -> int:
    import pyarrow.parquet as pq

    return sum(pq.ParquetFile(path).metadata.num_rows for path in folder.rglob("*.parquet"))


JOBS = {"featuremaps": featuremaps, "DataLoader": dataloader, "Ray Data": ray_data, "Daft": daft_job}
PACKAGES = {"DataLoader": "torch", "Ray Data": "ray", "Daft": "daft"}

# -- measuring -------------------------------------------------------------------------------------------------------------------


def seconds(job: str, folder: Path, kind: str, dtype: str, n: int) -> float:
    """Wall time of one job in a process of its own."""
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    started = time.monotonic()
    arguments = [sys.executable, "-m", "benchmarks.end_to_end", "--job", job, kind, dtype, str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    elapsed = time.monotonic() - started
    assert done.returncode == 0, f"{job}: {done.stderr[-2000:]}"
    written = int(done.stdout.split()[-1])
    assert written == n, f"{job} wrote {written} of {n} images"
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", action="append", choices=["float32", "uint8"])
    parser.add_argument("--json", type=Path, help="Write the medians there; `python -m benchmarks.plot` draws them.")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job, kind, dtype, folder = given.job
        print(JOBS[job](Path(folder), kind, dtype))
        return
    missing = [name for name, package in PACKAGES.items() if find_spec(package) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} cannot be imported, so there is nothing to compare with: pip install -e '.[benchmarks]'")
    need = given.images * np.prod(MAPS) * 4 * 1.2
    FOLDER.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(FOLDER).free < need:
        sys.exit(f"{FOLDER} needs {need / 1e9:.0f} GB free: set FEATUREMAPS_BENCHMARKS to a larger disk, or --images to fewer")
    print(machine())
    few = 2 * BATCH
    folders = {n: make("photos", n, [SIZE]) for n in (few, given.images)}
    cases = [("featuremaps", "ours"), *((peer, kind) for kind in ("plain", "ours") for peer in PACKAGES)]
    results = []
    for dtype in given.dtype or ["uint8", "float32"]:
        rates: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        for _ in range(given.repeats):
            for job, kind in cases:
                start = seconds(job, folders[few], kind, dtype, few)
                whole = seconds(job, folders[given.images], kind, dtype, given.images)
                rates[job, kind].append((given.images - few) / (whole - start))
                print(f"  {dtype} {job} ({kind}): {rates[job, kind][-1]:.0f} images/s, {start:.1f} s for {few}", flush=True)
        medians = {case: statistics.median(values) for case, values in rates.items()}
        results += [{"dtype": dtype, "job": job, "kind": kind, "images_per_s": rate} for (job, kind), rate in medians.items()]
        print(f"\n{dtype}, images/s, medians of {given.repeats} runs over {given.images} images of 639 x 516")
        for (job, kind), rate in medians.items():
            print(f"  {job + (' with our extractor' if kind == 'ours' and job != 'featuremaps' else ''):32s} {rate:7.1f}")
        ours = medians["featuremaps", "ours"]
        for kind, text in (("plain", "as documented"), ("ours", "with our extractor")):
            best = max((rate, job) for (job, k), rate in medians.items() if k == kind and job != "featuremaps")
            print(f"  {ours / best[0]:.1f} times the fastest peer {text} ({best[1]})")
    shutil.rmtree(OUTPUT, ignore_errors=True)
    if given.json:
        given.json.write_text(json.dumps({"machine": machine(), "n_images": given.images, "results": results}, indent=1))


if __name__ == "__main__":
    main()
