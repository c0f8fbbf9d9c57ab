"""Each stage of the main job alone, on one core, beside the floor that no program of its kind goes below.

    python -m benchmarks.stages [--dtype uint8]

Prints milliseconds of one image of 639 x 516 pixels, medians of interleaved repeats, and ratios of the same run; in brackets those of
the thread's processor, which are better to compare where others use the machine. It runs in a thread of its own, as a task does: in a
main thread, Blosc would use threads of its own, too.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn.functional import conv2d

from benchmarks.images import FOLDER, machine, make
from pipeline.config import Job, make_job
from pipeline.extract import kernel
from pipeline.extract.cpu import Extractor, use_one_thread
from pipeline.extract.weights import load_weights
from pipeline.run import tasks
from pipeline.source import decoding
from pipeline.store import codecs, objects
from pipeline.store.settings import layout_of, store_spec

N = 52
REPEATS = 7


def stages(dtype: str) -> dict[str, Callable[[], object]]:
    """What is timed, each for `N` images."""
    tasks.keep_memory()
    use_one_thread()
    folder = make("photos", 2000, [(516, 639)])
    job: Job = make_job({"source": str(folder), "store": str(FOLDER / "stages.zarr"), "dtype": dtype})
    weights = load_weights(job.extractor, 3)
    spec = store_spec(job, str(folder), weights)
    extractor = Extractor(job.extractor, weights, spec.layers)
    files = [path.read_bytes() for path in sorted(folder.glob("*/*.jpg"))[:N]]
    assert len(files) == N
    images = [decoding.decode(data, job.decode) for data in files]
    layout = layout_of((516, 639), job.extractor, np.dtype(dtype).itemsize, 3)
    (layer,) = layout.layers
    rows = min(layout.shard_rows, N)
    block = np.empty((rows, layer.channels, layer.height, layer.width), dtype)
    weight, bias = (torch.from_numpy(weights[f"conv1_{part}"]) for part in ("weight", "bias"))
    weight = weight.contiguous(memory_format=torch.channels_last)  # as the pixels are: PyTorch's fastest
    q = spec.layers[0]
    target = FOLDER / "stage-object"

    def encode() -> Iterator[bytes]:
        return codecs.encode_shard(block, layer.chunk_rows, rows, q.fill_value)

    def reference() -> None:
        for i, image in enumerate(images[:4]):  # a slow one
            x = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 256
            maps = torch.sigmoid(conv2d(x, weight, bias))[0]
            if dtype.startswith("uint"):
                maps = (maps - q.add_offset) / q.scale_factor + 0.5
            block[i % rows] = maps.numpy().astype(dtype)

    def extract() -> None:
        for i, image in enumerate(images):
            extractor.extract_into(image, {"conv1": block[i % rows]})

    extract()
    plain = block.tobytes()
    return {
        "decode": lambda: [decoding.decode(data, job.decode) for data in files],
        "extract": extract,
        "digest": lambda: [tasks.maps_digest([block[i % rows]]) for i in range(N)],
        "encode and write": lambda: [objects.put_parts(target.with_suffix(f".{i}"), encode()) for i in range(N // rows)],
        "part: encode": lambda: [deque(encode(), maxlen=0) for _ in range(N // rows)],
        "floor: F.conv2d, sigmoid, conversion": reference,
        "floor: copy of the maps": lambda: [block.copy() for _ in range(N // rows)],
        "floor: file of the maps, uncompressed": lambda: [
            target.with_suffix(f".{i}").write_bytes(plain) for i in range(N // rows)
        ],
    }


def measure(dtype: str) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of one image per stage, by the clock and of the processor, medians of interleaved repeats."""
    timed = stages(dtype)
    found: dict[str, list[float]] = {name: [] for name in timed}
    cpu: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(REPEATS):
        for name, work in timed.items():
            started, cpu_started = time.perf_counter(), time.thread_time()
            work()
            n = 4 if name.startswith("floor: F.conv2d") else N
            found[name].append(1e3 * (time.perf_counter() - started) / n)
            cpu[name].append(1e3 * (time.thread_time() - cpu_started) / n)
            for path in FOLDER.glob("stage-object.*"):
                path.unlink()
    medians = [{name: statistics.median(values) for name, values in each.items()} for each in (found, cpu)]
    return medians[0], medians[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=["float32", "float16", "uint16", "uint8"])
    print(f"{machine()}; first layer: {kernel.version()}")
    for dtype in parser.parse_args().dtype or ["float32", "uint8"]:
        thread = threading.Thread(target=report, args=(dtype,))
        thread.start()
        thread.join()


def report(dtype: str) -> None:
    found, cpu = measure(dtype)
    print(f"\n{dtype}, ms per image of 639 x 516")
    for name, value in found.items():
        print(f"  {name:40s} {value:7.2f} ({cpu[name]:.2f})")
    ours, ours_cpu = (sum(value for name, value in each.items() if ": " not in name) for each in (found, cpu))
    print(
        f"  {'sum of our stages':40s} {ours:7.2f} ({ours_cpu:.2f})  = {1e3 / ours:.0f} ({1e3 / ours_cpu:.0f}) images/s on one core"
    )
    ratio = cpu["floor: F.conv2d, sigmoid, conversion"] / cpu["extract"]
    print(f"  extract is {ratio:.1f} times as fast as F.conv2d + sigmoid + conversion, by the processor")


if __name__ == "__main__":
    main()
