"""The extractor on a GPU beside its two floors, and the whole pipeline with the GPU's busy share.

    python -m benchmarks.gpu [--dtype uint8] [--images 2000]

Kernel times are of images of 639 x 516 in batches that lie on the GPU: beside the time that the arithmetic takes at the rate of a
large float32 matrix product, the time that the bytes take at the rate of a copy within the GPU's memory, and `F.conv2d`, as it is and
in the blocks of neighbouring outputs that are best on processors. Medians of repeats, times by the GPU's own clock.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import conv2d

from benchmarks.images import FOLDER, machine, make
from benchmarks.main_job import fresh
from pipeline.config import make_job
from pipeline.extract.devices import n_gpus
from pipeline.extract.gpu import DeviceExtractor
from pipeline.extract.keeping import quantise
from pipeline.extract.weights import load_weights
from pipeline.store.settings import multiply_adds, store_spec

SIZE = (516, 639)
REPEATS = 20


def gpu_ms(work: Callable[[], object]) -> float:
    """Median time of a piece of work on the GPU, ms."""
    found = []
    for i in range(REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            found.append(begin.elapsed_time(end))
    return statistics.median(found)


@torch.inference_mode()
def kernels(dtype: str) -> None:
    job = make_job({"source": ".", "store": "./f.zarr", "dtype": dtype})
    weights = load_weights(job.extractor, 3)
    (stored,) = store_spec(job, ".", weights).layers
    batched = DeviceExtractor(job.extractor, weights, [stored], device="cuda")
    n = batched.batch_size(*SIZE)
    (layer,) = batched.extractor.layers
    images = torch.randint(0, 256, (n, *SIZE, 3), dtype=torch.uint8)
    pinned, on_gpu = images.pin_memory(), images.cuda()

    def plain() -> torch.Tensor:
        return quantise(layer(on_gpu.permute(0, 3, 1, 2).float() / 256), stored)

    def blocked() -> torch.Tensor:
        x = on_gpu.permute(0, 3, 1, 2).float().contiguous(memory_format=torch.channels_last)
        y = conv2d(x, layer.block_weight, layer.block_bias, stride=layer.block)  # the last rows and columns are left out
        sy, sx = layer.block
        y = y.unflatten(1, (2, sy, sx)).permute(0, 1, 4, 2, 5, 3)
        return quantise(torch.sigmoid(y.flatten(4, 5).flatten(2, 3)), stored)

    a, b = (torch.rand(8192, 8192, device="cuda") for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    flops = 2 * 8192**3 / (1e-3 * gpu_ms(lambda: a @ b))
    large = torch.empty(1 << 28, device="cuda")
    bandwidth = 2 * large.nbytes / (1e-3 * gpu_ms(large.clone))
    maps_bytes = 2 * 508 * 631 * np.dtype(dtype).itemsize
    floors = {
        "arithmetic": 1e3 * 2 * multiply_adds(job.extractor, SIZE, 3) / flops,
        "bytes in the GPU's memory": 1e3 * (images[0].nbytes + maps_bytes) / bandwidth,
        "copy of the image to the GPU": gpu_ms(lambda: pinned.cuda(non_blocking=True)) / n,
    }
    times = {"F.conv2d, sigmoid, conversion": gpu_ms(plain) / n, "in blocks of neighbouring outputs": gpu_ms(blocked) / n}
    print(f"\n{dtype}, batches of {n}: {flops / 1e12:.1f} TFLOP/s, {bandwidth / 1e9:.0f} GB/s; us per image of 639 x 516")
    for name, value in [*((f"floor: {name}", value) for name, value in floors.items()), *times.items()]:
        print(f"  {name:40s} {1e3 * value:8.1f}")
    floor = max(floors["arithmetic"], floors["bytes in the GPU's memory"])
    print(f"  F.conv2d takes {times['F.conv2d, sigmoid, conversion'] / floor:.1f} times the larger floor")
    out = np.empty((8 * n, 2, 508, 631), dtype)
    pixels = images.numpy()
    for _ in range(2):  # the first makes the buffers
        started = time.perf_counter()
        for _ in batched.extract_each(SIZE, ((pixels[i % n], {"conv1": row}) for i, row in enumerate(out))):
            pass
        whole = (time.perf_counter() - started) / len(out)
    print(f"  {'from and to the memory of the host':40s} {1e6 * whole:8.1f}, one thread")


class Busy(threading.Thread):
    """Mean share of time in which the GPU was busy, by nvidia-smi, between start and `share`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.values: list[int] = []
        query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
        self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        self.start()

    def run(self) -> None:
        assert self.process.stdout is not None
        self.values += [int(line.split()[0]) for line in self.process.stdout]

    def share(self) -> float:
        self.process.kill()
        self.join()
        return statistics.mean(self.values) / 100


def pipeline(dtype: str, n: int) -> None:
    """The command, over photographs, with the GPU and without."""
    folder = make("photographs", n, [SIZE], distinct=400)
    for name, gpus in (("GPU", 1), ("processors", 0)):
        busy = Busy()
        receipt = fresh(folder, "--dtype", dtype, "--gpus", gpus)
        share = busy.share()
        assert receipt["n_done"] == n, receipt
        shares = {stage: round(value, 2) for stage, value in receipt["shares"].items()}
        print(
            f"{dtype} with {name}: {receipt['images_per_s']:.0f} images/s, GPU busy {100 * share:.0f} % of the command; {shares}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=["float32", "float16", "uint16", "uint8"])
    parser.add_argument("--images", type=int, default=2000)
    given = parser.parse_args()
    if not n_gpus():
        sys.exit("no GPU, or torch was installed without CUDA: there is nothing to measure here")
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    for dtype in given.dtype or ["uint8", "float32"]:
        kernels(dtype)
    for dtype in given.dtype or ["uint8", "float32"]:
        pipeline(dtype, given.images)


if __name__ == "__main__":
    main()
