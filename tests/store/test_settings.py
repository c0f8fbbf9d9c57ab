from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config import DecodeSpec, ExtractorSpec, LayerSpec, make_job
from pipeline.errors import UsageError
from pipeline.extract import kernel
from pipeline.extract.activations import ACTIVATIONS
from pipeline.extract.weights import load_weights, weights_digest
from pipeline.store.schema import difference, narrowed, widened
from pipeline.store.settings import (
    cost_s,
    decode_spec,
    extractor_spec,
    is_compiled,
    layout_of,
    multiply_adds,
    needed_size,
    scratch_of,
    store_spec,
    torch_values,
)

LAYERS = [{"filters": 4, "kernel": 5, "pool": 2, "activation": "tanh"}, {"filters": 6, "kernel": [3, 1]}]


def spec_of(**values):
    job = make_job({"source": "photos", "store": "features.zarr", **values})
    return store_spec(job, "/photos", load_weights(job.extractor, job.decode.channels))


def test_a_store_gives_back_the_rules_and_layers_that_it_was_made_with():
    decode = {"color": "grey", "resize": (40, 50), "background": (1, 2, 3), "formats": ("PNG",)}
    spec = spec_of(decode=decode, extractor={"layers": LAYERS, "outputs": ["conv2", "conv1"]})
    assert decode_spec(spec) == DecodeSpec(**decode)
    found = extractor_spec(spec)
    assert found.layers == tuple(LayerSpec(**layer) for layer in LAYERS)
    assert found.output_names == ("conv1", "conv2")
    assert [(layer.name, layer.channels) for layer in spec.layers] == [("conv1", 4), ("conv2", 6)]


def test_the_spec_survives_json_as_the_store_keeps_it():
    spec = spec_of(extractor={"layers": LAYERS})
    assert json.loads(json.dumps(spec.decode)) == spec.decode
    assert json.loads(json.dumps(spec.extractor)) == spec.extractor


def test_a_digest_covers_the_content_and_not_where_weights_came_from(tmp_path):
    seeded = spec_of()
    weights = load_weights(ExtractorSpec(), 3)
    save_file({name.replace("_", "."): values for name, values in weights.items()}, tmp_path / "w.safetensors")
    loaded = spec_of(extractor={"weights": str(tmp_path / "w.safetensors")})
    assert seeded.extractor["origin"] == {"seed": 23455}
    assert loaded.extractor["origin"] == {"weights": "w.safetensors"}
    assert loaded.extractor["sha256"] == seeded.extractor["sha256"]
    assert difference(seeded, loaded) == []
    content = {key: value for key, value in seeded.extractor.items() if key not in {"sha256", "origin"}}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert seeded.extractor["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert content["weights_sha256"] == weights_digest(weights)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"dtype": "uint8"}, 'dtype: the store has "float32", this run asks for "uint8"'),
        ({"decode": {"color": "grey"}}, 'decode.color: the store has "rgb", this run asks for "grey"'),
        ({"decode": {"resize": [5, 5]}}, "decode.resize: the store has null, this run asks for [5, 5]"),
        ({"decode": {"exif_orientation": False}}, "decode.exif_orientation: the store has true, this run asks for false"),
        ({"extractor": {"outputs": ["conv1"]}}, None),
        ({"decode": {"pixel_limit": 5, "formats": ["PNG"], "resize_filter": "box"}}, None),
        ({"decode": {"pixel_limit": 10**9}}, None),
        ({"limit": 3, "workers": 2, "max_removed": 1, "retry_quarantined": True}, None),
    ],
)
def test_what_changes_the_maps_differs_and_what_does_not_is_free_to_change(values, line):
    lines = difference(spec_of(), spec_of(**values))
    assert (line in lines) if line else lines == []


def test_the_filter_of_a_resize_changes_the_maps():
    sizes = [{"resize": [9, 9], "resize_filter": name} for name in ("box", "lanczos")]
    lines = difference(*(spec_of(decode=decode) for decode in sizes))
    assert lines == ['decode.resize_filter: the store has "box", this run asks for "lanczos"']


