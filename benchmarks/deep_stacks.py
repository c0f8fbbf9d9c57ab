"""Deep stacks on photographs: the extractor, one image at a time in a process per core, against PyTorch with batches on all cores.

    python -m benchmarks.deep_stacks [--stack 16x3x3:relu:pool2,32x3x3:relu:pool2] [--images 32] [--repeats 5] [--no-kernel]
        [--keep-memory]

PyTorch runs the same stack as nn.Sequential, channels last, in inference mode, on one batch of all images. It keeps nothing. The
extractor stores the last layer's maps as float32 and computes their statistics. Both start from uint8 pixels of 639 x 516. They take
turns; prints medians in ms an image, of the clock and of the processors, both ratios of medians, and how much memory each took beyond
what it held after a small image.
``--no-kernel`` leaves the first layer to PyTorch, as where there is no compiler. ``--keep-memory`` lets PyTorch's process keep the
memory that it frees, as workers do.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.images import machine, picture
from pipeline.config import ExtractorSpec, LayerSpec
from pipeline.extract import kernel
from pipeline.extract.cpu import Extractor, use_one_thread
from pipeline.extract.layers import Array, output_sizes
from pipeline.extract.weights import Weights, seeded_weights
from pipeline.run.tasks import keep_memory

SIZE = (516, 639)
STACKS = (
    "16x3x3:relu:pool2,32x3x3:relu:pool2,64x3x3:relu:pool2",
    "20x5x5:tanh:pool2,50x5x5:tanh:pool2",
    "32x9x9,32x5x5",
    "8x9x9,8x5x5",
    "2x9x9,2x5x5",
)
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "none": nn.Identity}


def parse(stack: str) -> ExtractorSpec:
    return ExtractorSpec(layers=tuple(LayerSpec.parse(layer) for layer in stack.split(",")))


def first_layer_by(stack: str) -> str:
    """What computes the first layer of a photograph."""
    spec = parse(stack)
    return Extractor(spec, seeded_weights(spec, 3)).version(SIZE)


def pictures(n: int, size: tuple[int, int] = SIZE) -> list[Array]:
    rng = np.random.default_rng(0)
    return [np.array(picture(rng, *size)) for _ in range(n)]


def sequential(spec: ExtractorSpec, weights: Weights) -> nn.Sequential:
    """The stack as PyTorch's documentation writes it; the pool before the activation, which is faster, and gives the same."""
    modules: list[nn.Module] = []
    channels = 3
    for i, layer in enumerate(spec.layers):
        conv = nn.Conv2d(channels, layer.filters, layer.kernel)
        conv.weight.data, conv.bias.data = (torch.from_numpy(weights[f"conv{i + 1}_{part}"]) for part in ("weight", "bias"))
        pool = [] if layer.pool == (1, 1) else [nn.MaxPool2d(layer.pool)]
        modules += [conv, *pool, ACTIVATIONS[layer.activation]()]
        channels = layer.filters
    return nn.Sequential(*modules).to(memory_format=torch.channels_last).eval()


