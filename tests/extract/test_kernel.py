from __future__ import annotations

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d

from pipeline.config import ExtractorSpec, LayerSpec
from pipeline.extract import activations, kernel
from pipeline.extract.cpu import Extractor
from pipeline.extract.layers import output_bounds
from pipeline.extract.quantise import dequantise, quantisation
from pipeline.extract.weights import seeded_weights

ACTIVATIONS = {"none": lambda x: x, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}
COMPILED = [name for name, function in activations.ACTIVATIONS.items() if function.compiled is not None]
HAS_COMPILER = shutil.which("cc") is not None
needs_kernel = pytest.mark.skipif(not HAS_COMPILER, reason="needs the C compiler (Debian package gcc)")


def test_where_there_is_a_compiler_the_layer_is_compiled():
    assert (kernel.version() != "torch") == HAS_COMPILER, "install the package anew with a C compiler: pip install -e ."


@needs_kernel
@settings(deadline=None)
@given(
    filters=st.integers(1, 20),
    channels=st.sampled_from([1, 3, 4]),
    kernel_size=st.tuples(st.integers(1, 10), st.one_of(st.integers(1, 12), st.integers(13, 34))),
    more=st.tuples(st.integers(0, 8), st.one_of(st.integers(0, 200), st.integers(1000, 1700))),
    activation=st.sampled_from(COMPILED),
    dtype=st.sampled_from(["float32", "uint8", "uint16"]),
    lanes=st.sampled_from([4, 8, 16, 32]),
    seed=st.integers(0, 2**32 - 1),
)
@example(1, 4, (7, 28), (2, 1224), "none", "float32", 4, 53450)  # a sum that is too long for Winograd's convolution
def test_every_version_equals_the_reference(filters, channels, kernel_size, more, activation, dtype, lanes, seed):
    rng = np.random.default_rng(seed)
    spec = ExtractorSpec(layers=(LayerSpec(filters=filters, kernel=kernel_size, activation=activation),), seed=seed)
    weights = seeded_weights(spec, channels)
    image = rng.integers(0, 256, (kernel_size[0] + more[0], kernel_size[1] + more[1], channels), np.uint8)
    stored = quantisation(output_bounds(spec.layers, weights)[0], dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "MAX_LANES", lanes)
        out = np.full((filters, more[0] + 1, more[1] + 5), 77, dtype)  # rows with a margin, which stays as it is
        view = out[:, :, 2 : more[1] + 3]
        weight, bias = weights["conv1_weight"] / np.float32(256), weights["conv1_bias"]
        statistics = kernel.first_layer(image, weight, bias, activation, stored, view)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].double()
    exact = ACTIVATIONS[activation](conv2d(x, torch.from_numpy(weight).double(), torch.from_numpy(bias).double()))[0].numpy()
    # Rounding in float32 grows with the sum of the products' sizes, which the activation `none` does not bound.
    rounding = max(3e-6, 4e-7 * np.abs(weights["conv1_weight"]).sum((1, 2, 3)).max())
    assert np.abs(dequantise(view, stored) - exact).max() <= stored.error_bound + rounding
    expected = exact.mean((1, 2)), exact.std((1, 2)), exact.min((1, 2)), exact.max((1, 2))
    np.testing.assert_allclose(statistics, expected, rtol=0, atol=rounding)
    assert (out[:, :, :2] == 77).all()
    assert (out[:, :, more[1] + 3 :] == 77).all()


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "uint8"])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_compiled_and_torch_store_the_same_within_a_level(monkeypatch, n_layers, dtype):
    spec = ExtractorSpec(layers=(LayerSpec(),) + (LayerSpec(filters=3, kernel=(3, 3)),) * (n_layers - 1))
    weights = seeded_weights(spec, 3)
    stored = quantisation(output_bounds(spec.layers, weights)[-1], dtype)
    image = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
    name = f"conv{n_layers}"

    class Layer:
        dtype, scale_factor, add_offset = stored.dtype, stored.scale_factor, stored.add_offset

    Layer.name = name
    found = {}
    for lanes in (32, 0):
        monkeypatch.setattr(kernel, "MAX_LANES", lanes)
        extractor = Extractor(spec, weights, [Layer])
        out = np.empty((spec.layers[-1].filters, 53 - 2 * (n_layers - 1), 75 - 2 * (n_layers - 1)), dtype)
        pooled = extractor.extract_into(image, {name: out})[name]
        found[lanes] = dequantise(out, stored), pooled
    assert np.abs(found[32][0] - found[0][0]).max() <= 2 * stored.error_bound + 1e-5
    for a, b in zip(found[32][1], found[0][1], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6)


@needs_kernel
def test_the_version_is_that_of_the_layer():
    """Tiles hold 32 values of a row: a wider kernel is computed with vectors. Winograd's convolution pays where weights are many."""
    best, narrower = kernel.version(3, (9, 9)), kernel.version(3, (9, 11))
    sets = {"amx": "avx512-winograd", **{f"{name}-winograd": f"{name}-winograd" for name in ("avx512", "avx2", "plain")}}
    assert narrower == sets[best]
    assert kernel.version(1, (9, 32)) == best
    assert kernel.version(1, (9, 33)) == narrower
    assert kernel.version(3, (1, 33)) == narrower.removesuffix("-winograd")