def test_a_store_takes_up_wider_limits_and_keeps_them():
    narrow = spec_of(decode={"pixel_limit": 100, "formats": ["PNG", "JPEG"]})
    wide = spec_of(decode={"pixel_limit": 200, "formats": ["GIF", "PNG"]})
    both = spec_of(decode={"pixel_limit": 200, "formats": ["PNG", "JPEG", "GIF"]})
    assert widened(narrow, wide).decode == both.decode
    assert widened(both, narrow) is both
    assert widened(narrow, narrow) is narrow
    assert narrowed(narrow, both) == []
    assert narrowed(wide, narrow) == [
        "new images above 100 pixels are rejected (pixel_limit; it was 200 before)",
        "new images of the formats GIF are rejected (formats), which were read before",
    ]


def test_another_seed_differs_in_its_weights():
    assert any(line.startswith("extractor.weights_sha256: ") for line in difference(spec_of(), spec_of(extractor={"seed": 1})))


@pytest.mark.parametrize(("dtype", "fill"), [("float32", np.nan), ("float16", np.nan), ("uint16", 0), ("uint8", 0)])
def test_a_sigmoid_layer_is_stored_within_its_own_bounds(dtype, fill):
    (layer,) = spec_of(dtype=dtype).layers
    assert np.array_equal(layer.fill_value, fill, equal_nan=True)
    if dtype.startswith("float"):
        assert (layer.scale_factor, layer.add_offset) == (1.0, 0.0)
    else:
        assert 0 < layer.scale_factor * np.iinfo(dtype).max < 1.1
        assert layer.error_bound < layer.scale_factor


def test_the_smallest_image_is_the_receptive_field():
    spec = ExtractorSpec(layers=tuple(LayerSpec(**layer) for layer in LAYERS))
    assert needed_size(spec) == (10, 6)
    assert needed_size(ExtractorSpec()) == (9, 9)
    sizes = [(layer.height, layer.width) for layer in layout_of((10, 6), spec, 4, 3).layers]
    assert sizes == [(1, 1)]


def test_a_layout_has_the_layers_that_are_stored():
    spec = ExtractorSpec(layers=tuple(LayerSpec(**layer) for layer in LAYERS), outputs=("conv1", "conv2"))
    layout = layout_of((100, 80), spec, 2, 3)
    assert [(layer.name, layer.channels, layer.height, layer.width) for layer in layout.layers] == [
        ("conv1", 4, 48, 38),
        ("conv2", 6, 46, 38),
    ]


def test_the_work_of_an_image_is_that_of_its_convolutions_before_the_pool():
    spec = ExtractorSpec(layers=tuple(LayerSpec(**layer) for layer in LAYERS))
    first = 4 * 3 * 25 * 96 * 76
    second = 6 * 4 * 3 * 46 * 38
    assert multiply_adds(spec, (100, 80), 3) == first + second


def test_layers_of_more_weights_than_memory_are_a_slip_of_the_pen():
    spec = ExtractorSpec(layers=(LayerSpec(filters=1_000_000, kernel=(100_000, 100_000)),))
    with pytest.raises(
        UsageError, match=r"layers have 30,000,000,001,000,000 weights, and more than 134,217,728 are surely a slip"
    ):
        load_weights(spec, 3)


def test_values_that_torch_computes_leave_out_a_compiled_first_layer():
    spec = ExtractorSpec(layers=(LayerSpec(filters=4, kernel=(5, 5)), LayerSpec(filters=3, kernel=(3, 3), pool=(2, 2))))
    second = 3 * 94 * 74  # before pooling
    assert torch_values(spec, (100, 80), 3) == second
    assert torch_values(ExtractorSpec(layers=(LayerSpec(filters=3, kernel=(5, 5), pool=(2, 2)),)), (100, 80), 3) == 3 * 96 * 76
    wide = ExtractorSpec(layers=(LayerSpec(filters=8, kernel=(3, 3)), LayerSpec(filters=16, kernel=(3, 3), pool=(2, 2))))
    assert torch_values(wide, (100, 80), 3) == 0
    layout = layout_of((100, 80), spec, 4, 3)
    assert cost_s(spec, layout, 3) > cost_s(spec, layout, 1) > 0


