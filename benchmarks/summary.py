"""How fast this machine is, in about five minutes: each figure beside its reference, its goal, and the kernel that ran.

    python -m benchmarks.summary [--json FILE] [--only PART ...] [--limit 300]

Needs no extras. Each part is a process of its own and has a time limit in seconds. One that fails is named with its error, and the
others still run; the exit code is then 1, and 130 after Ctrl-C. A ratio above 1 is faster than what it stands beside, except for the
start. Other work on the machine disturbs the figures, so the load is printed. Goals of extraction are those for AVX2, or for AVX-512
where the kernel is of it. The other benchmarks measure the same more exactly.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.images import FOLDER, machine

DEEP = ("16x3x3:relu:pool2,32x3x3:relu:pool2,64x3x3:relu:pool2", "8x9x9,8x5x5")
EXTRACTION_GOALS = {"avx2": "6x", "avx512": "10x"}
FLAGS = ("avx2", "fma", "avx512f", "amx_tile")


class Row(NamedTuple):
    """One measured figure."""

    what: str
    value: float
    unit: str
    ratio: float | None
    """How many times as fast as ``beside``, or what ``beside`` says."""
    beside: str
    goal: str
    kernel: str

    def __str__(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:.2f}x"
        goal = f"goal {self.goal}" if self.goal else "no goal"
        return f"{self.what:40s} {self.value:8.4g} {self.unit:14s} {ratio:>7s} {self.beside:34s} {goal:10s} {self.kernel}"


# -- the parts, each in a process of its own -----------------------------------------------------------------------------------------


def extraction(dtype: str) -> list[Row]:
    import torch

    from benchmarks.first_layer import a_picture, make_case, measure, versions
    from pipeline.extract.cpu import use_one_thread

    use_one_thread()
    torch.set_grad_enabled(False)
    lanes = versions(9, 2)
    if not lanes:
        raise RuntimeError("there is no compiled layer here: install with a C compiler, or see `featuremaps doctor`")
    found = {name: statistics.median(times) for name, times in measure(make_case(a_picture(), 9, 2, dtype), lanes, 12).items()}
    reference = found.pop("torch")
    return [
        Row(
            f"extraction, {dtype}, one core",
            ms,
            "ms an image",
            reference / ms,
            "F.conv2d, sigmoid, conversion",
            EXTRACTION_GOALS.get(name.split("-")[0], ""),
            name,
        )
        for name, ms in found.items()
    ]


def pipeline(dtype: str, goal: str) -> list[Row]:
    from benchmarks.efficiency import SIZE, compare
    from benchmarks.images import make

    FOLDER.mkdir(parents=True, exist_ok=True)
    # of float32 maps, an image takes 2.6 MB at most
    n = min(200 * len(os.sched_getaffinity(0)), int(shutil.disk_usage(FOLDER).free / 6e6))
    ours, floor, kernels = compare(make("photographs", n, [SIZE], distinct=400), n, dtype, 2)
    return [Row(f"pipeline, {dtype}, all cores", ours, "images/s", ours / floor, "bare processes", goal, ", ".join(kernels))]


def small(network: str) -> list[Row]:
    from benchmarks.small_images import make, profile

    ms, kernel = profile(make(2048), network, passes=3)
    what = f"28 x 28, {network}, one core"
    return [Row(what, ms["sum"], "ms an image", ms["the loop"] / ms["sum"], "a loop with torch", "3x", kernel)]


def deep() -> list[Row]:
    from benchmarks.deep_stacks import compare, first_layer_by

    rows = []
    for stack in DEEP:
        ours, torchs = (side.medians[0] for side in compare(stack, 8 * len(os.sched_getaffinity(0)), 3))
        what = f"stack {stack.replace('relu:pool2', 'rp2')}"
        kernel = f"first layer: {first_layer_by(stack)}"
        rows.append(Row(what, ours, "ms an image", torchs / ours, "nn.Sequential, all cores", "1x", kernel))
    return rows


def start() -> list[Row]:
    from benchmarks.main_job import start_times
    from pipeline.extract import kernel

    seconds = start_times(3)
    ours, cluster = seconds["a run with one new image"], seconds["a bare Dask cluster with one task"]
    return [Row("run with one new image", ours, "s", ours / cluster, "the time of a bare Dask cluster", "", kernel.version())]


def scheduling() -> list[Row]:
    from benchmarks.driver import measure

    return [Row("scheduling, CPU of driver", measure(50_000, 1).per_batch_ms[0], "ms a batch", None, "", "5 ms", "no work")]


class Part(NamedTuple):
    title: str
    about_s: int
    measure: Callable[[], list[Row]]


PARTS = {
    "extraction-uint8": Part("the default layer on one photograph, uint8", 10, partial(extraction, "uint8")),
    "extraction-float32": Part("the default layer on one photograph, float32", 10, partial(extraction, "float32")),
    "pipeline-uint8": Part("whole runs beside bare processes, uint8", 45, partial(pipeline, "uint8", "0.92x")),
    "pipeline-float32": Part("whole runs beside bare processes, float32", 50, partial(pipeline, "float32", "0.90x")),
    "small-default": Part("images of 28 x 28, default layer", 15, partial(small, "default")),
    "small-lenet": Part("images of 28 x 28, LeNet's layers", 20, partial(small, "lenet")),
    "deep": Part("deep stacks beside nn.Sequential", 40, deep),
    "start": Part("runs with one new image, and bare Dask clusters", 50, start),
    "scheduling": Part("scheduling of 50,000 images in empty batches", 30, scheduling),
}

# -- all of them -------------------------------------------------------------------------------------------------------------------


class FailedError(Exception):
    """A part gave no figures."""


def run_part(command: list[str], limit_s: float) -> list[Row]:
    """The rows that a command prints as its last line; nothing of it is left, neither processes nor temporary files."""
    with tempfile.TemporaryDirectory(prefix="featuremaps-", ignore_cleanup_errors=True) as scratch:
        places = {"TMPDIR": scratch, "FEATUREMAPS_BENCHMARKS": str(FOLDER)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen(command, text=True, start_new_session=True, env=os.environ | places, **pipes)
        try:
            output, errors = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise FailedError(f"it took longer than {limit_s:g} s") from None
        finally:
            end_with_children(process)
    if process.returncode:
        raise FailedError((errors.strip().splitlines() or [f"it ended with {process.returncode}"])[-1])
    return [Row(*row) for row in json.loads(output.splitlines()[-1])]


def end_with_children(process: subprocess.Popen[str]) -> None:
    """Kill what is left of a part: its group of processes, in which Dask's workers are."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def instruction_sets() -> str:
    """What the processor says, and what the compiled layer uses of it."""
    from benchmarks.first_layer import versions

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    has = ", ".join(flag for flag in FLAGS if flag in flags) or "none known"
    return f"processor has: {has}; kernels for the default layer: {', '.join(versions(9, 2)) or 'torch only, no compiled code'}"


