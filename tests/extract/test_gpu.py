"""Batches on a device: everything but streams and pinned memory on the CPU, everything where there is a GPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipeline.config import ExtractorSpec, LayerSpec
from pipeline.errors import FeaturemapsError
from pipeline.extract import gpu
from pipeline.extract.choice import best_extractor
from pipeline.extract.cpu import Extractor
from pipeline.extract.devices import n_gpus
from pipeline.extract.gpu import DeviceExtractor
from pipeline.extract.gpu_sizes import GPU_STAGES
from pipeline.extract.layers import layer_names, output_bounds, output_sizes
from pipeline.extract.quantise import dequantise, quantisation
from pipeline.extract.weights import seeded_weights
from pipeline.store.schema import StoredLayer

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(n_gpus()))]
ONE = ExtractorSpec()
TWO = ExtractorSpec(
    layers=(LayerSpec(filters=3, kernel=(5, 3), pool=(2, 2), activation="tanh"), LayerSpec(filters=2, kernel=(3, 3))),
    outputs=("conv1", "conv2"),
)
SOME = TWO.model_copy(update={"outputs": ("conv1", "pooled")})
POOLED = TWO.model_copy(update={"outputs": ("pooled",)})
SIZE = (40, 52)


def stored_layers(spec, weights, dtype):
    bounds = dict(zip(layer_names(spec.layers), output_bounds(spec.layers, weights), strict=True))
    found = []
    for name in spec.output_names:
        q = quantisation(bounds[name], dtype)
        filters = spec.layers[int(name[4:]) - 1].filters
        found.append(StoredLayer(name, filters, dtype, q.scale_factor, q.add_offset, q.fill_value, q.error_bound))
    return found


def work(spec, sizes, dtype="float32", seed=0):
    """Images and destinations, each within a wider block, as the rows of a padded class are."""
    rng = np.random.default_rng(seed)
    items = []
    for size in sizes:
        layer_sizes = dict(zip(layer_names(spec.layers), output_sizes(spec.layers, *size), strict=True))
        out = {}
        for name in spec.map_names:
            height, width = layer_sizes[name]
            block = np.full((spec.layers[int(name[4:]) - 1].filters, height + 2, width + 3), 7, dtype)
            out[name] = block[:, :height, :width]
        items.append((rng.integers(0, 256, (*size, 3), np.uint8), out))
    return items


def make(spec=ONE, dtype="float32", where="cpu", **values):
    weights = seeded_weights(spec, 3)
    stored = stored_layers(spec, weights, dtype)
    return DeviceExtractor(spec, weights, stored, device=where, **values), Extractor(spec, weights, stored), stored


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "uint8"])
@pytest.mark.parametrize("spec", [ONE, TWO, SOME, POOLED], ids=["one layer", "two layers", "one pooled", "pooled"])
def test_batches_agree_with_one_image_after_another(spec, dtype, where):
    batched, single, stored = make(spec, dtype, where)
    batched._batch[SIZE] = 4
    items = work(spec, [SIZE] * 5 + [(33, 52), SIZE, (40, 30), (14, 12)] + [SIZE] * 4, dtype)
    found = list(batched.extract_each(SIZE, iter(items)))
    assert len(found) == len(items)
    for (image, out), pooled in zip(items, found, strict=True):
        expected_pooled = single.extract_into(image, expected := {name: np.empty_like(values) for name, values in out.items()})
        assert pooled.keys() == expected_pooled.keys() == set(spec.output_names)
        for layer in stored:
            for x, y in zip(pooled[layer.name], expected_pooled[layer.name], strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)
            if layer.name not in spec.map_names:
                continue
            a, b = (dequantise(maps[layer.name], layer) for maps in (out, expected))
            assert np.abs(a.astype(float) - b).max() <= 2 * layer.error_bound + 1e-5
            base = out[layer.name].base
            assert (base[:, out[layer.name].shape[1] :] == 7).all()  # what lies beyond is another's
            assert (base[:, :, out[layer.name].shape[2] :] == 7).all()


@pytest.mark.parametrize("where", DEVICES)
def test_a_result_does_not_depend_on_the_rest_of_its_batch(where):
    items = work(ONE, [SIZE, SIZE, SIZE, SIZE, (33, 52), (40, 30), SIZE])  # the smaller ones follow whole ones in their places
    together, _, _ = make(where=where)
    alone, _, _ = make(where=where)
    together._batch[SIZE] = alone._batch[SIZE] = 4
    list(together.extract_each(SIZE, items))
    for image, out in items:
        (pooled,) = alone.extract_each(SIZE, [(image, other := {"conv1": np.empty_like(out["conv1"])})])
        assert np.array_equal(other["conv1"], out["conv1"])
        assert np.isfinite(pooled["conv1"].mean).all()


@pytest.mark.parametrize("where", DEVICES)
def test_threads_share_an_extractor(where):
    batched, single, _ = make(where=where, threads=4)
    batched._batch[SIZE] = 2
    batches = [work(ONE, [SIZE] * 5, seed=i) for i in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda items: list(batched.extract_each(SIZE, items)), batches):
            assert len(found) == 5
    for items in batches:
        for image, out in items:
            np.testing.assert_allclose(out["conv1"], single.extract(image)["conv1"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", DEVICES)
def test_images_are_taken_as_there_is_room_and_come_back_in_order(where):
    batched, _, _ = make(where=where)
    batched._batch[SIZE] = 2
    taken = []

    def items():
        for i, item in enumerate(work(ONE, [SIZE] * 20)):
            taken.append(i)
            yield item

    results = batched.extract_each(SIZE, items())
    for i in range(20):
        next(results)
        assert len(taken) <= i + 1 + 2 * (GPU_STAGES + 1)
    assert list(results) == []


def test_memory_that_runs_out_halves_the_batch_and_loses_nothing(monkeypatch):
    """Stands for a GPU whose memory others take: the device's own allocator cannot be made to fail on a CPU."""
    batched, single, _ = make()
    batched._batch[SIZE] = 8
    start, sizes = gpu._Stage.start, []

    def start_or_fail(self, items):
        sizes.append(len(self.pixels))
        if len(self.pixels) > 2 or len(sizes) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        start(self, items)

    monkeypatch.setattr(gpu._Stage, "start", start_or_fail)
    items = work(ONE, [SIZE] * 13)
    assert len(list(batched.extract_each(SIZE, items))) == 13
    assert sizes == [8, 4, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1, 1]
    assert batched.batch_size(*SIZE) == 1
    for image, out in items:
        np.testing.assert_allclose(out["conv1"], single.extract(image)["conv1"], rtol=0, atol=1e-5)


