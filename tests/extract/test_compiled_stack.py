from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import ExtractorSpec, LayerSpec
from pipeline.errors import FeaturemapsError
from pipeline.extract import kernel
from pipeline.extract.compiled import MOST_AT_ONCE, CompiledExtractor
from pipeline.extract.cpu import Extractor
from pipeline.extract.layers import output_bounds, output_sizes, receptive_field
from pipeline.extract.quantise import dequantise, quantisation
from pipeline.extract.weights import seeded_weights
from tests.extract.test_cpu import LENET, golden_lenet
from tests.extract.test_kernel import COMPILED, needs_kernel

pytestmark = needs_kernel
LANES = [4, 8, 16, 32]


class Stored:
    def __init__(self, name: str, bounds: tuple[float, float], dtype: str) -> None:
        q = quantisation(bounds, dtype)
        self.name, self.dtype, self.scale_factor, self.add_offset, self.error_bound = (
            *(name, dtype, q.scale_factor, q.add_offset, q.error_bound),
        )


def stored(spec: ExtractorSpec, weights, dtype: str) -> list[Stored]:
    bounds = output_bounds(spec.layers, weights)
    return [Stored(name, bounds[int(name.removeprefix("conv")) - 1], dtype) for name in spec.output_names]


def noise(n: int, height: int, width: int, channels: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8))


def together(extractor: CompiledExtractor, images: list[np.ndarray]):
    out = [extractor.stack.empty(image) for image in images]
    return out, list(extractor.extract_each(images[0].shape[:2], zip(images, out, strict=True)))


layers = st.builds(
    LayerSpec,
    filters=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    activation=st.sampled_from([name for name in COMPILED if name != "none"]),
)


@settings(deadline=None, max_examples=60)
@given(
    stack=st.lists(layers, min_size=1, max_size=3),
    channels=st.sampled_from([1, 3]),
    more=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    dtype=st.sampled_from(["float32", "uint8", "uint16"]),
    lanes=st.sampled_from(LANES),
    n=st.sampled_from([1, 2, 7]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_stack_equals_the_reference_and_does_not_depend_on_its_batch(stack, channels, more, dtype, lanes, n, seed):
    spec = ExtractorSpec(layers=tuple(stack), seed=seed, outputs=tuple(f"conv{i + 1}" for i in range(len(stack))))
    weights, field = seeded_weights(spec, channels), receptive_field(spec.layers)
    images = noise(n, field.height + more[0], field.width + more[1], channels, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "MAX_LANES", lanes)
        extractor = CompiledExtractor(spec, weights, stored(spec, weights, dtype))
        found = extractor.whole.compute(images, out := [extractor.stack.empty(image) for image in images])
        alone = extractor.whole.compute(images[-1:], last := [extractor.stack.empty(images[-1])])
    exact = Extractor(spec, weights).reference(images[-1])
    for name, maps in exact.items():
        np.testing.assert_array_equal(out[-1][name], last[0][name])
        np.testing.assert_array_equal(found[-1][name], alone[0][name])
        q = extractor.stack.stored[name]
        assert np.abs(dequantise(out[-1][name], q) - maps).max() <= q.error_bound + 3e-6
        expected = maps.mean((1, 2)), maps.std((1, 2)), maps.min((1, 2)), maps.max((1, 2))
        np.testing.assert_allclose(found[-1][name], expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize("stack", ["8x3x3:relu:pool2,24x5x5:tanh", "16x5x5:pool3,9x1x1:none,8x3x3"])
def test_large_images_are_computed_some_rows_at_a_time(stack, dtype):
    layers = tuple(LayerSpec.parse(layer) for layer in stack.split(","))
    spec = ExtractorSpec(layers=layers, outputs=tuple(f"conv{i + 1}" for i in range(len(layers))))
    weights = seeded_weights(spec, 3)
    extractor = CompiledExtractor(spec, weights, stored(spec, weights, dtype))
    assert extractor.is_enough
    images = noise(2, 301, 217, 3)
    out = [
        {
            name: np.zeros((len(maps), maps.shape[1] + 2, maps.shape[2] + 3), maps.dtype)
            for name, maps in extractor.stack.empty(images[0]).items()
        }
        for _ in images
    ]
    views = [{name: maps[:, 1:-1, 2:-1] for name, maps in each.items()} for each in out]
    pooled = list(extractor.extract_each((301, 217), zip(images, views, strict=True)))
    for image, each, view, found in zip(images, out, views, pooled, strict=True):
        for name, maps in Extractor(spec, weights).reference(image).items():
            q = extractor.stack.stored[name]
            assert np.abs(dequantise(view[name], q) - maps).max() <= q.error_bound + 3e-6
            expected = maps.mean((1, 2)), maps.std((1, 2)), maps.min((1, 2)), maps.max((1, 2))
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=3e-6)
            assert each[name].sum(dtype=float) == view[name].sum(dtype=float)  # nothing beside the maps was written


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        ("16x3x3:relu:pool2,32x3x3:relu", True),
        ("6x5x5:tanh:pool2,16x5x5:tanh:pool2", True),
        ("8x9x9:relu:pool2", True),
        ("2x3x3,32x3x3", True),
        ("2x9x9,2x5x5", False),
        ("4x9x9:pool2", False),
        ("32x9x9,32x5x5", False),  # the first layer has faster code of its own
    ],
)
def test_compiled_code_computes_stacks_whose_filters_fill_vectors(stack, expected):
    spec = ExtractorSpec(layers=tuple(LayerSpec.parse(layer) for layer in stack.split(",")))
    extractor = CompiledExtractor(spec, seeded_weights(spec, 3))
    assert extractor.is_enough == expected
    assert extractor.takes((516, 639)) == expected


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("spec", [ExtractorSpec(), LENET], ids=["default", "lenet"])
def test_an_image_is_the_same_in_every_batch_and_at_every_place(monkeypatch, spec, lanes):
    monkeypatch.setattr(kernel, "MAX_LANES", lanes)
    extractor = CompiledExtractor(spec, seeded_weights(spec, 1))
    images = noise(MOST_AT_ONCE + 5, 28, 28, 1)
    out, pooled = together(extractor, images)
    order = np.random.default_rng(1).permutation(len(images)).tolist()
    mixed, mixed_pooled = together(extractor, [images[i] for i in order])
    for place, i in enumerate(order):
        alone = extractor.stack.empty(images[i])
        alone_pooled = extractor.extract_into(images[i], alone)
        for name, maps in alone.items():
            for other in (out[i], mixed[place]):
                np.testing.assert_array_equal(other[name], maps)
            for found in (pooled[i], mixed_pooled[place]):
                np.testing.assert_array_equal(found[name], alone_pooled[name])


