from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import conv2d, max_pool2d

from pipeline.config import Activation, ExtractorSpec, LayerSpec
from pipeline.errors import FeaturemapsError, ImageError, UsageError
from pipeline.extract import compiled_stack, cpu, keeping
from pipeline.extract.cpu import Extractor, Layer
from pipeline.extract.keeping import pool, quantise_into
from pipeline.extract.layers import output_bounds, output_sizes
from pipeline.extract.quantise import dequantise, quantisation
from pipeline.extract.stack import Pooled
from pipeline.extract.weights import load_weights, seeded_weights, weights_digest

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = ("float32", "float16", "uint16", "uint8")
DEFAULT = ExtractorSpec()
TWO_LAYERS = ExtractorSpec(
    layers=(LayerSpec(filters=3, kernel=(5, 3), pool=(2, 2), activation="tanh"), LayerSpec(filters=2, kernel=(3, 3))),
    outputs=("conv1", "conv2"),
)


@dataclass(frozen=True)
class Stored:
    name: str
    dtype: str
    scale_factor: float
    add_offset: float


def stored_as(spec: ExtractorSpec, weights: dict[str, np.ndarray], dtype: str) -> list[Stored]:
    bounds = dict(zip(("conv1", "conv2"), output_bounds(spec.layers, weights), strict=False))
    chosen = {name: quantisation(bounds[name], dtype) for name in spec.output_names}
    return [Stored(name, q.dtype, q.scale_factor, q.add_offset) for name, q in chosen.items()]


def make(spec: ExtractorSpec = DEFAULT, dtype: str = "float32") -> Extractor:
    weights = seeded_weights(spec, 3)
    return Extractor(spec, weights, stored_as(spec, weights, dtype))


def random_image(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.fixture(autouse=True, scope="module")
def _by_torch_alone() -> Iterator[None]:
    """In one thread; `test_compiled_stack` tests what compiled code does of stacks."""
    cpu.use_one_thread()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_stack, "LARGEST_LAYER", 0)
        patch.setattr(compiled_stack, "MOST_PADDING", 0.0)
        yield


# -- golden ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def conv_sigmoid() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "conv_sigmoid_96x128.npz") as file:
        return dict(file)


def test_seeded_weights_are_the_golden_ones(conv_sigmoid: dict[str, np.ndarray]) -> None:
    weights = seeded_weights(DEFAULT, 3, "float64")
    np.testing.assert_array_equal(weights["conv1_weight"], conv_sigmoid["weight"][:, :, ::-1, ::-1])
    np.testing.assert_array_equal(weights["conv1_bias"], conv_sigmoid["bias"])
    for name, values in seeded_weights(DEFAULT, 3).items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, weights[name].astype(np.float32))


def test_golden_float64(conv_sigmoid: dict[str, np.ndarray]) -> None:
    exact = Extractor(DEFAULT, seeded_weights(DEFAULT, 3, "float64"), precision="float64")
    maps = exact(torch.from_numpy(conv_sigmoid["image"]))["conv1"]
    assert maps.dtype == torch.float64
    np.testing.assert_allclose(maps.numpy(), conv_sigmoid["features"], rtol=0, atol=1e-12)
    np.testing.assert_array_equal(exact.reference(conv_sigmoid["image"])["conv1"], maps.numpy())
    np.testing.assert_allclose(exact.extract(conv_sigmoid["image"])["conv1"], conv_sigmoid["features"], rtol=0, atol=6e-8)


def test_golden_float32(conv_sigmoid: dict[str, np.ndarray]) -> None:
    fast = Extractor(DEFAULT, load_weights(DEFAULT, 3))
    maps = fast.extract(conv_sigmoid["image"])["conv1"]
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, conv_sigmoid["features"], rtol=0, atol=5e-7)
    np.testing.assert_array_equal(fast(torch.from_numpy(conv_sigmoid["image"]))["conv1"].numpy(), maps)
    # what is left is the rounding of the weights to float32
    np.testing.assert_allclose(fast.reference(conv_sigmoid["image"])["conv1"], conv_sigmoid["features"], rtol=0, atol=1e-7)