def test_threads_that_run_out_of_memory_together_halve_the_batch_once(monkeypatch):
    """As above."""
    batched, single, _ = make(threads=6)
    batched._batch[SIZE] = 8
    together, start = threading.Barrier(6), gpu._Stage.start

    def start_or_fail(self, items):
        if len(self.pixels) > 4:
            together.wait(900)
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        start(self, items)

    monkeypatch.setattr(gpu._Stage, "start", start_or_fail)
    batches = [work(ONE, [SIZE] * 9, seed=i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        assert [len(found) for found in pool.map(lambda items: list(batched.extract_each(SIZE, items)), batches)] == [9] * 6
    assert batched.batch_size(*SIZE) == 4
    for image, out in batches[5]:
        np.testing.assert_allclose(out["conv1"], single.extract(image)["conv1"], rtol=0, atol=1e-5)


def test_a_batch_that_shrinks_while_its_images_are_taken_is_computed_as_it_was_begun():
    batched, _, _ = make()
    batched._batch[SIZE] = 4

    def items():
        for item in work(ONE, [SIZE] * 6):
            batched._batch[SIZE] = 2  # as another thread does that runs out of memory
            yield item

    assert len(list(batched.extract_each(SIZE, items()))) == 6


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_memory(monkeypatch):
    batched, _, _ = make()

    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu._Stage, "start", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(batched.extract_each(SIZE, work(ONE, [SIZE])))


def test_one_image_beyond_the_memory_is_an_error_that_says_what_to_do(monkeypatch):
    """As above."""
    batched, _, _ = make()
    batched._batch[SIZE] = 2

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu._Stage, "start", fail)
    with pytest.raises(FeaturemapsError, match=r"one image of 40 x 52 pixels does not fit the memory of cpu .*--gpus 0"):
        list(batched.extract_each(SIZE, work(ONE, [SIZE])))


def test_the_batch_follows_from_the_size_the_layers_and_the_memory():
    batched, _, _ = make()
    assert [batched.batch_size(*size) for size in ((28, 28), (516, 639), (6000, 8000))] == [2048, 16, 1]
    assert batched.version((516, 639)) == "cpu, batches of 16"
    wide, _, _ = make(ExtractorSpec(layers=(LayerSpec(filters=500),)))
    assert wide.batch_size(516, 639) == 1
    crowded, _, _ = make(threads=32)
    assert crowded.batch_size(516, 639) < 16
    full, _, _ = make()
    full.free_bytes = 0
    assert full.batch_size(516, 639) == 1


@pytest.mark.skipif(not n_gpus(), reason="no GPU")
def test_workers_share_the_gpus():
    weights = seeded_weights(ONE, 3)
    found = best_extractor(ONE, weights, stored_layers(ONE, weights, "uint8"), n_gpus() + 1, 2)
    assert found.device == torch.device("cuda", 1 % n_gpus())
    assert found.extractor.layers[0].weight.is_cuda
    assert torch.cuda.get_device_name() in found.version((516, 639))


@pytest.mark.skipif(not n_gpus(), reason="no GPU")
def test_tf32_is_off_unless_asked_for():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    differences = {}
    for tf32 in (False, True):
        spec = ExtractorSpec(tf32=tf32)
        batched, single, _ = make(spec, where="cuda")
        out = {"conv1": np.empty((2, 56, 56), np.float32)}
        list(batched.extract_each((64, 64), [(image, out)]))
        differences[tf32] = np.abs(out["conv1"] - single.reference(image)["conv1"]).max()
    assert differences[False] < 2e-6
    assert differences[True] < 5e-3
    if torch.cuda.get_device_capability() >= (8, 0):
        assert differences[True] > 2 * differences[False]
