"""The extractor on a GPU: its accuracy, its kernels beside two lower bounds, and the best batch, number of threads and layout.

    benchmarks/gpu.sh                                       # this and more, in eight minutes
    python -m benchmarks.gpu machine|accuracy|kernels|sweep FOLDER

Writes FOLDER/PART.json after each figure. Kernel times are of batches that lie on the GPU, by its own clock, medians of repeats. They stand
beside the time that the arithmetic takes at the rate of a large float32 matrix product, and the bytes at the rate of a copy within
the GPU's memory. Without a GPU the processor takes its place, with less to do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import conv2d

from benchmarks.gpu_report import save
from benchmarks.images import machine as this_machine
from pipeline.config import ExtractorSpec, LayerSpec, make_job
from pipeline.extract import devices
from pipeline.extract.cpu import Extractor
from pipeline.extract.gpu import DeviceExtractor
from pipeline.extract.keeping import pool_batch, quantise
from pipeline.extract.layers import output_sizes
from pipeline.extract.weights import load_weights, seeded_weights
from pipeline.store.settings import multiply_adds, store_spec

ON_GPU = torch.cuda.is_available()
WHERE = "cuda" if ON_GPU else "cpu"
PHOTO, TINY = ((516, 639) if ON_GPU else (64, 80)), (28, 28)
REPEATS = 20 if ON_GPU else 2
SIDE = 8192 if ON_GPU else 512  # of the matrix whose product is the rate of arithmetic
SWEEP_S = 1.0 if ON_GPU else 0.1
DEEP = (
    LayerSpec(filters=8, kernel=(5, 5), pool=(2, 2), activation="tanh"),
    LayerSpec(filters=8, kernel=(3, 3), activation="relu"),
    LayerSpec(filters=4, kernel=(3, 3)),
)


def machine(folder: Path) -> None:
    """What it is; processor and GPU by name."""
    query = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        smi = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv"], check=False, capture_output=True, text=True
        ).stdout
    except OSError:
        smi = ""
    found = {"machine": this_machine(), "is_rehearsal": not ON_GPU, "nvidia_smi": smi.splitlines()}
    found |= {"gpu": torch.cuda.get_device_name() if ON_GPU else "none", "cuda": torch.version.cuda}
    found |= {"cudnn": torch.backends.cudnn.version(), "memory": torch.cuda.mem_get_info() if ON_GPU else None}
    found |= {"GPUs that a run would use": devices.n_gpus(), "device files": [str(path) for path in Path("/dev").glob("nvidia*")]}
    found |= {name: value for name, value in os.environ.items() if name.startswith(("NVIDIA_TF32", "PYTORCH_", "CUDA_"))}
    print(json.dumps(found, indent=1))
    save(folder, "machine", found)


def accuracy(folder: Path) -> None:
    """Largest difference from float64, with TF32 and without, of maps and of statistics; whether a second time gives the same bits."""
    rng, found = np.random.default_rng(1), {}
    images = [rng.integers(0, 256, (*PHOTO, 3), np.uint8), np.kron(rng.integers(0, 256, (17, 21, 3)), np.ones((32, 32, 1)))]
    images[1] = np.ascontiguousarray(images[1][: PHOTO[0], : PHOTO[1]].astype(np.uint8))
    for name, layers in {"default": (LayerSpec(),), "deep": DEEP}.items():
        for tf32 in (False, True):
            spec = ExtractorSpec(layers=layers, tf32=tf32)
            weights = seeded_weights(spec, 3)
            reference, batched = Extractor(spec, weights), DeviceExtractor(spec, weights, device=WHERE, threads=1)
            (output,) = spec.map_names
            twice = [list(extract(batched, PHOTO, images, output)) for _ in range(2)]
            exact = [reference.reference(image)[output] for image in images]
            pairs = list(zip(twice[0], exact, strict=True))
            found[f"{name}{', TF32' if tf32 else ''}"] = {
                "largest error of a map": float(max(np.abs(maps - true).max() for (maps, _), true in pairs)),
                "largest error of a mean": float(
                    max(np.abs(pooled.mean - true.mean((1, 2))).max() for (_, pooled), true in pairs)
                ),
                "largest error of a std": float(max(np.abs(pooled.std - true.std((1, 2))).max() for (_, pooled), true in pairs)),
                "same bits again": all(np.array_equal(a, b) for (a, _), (b, _) in zip(*twice, strict=True)),
            }
            print(name, tf32, found[f"{name}{', TF32' if tf32 else ''}"])
            save(folder, "accuracy", found)


def extract(batched: DeviceExtractor, size: tuple[int, int], images: list[np.ndarray], output: str) -> Iterator[tuple]:
    outs = [{output: np.empty(batched.extractor.stack.shapes(*image.shape)[output], np.float32)} for image in images]
    for out, pooled in zip(outs, batched.extract_each(size, zip(images, outs, strict=True)), strict=True):
        yield out[output], pooled[output]


def ms(work: Callable[[], object]) -> float:
    """Median time of a piece of work on the GPU, ms; by its own clock where there is one."""
    found = []
    for _ in range(REPEATS + 3):
        if ON_GPU:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            work()
            found.append(1e3 * (time.perf_counter() - started))
    return statistics.median(found[3:])


def made(dtype: str, threads: int = 1) -> DeviceExtractor:
    """The default layer, stored in a dtype."""
    job = make_job({"source": ".", "store": "./f.zarr", "dtype": dtype})
    weights = load_weights(job.extractor, 3)
    return DeviceExtractor(job.extractor, weights, store_spec(job, ".", weights).layers, device=WHERE, threads=threads)


def rates() -> tuple[float, float]:
    """Float32 operations a second of a large matrix product, and bytes a second of a copy, read and written."""
    square, large = torch.rand(SIDE, SIDE, device=WHERE), torch.empty((1 << 28) if ON_GPU else (1 << 22), device=WHERE)
    return 2 * SIDE**3 / (1e-3 * ms(lambda: square @ square)), 2 * large.nbytes / (1e-3 * ms(large.clone))


@torch.inference_mode()
def kernels(folder: Path) -> None:
    """Microseconds an image: lower bounds, the layer in several layouts, and each of the steps that follow it."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    flops, bandwidth = rates()
    found: dict[str, Any] = {"TFLOP/s of a matrix product": flops / 1e12, "GB/s of a copy": bandwidth / 1e9}
    for dtype in ("uint8", "float32"):
        for size in (PHOTO, TINY):
            name = f"{dtype}, {size[1]} x {size[0]}"
            found[name] = kernels_of(made(dtype), size, flops, bandwidth)
            print(f"{name}, us an image: " + ", ".join(f"{key} {value:.3g}" for key, value in found[name].items()))
            save(folder, "kernels", found)


