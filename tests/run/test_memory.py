"""The projection of a worker's memory, compared with what worker processes really took."""

from __future__ import annotations

import os
import re
from pathlib import Path

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster
from PIL import Image

from pipeline.api import run_job
from pipeline.checks.plan import plan_job
from pipeline.cluster.dask_settings import DASK_SETTINGS
from pipeline.config import ExtractorSpec, make_job
from pipeline.errors import UsageError
from pipeline.run.plan import memory
from pipeline.run.plan.memory import (
    COMPILED_BASE_BYTES,
    WorkerKind,
    guess_decode_bytes,
    require_memory,
    usable_bytes,
    wanted_limit_bytes,
    worker_memory_bytes,
)
from pipeline.run.slots import ROLES
from pipeline.store.schema import Status
from pipeline.store.settings import Scratch, scratch_of
from pipeline.store.store import Store
from tests.store.test_layout import layout_for


def test_projected_memory_grows_with_the_image_the_window_and_the_threads():
    small = worker_memory_bytes([layout_for((64, 64))], 3, WorkerKind(1, 2))
    large = worker_memory_bytes([layout_for((64, 64)), layout_for((8000, 6000))], 3, WorkerKind(1, 2))
    assert worker_memory_bytes([], 3, WorkerKind(1, 2)) < small < large
    assert worker_memory_bytes([layout_for((64, 64))], 3, WorkerKind(1, 4)) > small
    assert worker_memory_bytes([layout_for((64, 64))], 3, WorkerKind(2, 2)) > small
    assert worker_memory_bytes([layout_for((64, 64))], 3, WorkerKind(1)) < small  # where one task does all, no batch is held
    assert worker_memory_bytes([layout_for((64, 64))], 3, WorkerKind(1, 2, has_gpu=True)) > small
    hidden = worker_memory_bytes([layout_for((64, 64))], 3, WorkerKind(1), scratch={(64, 64): Scratch(2**30)})
    assert hidden > 2**30  # layers that are computed and not stored


def test_decoding_and_compressing_do_not_add_up():
    layout = layout_for((4000, 6000), itemsize=1)
    (layer,) = layout.layers
    least = worker_memory_bytes([layout], 3, WorkerKind(1))
    assert least - COMPILED_BASE_BYTES < 3.3 * layer.row_bytes  # the maps, their compressed object twice, a little scratch
    assert worker_memory_bytes([layout], 3, WorkerKind(1), 2 * layer.row_bytes) == least
    assert worker_memory_bytes([layout], 3, WorkerKind(1), 9 * layer.row_bytes) == least + 7 * layer.row_bytes


def test_a_worker_that_is_too_small_is_refused_with_the_number_that_would_do():
    layouts = {(4000, 6000): layout_for((4000, 6000))}
    needed = worker_memory_bytes(layouts.values(), 3, WorkerKind(2), 10**8)
    wanted = wanted_limit_bytes(needed)
    assert usable_bytes(wanted - 2**20) < needed <= usable_bytes(wanted)
    require_memory(layouts, 3, WorkerKind(2), wanted, 10**8, {})
    require_memory(layouts, 3, WorkerKind(2), 0, 10**8, {})
    text = (
        f"images of 4000 x 6000 pixels need up to {needed / 2**20:.0f} MiB per worker, and a worker of {wanted // 2**20 - 1} MiB may use "
        f"{usable_bytes(wanted - 2**20) / 2**20:.0f} MiB: it would be paused or killed, so its images were not started; run with fewer "
        f"workers of at least {wanted // 2**20} MiB each"
    )
    with pytest.raises(UsageError, match=re.escape(text)):
        require_memory(layouts, 3, WorkerKind(2), wanted - 2**20, 10**8, {})


