from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import FeaturemapsError
from pipeline.store.layout import (
    BATCH_BYTES,
    DRIVER_S,
    MAX_SHARD_ROWS,
    MIN_BATCH_S,
    Piece,
    assign_classes,
    class_layout,
    cut_pieces,
    image_cost_s,
    ladder_step,
    pack_batches,
)

SIDES = st.integers(9, 3000)
SIZES = st.tuples(SIDES, SIDES)


def layout_for(size, filters=2, itemsize=4, kernel=9, channels=3):
    return class_layout(size, [("conv1", filters, (size[0] - kernel + 1, size[1] - kernel + 1))], itemsize, channels)


@given(st.integers(1, 10**6))
def test_a_ladder_step_is_the_next_one_up_and_at_most_a_fifth_too_large(side):
    step = ladder_step(side)
    assert step >= side
    assert ladder_step(step) == step
    if side > 16:
        assert step <= math.ceil(side * 2**0.25)


@given(st.lists(SIZES, max_size=60), st.lists(SIZES, max_size=5), st.integers(0, 20))
def test_every_image_fits_its_class_and_exact_classes_are_kept_few(sizes, existing, max_exact):
    assigned = assign_classes(sizes, existing, max_exact)
    assert len(assigned) == len(sizes)
    for size, chosen in zip(sizes, assigned, strict=True):
        assert chosen[0] >= size[0]
        assert chosen[1] >= size[1]
        assert chosen in {size, (ladder_step(size[0]), ladder_step(size[1]))}
    exact = set(assigned) - set(existing) - {(ladder_step(h), ladder_step(w)) for h, w in sizes}
    assert len(exact) <= max_exact


@given(st.lists(SIZES, max_size=40), st.integers(0, 40), st.integers(0, 10))
def test_classes_do_not_depend_on_where_the_listing_was_cut(sizes, cut, max_exact):
    first = assign_classes(sizes[:cut], [], max_exact)
    assert first + assign_classes(sizes[cut:], set(first), max_exact) == assign_classes(sizes, [], max_exact)


@given(SIZES, st.sampled_from([1, 2, 4]), st.lists(st.integers(1, 64), min_size=1, max_size=3))
def test_a_layout_is_aligned_and_bounded(size, itemsize, filters):
    layers = [(f"conv{i + 1}", f, (size[0] - 8, size[1] - 8)) for i, f in enumerate(filters)]
    layout = class_layout(size, layers, itemsize)
    assert 1 <= layout.shard_rows <= MAX_SHARD_ROWS
    assert layout.shard_rows == 1 or layout.shard_rows * size[0] * size[1] * 3 <= 128 * 2**20
    assert layout.shard_rows == 1 or layout.shard_rows * layout.row_bytes <= 64 * 2**20
    for layer in layout.layers:
        assert layout.shard_rows % layer.chunk_rows == 0
        chunk_bytes = layer.chunk_rows * layer.channels * layer.chunk_height * layer.chunk_width * itemsize
        assert chunk_bytes < 2**31 - 2**16  # what blosc takes
        if layer.row_bytes > 256 * 2**20:
            assert layout.shard_rows == 1
            assert chunk_bytes <= 64 * 2**20
        else:
            assert (layer.chunk_height, layer.chunk_width) == (layer.height, layer.width)


def test_small_maps_share_an_inner_chunk_of_at_least_256_kib():
    layout = layout_for((28, 28), itemsize=4)
    (layer,) = layout.layers
    assert layer.chunk_rows * layer.row_bytes >= 256 * 1024
    assert layout.shard_rows == 2048


def test_the_tutorials_photograph_has_26_rows_in_a_float32_shard():
    layout = layout_for((516, 639))
    assert layout.shard_rows == 26
    assert layout.layers[0].chunk_rows == 1
    assert layout.is_sharded(layout.layers[0])


def test_a_map_above_256_mib_is_cut_in_y_and_has_its_row_to_itself():
    layout = layout_for((8000, 6000))
    (layer,) = layout.layers
    assert layout.shard_rows == 1
    assert not layout.is_sharded(layer)
    assert layer.chunk_height < layer.height
    assert layer.chunk_width == layer.width


