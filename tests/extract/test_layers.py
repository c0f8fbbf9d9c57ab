from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import LayerSpec
from pipeline.extract import layers
from pipeline.extract.activations import ACTIVATIONS

sides = st.integers(1, 4)
layer_specs = st.builds(
    LayerSpec,
    filters=st.integers(1, 3),
    kernel=st.tuples(sides, sides),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
stacks = st.lists(layer_specs, min_size=1, max_size=3)


def windows(image: np.ndarray, height: int, width: int, step_y: int, step_x: int) -> np.ndarray:
    view = np.lib.stride_tricks.sliding_window_view(image, (height, width), axis=(-2, -1))
    return view[..., ::step_y, ::step_x, :, :]


def forward(stack: list[LayerSpec], weights: dict[str, np.ndarray], image: np.ndarray) -> list[np.ndarray]:
    """The definition, slowly: (channel, y, x) float64 in, every layer's maps out."""
    outputs = []
    for name, layer in zip(layers.layer_names(stack), stack, strict=True):
        image = np.einsum("cyxij,fcij->fyx", windows(image, *layer.kernel, 1, 1), weights[f"{name}_weight"])
        image = windows(image, *layer.pool, *layer.pool).max((-2, -1)) + weights[f"{name}_bias"][:, None, None]
        image = ACTIVATIONS[layer.activation].of_array(image)
        outputs.append(image)
    return outputs


def random_weights(stack: list[LayerSpec], channels: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {name: rng.normal(size=shape) for name, shape in layers.weight_shapes(stack, channels).items()}


def test_names() -> None:
    assert layers.layer_names([LayerSpec()] * 11)[::10] == ("conv1", "conv11")


def test_default_sizes_and_field() -> None:
    assert layers.output_sizes([LayerSpec()], 516, 639) == [(508, 631)]
    assert layers.receptive_field([LayerSpec()]) == layers.ReceptiveField(9, 9, 1, 1, 4.0, 4.0)


def test_too_small_is_zero_in_every_later_layer() -> None:
    stack = [LayerSpec(kernel=(9, 9)), LayerSpec(kernel=(1, 1)), LayerSpec(kernel=(3, 3))]
    assert layers.output_sizes(stack, 8, 100) == [(0, 92), (0, 92), (0, 90)]
    assert layers.output_sizes([LayerSpec(kernel=(1, 1), pool=(2, 2))], 1, 1) == [(0, 0)]


def test_field_of_some_layers() -> None:
    stack = [LayerSpec(kernel=(5, 3), pool=(2, 1)), LayerSpec(kernel=(3, 3), pool=(1, 2))]
    assert layers.receptive_field(stack, 0) == layers.ReceptiveField(1, 1, 1, 1, 0.0, 0.0)
    assert layers.receptive_field(stack, 1) == layers.ReceptiveField(6, 3, 2, 1, 2.5, 1.0)
    assert layers.receptive_field(stack) == layers.ReceptiveField(10, 6, 2, 2, 4.5, 2.5)


@settings(deadline=None, max_examples=60)
@given(stacks, st.integers(1, 2), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_sizes_and_field_agree_with_brute_force(
    stack: list[LayerSpec], channels: int, more_y: int, more_x: int, seed: int
) -> None:
    stack = [layer.model_copy(update={"activation": "none"}) for layer in stack]
    field = layers.receptive_field(stack)
    height, width = field.height + more_y, field.width + more_x
    rng = np.random.default_rng(seed)
    weights = {name: np.abs(values) + 0.1 for name, values in random_weights(stack, channels, rng).items()}
    image = np.zeros((channels, height, width))
    outputs = forward(stack, weights, image)
    assert [maps.shape[1:] for maps in outputs] == layers.output_sizes(stack, height, width)
    base = outputs[-1][0]
    out_y, out_x = np.indices(base.shape)
    for y, x in {(0, 0), (height - 1, width - 1), *map(tuple, rng.integers((height, width), size=(4, 2)).tolist())}:
        image[0, y, x] = 1  # positive weights: every output that sees the pixel grows
        changed = forward(stack, weights, image)[-1][0] != base
        image[0, y, x] = 0
        seen_y = (out_y * field.stride_y <= y) & (y < out_y * field.stride_y + field.height)
        seen_x = (out_x * field.stride_x <= x) & (x < out_x * field.stride_x + field.width)
        np.testing.assert_array_equal(changed, seen_y & seen_x)
    assert field.offset_y == (field.height - 1) / 2
    assert field.offset_x == (field.width - 1) / 2


@settings(deadline=None, max_examples=60)
@given(stacks, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_bounds_hold(stack: list[LayerSpec], channels: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    field = layers.receptive_field(stack)
    weights = random_weights(stack, channels, rng)
    shape = (channels, field.height + 5, field.width + 5)
    for image in (rng.integers(0, 256, shape), rng.choice([0, 255], shape)):
        for maps, (low, high) in zip(forward(stack, weights, image / 256), layers.output_bounds(stack, weights), strict=True):
            slack = 1e-12 * max(1, abs(low), abs(high))
            assert low - slack <= maps.min()
            assert maps.max() <= high + slack


@settings(deadline=None, max_examples=40)
@given(layer_specs, st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_bounds_of_a_first_layer_are_attained(layer: LayerSpec, channels: int, seed: int) -> None:
    weights = random_weights([layer], channels, np.random.default_rng(seed))
    ((low, high),) = layers.output_bounds([layer], weights)
    plain = [layer.model_copy(update={"pool": (1, 1)})]
    extremes = []
    for kernel in weights["conv1_weight"]:  # the image that a filter likes best, and its opposite
        extremes += [forward(plain, weights, (sign * kernel > 0) * 255 / 256)[0] for sign in (1, -1)]
    np.testing.assert_allclose((np.min(extremes), np.max(extremes)), (low, high), rtol=1e-12, atol=1e-12)


def test_bounds_of_no_weight_are_one_value() -> None:
    weights = {"conv1_weight": np.zeros((1, 3, 9, 9)), "conv1_bias": np.zeros(1)}
    assert layers.output_bounds([LayerSpec(filters=1)], weights) == [(0.5, 0.5)]


@settings(deadline=None)
@given(st.integers(1, 100), st.tuples(sides, sides))
def test_blocks_fill_the_vector_and_no_more(filters: int, kernel: tuple[int, int]) -> None:
    sy, sx = layers.block_shape(filters, kernel)
    assert (sy, sx) == (1, 1) or 8 < filters * sy * sx <= 16
    assert sx <= 4
    if kernel != (1, 1) and filters <= 8:
        assert sy * sx > 1


@settings(deadline=None)
@given(st.integers(1, 100_000), st.sampled_from([1, 2, 4]))
def test_padded_extents_are_near_whole_blocks(extent: int, block: int) -> None:
    padded = layers.padded_extent(extent, block)
    assert padded % block == 0
    assert 0 <= padded - extent < max(block, min(16, extent / 8 + 1))


@pytest.mark.parametrize(("smallest", "largest", "most"), [(1, 64, 32), (64, 300, 20), (300, 700, 27)])
def test_padded_extents_are_few(smallest: int, largest: int, most: int) -> None:
    assert len({layers.padded_extent(extent, 1) for extent in range(smallest, largest)}) <= most
