"""Worker processes that share a GPU. Where there is none the processor stands in: everything but streams and pinned memory."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from pipeline.api import run_job
from pipeline.cluster.kinds.local import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.extract.gpu import n_cuda_gpus
from pipeline.store.store import Store
from tests import support
from tests.conftest import content, make_images

pytestmark = pytest.mark.cluster
STAND_IN = Path(support.__file__).parent / "gpu_stand_in"


@pytest.fixture
def sharing(monkeypatch):
    """Two processes that share the GPU."""
    if not n_cuda_gpus():
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), os.environ.get("PYTHONPATH", "")]))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 1)
    with connect(LocalSpec(workers=2, gpus=1, processes_per_gpu=2)) as client:
        yield client


def extractors_of(dask_worker):
    """What a worker computes with: kind, device, and bytes of it that batches may take."""
    found = [plugin.extractor for plugin in dask_worker.plugins.values() if hasattr(plugin, "extractor")]
    return [(type(extractor).__name__, str(extractor.device), extractor.room.n_bytes) for extractor in found]


def half_of_the_gpu():
    """Bytes that batches of all processes may take."""
    return torch.cuda.mem_get_info()[1] // 2 if n_cuda_gpus() else 1 << 32


def test_processes_divide_a_gpu_and_the_death_of_one_changes_nothing(sharing, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.driver.COMMIT_S", 0.02)  # so that there is work left when the first progress comes
    source = make_images(tmp_path / "source", 60, [(64, 80), (50, 64), (40, 40)])
    stores = [tmp_path / "undisturbed.zarr", tmp_path / "disturbed.zarr"]
    killed = []

    def kill_one(progress):
        if progress.stage == "running" and not killed:
            killed.append(sharing.cluster.workers["local-0"].pid)
            os.kill(killed[0], signal.SIGKILL)

    for store, callback in zip(stores, (None, kill_one), strict=True):
        job = make_job({"source": str(source), "store": str(store), "dtype": "uint16"})
        assert run_job(job, sharing, on_progress=callback).n_done == 60
        found = [each for worker in sharing.run(extractors_of).values() for each in worker]
        assert {kind for kind, _, _ in found} == {"DeviceExtractor"}
        assert {device for _, device, _ in found} == {"cuda:0" if n_cuda_gpus() else "cpu"}
        assert max(n_bytes for _, _, n_bytes in found) <= half_of_the_gpu() // 2
    assert killed
    assert content(stores[0]) == content(stores[1])
    (receipt,) = Store(stores[1]).receipts()
    assert all(", batches of " in name for name in receipt["kernels"])