def test_a_row_too_wide_for_a_band_is_cut_in_x_as_well():
    layout = class_layout((20, 3_000_000), [("conv1", 64, (12, 2_999_992))], 4)
    (layer,) = layout.layers
    assert layer.chunk_height == 1
    assert layer.chunk_width < layer.width
    assert layer.chunk_width * 64 * 4 <= 64 * 2**20


def test_a_class_below_the_receptive_field_is_refused():
    with pytest.raises(FeaturemapsError, match=r"class 5x5 leaves no conv1 map .* smaller than the receptive field"):
        class_layout((5, 5), [("conv1", 2, (-3, -3))], 4)


@settings(deadline=None)
@given(SIZES, st.data())
def test_every_pending_row_is_in_one_piece_and_no_shard_has_two(size, data):
    layout = layout_for(size)
    n_rows = data.draw(st.integers(0, 5 * layout.shard_rows + 3))
    rows = sorted(data.draw(st.sets(st.integers(0, max(0, n_rows - 1)), max_size=min(n_rows, 200))) if n_rows else [])
    complete = data.draw(st.booleans())
    pieces, held = cut_pieces(layout, rows, n_rows, 0.01, complete=complete)
    assert [row for piece in pieces for row in piece.rows] + held == rows
    assert len({piece.start for piece in pieces}) == len(pieces)
    for piece in pieces:
        assert piece.start % layout.shard_rows == 0
        assert piece.stop == min(piece.start + layout.shard_rows, n_rows)
        assert all(piece.start <= row < piece.stop for row in piece.rows)
        assert complete or piece.stop - piece.start == layout.shard_rows
    assert not (complete and held)


PIECES = st.lists(
    st.builds(
        Piece,
        size=st.just((10, 10)),
        start=st.integers(0, 1000),
        stop=st.just(1001),
        rows=st.just((1000,)),
        cost_s=st.floats(1e-4, 3),
        memory_bytes=st.integers(1, 2 * BATCH_BYTES),
    ),
    max_size=60,
)


@given(PIECES, st.integers(1, 64))
def test_batches_hold_every_piece_once_and_stay_within_memory(pieces, slots):
    for is_whole in (False, True):
        batches = pack_batches(pieces, slots, is_whole=is_whole)
        assert [piece for batch in batches for piece in batch.pieces] == pieces
        assert all(batch.n_images == len(batch.pieces) for batch in batches)
        assert is_whole or all(len(batch.pieces) == 1 or batch.memory_bytes <= BATCH_BYTES for batch in batches)


@given(st.integers(1, 16), st.integers(1, 3000))
def test_small_classes_are_packed_and_every_slot_has_work(slots, n):
    pieces = [Piece((10, 10), 0, 3, (0, 1, 2), 0.006, 1000)] * n
    batches = pack_batches(pieces, slots)
    assert len(batches) <= max(1, math.ceil(n * 0.006 / MIN_BATCH_S))
    if n * 0.006 >= 4 * slots:
        assert len(batches) >= 2 * slots


def test_one_driver_keeps_up_with_a_thousand_workers():
    pieces = [Piece((10, 10), 0, 3, (0, 1, 2), 0.5, 1000)] * 300_000
    batches = pack_batches(pieces, 1000)
    assert 1000 * DRIVER_S <= batches[0].cost_s <= 1000 * DRIVER_S + 0.5
    assert min(MIN_BATCH_S, 0.5) <= batches[-1].cost_s < 1.0
    assert max(batch.cost_s for batch in pack_batches(pieces, 4)) <= 1.5


def test_cost_grows_with_work():
    layout = layout_for((516, 639))
    assert image_cost_s(layout, 10**9, 0) > image_cost_s(layout, 10**8, 0) > image_cost_s(layout_for((64, 64)), 10**6, 0) > 0
    assert image_cost_s(layout, 10**8, 10**6) > image_cost_s(layout, 10**8, 0)