@pytest.mark.cluster
def test_a_worker_just_large_enough_by_the_projection_finishes_and_is_never_paused(tmp_path):
    """Its memory is kept from batch to batch, so a pause would last for ever."""
    source = make_photos(tmp_path / "source", 40, (516, 639), ".jpg")
    values = {"source": str(source), "store": str(tmp_path / "f.zarr"), "workers": 1}
    limit = wanted_limit_bytes(plan_job(make_job(values)).worker_memory_bytes)
    with pytest.raises(
        UsageError,
        match=rf"workers of at least {limit // 2**20} MiB each .*; of a cluster `memory` of all its groups in cluster.yaml\)",
    ):
        run_job(make_job({**values, "memory_limit_bytes": limit - 2**20}))
    assert run_job(make_job({**values, "memory_limit_bytes": limit})).n_done == 40


def peak_bytes() -> int:
    """Of this process, ever."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def make_photos(folder: Path, n: int, size: tuple[int, int], suffix: str) -> Path:
    """Pictures with detail, whose maps do not compress much, which a few make many of."""
    folder.mkdir()
    rng, (height, width) = np.random.default_rng(1), size
    first = folder / f"0{suffix}"
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(first)
    for i in range(1, n):
        os.link(first, folder / f"{i}{suffix}")
    return folder


DEEP = [
    {"filters": 16, "kernel": 5, "activation": "relu", "pool": 2},
    {"filters": 32, "kernel": 5, "activation": "relu", "pool": 2},
    {"filters": 64, "kernel": 3, "activation": "tanh"},
]
# Enough for each thread to have a whole shard: less takes less than is projected.
WORKLOADS = {
    "tiny": (1, 3000, (28, 28), ".png", {}),
    "photographs in two threads": (2, 260, (516, 639), ".jpg", {"dtype": "uint8"}),
    "a large image": (1, 1, (3000, 4000), ".png", {"dtype": "uint8"}),
    "large images in two threads": (2, 4, (3000, 4000), ".jpg", {}),
    "a deep stack in two threads": (2, 60, (512, 512), ".png", {"extractor": {"layers": DEEP}}),
}


@pytest.mark.cluster
@pytest.mark.skipif(not memory.version("torch").endswith("+cpu"), reason="what torch's other builds take is a bound only")
@pytest.mark.parametrize("name", WORKLOADS)
def test_the_projection_is_at_least_the_peak_of_a_real_worker_and_not_much_more(tmp_path, monkeypatch, name):
    threads, n, size, suffix, values = WORKLOADS[name]
    source = make_photos(tmp_path / "source", n, size, suffix)
    projected = []

    def project(*arguments):
        projected.append(worker_memory_bytes(*arguments))
        return projected[-1]

    monkeypatch.setattr("pipeline.run.plan.memory.worker_memory_bytes", project)
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), **values})
    options = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0", "memory_limit": "6GiB", "silence_logs": False}
    resources = dict.fromkeys(ROLES, threads)
    with (
        dask.config.set(DASK_SETTINGS),
        LocalCluster(n_workers=1, threads_per_worker=threads, resources=resources, **options) as cluster,
        Client(cluster) as client,
    ):
        assert run_job(job, client).n_done == n
        (peak,) = client.run(peak_bytes).values()
    assert peak <= max(projected) <= 1.75 * peak, f"projected {max(projected) / 2**20:.0f} MiB, took {peak / 2**20:.0f} MiB"


def test_what_an_earlier_run_probed_is_decoded_too(run, tmp_path):
    source = make_photos(tmp_path / "source", 2, (1000, 1200), ".png")
    run(source)
    store = Store(tmp_path / "features.zarr")
    store.commit("1000x1200", np.array([1]), {"status": np.array([Status.PENDING], np.uint8)})
    preview = plan_job(make_job({"source": str(source), "store": str(store.path), "workers": 1}))
    layout = store.classes[1000, 1200].layout
    expected = guess_decode_bytes((1000, 1200), (source / "1.png").stat().st_size)
    scratch = {(1000, 1200): scratch_of(ExtractorSpec(), "float32", (1000, 1200), 3)}
    assert preview.worker_memory_bytes == worker_memory_bytes([layout], 3, WorkerKind(1), expected, scratch)
    assert run(source).n_done == 1