@pytest.mark.parametrize("values", [1, 243 * 639 * 100, 243 * 639 * 639])
def test_the_reference_is_computed_in_bands_because_torch_unfolds_its_input(monkeypatch, conv_sigmoid, values) -> None:
    fast = Extractor(DEFAULT, seeded_weights(DEFAULT, 3))
    whole = fast.reference(conv_sigmoid["image"])["conv1"]
    monkeypatch.setattr(cpu, "UNFOLDED_VALUES", values)
    np.testing.assert_allclose(fast.reference(conv_sigmoid["image"])["conv1"], whole, rtol=0, atol=1e-13)


def test_golden_photograph() -> None:
    image = np.array(Image.open(GOLDEN / "rocket_639x516.png").convert("RGB"))
    with np.load(GOLDEN / "conv_sigmoid_rocket_639x516.npz") as file:
        features = file["features"]
    maps = Extractor(DEFAULT, load_weights(DEFAULT, 3)).extract(image)["conv1"]
    np.testing.assert_allclose(maps, features, rtol=0, atol=5e-7)
    exact = Extractor(DEFAULT, seeded_weights(DEFAULT, 3, "float64"), precision="float64").reference(image)["conv1"]
    np.testing.assert_allclose(exact, features, rtol=0, atol=3.1e-8)  # half a unit in the last place of a float32 below 1


LENET = ExtractorSpec(
    layers=(
        LayerSpec(filters=20, kernel=(5, 5), pool=(2, 2), activation="tanh"),
        LayerSpec(filters=50, kernel=(5, 5), pool=(2, 2), activation="tanh"),
        LayerSpec(filters=500, kernel=(4, 4), activation="tanh"),
    ),
    outputs=("conv1", "conv2", "conv3"),
)


