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
from pipeline.extract.gpu import DeviceExtractor, n_cuda_gpus
from pipeline.extract.gpu_memory import Room, adjoining
from pipeline.extract.gpu_sizes import GPU_STAGES
from pipeline.extract.layers import layer_names, output_bounds, output_sizes
from pipeline.extract.quantise import dequantise, quantisation
from pipeline.extract.weights import seeded_weights
from pipeline.store.schema import StoredLayer

DEVICES = ["cpu", *(f"cuda:{i}" for i in range(n_cuda_gpus()))]
needs_gpu = pytest.mark.skipif(not n_cuda_gpus(), reason="no GPU")
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
    found = list(together.extract_each(SIZE, items))
    for image, out in items:
        (pooled,) = alone.extract_each(SIZE, [(image, other := {"conv1": np.empty_like(out["conv1"])})])
        assert np.array_equal(other["conv1"], out["conv1"])
        np.testing.assert_array_equal(pooled["conv1"], found.pop(0)["conv1"])


@pytest.mark.parametrize("where", DEVICES)
def test_buffers_that_are_used_again_remember_no_smaller_image(where):
    device, _, _ = make(where=where)
    device._batch[SIZE] = 4
    whole = [(image, {}) for image, _ in work(ONE, [SIZE] * 4)]
    ((small, _),) = work(ONE, [(20, 30)])
    first = list(device.extract_each(SIZE, whole))
    list(device.extract_each(SIZE, [*whole[:3], (small, {})]))
    list(device.extract_each(SIZE, whole[:1]))
    for before, again in zip(first, device.extract_each(SIZE, whole), strict=True):
        np.testing.assert_array_equal(before["conv1"], again["conv1"])


@pytest.mark.parametrize("where", DEVICES)
def test_a_batch_that_cannot_be_waited_for_is_an_error_and_gives_its_memory_back(where, monkeypatch):
    device, _, _ = make(where=where)
    device._batch[SIZE] = 1
    with monkeypatch.context() as patched:
        patched.setattr(gpu._Stage, "wait", lambda _: (_ for _ in ()).throw(RuntimeError("device lost")))
        with pytest.raises(RuntimeError, match="device lost"):
            list(device.extract_each(SIZE, work(ONE, [SIZE] * 3)))
    assert device.room._taken == []


@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_maps_of_a_block_of_rows_go_straight_there_and_others_by_a_detour(where, dtype):
    batched, single, (layer,) = make(ONE, dtype, where)
    batched._batch[SIZE] = 4
    sizes = [SIZE, SIZE, SIZE, (33, 52), SIZE, SIZE, SIZE]
    rows = [0, 1, 3, 4, 5, 6, 2]  # a gap, an order of its own, and a row that has less
    block = batched.block((8, *single.stack.shapes(*SIZE, 3)["conv1"]), dtype)
    block[:] = 7
    images = [image for image, _ in work(ONE, sizes)]
    places = [block[row, :, : height - 8, : width - 8] for row, (height, width) in zip(rows, sizes, strict=True)]
    list(batched.extract_each(SIZE, [(image, {"conv1": place}) for image, place in zip(images, places, strict=True)]))
    for image, place in zip(images, places, strict=True):
        expected = dequantise(single.extract(image)["conv1"], layer)
        np.testing.assert_allclose(dequantise(place, layer), expected, rtol=0, atol=2 * layer.error_bound + 1e-5)
    assert (block[7] == 7).all()
    assert (block[4, :, 25:] == 7).all()
    assert [len(run) for _, run in adjoining([block[row] for row in rows])] == [2, 4, 1]


@pytest.mark.parametrize("where", DEVICES)
def test_a_caller_that_leaves_gives_back_what_its_batches_took(where):
    batched, _, _ = make(where=where)
    batched._batch[SIZE] = 2
    results = batched.extract_each(SIZE, work(ONE, [SIZE] * 6))
    next(results)
    assert batched.room._taken
    results.close()
    assert not batched.room._taken


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

    def start_or_fail(self, items, n_bytes):
        sizes.append(len(self.pixels))
        if len(self.pixels) > 2 or len(sizes) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        start(self, items, n_bytes)

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

    def start_or_fail(self, items, n_bytes):
        if len(self.pixels) > 4:
            together.wait(900)
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        start(self, items, n_bytes)

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


