"""What a notebook pays: one random image, and a whole class reduced with Dask, for every dtype; then for other codecs and chunks.

python -m benchmarks.reading
"""

from __future__ import annotations

import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dask
import dask.array
import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from benchmarks.images import FOLDER, machine, make
from benchmarks.main_job import STORE, fresh

N = 500
COPIED = 208  # images of each variant: eight shards
MAPS = (2, 508, 631)
SHARD = 26
VARIANTS = FOLDER / "variants.zarr"


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def one_image_ms(read: Callable[[int], object], n: int) -> float:
    return 1e3 * statistics.median(seconds(lambda i=i: read(i)) for i in random.Random(0).sample(range(n), 20))  # type: ignore[misc]


def dtypes() -> None:
    """Our store, as the command writes it and `open_store` reads it."""
    from pipeline import open_store

    folder = make("photos", N, [(516, 639)])
    for dtype in ("float32", "float16", "uint16", "uint8"):
        assert fresh(folder, "--dtype", dtype)["n_done"] == N
        opened_s = seconds(lambda: open_store(STORE).images)
        store = open_store(STORE)
        paths = list(store.images["path"])
        assert len(paths) == N
        image_ms = one_image_ms(lambda i: store.image(paths[i])["conv1"].load(), N)  # noqa: B023 (called at once)
        maps = store.dataset("516x639")["conv1"]
        assert maps.shape == (N, *MAPS)
        class_s = seconds(lambda: maps.mean("image").compute())  # noqa: B023 (as above)
        print(
            f"{dtype:8s} {size_of(STORE) / N / 1e6:.2f} MB an image; open and list {opened_s:.2f} s; one image {image_ms:.0f} ms; mean of "
            f"the class {1e3 * class_s / N:.2f} ms an image, {N * np.prod(MAPS) * 4 / class_s / 1e9:.2f} GB/s of float32",
            flush=True,
        )


def variants(dtype: str) -> None:
    """The same maps as other codecs and chunks would keep them, written and read by plain Zarr."""
    maps = np.asarray(zarr.open_array(str(STORE / "516x639" / "conv1"), mode="r", zarr_format=3)[:COPIED])
    typesize = maps.dtype.itemsize

    def blosc(cname: str, shuffle: str) -> list[object]:
        return [BloscCodec(typesize=typesize, cname=cname, clevel=5, shuffle=shuffle), Crc32cCodec()]

    bits = blosc("lz4", "bitshuffle")
    cases = {
        "lz4, bits shuffled (ours)": (1, SHARD, bits),
        "lz4, bytes shuffled": (1, SHARD, blosc("lz4", "shuffle")),
        "zstd, bits shuffled": (1, SHARD, blosc("zstd", "bitshuffle")),
        "zstd as Zarr does by default": (1, SHARD, [ZstdCodec()]),
        "not compressed": (1, SHARD, None),
        "ours, not sharded": (1, None, bits),
        "ours, 8 images in a chunk": (8, 24, bits),
        "ours, 26 images in a chunk, not sharded": (SHARD, None, bits),
    }
    for name, (chunk, shard, compressors) in cases.items():
        shutil.rmtree(VARIANTS, ignore_errors=True)
        array = zarr.create_array(
            VARIANTS,
            shape=maps.shape,
            chunks=(chunk, *MAPS),
            shards=(shard, *MAPS) if shard else None,
            dtype=maps.dtype,
            compressors=compressors,  # type: ignore[arg-type]
        )
        array[:] = maps
        assert np.array_equal(array[7], maps[7])
        image_ms = one_image_ms(lambda i: array[i], COPIED)  # noqa: B023 (called at once)
        step = shard or SHARD
        lazy = dask.array.from_zarr(array, chunks=(step, *MAPS))
        class_s = seconds(lambda: lazy.mean(0, dtype="float32").compute())  # noqa: B023 (as above)
        print(
            f"{dtype:8s} {name:40s} {size_of(VARIANTS) / COPIED / 1e6:.2f} MB an image; one image {image_ms:5.1f} ms; mean "
            f"{1e3 * class_s / COPIED:.2f} ms an image",
            flush=True,
        )
    shutil.rmtree(VARIANTS)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(FOLDER).free < 4e9:
        sys.exit(f"{FOLDER} needs 4 GB free: set FEATUREMAPS_BENCHMARKS to a larger disk")
    print(machine())
    dtypes()
    for dtype in ("float32", "uint8"):
        assert fresh(make("photos", N, [(516, 639)]), "--dtype", dtype)["n_done"] == N
        variants(dtype)


if __name__ == "__main__":
    main()