def golden_lenet() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Weights, and images with their maps."""
    with np.load(GOLDEN / "lenet_tanh_28x28.npz") as file:
        golden = dict(file)
    flipped = {f"conv{i + 1}_weight": golden[f"layer{i}_W"][:, :, ::-1, ::-1] for i in (0, 1)}
    # the hidden layer flattens (channel, y, x) and multiplies: a convolution over the whole map, not flipped
    weights = flipped | {"conv3_weight": golden["layer2_W"].T.reshape(500, 50, 4, 4)}
    return weights | {f"conv{i + 1}_bias": golden[f"layer{i}_b"] for i in range(3)}, golden


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-12), ("float32", 5e-7)])
def test_golden_lenet(precision: cpu.Precision, tolerance: float) -> None:
    weights, golden = golden_lenet()
    lenet = Extractor(LENET, weights, precision=precision)
    for i, image in enumerate(golden["images"]):
        maps = lenet(torch.from_numpy(image.transpose(1, 2, 0) * 256))
        np.testing.assert_allclose(maps["conv1"].numpy(), golden["layer0"][i], rtol=0, atol=tolerance)
        np.testing.assert_allclose(maps["conv2"].numpy(), golden["layer1"][i], rtol=0, atol=tolerance)
        np.testing.assert_allclose(maps["conv3"].numpy()[:, 0, 0], golden["layer2"][i], rtol=0, atol=tolerance)


# -- weights -----------------------------------------------------------------------------------------------------------------


def weights_file(folder: Path, tensors: dict[str, torch.Tensor]) -> ExtractorSpec:
    path = folder / "weights.safetensors"
    save_file(tensors, path)
    return ExtractorSpec(weights=str(path))


def some_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"conv1.weight": torch.randn(2, 3, 9, 9).to(dtype), "conv1.bias": torch.randn(2).to(dtype)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("separator", [".", "_"])
def test_weights_from_a_file(tmp_path: Path, dtype: torch.dtype, separator: str) -> None:
    tensors = some_tensors(dtype)
    weights = load_weights(weights_file(tmp_path, {key.replace(".", separator): value for key, value in tensors.items()}), 3)
    assert list(weights) == ["conv1_weight", "conv1_bias"]
    for name, values in weights.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, tensors[name.replace("_", ".")].float().numpy())


def test_weights_of_a_file_give_the_maps_of_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(2)
    conv = torch.nn.Conv2d(3, 2, 9)
    spec = weights_file(tmp_path, {f"conv1.{key}": value.contiguous() for key, value in conv.state_dict().items()})
    image = random_image(40, 50)
    with torch.no_grad():
        expected = torch.sigmoid(conv(torch.from_numpy(image).permute(2, 0, 1) / 256)).numpy()
    np.testing.assert_allclose(Extractor(spec, load_weights(spec, 3)).extract(image)["conv1"], expected, rtol=0, atol=1e-6)


def test_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere cannot be read as safetensors .*No such file.*nothing was started; give"):
        load_weights(ExtractorSpec(weights=str(tmp_path / "nowhere")), 3)


@pytest.mark.parametrize("content", [b"", b"no header", b"\x02\0\0\0\0\0\0\0{]", b"\xff" * 100])
def test_refuses_a_file_that_is_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as safetensors \(.+\), so there is no extractor"):
        load_weights(ExtractorSpec(weights=str(tmp_path / "w")), 3)


def test_refuses_missing_and_surplus_keys(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors["fc.weight"] = tensors.pop("conv1.weight")
    with pytest.raises(
        UsageError, match=r"holds \['conv1.bias', 'fc.weight'\]: \['conv1.weight'\] are missing and \['fc.weight'\]"
    ):
        load_weights(weights_file(tmp_path, tensors), 3)
    with pytest.raises(UsageError, match=r"nothing is missing and \['fc.bias'\] belong to no layer.*save exactly"):
        load_weights(weights_file(tmp_path, some_tensors() | {"fc.bias": torch.zeros(1)}), 3)
    with pytest.raises(UsageError, match=r"\['conv1.bias'\] are missing and nothing is left over"):
        load_weights(weights_file(tmp_path, {"conv1.weight": torch.zeros(2, 3, 9, 9)}), 3)


def test_refuses_the_same_weight_twice(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\['conv1.bias'\] belong to no layer|\['conv1_bias'\] belong to no layer"):
        load_weights(weights_file(tmp_path, some_tensors() | {"conv1_bias": torch.zeros(2)}), 3)


def test_refuses_wrong_shapes(tmp_path: Path) -> None:
    tensors = some_tensors() | {"conv1.weight": torch.zeros(2, 1, 9, 9)}
    with pytest.raises(
        UsageError, match=r"'conv1.weight' of .* has shape \(2, 1, 9, 9\), but the layers need \(2, 3, 9, 9\).*change"
    ):
        load_weights(weights_file(tmp_path, tensors), 3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_refuses_what_is_no_float(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(UsageError, match=r"'conv1.weight' of .* is of type \w+, but weights are floats"):
        load_weights(weights_file(tmp_path, some_tensors(dtype)), 3)


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, math.nan), (torch.float32, -math.inf), (torch.float64, 1e300)])
def test_refuses_what_is_not_finite(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    tensors = some_tensors(dtype)
    tensors["conv1.bias"][1] = value
    with pytest.raises(UsageError, match=r"'conv1.bias' of .* holds 1 values that are not finite as float32"):
        load_weights(weights_file(tmp_path, tensors), 3)


def test_digest_depends_on_names_shapes_and_values_only() -> None:
    weights = seeded_weights(DEFAULT, 3)
    digest = weights_digest(weights)
    assert len(digest) == 64
    assert digest == weights_digest(dict(reversed(weights.items())))
    assert digest == weights_digest({name: values.astype(">f4") for name, values in weights.items()})
    assert digest != weights_digest(weights | {"conv1_bias": -weights["conv1_bias"]})
    assert digest != weights_digest(weights | {"conv1_weight": weights["conv1_weight"].reshape(2, 9, 3, 9)})
    assert digest != weights_digest({name.upper(): values for name, values in weights.items()})


# -- quantisation ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(DTYPES),
    st.floats(-1e4, 1e4, width=32),
    st.sampled_from([0.0, 1e-30, 1e-6, 1e-3, 0.5, 1.0, 30.0, 4e4]),
    st.integers(0, 2**32 - 1),
)
def test_stored_values_decode_within_the_bound(dtype: str, low: float, width: float, seed: int) -> None:
    high = low + width
    q = quantisation((low, high), dtype)
    values = np.random.default_rng(seed).uniform(low, high, (2, 7, 9)).astype(np.float32)
    slack = (high - low) / 5000  # a convolution in float32 may leave its bounds by some roundings
    values.flat[:4] = low, high, np.nextafter(np.float32(low), -np.inf), low - slack
    values.flat[4:6] = np.nextafter(np.float32(high), np.inf), high + slack
    stored = np.empty(values.shape, dtype)
    quantise_into(torch.from_numpy(values), q, stored)
    if dtype.startswith("u"):
        assert stored.min() >= 1
        assert q.fill_value == 0
    else:
        assert math.isnan(q.fill_value)
    decoded = dequantise(stored, q)
    assert decoded.dtype == np.float32
    assert np.abs(decoded.astype(np.float64) - values).max() <= q.error_bound
    np.testing.assert_allclose(stored * q.scale_factor + q.add_offset, values, rtol=0, atol=q.error_bound)  # as xarray does


@pytest.mark.parametrize("dtype", DTYPES)
def test_fill_decodes_to_nan(dtype: str) -> None:
    q = quantisation((0.0, 1.0), dtype)
    assert np.isnan(dequantise(np.full((1, 2, 2), q.fill_value, dtype), q)).all()


def test_error_bounds_of_a_sigmoid() -> None:
    assert quantisation((0.0, 1.0), "float32").error_bound == 0
    assert quantisation((0.0, 0.99), "float16").error_bound == 2.0**-12
    assert quantisation((0.0, 1.0), "uint16").error_bound == pytest.approx(0.5 / 65534, rel=0.15)
    assert quantisation((0.0, 1.0), "uint8").error_bound == pytest.approx(0.5 / 254, rel=1e-3)


@pytest.mark.parametrize(
    ("bounds", "dtype"),
    [((0, 65505), "float16"), ((-1e39, 0), "float32"), ((0, math.inf), "uint8"), ((math.nan, math.nan), "uint16")],
)
def test_refuses_bounds_that_cannot_be_stored(bounds: tuple[float, float], dtype: str) -> None:
    with pytest.raises(UsageError, match=rf"may lie anywhere in \[.*\], but {dtype} is stored within .*use a wider dtype"):
        quantisation(bounds, dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.floats(-100, 100),
    st.sampled_from([0.0, 1e-3, 1.0]),
    st.integers(0, 99),
)
def test_pooled_statistics_agree_with_float64(c: int, h: int, w: int, centre: float, spread: float, seed: int) -> None:
    maps = (centre + spread * np.random.default_rng(seed).normal(size=(c, h, w))).astype(np.float32)
    exact, found = maps.astype(np.float64), Pooled(*pool(torch.from_numpy(maps)).numpy())
    tolerance = {"rtol": 1e-6, "atol": 1e-6 * max(1, abs(centre))}
    np.testing.assert_allclose(found.mean, exact.mean((1, 2)), **tolerance)
    np.testing.assert_allclose(found.std, exact.std((1, 2)), **tolerance)
    np.testing.assert_array_equal(found.min, maps.min((1, 2)))
    np.testing.assert_array_equal(found.max, maps.max((1, 2)))
    assert {values.dtype for values in found} == {np.dtype(np.float32)}


def test_pooled_statistics_of_a_large_map_are_accurate() -> None:
    maps = np.random.default_rng(0).uniform(0.2, 0.7, (2, 508, 631)).astype(np.float32)
    found, exact = Pooled(*pool(torch.from_numpy(maps)).numpy()), maps.astype(np.float64)
    np.testing.assert_allclose(found.mean, exact.mean((1, 2)), rtol=2e-7)
    np.testing.assert_allclose(found.std, exact.std((1, 2)), rtol=1e-6)


def test_statistics_and_stored_values_are_the_same_in_parts(monkeypatch) -> None:
    maps = torch.from_numpy(np.random.default_rng(0).random((7, 30, 41), np.float32))
    q, stored = quantisation((0.0, 1.0), "uint8"), [np.empty(maps.shape, np.uint8) for _ in range(2)]
    whole = pool(maps)
    quantise_into(maps, q, stored[0])
    monkeypatch.setattr(keeping, "CACHED_VALUES", 3 * 30 * 41)
    assert torch.equal(pool(maps), whole)
    assert torch.equal(pool(torch.stack([maps, maps])), torch.stack([whole, whole], 1))
    quantise_into(maps, q, stored[1])
    np.testing.assert_array_equal(*stored)


# -- the stack ---------------------------------------------------------------------------------------------------------------


def in_order(maps: torch.Tensor, *, last: bool) -> torch.Tensor:
    """The same (channel, y, x), stored in this order or channels last."""
    return maps.permute(1, 2, 0).contiguous().permute(2, 0, 1) if last else maps


@settings(deadline=None, max_examples=150)
@given(
    filters=st.integers(1, 20),
    channels=st.integers(1, 4),
    kernel=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    block=st.none() | st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pooling=st.sampled_from([(1, 1), (2, 2), (3, 1)]),
    more=st.tuples(st.integers(3, 40), st.integers(3, 40)),
    band=st.sampled_from([1, 300, cpu.BAND_OUTPUTS]),
    channels_last=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32 - 1),
)
def test_blocked_equals_plain_convolution(
    filters: int,
    channels: int,
    kernel: tuple[int, int],
    block: tuple[int, int] | None,
    pooling: tuple[int, int],
    more: tuple[int, int],
    band: int,
    channels_last: tuple[bool, bool],
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(channels * kernel[0] * kernel[1])
    weight = torch.from_numpy(rng.uniform(-scale, scale, (filters, channels, *kernel)).astype(np.float32))
    bias = torch.from_numpy(rng.uniform(-0.5, 0.5, filters).astype(np.float32))
    spec = LayerSpec(filters=filters, kernel=kernel, pool=pooling, activation="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BAND_OUTPUTS", band)
        if block is not None:
            patch.setattr(cpu, "block_shape", lambda *_: block)
            patch.setattr(cpu, "padded_extent", lambda extent, step: -(-extent // step) * step)
        layer = Layer(spec, weight, bias, 1.0)
        image = torch.from_numpy(rng.random((channels, kernel[0] + more[0], kernel[1] + more[1]), np.float32))
        ((height, width),) = output_sizes([spec], *image.shape[1:])
        out = torch.full((filters, height, width), torch.nan)
        blocked = layer(*(in_order(maps, last=last) for maps, last in zip((image, out), channels_last, strict=True)))
    plain = max_pool2d(conv2d(image, weight, bias), pooling)
    torch.testing.assert_close(blocked, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_layers", [2, 3, 4])
@pytest.mark.parametrize("outputs", ["last", "first and last", "all"])
def test_stacks_in_bands_equal_the_reference(monkeypatch, n_layers: int, outputs: str, dtype: str) -> None:
    """No layer may overwrite the input that its next band needs."""
    monkeypatch.setattr(cpu, "BAND_OUTPUTS", 500)
    names = [f"conv{i + 1}" for i in range(n_layers)]
    kept = {"last": names[-1:], "first and last": [names[0], names[-1]], "all": names}[outputs]
    layers = tuple(LayerSpec(filters=3 + i % 2, kernel=(3, 3), activation=("relu", "tanh")[i % 2]) for i in range(n_layers))
    spec = ExtractorSpec(layers=layers, outputs=tuple(kept))
    weights = seeded_weights(spec, 3)
    bounds = dict(zip(names, output_bounds(spec.layers, weights), strict=True))
    chosen = {name: quantisation(bounds[name], dtype) for name in kept}
    made = Extractor(spec, weights, [Stored(name, q.dtype, q.scale_factor, q.add_offset) for name, q in chosen.items()])
    image = random_image(61, 43)
    reference = made.reference(image)
    for name, maps in made.extract(image).items():
        found = dequantise(maps, chosen[name])
        assert np.abs(found - reference[name]).max() <= chosen[name].error_bound + 1e-5


@pytest.mark.parametrize("spec", [DEFAULT, TWO_LAYERS])
@pytest.mark.parametrize("size", [(12, 12), (13, 12), (12, 29), (57, 83), (200, 131)])
def test_float32_agrees_with_the_reference(spec: ExtractorSpec, size: tuple[int, int]) -> None:
    extract, image = make(spec), random_image(*size)
    reference = extract.reference(image)
    for name, maps in extract.extract(image).items():
        np.testing.assert_allclose(maps, reference[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("outputs", [("conv3",), ("conv1", "conv2", "conv3")])
@pytest.mark.parametrize(("kernel", "pooling"), [((9, 9), (1, 1)), ((9, 9), (2, 2)), ((3, 3), (1, 1)), ((3, 3), (2, 3))])
def test_stacks_of_many_filters_equal_the_reference(monkeypatch, outputs, kernel, pooling) -> None:
    """Between layers their maps are stored in another order than few filters' are."""
    monkeypatch.setattr(cpu, "BAND_OUTPUTS", 5000)
    shapes = ((18, kernel, pooling), (20, (3, 3), (1, 1)), (17, (3, 3), pooling))
    layers = tuple(LayerSpec(filters=n, kernel=size, pool=pools, activation="tanh") for n, size, pools in shapes)
    spec = ExtractorSpec(layers=layers, outputs=outputs)
    made, image = Extractor(spec, seeded_weights(spec, 3)), random_image(61, 43)
    reference = made.reference(image)
    for name, maps in made.extract(image).items():
        np.testing.assert_allclose(maps, reference[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("pooling", [(1, 1), (2, 2), (3, 1)])
def test_maps_do_not_depend_on_where_they_go(activation: Activation, pooling: tuple[int, int]) -> None:
    """In a class of their own size, beside the margin of a padded class, with channels last, or nowhere."""
    layers = tuple(LayerSpec(filters=n, kernel=(3, 3), pool=pooling, activation=activation) for n in (8, 16))
    spec = ExtractorSpec(layers=layers, outputs=("conv1", "conv2"))
    extractor = Extractor(spec, seeded_weights(spec, 3))
    image = np.random.default_rng(0).integers(0, 256, (150, 171, 3), np.uint8)
    shapes = extractor.stack.shapes(*image.shape).items()
    own = {name: np.empty(shape, np.float32) for name, shape in shapes}
    beside = {name: np.empty((c, y + 3, x + 5), np.float32)[:, :y, :x] for name, (c, y, x) in shapes}
    last = {name: np.empty((y, x, c), np.float32).transpose(2, 0, 1) for name, (c, y, x) in shapes}
    pooled = [extractor.extract_into(image, out) for out in (own, beside, last, {})]
    for name, maps in own.items():
        np.testing.assert_array_equal(maps, beside[name])
        np.testing.assert_array_equal(maps, last[name])
        for found in pooled:
            np.testing.assert_array_equal(found[name], pooled[0][name])


def test_the_version_is_what_computes_the_first_layer() -> None:
    small, large = (
        Extractor(spec, seeded_weights(spec, 3))
        for spec in (ExtractorSpec(layers=(LayerSpec(kernel=(size, size)), LayerSpec(kernel=(3, 3)))) for size in (3, 9))
    )
    assert small.version((20, 20)) == "torch"
    assert large.version((20, 20)) == large.compiled.layer.version()


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations(activation: str) -> None:
    spec = ExtractorSpec(layers=(LayerSpec(kernel=(3, 3), activation=activation),))  # type: ignore[arg-type]
    weights, image = seeded_weights(spec, 3), random_image(20, 20)
    x = torch.from_numpy(image).permute(2, 0, 1) / 256
    linear = conv2d(x, torch.from_numpy(weights["conv1_weight"]), torch.from_numpy(weights["conv1_bias"]))
    functions = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu, "none": torch.clone}
    maps = Extractor(spec, weights).extract(image)["conv1"]
    np.testing.assert_allclose(maps, functions[activation](linear).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", [DEFAULT, TWO_LAYERS])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_view_of_a_larger_row_gets_the_same(spec: ExtractorSpec, dtype: str) -> None:
    extract, image = make(spec, dtype), random_image(45, 62)
    whole = extract.extract(image)
    rows = {name: np.full((maps.shape[0], 70, 80), 7, dtype) for name, maps in whole.items()}
    views = {name: row[:, : whole[name].shape[1], : whole[name].shape[2]] for name, row in rows.items()}
    pooled = extract.extract_into(image, views)
    again = extract.extract_into(image, whole)
    for name, maps in whole.items():
        np.testing.assert_array_equal(views[name], maps)
        assert (rows[name][:, maps.shape[1] :] == 7).all()
        assert (rows[name][:, :, maps.shape[2] :] == 7).all()
        np.testing.assert_array_equal(pooled[name], again[name])


@pytest.mark.parametrize("dtype", DTYPES)
def test_stored_maps_and_statistics_are_those_of_the_float32_maps(dtype: str) -> None:
    extract, image = make(TWO_LAYERS, dtype), random_image(45, 62)
    exact = make(TWO_LAYERS).extract(image)
    out = {name: np.empty(maps.shape, dtype) for name, maps in exact.items()}
    bounds = dict(zip(exact, output_bounds(TWO_LAYERS.layers, seeded_weights(TWO_LAYERS, 3)), strict=True))
    for name, pooled in extract.extract_into(image, out).items():
        q = quantisation(bounds[name], dtype)
        assert np.abs(dequantise(out[name], q) - exact[name]).max() <= q.error_bound
        for found, expected in zip(pooled, pool(torch.from_numpy(exact[name])), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_results_do_not_depend_on_what_ran_before(dtype: str) -> None:
    extract, images = make(TWO_LAYERS, dtype), [random_image(h, w, seed=h) for h, w in [(30, 40), (90, 110), (31, 17), (64, 64)]]
    first = [extract.extract(image) for image in images]
    vars(keeping._scratch).clear()
    for order in ([3, 2, 1, 0], [1, 1, 2, 0, 3]):
        for i in order:
            for buffer in vars(keeping._scratch).values():
                buffer.fill_(math.nan)
            for name, maps in extract.extract(images[i]).items():
                np.testing.assert_array_equal(maps, first[i][name])


def test_scratch_grows_to_the_largest_image_and_no_further() -> None:
    extract = make()
    vars(keeping._scratch).clear()
    extract.extract(random_image(100, 120))
    held = {role: buffer.numel() for role, buffer in vars(keeping._scratch).items()}
    for side in range(20, 100):
        extract.extract(random_image(side, 119 - side))
    assert held == {role: buffer.numel() for role, buffer in vars(keeping._scratch).items()}


def test_threads_do_not_disturb_each_other() -> None:
    extract = make(TWO_LAYERS, "uint8")
    images = [random_image(20 + 13 * (i % 7), 30 + 11 * (i % 5), seed=i) for i in range(40)]
    alone = [extract.extract(image) for image in images]
    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(extract.extract, images * 3))
    for one, other in zip(alone * 3, together, strict=True):
        for name, maps in one.items():
            np.testing.assert_array_equal(maps, other[name])


def test_layers_after_the_last_output_are_not_computed() -> None:
    spec = TWO_LAYERS.model_copy(update={"outputs": ("conv1",)})
    extract = Extractor(spec, seeded_weights(spec, 3))
    assert len(extract.layers) == 1
    assert list(extract.extract(random_image(6, 6))) == ["conv1"]  # too small for the second layer


def test_maps_of_an_output_may_be_left_out_and_are_pooled_all_the_same() -> None:
    extract, image = make(TWO_LAYERS), random_image(20, 20)
    out = {"conv2": np.empty_like(extract.extract(image)["conv2"])}
    assert list(extract.extract_into(image, out)) == ["conv1", "conv2"]


@pytest.mark.filterwarnings("error")
def test_strided_and_read_only_images() -> None:
    extract, image = make(), random_image(40, 50)
    expected = extract.extract(image)["conv1"]
    fixed = image.copy()
    fixed.flags.writeable = False
    turned = np.ascontiguousarray(image[::-1].transpose(1, 0, 2)).transpose(1, 0, 2)[::-1]
    for other in (fixed, turned):
        np.testing.assert_array_equal(extract.extract(other)["conv1"], expected)


def test_an_extractor_can_be_pickled() -> None:
    extract, image = make(dtype="uint8"), random_image(20, 20)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(extract)).extract(image)["conv1"], extract.extract(image)["conv1"])