def test_layers_that_are_not_stored_take_memory_too_unless_compiled_code_has_none(monkeypatch):
    spec = ExtractorSpec(layers=(LayerSpec(filters=64, kernel=(3, 3)), LayerSpec(filters=2, kernel=(3, 3), pool=(8, 8))))
    assert scratch_of(spec, "float16", (402, 602), 3) == (4 * (64 * 400 * 600 + 2 * 49 * 74), True)
    maps = 4 * 2 * 508 * 631
    assert scratch_of(ExtractorSpec(), "float16", (516, 639), 3) == (maps, True)
    monkeypatch.setattr("pipeline.extract.kernel.version", lambda *_: "avx2")
    assert scratch_of(ExtractorSpec(), "uint8", (516, 639), 3) == (0, False)
    assert scratch_of(ExtractorSpec(), "uint8", (516, 639), 3, has_kernel=False) == (maps, True)
    spec = ExtractorSpec(layers=(LayerSpec(filters=64, kernel=(3, 3)), LayerSpec(filters=6, kernel=(3, 3), pool=(8, 8))))
    # Outputs of one row of maps, in whole vectors, and a pointer each; the pixels are larger than the last maps.
    outputs = max(600 * (64 + 2), 74 * 8 * 8 * (16 + 2))
    assert scratch_of(spec, "uint8", (402, 602), 3) == (4 * (64 * 400 * 600 + 3 * 402 * 602 + outputs), False)
    with monkeypatch.context() as patch:
        patch.setitem(ACTIVATIONS, "sigmoid", ACTIVATIONS["sigmoid"]._replace(compiled=None))
        assert scratch_of(ExtractorSpec(), "uint8", (516, 639), 3) == (maps, True)
    monkeypatch.setattr("pipeline.extract.kernel.version", lambda *_: "torch")
    assert scratch_of(ExtractorSpec(), "uint8", (516, 639), 3) == (maps, True)


def test_torch_is_needed_where_compiled_code_does_not_pay():
    narrow = ExtractorSpec(layers=(LayerSpec(filters=2, kernel=(9, 9)), LayerSpec(filters=2, kernel=(5, 5))))
    wide = ExtractorSpec(layers=(LayerSpec(filters=16, kernel=(3, 3)), LayerSpec(filters=16, kernel=(5, 5))))
    has_kernel = kernel.version(3) != "torch"
    for spec, size, expected in ((narrow, (516, 639), False), (narrow, (28, 28), True), (wide, (516, 639), True)):
        assert scratch_of(spec, "uint8", size, 3).has_torch is not (expected and has_kernel)
        assert is_compiled(spec, "uint8", 3, size) == (expected and has_kernel)


def test_quantised_stores_of_tf32_leave_room_for_its_rounding():
    exact, fast = (spec_of(dtype="uint8", extractor={"tf32": tf32}).layers[0] for tf32 in (False, True))
    assert fast.scale_factor > exact.scale_factor * (1 + 1 / 256)
    assert fast.add_offset < exact.add_offset


def test_tf32_is_part_of_the_store_only_where_it_was_asked_for(tmp_path):
    job = make_job({"source": str(tmp_path), "store": str(tmp_path / "f.zarr")})
    exact = store_spec(job, str(tmp_path), load_weights(job.extractor, 3))
    fast = job.model_copy(update={"extractor": job.extractor.model_copy(update={"tf32": True})})
    other = store_spec(fast, str(tmp_path), load_weights(fast.extractor, 3))
    assert "tf32" not in exact.extractor
    assert exact.extractor["sha256"] != other.extractor["sha256"]
    assert [extractor_spec(spec).tf32 for spec in (exact, other)] == [False, True]


def test_a_setting_that_the_extractor_gets_later_is_in_the_store_where_it_is_not_the_default(tmp_path, monkeypatch):
    class Later(ExtractorSpec):
        vivid: bool = False

    job = make_job({"source": str(tmp_path), "store": str(tmp_path / "f.zarr")})
    weights = load_weights(job.extractor, 3)
    made = [
        store_spec(job.model_copy(update={"extractor": extractor}), str(tmp_path), weights)
        for extractor in (ExtractorSpec(), Later(), Later(vivid=True))
    ]
    assert difference(made[0], made[1]) == []
    assert difference(made[0], made[2]) == ["extractor.vivid: the store has null, this run asks for true"]
    monkeypatch.setattr("pipeline.store.settings.ExtractorSpec", Later)
    assert [extractor_spec(spec).vivid for spec in made] == [False, False, True]
