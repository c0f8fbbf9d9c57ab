from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from pipeline.config import ExtractorSpec, LayerSpec
from pipeline.extract import devices, kernel
from pipeline.extract.activations import ACTIVATIONS
from pipeline.extract.choice import CompiledFirst, best_extractor
from pipeline.extract.compiled import CompiledExtractor
from pipeline.extract.cpu import Extractor
from pipeline.extract.weights import seeded_weights

ONE = ExtractorSpec()
TWO = ExtractorSpec(layers=(LayerSpec(), LayerSpec(kernel=(3, 3))))
POOLED = ExtractorSpec(layers=(LayerSpec(pool=(2, 2)),))
needs_kernel = pytest.mark.skipif(kernel.version() == "torch", reason="the layer is not compiled")


class Float16:
    name, dtype, scale_factor, add_offset = "conv1", "float16", 1.0, 0.0


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch):
    monkeypatch.setattr(devices, "n_gpus", lambda: 0)


@needs_kernel
def test_compiled_code_is_used_alone_where_it_computes_all(monkeypatch):
    for spec, stored, expected in (
        (ONE, (), CompiledExtractor),
        (TWO, (), CompiledFirst),
        (POOLED, (), CompiledFirst),
        (ONE, (Float16,), Extractor),
    ):
        assert isinstance(best_extractor(spec, seeded_weights(spec, 3), stored, 0, 1), expected)
    with monkeypatch.context() as patch:
        patch.setitem(ACTIVATIONS, "sigmoid", ACTIVATIONS["sigmoid"]._replace(compiled=None))
        by_torch = best_extractor(ONE, seeded_weights(ONE, 3), (), 0, 1)
        assert isinstance(by_torch, Extractor)
        assert by_torch.version((20, 20)) == "torch"
    monkeypatch.setattr(kernel, "MAX_LANES", 0)
    assert isinstance(best_extractor(ONE, seeded_weights(ONE, 3), (), 0, 1), Extractor)


@needs_kernel
def test_a_worker_of_one_compiled_layer_or_of_small_images_never_imports_torch():
    code = """
import sys
import numpy as np
from pipeline.config import ExtractorSpec, LayerSpec
from pipeline.extract.choice import best_extractor
from pipeline.extract.weights import load_weights
import pipeline.run.tasks
best_extractor(ExtractorSpec(), load_weights(ExtractorSpec(), 3), (), 0, 1).extract(np.zeros((20, 20, 3), np.uint8))
pooled = ExtractorSpec(layers=(LayerSpec(pool=(2, 2)), LayerSpec(kernel=(3, 3))))
list(best_extractor(pooled, load_weights(pooled, 3), (), 0, 1).extract_each((20, 20), [(np.zeros((20, 20, 3), np.uint8), {})]))
sys.exit("torch" in sys.modules)
"""
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


@needs_kernel
def test_maps_without_a_destination_or_with_a_strided_one_are_the_same():
    weights = seeded_weights(ONE, 3)
    compiled = CompiledExtractor(ONE, weights)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    expected, pooled = compiled.extract(image), compiled.extract_into(image, {})
    strided = np.full((2, 22, 64), 7, np.float32)[:, :, ::2]
    assert strided.shape == expected["conv1"].shape
    for found in (pooled, compiled.extract_into(image, {"conv1": strided})):
        np.testing.assert_array_equal(found["conv1"], pooled["conv1"])
    np.testing.assert_array_equal(strided, expected["conv1"])
    np.testing.assert_allclose(pooled["conv1"].mean, expected["conv1"].mean((1, 2)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["nvidia0", "dxg", "kfd", "nvhost-gpu"])
def test_a_gpu_is_looked_for_where_there_is_a_device_file(tmp_path, monkeypatch, name):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "nvidiactl").touch()
    assert not devices.may_have_gpus(tmp_path)
    (tmp_path / name).touch()
    assert devices.may_have_gpus(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not devices.may_have_gpus(tmp_path)


@needs_kernel
def test_torch_is_made_once_and_for_large_images_only():
    made = []

    def by_torch():
        made.append(1)
        return Extractor(POOLED, weights)

    weights = seeded_weights(POOLED, 3)
    extractor = CompiledFirst(CompiledExtractor(POOLED, weights), by_torch)
    small, large = (np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8) for side in (28, 700))
    assert extractor.version((28, 28)) != "torch"
    (pooled,) = extractor.extract_each((28, 28), [(small, {})])
    assert not made
    assert extractor.version((700, 700)) == "torch"
    assert extractor.version((28, 28), (700, 700)) == extractor.version((28, 28))
    of_small, of_large = extractor.extract_each((700, 700), [(small, {}), (large, {})])
    assert made == [1]
    np.testing.assert_array_equal(of_small["conv1"], pooled["conv1"])  # whatever the class that it lies in
    np.testing.assert_allclose(
        of_large["conv1"].mean, Extractor(POOLED, weights).reference(large)["conv1"].mean((1, 2)), atol=1e-6
    )
