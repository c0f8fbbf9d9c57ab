"""Small images: the pipeline beside a plain loop with PyTorch over batches of 256, on the same files, in one run.

    python -m benchmarks.small_images [--images 70000] [--repeats 3] [--network default lenet] [--profile]

Grey PNGs of 28 x 28, 2,000 distinct ones and hard links to them. The loop opens each with Pillow, computes batches with all cores and
writes float32 maps of all layers to Zarr arrays with chunks of 256 images. Both take turns. Seconds are those of the whole command;
processor seconds are of all its processes, which other work disturbs less. Rates leave the start out: they are between the first
and the last batch. ``--profile`` prints the processor time of an image by stage, and the loop's: the least of five passes
over 2,048 images in one thread, which alternate.
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
from collections import deque
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.bare_worker import NAME, work_alone
from benchmarks.images import FOLDER, command, machine
from benchmarks.main_job import STORE
from pipeline.config import Job, make_job
from pipeline.extract.weights import load_weights
from pipeline.run import tasks
from pipeline.source.fetch import Source
from pipeline.source.listing import list_collection
from pipeline.store import schema
from pipeline.store.settings import layout_of, store_spec

SIZE, BATCH, DISTINCT = 28, 256, 2000
NETWORKS: dict[str, list[str]] = {
    "default": [],
    "lenet": ["--layers", "20x5x5:tanh:pool2", "--layers", "50x5x5:tanh:pool2", "--layers", "500x4x4:tanh"],
}
LENET = [(20, 5, 2), (50, 5, 2), (500, 4, 1)]  # filters, kernel, pool


def make(n: int) -> Path:
    """A folder of ``n`` files."""
    folder = FOLDER / f"small-{n}"
    if (folder / ".complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    paths = [folder / f"{i // 1000:03d}" / f"{i:06d}.png" for i in range(n)]
    for i, path in enumerate(paths):
        if i % 1000 == 0:
            path.parent.mkdir(parents=True)
        if i >= DISTINCT:
            path.hardlink_to(paths[i % DISTINCT])
            continue
        pixels = np.zeros((SIZE, SIZE), np.uint8)  # a figure on black, as handwritten digits and clothes are
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
        pixels[4:24, 4:24] = np.asarray(coarse.resize((20, 20), Image.Resampling.BICUBIC))
        Image.fromarray(pixels).save(path)
    (folder / ".complete").touch()
    return folder


def job(folder: Path, network: str) -> Job:
    spec = [{"filters": f, "kernel": k, "pool": p, "activation": "tanh"} for f, k, p in LENET]
    extractor = {"layers": spec, "outputs": ["conv1", "conv2", "conv3"]} if network == "lenet" else {}
    return make_job({"source": str(folder), "store": str(STORE), "decode": {"color": "grey"}, "extractor": extractor})


def compute_batches(paths: list[Path], network: str) -> None:
    """What one would write without this package."""
    import torch
    import zarr
    from torch import nn

    torch.set_grad_enabled(False)
    shapes = [(f, k, p, nn.Tanh) for f, k, p in LENET] if network == "lenet" else [(2, 9, 1, nn.Sigmoid)]
    layers, channels, side = [], 1, SIZE
    shutil.rmtree(FOLDER / "loop.zarr", ignore_errors=True)
    group = zarr.open_group(str(FOLDER / "loop.zarr"), mode="w")
    for i, (filters, kernel, pool, activation) in enumerate(shapes):
        side = (side - kernel + 1) // pool
        array = group.create_array(
            f"conv{i + 1}", shape=(len(paths), filters, side, side), chunks=(BATCH, filters, side, side), dtype="float32"
        )
        layers.append((nn.Sequential(nn.Conv2d(channels, filters, kernel), nn.MaxPool2d(pool), activation()), array))
        channels = filters
    for first in range(0, len(paths), BATCH):
        x = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for path in paths[first : first + BATCH]]))[:, None] / 256
        for layer, array in layers:
            x = layer(x)
            array[first : first + BATCH] = x.numpy()


def loop(folder: Path, network: str) -> None:
    """The plain loop in a process of its own; prints its rate."""
    started = time.perf_counter()
    paths = sorted(folder.glob("*/*.png"))
    compute_batches(paths, network)
    print(json.dumps({"images_per_s": len(paths) / (time.perf_counter() - started)}))


def measured(*arguments: str) -> dict[str, float]:
    """Seconds, processor seconds and rate of a command whose output ends with JSON."""
    before, started = os.times(), time.perf_counter()
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    elapsed_s, after = time.perf_counter() - started, os.times()
    processor_s = sum(after[2:4]) - sum(before[2:4])
    return {"seconds": elapsed_s, "processor seconds": processor_s, "rate": json.loads(output)["images_per_s"]}


def compare(folder: Path, network: str, n: int, repeats: int) -> None:
    found: dict[str, list[dict[str, float]]] = {"featuremaps": [], "loop": []}
    outputs = [part for i in (1, 2, 3) for part in ("--outputs", f"conv{i}")] if network == "lenet" else []
    for _ in range(repeats):
        shutil.rmtree(STORE, ignore_errors=True)
        run = measured(*command("run", folder, STORE, "--color", "grey", *NETWORKS[network], *outputs, "--json"))
        found["featuremaps"].append(run)
        found["loop"].append(measured(sys.executable, "-m", "benchmarks.small_images", "--loop", str(folder), network))
        for name, runs in found.items():
            print(f"  {name}: " + ", ".join(f"{key} {value:.1f}" for key, value in runs[-1].items()), flush=True)
    medians = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    ours, theirs = medians["featuremaps"], medians["loop"]
    print(
        f"{network}, {n} images: {ours['seconds']:.1f} s ({ours['processor seconds']:.1f} processor seconds), "
        f"{ours['rate']:.0f} images/s; the loop takes {theirs['seconds'] / ours['seconds']:.1f} times as long, "
        f"{theirs['processor seconds'] / ours['processor seconds']:.1f} times the processor seconds; "
        f"rate {ours['rate'] / theirs['rate']:.1f} times the loop's"
    )


def profile(folder: Path, network: str, n: int = 2048, passes: int = 5) -> tuple[dict[str, float], str]:
    """Milliseconds of processor time of one process for each image as tasks compute it, without cluster, driver and ledger; the kernel."""
    import torch

    tasks.keep_memory()
    chosen = job(folder, network)
    weights = load_weights(chosen.extractor, 1)
    plugin = work_alone(chosen.extractor, weights, store_spec(chosen, str(folder), weights).layers)
    listing = list_collection(str(folder))
    layout = layout_of((SIZE, SIZE), chosen.extractor, 4, 1)
    pieces = []
    for start in range(0, n, layout.shard_rows):
        rows = range(start, min(n, start + layout.shard_rows))
        texts = tuple(listing.paths[i] for i in rows), tuple(listing.fingerprint(i) for i in rows)
        pieces.append(tasks.WorkPiece(layout, rows.start, rows.stop, tuple(rows), *texts))
    time_of = time.perf_counter
    time.perf_counter = time.process_time  # as `tasks` measures its stages
    best: dict[str, float] = {}
    torch.set_num_threads(1)
    paths = sorted(folder.glob("*/*.png"))[:n]
    for _ in range(passes):
        begun = time.process_time()
        compute_batches(paths, network)
        loop_s = time.process_time() - begun
        decoded = tasks.read(Source(listing.root, chosen.decode), "run", pieces)
        extracted = tasks.extract(tasks.Target(str(STORE), "run", NAME), decoded)
        started = time.process_time()
        for piece, blocks in zip(extracted.result.pieces, extracted.blocks, strict=True):
            assert (piece.status == schema.Status.DONE).all()
            for layer, kept in zip(layout.layers, plugin.map_layers, strict=True):
                for _, parts in schema.encode_rows(layout, layer, piece.start, blocks[layer.name], kept.fill_value):
                    deque(parts, maxlen=0)
        stages = extracted.result.stage_s | {"write": time.process_time() - started}
        stages |= {"sum": sum(stages.values()), "the loop": loop_s}
        best = {name: min(best.get(name, seconds), seconds) for name, seconds in stages.items()}
    time.perf_counter = time_of
    return {name: 1e3 * seconds / n for name, seconds in best.items()}, extracted.result.kernel


def report(network: str, ms: dict[str, float], kernel: str) -> None:
    print(f"{network}, one core, ms an image by {kernel}: " + ", ".join(f"{name} {value:.3f}" for name, value in ms.items()))
    print(f"  the loop takes {ms['the loop'] / ms['sum']:.1f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=70_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--network", nargs="*", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--loop", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        loop(Path(given.loop[0]), given.loop[1])
        return
    print(machine())
    folder = make(given.images)
    for network in given.network:
        if given.profile:
            report(network, *profile(folder, network))
        else:
            compare(folder, network, given.images, given.repeats)


if __name__ == "__main__":
    main()