def peak_mib(*, reset: bool = False) -> float:
    """Most memory of this process, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def serve(commands: Connection, stack: str, n: int, work_of: Callable[[ExtractorSpec, Weights, int], Callable[[], None]]) -> None:
    """Do the work each time that it is asked for, and say how much memory and processor time that took."""
    spec = parse(stack)
    work = work_of(spec, seeded_weights(spec, 3), n)
    before = peak_mib(reset=True)
    commands.send(None)
    while commands.recv():
        started = time.process_time()
        work()
        commands.send((peak_mib() - before, time.process_time() - started))


def by_torch(spec: ExtractorSpec, weights: Weights, n: int) -> Callable[[], None]:
    model, batch = sequential(spec, weights), torch.from_numpy(np.stack(pictures(n)))  # (n, y, x, channel)
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))

    def work() -> None:
        with torch.inference_mode():
            maps = model(batch.permute(0, 3, 1, 2).float() / 256)
        assert maps.shape[0] == n

    with torch.inference_mode():
        model(torch.zeros(1, 3, 64, 64))
    return work


def by_torch_that_keeps_memory(spec: ExtractorSpec, weights: Weights, n: int) -> Callable[[], None]:
    keep_memory()
    return by_torch(spec, weights, n)


def by_extractor_without_kernel(spec: ExtractorSpec, weights: Weights, n: int) -> Callable[[], None]:
    kernel.MAX_LANES = 0
    return by_extractor(spec, weights, n)


def by_extractor(spec: ExtractorSpec, weights: Weights, n: int) -> Callable[[], None]:
    keep_memory()
    use_one_thread()
    extractor, images = Extractor(spec, weights), pictures(n)
    size = output_sizes(spec.layers, *SIZE)[-1]
    out = {
        spec.output_names[-1]: np.zeros((spec.layers[-1].filters, *size), np.float32)
    }  # of a shard, which its process holds anyway
    extractor.extract(pictures(1, (64, 64))[0])

    def work() -> None:
        for image in images:
            extractor.extract_into(image, out)

    return work


class Side:
    """Processes that do the work at once."""

    def __init__(self, stack: str, n: int, processes: int, work_of: Callable[..., Callable[[], None]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        self.times_ms: list[float] = []
        self.processor_ms: list[float] = []
        self.n, self.memory_mib = n, 0.0
        for _ in range(processes):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(theirs, stack, n // processes, work_of)))
            self.pipes.append(ours)
            self.processes[-1].start()
        for pipe in self.pipes:
            pipe.recv()

    def time(self, *, keep: bool) -> None:
        started = time.perf_counter()
        for pipe in self.pipes:
            pipe.send(True)
        memory, processor_s = zip(*(pipe.recv() for pipe in self.pipes), strict=True)
        if keep:
            self.times_ms.append(1e3 * (time.perf_counter() - started) / self.n)
            self.processor_ms.append(1e3 * sum(processor_s) / self.n)
        self.memory_mib = sum(memory)

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send(False)
            process.join()
            assert process.exitcode == 0

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.times_ms), statistics.median(self.processor_ms)

    def __str__(self) -> str:
        return "{:.1f} ms ({:.1f} of processors) {:.0f} MiB".format(*self.medians, self.memory_mib)


def compare(stack: str, n: int, repeats: int, *, has_kernel: bool = True, keeps_memory: bool = False) -> tuple[Side, Side]:
    """The extractor and PyTorch, measured in turns."""
    cores = len(os.sched_getaffinity(0))
    ours = Side(stack, n, cores, by_extractor if has_kernel else by_extractor_without_kernel)
    torchs = Side(stack, n, 1, by_torch_that_keeps_memory if keeps_memory else by_torch)
    for i in range(repeats + 1):
        for side in (torchs, ours):
            side.time(keep=i > 0)  # the first warms up
    for side in (ours, torchs):
        side.end()
    return ours, torchs


def report(stack: str, ours: Side, torchs: Side) -> None:
    by_clock, by_processor = (a / b for a, b in zip(torchs.medians, ours.medians, strict=True))
    print(f"  {stack}: first layer by {first_layer_by(stack)}")
    print(f"    torch {torchs}; ours {ours}; {by_clock:.2f} times ({by_processor:.2f} by processor time)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stack", nargs="*", default=STACKS)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-kernel", action="store_true")
    parser.add_argument("--keep-memory", action="store_true")
    given = parser.parse_args()
    if given.no_kernel:
        kernel.MAX_LANES = 0  # here for the report only: each side has processes of its own
    print(f"{machine()}; batches of {given.images}")
    for stack in given.stack:
        kind = {"has_kernel": not given.no_kernel, "keeps_memory": given.keep_memory}
        report(stack, *compare(stack, given.images, given.repeats, **kind))


if __name__ == "__main__":
    main()