def kernels_of(batched: DeviceExtractor, size: tuple[int, int], flops: float, bandwidth: float) -> dict[str, float]:
    stack = batched.extractor.stack
    n = batched.batch_size(*size) if ON_GPU else 2
    (layer,), (stored,) = batched.extractor.layers, stack.stored.values()
    images = torch.randint(0, 256, (n, *size, 3), dtype=torch.uint8, pin_memory=ON_GPU)
    there = images.to(WHERE)
    heights, widths = (torch.full((n,), length, device=WHERE) for length in output_sizes(stack.layers, *size)[0])
    plain = there.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(256)
    last = there.permute(0, 3, 1, 2).float().div_(256)
    maps = layer(plain)
    kept = quantise(maps, stored)
    host = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=ON_GPU)

    def blocked() -> torch.Tensor:
        x = there.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
        return conv2d(x, layer.block_weight, layer.block_bias, stride=layer.block)  # its last rows and columns are left out

    def best_by_timing() -> torch.Tensor:
        torch.backends.cudnn.benchmark = True
        result = conv2d(plain, layer.weight)
        torch.backends.cudnn.benchmark = False
        return result

    work: dict[str, Callable[[], object]] = {
        "convert": lambda: there.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(256),
        "convolve": lambda: conv2d(plain, layer.weight),
        "convolve, channels last": lambda: conv2d(last, layer.weight),
        "convolve, algorithm chosen by timing": best_by_timing,
        "convert and convolve in blocks of neighbouring outputs": blocked,
        "convolve, bias, activation": lambda: layer(plain),
        "quantise": lambda: quantise(maps, stored),
        "statistics": lambda: pool_batch(maps, heights, widths, is_whole=True),
        "statistics of a padded class": lambda: pool_batch(maps, heights, widths, is_whole=False),
        "copy to the GPU": lambda: images.to(WHERE, non_blocking=True),
        "copy from the GPU": lambda: host.copy_(kept, non_blocking=True),
    }
    multiplications = multiply_adds(stack.spec, size, 3)
    n_bytes = images[0].nbytes + kept[0].numel() * np.dtype(stored.dtype).itemsize
    found = {"floor: arithmetic": 2e6 * multiplications / flops, "floor: bytes": 1e6 * n_bytes / bandwidth}
    for name, each in work.items():
        found[name] = 1e3 * ms(each) / n
    return found


def sweep(folder: Path) -> None:
    """Images/s from and to the memory of the host, in one process, for numbers of threads and batches."""
    cores = len(os.sched_getaffinity(0))
    tried = [(threads, 0) for threads in (1, 4, 2, 8, 16, 32) if threads <= 2 * cores]
    found: list[dict[str, Any]] = []
    for size, batches in ((PHOTO, (1, 4, 8, 16, 32, 64)), (TINY, (64, 512, 1024, 2048, 4096))):
        for threads, wanted in tried + [(min(4, cores), wanted) for wanted in batches]:
            batched = made("uint8", threads)
            batched._batch[size] = batch = wanted or batched.batch_size(*size)
            rate = images_per_s(batched, size, threads)
            found.append({"height": size[0], "width": size[1], "threads": threads, "batch": batch, "images_per_s": rate})
            print(f"{size[1]} x {size[0]}, {threads} threads, batches of {batch}: {rate:.0f} images/s")
            save(folder, "sweep", found)


def images_per_s(batched: DeviceExtractor, size: tuple[int, int], threads: int) -> float:
    n = max(2 * batched.batch_size(*size), 32)
    images = np.random.default_rng(0).integers(0, 256, (8, *size, 3), np.uint8)
    shape = batched.extractor.stack.shapes(*size, 3)["conv1"]
    together, over, counts = threading.Barrier(threads + 1), threading.Event(), [0] * threads

    def work(i: int) -> None:
        block = batched.block((n, *shape), "uint8")
        items = [(images[k % 8], {"conv1": row}) for k, row in enumerate(block)]
        list(batched.extract_each(size, items))  # makes the buffers
        together.wait()
        while not over.is_set():
            counts[i] += sum(1 for _ in batched.extract_each(size, items))

    with ThreadPoolExecutor(threads) as pool:
        done = [pool.submit(work, i) for i in range(threads)]
        together.wait(60)
        started = time.perf_counter()
        time.sleep(SWEEP_S)
        over.set()
        for each in done:
            each.result()
        return sum(counts) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"machine": machine, "accuracy": accuracy, "kernels": kernels, "sweep": sweep}
    parser.add_argument("part", choices=parts)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts[given.part](given.folder)


if __name__ == "__main__":
    main()
