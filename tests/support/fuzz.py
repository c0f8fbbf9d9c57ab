"""Damaged files of every kind that is read: ``python -m tests.support.fuzz --examples N --seed S`` says how each kind ended."""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from pipeline.config import DecodeSpec, ExtractorSpec, load_job
from pipeline.errors import ImageError, UsageError
from pipeline.extract.weights import load_weights
from pipeline.source.decoding import decode, probe
from tests.source.test_decoding import FILES

CODES = {
    "empty",
    "not_an_image",
    "unsupported_format",
    "too_many_pixels",
    "too_large",
    "truncated",
    "corrupt",
    "unsupported_mode",
}
SLOW_S = 100.0
BOUNDED = DecodeSpec(pixel_limit=1_000_000)
INTERESTING = [
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0",
    b"\x80",
    b"\xff\xfe",
    b"\xff\xda",
    b"\1\0\0\0",
]
JOB = b"""source: photos
store: features.zarr
dtype: uint8
decode: {color: grey, background: [1, 2, 3], pixel_limit: 99, formats: [PNG], resize: [20, 30], resize_filter: box}
extractor:
  layers: [&a {filters: 2, kernel: 9, pool: 1, activation: sigmoid}, *a]
  seed: 23455
  outputs: [conv1]
max_removed: 0.1
"""
YAML_WORDS = [
    b"!!bool ",
    b"!!timestamp ",
    b"!!int ",
    b"!!binary ",
    b"!!python/object:os.system ",
    b"&a ",
    b"*a",
    b"{",
    b"[",
    b"? ",
    b"<<: ",
    b"~",
    b"\t",
]
LAYERS = ExtractorSpec(weights="x").layers
WEIGHTS = save({"conv1.weight": np.ones((2, 3, 9, 9), np.float32), "conv1.bias": np.ones(2, np.float32)})


def damaged(data: bytes, random_: random.Random, words: list[bytes] = INTERESTING) -> bytes:
    """Some bytes changed, copied, cut out or put in, mostly near the beginning."""
    found = bytearray(data)
    for _ in range(random_.choice((1, 1, 2, 4, 16))):
        reach = min(len(found), random_.choice((64, 512, len(data)))) or 1
        place, kind = random_.randrange(reach), random_.randrange(6)
        if kind == 0:
            found[place : place + 1] = bytes([random_.randrange(256)])
        elif kind == 1:
            word = random_.choice(words)
            found[place : place + len(word)] = word
        elif kind == 2:
            found[place:place] = random_.choice(words)
        elif kind == 3:
            found[place:place] = found[place : place + random_.randrange(1, 200)] * random_.choice((1, 1, 50))
        elif kind == 4:
            del found[place : place + random_.randrange(1, 50)]
        else:
            del found[random_.randrange(len(found) + 1) :]
    return bytes(found)


def try_image(data: bytes) -> str:
    """How both functions end, which is alike; anything but pixels and an `ImageError` passes."""
    ends = []
    for function in (probe, decode):
        try:
            result = function(data, BOUNDED)
        except ImageError as error:
            ends.append((error.code, None))
        else:
            ends.append(("done", (result.input_height, result.input_width) if function is probe else result.shape[:2]))
    (probed, size), (end, shape) = ends
    assert {probed, end} <= CODES | {"done"}, ends
    assert (size == shape) if end == "done" else (probed in {"done", end}), f"probe says {probed} {size}, decode {end} {shape}"
    return end


def try_job(data: bytes, folder: Path) -> str:
    """A job, or a `UsageError`."""
    path = folder / "job.yaml"
    path.write_bytes(data)
    try:
        load_job(path)
    except UsageError:
        return "refused"
    return "job"


def try_weights(data: bytes, folder: Path) -> str:
    """Weights, or a `UsageError`."""
    path = folder / "weights.safetensors"
    path.write_bytes(data)
    try:
        load_weights(ExtractorSpec(weights=str(path)), 3)
    except UsageError:
        return "refused"
    return "weights"


def fuzz(examples: int, seed: int, folder: Path) -> dict[str, Counter[str]]:
    """Ends by kind of file, after that many examples of each kind.

    Raises
    ------
    AssertionError
        With the kind, the number and the bytes of an example that ended otherwise, or took too long.
    """
    kinds: dict[str, tuple[bytes, list[bytes], Callable[[bytes], str]]] = {
        name: (data, INTERESTING, try_image) for name, data in FILES.items()
    }
    kinds["job"] = JOB, YAML_WORDS, lambda data: try_job(data, folder)
    kinds["weights"] = WEIGHTS, INTERESTING, lambda data: try_weights(data, folder)
    ends: dict[str, Counter[str]] = {name: Counter() for name in kinds}
    for number in range(examples):
        for name, (sound, words, attempt) in kinds.items():
            data = damaged(sound, random.Random(f"{seed} {name} {number}"), words)
            started_s = time.perf_counter()
            try:
                ends[name][attempt(data)] += 1
            except BaseException as error:
                error.add_note(f"{name}, seed {seed}, example {number}: {data!r}")
                raise
            elapsed_s = time.perf_counter() - started_s
            assert elapsed_s < SLOW_S, f"{elapsed_s:.1f} s for {name}, seed {seed}, example {number}: {data!r}"
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ends = fuzz(options.examples, options.seed, Path(folder))
    for name, counts in ends.items():
        print(f"{name:18} " + ", ".join(f"{end} {n}" for end, n in counts.most_common()))
    print(f"{sum(counts.total() for counts in ends.values())} examples")


if __name__ == "__main__":
    main()
