"""The compiled first layer against PyTorch's F.conv2d, activation and conversion, on one core, with each instruction set there is.

    python -m benchmarks.first_layer [--kernel 9 5 3] [--filters 2 8 20] [--dtype uint8 uint16 float32] [--repeats 20]

One image of 639 x 516 x 3. Times are those of the thread, so other processes take none of it; all versions take turns. Prints the
median and the least of them in ms, the ratio of medians, operations of the direct convolution per second of the median, and the
largest difference from float64 of the values that a dtype stores exactly.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import conv2d

from benchmarks.images import machine, picture
from pipeline.config import ExtractorSpec, LayerSpec
from pipeline.extract import kernel
from pipeline.extract.cpu import use_one_thread
from pipeline.extract.layers import Array, output_bounds
from pipeline.extract.quantise import INTEGER_MAX, quantisation
from pipeline.extract.weights import seeded_weights


class Case(NamedTuple):
    """One layer on one image, by PyTorch and by compiled code."""

    out: Array
    reference: Callable[[], None]
    compiled: Callable[[], object]
    exact: Array


def make_case(image: Array, size: int, filters: int, dtype: str) -> Case:
    spec = ExtractorSpec(layers=(LayerSpec(filters=filters, kernel=(size, size)),))
    weights = seeded_weights(spec, 3)
    stored = quantisation(output_bounds(spec.layers, weights)[0], dtype)
    weight, bias = weights["conv1_weight"] / np.float32(256), weights["conv1_bias"]
    out = np.empty((filters, image.shape[0] - size + 1, image.shape[1] - size + 1), dtype)
    # PyTorch is fastest where weights are channels last, as pixels are
    torch_weight = torch.from_numpy(weight).contiguous(memory_format=torch.channels_last)

    def reference() -> None:
        x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
        maps = torch.sigmoid(conv2d(x, torch_weight, torch.from_numpy(bias)))[0]
        if dtype in INTEGER_MAX:
            maps = (maps - stored.add_offset) / stored.scale_factor + 0.5
        out[...] = maps.numpy().astype(dtype)

    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    exact = torch.sigmoid(conv2d(x, torch.from_numpy(weight).double(), torch.from_numpy(bias).double()))[0].numpy()
    return Case(out, reference, lambda: kernel.first_layer(image, weight, bias, "sigmoid", stored, out), exact)


def thread_ms(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return 1e3 * (time.thread_time() - started)


def measure(case: Case, lanes: dict[str, int], repeats: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {name: [] for name in ("torch", *lanes)}
    for i in range(repeats + 1):
        for name, times in found.items():
            kernel.MAX_LANES = lanes.get(name, 0)
            took = thread_ms(case.compiled if name in lanes else case.reference)
            if i:  # the first warms up
                times.append(took)
    return found


def versions(size: int, filters: int) -> dict[str, int]:
    """Each version of the compiled layer that this processor runs, and its `kernel.MAX_LANES`."""
    lanes: dict[str, int] = {}
    for kernel.MAX_LANES in (32, 16, 8, 4):
        lanes.setdefault(kernel.version(3, (size, size), filters), kernel.MAX_LANES)
    lanes.pop("torch", None)  # there is no compiled code
    return lanes


def a_picture() -> Array:
    return np.array(picture(np.random.default_rng(0), 516, 639))


def report(size: int, filters: int, dtype: str, image: Array, repeats: int) -> None:
    lanes = versions(size, filters)
    case = make_case(image, size, filters, dtype)
    found = measure(case, lanes, repeats)
    operations = 2 * 3 * size * size * case.out.size
    torch_ms = statistics.median(found["torch"])
    for name, times in found.items():
        ms = statistics.median(times)
        line = f"  {size}x{size} {filters:2d} filters {dtype:8s} {name:16s} {ms:7.2f} {min(times):7.2f}"
        if name in lanes:
            line += f"  {torch_ms / ms:5.1f} times {operations / ms / 1e6:6.0f} GFLOP/s"
            if dtype == "float32":
                kernel.MAX_LANES = lanes[name]
                case.compiled()
                line += f"  error {np.abs(case.out - case.exact).max():.1e}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", nargs="*", type=int, default=[9, 5, 3])
    parser.add_argument("--filters", nargs="*", type=int, default=[2, 8, 20])
    parser.add_argument("--dtype", nargs="*", choices=list(kernel.DTYPES), default=list(kernel.DTYPES))
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    use_one_thread()
    torch.set_grad_enabled(False)
    image = a_picture()
    print(f"{machine()}\nms of a thread: median, least")
    for size in arguments.kernel:
        for filters in arguments.filters:
            for dtype in arguments.dtype:
                report(size, filters, dtype, image, arguments.repeats)


if __name__ == "__main__":
    main()