def test_lenet_is_as_exact_as_torch():
    weights = seeded_weights(LENET, 1)
    (image,) = noise(1, 28, 28, 1)
    exact = Extractor(LENET, weights).reference(image)
    for name, maps in CompiledExtractor(LENET, weights).extract(image).items():
        assert np.abs(maps - exact[name]).max() <= 5e-7


@pytest.mark.parametrize("lanes", LANES)
def test_golden_lenet(monkeypatch, lanes):
    """Weights and maps of a LeNet in NumPy, as `test_cpu` has them for torch."""
    monkeypatch.setattr(kernel, "MAX_LANES", lanes)
    weights, golden = golden_lenet()
    pixels = golden["images"].transpose(0, 2, 3, 1) * 256
    images = list(np.ascontiguousarray(pixels.astype(np.uint8)))
    np.testing.assert_array_equal(pixels, images)
    out, _ = together(CompiledExtractor(LENET, weights), images)
    for i, maps in enumerate(out):
        for name, layer in (("conv1", "layer0"), ("conv2", "layer1"), ("conv3", "layer2")):
            np.testing.assert_allclose(maps[name].reshape(golden[layer][i].shape), golden[layer][i], rtol=0, atol=5e-7)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "uint16"])
def test_maps_go_where_they_are_wanted(dtype):
    """Some outputs, in rows with a margin, in every second value, or nowhere; of images of several sizes, in their order."""
    weights = seeded_weights(LENET, 1)
    extractor = CompiledExtractor(LENET, weights, stored(LENET, weights, dtype))
    images = [*noise(3, 28, 28, 1), *noise(2, 31, 29, 1), *noise(1, 28, 28, 1)]
    expected = [extractor.extract(image) for image in images]
    for make in (
        lambda maps: np.full((*maps.shape[:2], maps.shape[2] + 5), 77, dtype),
        lambda maps: np.full((*maps.shape, 2), 77, dtype),
    ):
        wide = [{name: make(maps) for name, maps in found.items() if name != "conv2"} for found in expected]
        views = [
            {name: w[..., : expected[i][name].shape[2]] if w.ndim == 3 else w[..., 0] for name, w in each.items()}
            for i, each in enumerate(wide)
        ]
        pooled = list(extractor.extract_each((31, 29), zip(images, views, strict=True)))
        for i, each in enumerate(views):
            assert set(pooled[i]) == {"conv1", "conv2", "conv3"}
            for name, maps in each.items():
                np.testing.assert_array_equal(maps, expected[i][name])
                rest = wide[i][name][..., maps.shape[2] :] if wide[i][name].ndim == 3 else wide[i][name][..., 1]
                assert (rest == 77).all()
    for image, found in zip(images, extractor.extract_each((31, 29), ((image, {}) for image in images)), strict=True):
        np.testing.assert_array_equal(found["conv2"], extractor.extract_into(image, {})["conv2"])