def test_an_image_that_does_not_fit_beside_others_is_tried_alone(monkeypatch):
    """As above."""
    batched, single, _ = make(threads=4)
    batched._batch[SIZE] = 1
    start, alone = gpu._Stage.start, []

    def start_or_fail(self, items, n_bytes):
        if len(batched.room._taken) > 1 or n_bytes < batched.room.n_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        alone.append(n_bytes)
        start(self, items, n_bytes)

    monkeypatch.setattr(gpu._Stage, "start", start_or_fail)
    batches = [work(ONE, [SIZE] * 3, seed=i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert [len(found) for found in pool.map(lambda items: list(batched.extract_each(SIZE, items)), batches)] == [3] * 4
    assert len(alone) == 12
    for image, out in batches[3]:
        np.testing.assert_allclose(out["conv1"], single.extract(image)["conv1"], rtol=0, atol=1e-5)


def test_batches_wait_for_room_and_one_that_is_larger_than_all_goes_alone():
    room = Room(10)
    assert room.take(6, wait=True)
    assert not room.take(6, wait=False)
    assert room.take(4, wait=False)
    taken = threading.Thread(target=room.take, args=(20,), kwargs={"wait": True})
    taken.start()
    room.give(6)
    room.give(4)
    taken.join()
    assert not room.take(1, wait=False)
    room.give(20)
    assert room.take(1, wait=False)


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
    assert batched.version((516, 639)) == batched.version((28, 28), (516, 639)) == "cpu, batches of 16"
    wide, _, _ = make(ExtractorSpec(layers=(LayerSpec(filters=500),)))
    assert wide.batch_size(516, 639) == 1
    crowded, _, _ = make(threads=32)
    assert crowded.batch_size(516, 639) < 16
    quarter, _, _ = make(share=0.25)
    assert quarter.room.n_bytes == batched.room.n_bytes // 4
    full, _, _ = make()
    full.room.n_bytes = 0
    assert full.batch_size(516, 639) == 1


@needs_gpu
def test_workers_share_the_gpus():
    weights = seeded_weights(ONE, 3)
    found = best_extractor(ONE, weights, stored_layers(ONE, weights, "uint8"), n_cuda_gpus() + 1, 2)
    assert found.device == torch.device("cuda", 1 % n_cuda_gpus())
    assert found.extractor.layers[0].weight.is_cuda
    assert torch.cuda.get_device_name() in found.version((516, 639))


@needs_gpu
def test_threads_on_a_full_gpu_halve_their_batches_and_lose_nothing():
    size = (516, 639)
    batched, single, _ = make(where="cuda", threads=4)
    list(batched.extract_each(SIZE, work(ONE, [SIZE])))  # loads cuDNN, which takes memory of its own
    batched._batch[size] = 64
    taken = torch.empty(torch.cuda.mem_get_info()[0] - (300 << 20), dtype=torch.uint8, device="cuda")
    batches = [work(ONE, [size] * 9, seed=i) for i in range(4)]
    try:
        with ThreadPoolExecutor(4) as pool:
            assert [len(found) for found in pool.map(lambda items: list(batched.extract_each(size, items)), batches)] == [9] * 4
    finally:
        del taken
        torch.cuda.empty_cache()
    assert batched.batch_size(*size) < 64
    for items in batches:
        for image, out in items:
            np.testing.assert_allclose(out["conv1"], single.extract(image)["conv1"], rtol=0, atol=1e-5)


@needs_gpu
def test_the_same_images_give_the_same_bits_again():
    for spec in (ONE, TWO):
        batched, _, _ = make(spec, where="cuda", threads=2)
        first, second = (work(spec, [SIZE] * 40, seed=1) for _ in range(2))
        pooled = [list(batched.extract_each(SIZE, items)) for items in (first, second)]
        for (_, a), (_, b), p, q in zip(first, second, *pooled, strict=True):
            assert all(np.array_equal(a[name], b[name]) for name in a)
            assert all(np.array_equal(p[name], q[name]) for name in p)


@needs_gpu
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


def test_whoever_waits_for_much_memory_is_not_overtaken():
    room = Room(10)
    assert room.take(6, wait=False)
    large = threading.Thread(target=room.take, args=(10,), kwargs={"wait": True})
    large.start()
    while not room._waiting:
        pass
    assert not room.take(4, wait=False)  # it would fit
    room.give(6)
    large.join()
    assert room._taken == [10]