def measure_all(names: list[str], limit_s: float, results: dict[str, list[Row]], errors: dict[str, str]) -> None:
    """Run the parts in turn, and say what is being done."""
    for i, name in enumerate(names, 1):
        part, started = PARTS[name], time.monotonic()
        print(f"[{i}/{len(names)}] {name}: {part.title} (about {part.about_s} s)", flush=True)
        try:
            results[name] = run_part([sys.executable, "-m", "benchmarks.summary", "--part", name], limit_s)
        except FailedError as error:
            errors[name] = str(error)
        for line in results.get(name, [f"failed: {errors.get(name)}"]):
            print(f"    {line}", flush=True)
        print(f"    took {time.monotonic() - started:.0f} s", flush=True)


def load() -> str:
    return ", ".join(f"{value:.1f}" for value in os.getloadavg())


def report(results: dict[str, list[Row]], errors: dict[str, str]) -> None:
    print(f"\nload of the machine: {load()}")
    for rows in results.values():
        print(*rows, sep="\n")
    for name, error in errors.items():
        print(f"{name} failed: {error}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="Write machine, rows and errors there too.")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--limit", type=float, default=300, help="Seconds that a part may take.")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.part:
        print(json.dumps(PARTS[given.part].measure()))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: dict[str, list[Row]] = {}
    errors: dict[str, str] = {}
    about, sets = machine(), instruction_sets()
    print(f"{about}\n{sets}\nload of the machine: {load()}; files in {FOLDER}")
    code = 0
    try:
        measure_all(given.only, given.limit, results, errors)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print("\nStopped by Ctrl-C. This was measured:")
        code = 130
    for left in ("store.zarr", "loop.zarr", "start"):
        shutil.rmtree(FOLDER / left, ignore_errors=True)
    report(results, errors)
    if given.json:
        rows = [{"part": name, **row._asdict()} for name, found in results.items() for row in found]
        written = {"machine": about, "instruction_sets": sets, "load": os.getloadavg(), "rows": rows, "errors": errors}
        given.json.write_text(json.dumps(written, indent=1), encoding="utf-8")
    return code or bool(errors)


if __name__ == "__main__":
    sys.exit(main())