@needs_kernel
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_weights_whose_points_would_overflow_are_computed_directly(monkeypatch, lanes):
    monkeypatch.setattr(kernel, "MAX_LANES", lanes)
    weight, image = np.full((2, 3, 9, 9), 1e33, np.float32), np.full((12, 20, 3), 200, np.uint8)
    weight[1] = -3e38  # beyond float32 once summed
    out = np.empty((2, 4, 12), np.float32)
    kernel.first_layer(image, weight, np.zeros(2, np.float32), "none", quantisation((0, 0), "float32"), out)
    np.testing.assert_allclose(out[0], 243 * 200 * 1e33, rtol=1e-5)
    assert (out[1] == -np.inf).all()


@needs_kernel
@pytest.mark.parametrize("activation", COMPILED)
@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("size", [1, 9])
def test_what_is_no_number_stays_none(monkeypatch, lanes, activation, size):
    monkeypatch.setattr(kernel, "MAX_LANES", lanes)
    weight, image = np.zeros((2, 3, size, size), np.float32), np.ones((12, 20, 3), np.uint8)
    weight[0, 0, 0, 0] = np.nan
    out = np.empty((2, 13 - size, 21 - size), np.float32)
    mean, *_ = kernel.first_layer(image, weight, np.zeros(2, np.float32), activation, quantisation((0, 0), "float32"), out)
    assert np.isnan(out[0]).all()
    assert np.isnan(mean[0])
    assert np.isfinite(out[1]).all()


@needs_kernel
@pytest.mark.parametrize("lanes", [4, 8, 16, 32])
def test_maps_of_a_part_are_those_of_the_whole(monkeypatch, lanes):
    """To 5e-7 wherever it is cut: a row of 3,000 pixels is several strips, and its blocks begin elsewhere in the part."""
    monkeypatch.setattr(kernel, "MAX_LANES", lanes)
    weights, stored = seeded_weights(ExtractorSpec(), 3), quantisation((0, 0), "float32")
    layer = weights["conv1_weight"] / np.float32(256), weights["conv1_bias"], "sigmoid", stored
    image = np.random.default_rng(0).integers(0, 256, (20, 3000, 3), np.uint8)
    whole, part = np.empty((2, 12, 2992), np.float32), np.empty((2, 11, 2000), np.float32)
    kernel.first_layer(image, *layer, whole)
    kernel.first_layer(np.ascontiguousarray(image[1:, 700:2708]), *layer, part)
    np.testing.assert_allclose(part, whole[:, 1:, 700:2700], rtol=0, atol=5e-7)


def test_what_the_layer_cannot_take_is_refused():
    stored = quantisation((0, 1), "float32")
    image, weight, bias = np.zeros((9, 9, 3), np.uint8), np.zeros((2, 3, 9, 9), np.float32), np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="needs its library and contiguous arrays; use torch's"):
        kernel.first_layer(image, weight, bias, "sigmoid", stored, np.empty((2, 1, 2), np.float32)[:, :, ::2])


def test_an_installation_without_a_compiler_falls_back_to_torch(tmp_path):
    """The package alone, as it is before anything is compiled."""
    shutil.copytree("pipeline", tmp_path / "pipeline", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "pipeline" / "extract" / "_kernel.foreign.so").write_bytes(b"another platform's")
    code = (
        "from pipeline.extract import kernel, quantise; "
        "print(kernel.version(), kernel.is_available(quantise.quantisation((0, 1), 'uint8')))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "torch False\n"


@needs_kernel
@pytest.mark.parametrize("lanes", [4, 8, 16, 32])
def test_the_statistics_of_a_wide_constant_image_are_exact(monkeypatch, lanes):
    monkeypatch.setattr(kernel, "MAX_LANES", lanes)
    image, weight = np.full((3, 20_000, 1), 100, np.uint8), np.ones((1, 1, 1, 1), np.float32)
    out = np.empty((1, 3, 20_000), np.float32)
    mean, std, low, high = kernel.first_layer(
        image, weight, np.full(1, 0.1, np.float32), "none", quantisation((0, 0), "float32"), out
    )
    assert low == high == out[0, 0, 0]
    assert abs(mean - low) < 1e-4  # of 100.1
    assert std < 1e-4


@needs_kernel
def test_a_library_of_other_sources_is_not_used(monkeypatch):
    monkeypatch.setattr(kernel, "_ABI", 0)
    kernel.library.cache_clear()
    assert kernel.version() == "torch"
    monkeypatch.undo()
    kernel.library.cache_clear()
    assert kernel.version() != "torch"


@needs_kernel
def test_a_layer_without_memory_for_its_rows_says_so(monkeypatch):
    class Library:
        """Stands for the compiled code on a machine whose memory is used up, which no test can arrange safely."""

        @staticmethod
        def featuremaps_layer(*_: object) -> int:
            return -1

    monkeypatch.setattr(kernel, "library", Library)
    stored = quantisation((0, 1), "float32")
    image, weight, bias = np.zeros((9, 9, 3), np.uint8), np.zeros((2, 3, 9, 9), np.float32), np.zeros(2, np.float32)
    with pytest.raises(MemoryError, match="found no memory for its rows"):
        kernel.first_layer(image, weight, bias, "sigmoid", stored, np.empty((2, 1, 1), np.float32))