def test_what_is_no_number_is_refused():
    weights = seeded_weights(LENET, 1)
    weights["conv1_weight"][3] = np.nan
    with pytest.raises(FeaturemapsError, match="conv1 ranges over"):
        CompiledExtractor(LENET, weights).extract(noise(1, 28, 28, 1)[0])


@pytest.mark.parametrize("lanes", LANES)
def test_a_pool_keeps_what_is_no_number(monkeypatch, lanes):
    monkeypatch.setattr(kernel, "MAX_LANES", lanes)
    spec = ExtractorSpec(layers=(LayerSpec(filters=1, kernel=(1, 1), pool=(2, 2), activation="none"),))
    extractor = CompiledExtractor(spec, {"conv1_weight": np.full((1, 1, 1, 1), 3e38), "conv1_bias": np.full(1, -np.inf)})
    for place in range(4):  # infinite less infinite is no number, wherever it stands in the pool
        image = np.zeros((2, 2, 1), np.uint8)
        image.flat[place] = 255
        extractor.whole.weights["conv1_weight"] = np.full((1, 1, 1, 1), np.inf)
        with pytest.raises(FeaturemapsError):
            extractor.extract(image)


def test_only_small_images_are_taken():
    spec = ExtractorSpec(layers=(LayerSpec(filters=2, pool=(2, 2)),))
    extractor = CompiledExtractor(spec, seeded_weights(spec, 3))
    assert extractor.takes((28, 28))
    assert not extractor.takes((97, 96))
    assert extractor.version((28, 28)) != "torch"
    assert extractor.version((600, 600)) == "torch"
    assert not CompiledExtractor(spec, seeded_weights(spec, 3), [Stored("conv1", (0, 1), "float16")]).takes((28, 28))


def test_a_call_takes_so_many_images_as_memory_allows(monkeypatch):
    spec, called = ExtractorSpec(layers=(LayerSpec(filters=500, kernel=(3, 3), activation="relu"), LayerSpec(kernel=(3, 3)))), []
    extractor = CompiledExtractor(spec, seeded_weights(spec, 1))
    compute = extractor.whole.compute
    monkeypatch.setattr(extractor.whole, "compute", lambda images, out: called.append(len(images)) or compute(images, out))
    together(extractor, noise(7, 28, 28, 1))
    assert called == [3, 3, 1]


def test_a_small_image_is_the_same_by_the_extractor_of_torch():
    weights = seeded_weights(LENET, 1)
    (image,) = noise(1, 28, 28, 1)
    torch.set_num_threads(1)
    by_torch, by_itself = Extractor(LENET, weights).extract(image), CompiledExtractor(LENET, weights).extract(image)
    for name, maps in by_itself.items():
        np.testing.assert_array_equal(by_torch[name], maps)
    assert [maps.shape[1:] for maps in by_itself.values()] == output_sizes(LENET.layers, 28, 28)


def test_layers_without_memory_say_so(monkeypatch):
    class Library:
        """Stands for the compiled code on a machine whose memory is used up, which no test can arrange safely."""

        @staticmethod
        def featuremaps_stack(*_: object) -> int:
            return -1

        featuremaps_lanes = staticmethod(lambda lanes: 4)

    extractor = CompiledExtractor(LENET, seeded_weights(LENET, 1))
    (image,) = noise(1, 28, 28, 1)
    monkeypatch.setattr(kernel, "library", Library)
    with pytest.raises(MemoryError, match="found no memory for their maps"):
        extractor.whole.compute([image], [{}])
    monkeypatch.setattr(kernel, "library", lambda: None)
    with pytest.raises(ValueError, match="need their library; use torch's"):
        extractor.whole.compute([image], [{}])
