"""Each stage of the main job alone, on one core, beside the floor that no program of its kind goes below.

    python -m benchmarks.stages [--dtype uint8]

Prints milliseconds of one image of 639 x 516 pixels, medians of interleaved repeats, and ratios of the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

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
    encoded = codecs.encode_shard(block, layer.chunk_rows, rows, q.fill_value)
    plain = block.tobytes()
    return {
        "decode": lambda: [decoding.decode(data, job.decode) for data in files],
        "extract": extract,
        "digest": lambda: [tasks.maps_digest([block[i % rows]]) for i in range(N)],
        "encode": lambda: [codecs.encode_shard(block, layer.chunk_rows, rows, q.fill_value) for _ in range(N // rows)],
        "write": lambda: [objects.put(target.with_suffix(f".{i}"), *encoded) for i in range(N // rows)],
        "floor: F.conv2d, sigmoid, conversion": reference,
        "floor: copy of the maps": lambda: [block.copy() for _ in range(N // rows)],
        "floor: file of the maps, uncompressed": lambda: [
            target.with_suffix(f".{i}").write_bytes(plain) for i in range(N // rows)
        ],
    }


def measure(dtype: str) -> dict[str, float]:
    """Milliseconds of one image per stage, median of interleaved repeats."""
    timed = stages(dtype)
    found: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(REPEATS):
        for name, work in timed.items():
            started = time.perf_counter()
            work()
            n = 4 if name.startswith("floor: F.conv2d") else N
            found[name].append(1e3 * (time.perf_counter() - started) / n)
            for path in FOLDER.glob("stage-object.*"):
                path.unlink()
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", action="append", choices=["float32", "float16", "uint16", "uint8"])
    print(f"{machine()}; first layer: {kernel.version()}")
    for dtype in parser.parse_args().dtype or ["float32", "uint8"]:
        found = measure(dtype)
        print(f"\n{dtype}, ms per image of 639 x 516")
        for name, value in found.items():
            print(f"  {name:40s} {value:7.2f}")
        ours = sum(value for name, value in found.items() if not name.startswith("floor"))
        print(f"  {'sum of our stages':40s} {ours:7.2f}  = {1e3 / ours:.0f} images/s on one core")
        ratio = found["floor: F.conv2d, sigmoid, conversion"] / found["extract"]
        print(f"  extract is {ratio:.1f} times as fast as F.conv2d + sigmoid + conversion")


if __name__ == "__main__":
    main()
