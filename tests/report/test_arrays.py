from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.extract.quantise import quantisation
from pipeline.report import arrays
from pipeline.report.arrays import Picture


def stored(dtype: str, low: float = 0.0, high: float = 1.0) -> SimpleNamespace:
    q = quantisation((low, high), dtype)
    return SimpleNamespace(dtype=dtype, scale_factor=q.scale_factor, add_offset=q.add_offset)


@given(
    st.sampled_from(["uint8", "uint16", "float16", "float32"]),
    st.floats(-1, 1, width=16).filter(lambda value: value == 0 or abs(value) > 1e-3),
    st.floats(0, 1, width=16),
)
def test_bins_cover_the_range_and_are_not_too_many(dtype, low, width):
    edges = arrays.bin_edges(low, min(low + width, 1.0), stored(dtype, -1.0))
    assert 1 <= len(edges) - 1 <= arrays.N_BINS
    assert edges[0] <= low
    assert edges[-1] >= min(low + width, 1.0)
    assert np.allclose(np.diff(edges), edges[1] - edges[0])


def test_values_of_float16_that_are_spread_evenly_fill_all_bins_evenly():
    levels = np.arange(0.5, 1, 2**-11)  # all that float16 has there
    edges = arrays.bin_edges(levels[0], levels[-1], stored("float16"))
    counts = np.histogram(levels, edges)[0]
    assert set(counts[:-1].tolist()) == {11}
    assert counts[-1] <= 11


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 65504.0), (-65504.0, 65504.0), (40000.0, 65504.0), (65504.0, 65504.0), (0.0, 0.0)]
)
def test_the_largest_values_of_float16_have_bins(low, high):
    edges = arrays.bin_edges(low, high, stored("float16"))
    assert np.isfinite(edges).all()
    assert edges[0] < low <= high < edges[-1]
    assert len(edges) - 1 == 1 if low == high else 50 < len(edges) - 1 <= arrays.N_BINS


@pytest.mark.parametrize("shape", [(4000, 3000), (1, 4001), (5000, 2)])
def test_a_large_array_is_drawn_smaller_at_the_same_place(shape):
    values = np.broadcast_to(np.arange(shape[1], dtype=np.float32), shape)
    picture = arrays.of_map("", values, np.arange(shape[0]) * 2 + 7.5, np.arange(shape[1]) * 2 + 7.5, (2, 2), 1000)
    assert max(picture.values.shape) <= 1000
    left, right, bottom, top = picture.extent
    assert (left, top) == (6.5, 6.5)
    factor = -(-max(shape) // 1000)
    assert right == pytest.approx(6.5 + 2 * shape[1], abs=2 * factor)
    assert bottom == pytest.approx(6.5 + 2 * shape[0], abs=2 * factor)
    step = (right - left) / picture.values.shape[1]
    assert picture.values[0, -1] == pytest.approx((right - step / 2 - 6.5 - 1) / 2)  # the mean of its block


def test_pixels_keep_their_type_and_colours():
    pixels = np.full((3000, 20, 3), [250, 10, 99], np.uint8)
    picture = arrays.of_pixels("a", pixels, 1000)
    assert picture.values.dtype == np.uint8
    assert picture.values.shape == (1000, 6, 3)
    assert (picture.values == [250, 10, 99]).all()
    assert arrays.of_pixels("a", pixels[:, :, :1], 4000).values.shape == (3000, 20)


def test_a_few_extremes_do_not_take_the_colours_of_all_others():
    values = np.concatenate([np.zeros(998), [5.0, 9.0]])
    assert arrays.value_limits(values) == (0.0, 9.0)  # but where there is nothing else
    assert arrays.value_limits(np.array([0.25])) == (-0.25, 0.75)
    assert Picture("", values, (0.0, 4.0, 2.0, 0.0)).ratio == 2