def test_a_grey_image_and_a_smallest_image() -> None:
    grey = Extractor(DEFAULT, seeded_weights(DEFAULT, 1))
    image = random_image(9, 9, 1)
    assert grey.extract(image)["conv1"].shape == (2, 1, 1)
    np.testing.assert_allclose(grey.extract(image)["conv1"], grey.reference(image)["conv1"], rtol=0, atol=5e-7)


# -- refusals ----------------------------------------------------------------------------------------------------------------


def test_refuses_an_image_that_is_too_small() -> None:
    with pytest.raises(ImageError, match=r"too_small: 8 x 100 pixels leave no maps; at least 9 x 9 \(height x width\) do"):
        make().extract(random_image(8, 100))
    with pytest.raises(ImageError, match="too_small: 8 x 8 pixels"):
        make()(torch.from_numpy(random_image(8, 8)))


def test_refuses_what_is_no_image() -> None:
    with pytest.raises(ValueError, match="image is of type float32, but pixels are uint8"):
        make().extract(random_image(20, 20).astype(np.float32))
    with pytest.raises(ValueError, match="image has 1 channels, but the weights are for 3"):
        make().extract(random_image(20, 20, 1))


def test_refuses_a_wrong_destination() -> None:
    image = random_image(20, 20)
    with pytest.raises(ValueError, match=r"conv2 is not an output of this extractor; its outputs are \['conv1'\]"):
        make().extract_into(image, {"conv2": np.empty((2, 12, 12), np.float32)})
    for wrong in (np.empty((2, 12, 13), np.float32), np.empty((2, 12, 12), np.float64)):
        with pytest.raises(
            ValueError, match=r"destination of conv1 is \(2, 12, 1\d\) float\d\d, but the maps .* \(2, 12, 12\) float32"
        ):
            make().extract_into(image, {"conv1": wrong})


def test_refuses_values_that_the_dtype_was_not_chosen_for() -> None:
    q = quantisation((0.0, 0.1), "uint8")
    wrong = Extractor(DEFAULT, seeded_weights(DEFAULT, 3), [Stored("conv1", q.dtype, q.scale_factor, q.add_offset)])
    with pytest.raises(FeaturemapsError, match=r"conv1 ranges over \[.*\], but uint8 was chosen for \[.*stored as others"):
        wrong.extract(random_image(20, 20))


def test_refuses_maps_that_overflow() -> None:
    spec = ExtractorSpec(layers=(LayerSpec(activation="none"),))
    weights = {name: np.full_like(values, 3e38) for name, values in seeded_weights(spec, 3).items()}
    with pytest.raises(FeaturemapsError, match=r"conv1 ranges over \[inf, inf\], but float32 was chosen for"):
        Extractor(spec, weights).extract(np.full((20, 20, 3), 255, np.uint8))
