from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.config import DecodeSpec, ExtractorSpec, Job, LayerSpec, load_job, make_job, read_yaml
from pipeline.errors import UsageError
from pipeline.validation import validate_model

JOB = {"source": "photos", "store": "features.zarr"}


def refused(values, where: str = "the command") -> str:
    """The message that a job with these values gets, one paragraph."""
    with pytest.raises(UsageError) as caught:
        make_job({**JOB, **values}, where)
    message = str(caught.value)
    assert message.startswith(f"{where} is not usable, so nothing was started: ")
    assert "\n" not in message
    return message


def test_a_job_needs_no_more_than_source_and_store_and_then_is_the_tutorials():
    job = make_job(JOB)
    assert job.extractor.layers == (LayerSpec(filters=2, kernel=(9, 9), pool=(1, 1), activation="sigmoid"),)
    assert (job.extractor.seed, job.dtype, job.decode.color, job.max_removed) == (23455, "float32", "rgb", 0.10)
    assert job.extractor.output_names == ("conv1",)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dtpye": "uint8"}, "unknown key 'dtpye': did you mean 'dtype'?"),
        ({"max_quarantine": 3}, "unknown key 'max_quarantine': did you mean 'max_quarantined'?"),
        ({"decode": {"colour": "grey"}}, "unknown key 'decode.colour': did you mean 'color'?"),
        ({"extractor": {"layer": []}}, "unknown key 'extractor.layer': did you mean 'layers'?"),
        (
            {"extractor": {"layers": [{}, {"kernels": 5}]}},
            "unknown key 'extractor.layers.1.kernels': did you mean 'kernel'?",
        ),
        (
            {"extractor": {"layers": [{"zzz": 5}]}},
            "unknown key 'extractor.layers.0.zzz': known keys are activation, filters, kernel, pool",
        ),
        ({"outputs": "conv1"}, "unknown key 'outputs': did you mean 'extractor.outputs'?"),
        ({"layers": []}, "unknown key 'layers': did you mean 'extractor.layers'?"),
        ({"kernel": 9}, "unknown key 'kernel': did you mean 'extractor.layers.N.kernel'?"),
        ({"resize": [9, 9]}, "unknown key 'resize': did you mean 'decode.resize'?"),
        ({"decode": {"dtype": "uint8"}}, "unknown key 'decode.dtype': did you mean 'dtype'?"),
        ({"decode": {"seed": 5}}, "unknown key 'decode.seed': did you mean 'extractor.seed'?"),
        (
            {"zzz": 1},
            "unknown key 'zzz': known keys are check, cluster, deadline_s, decode, default_exclude, dtype, durability, exclude, extractor",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(values, expected):
    assert expected in refused(values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"dtype": "int8"}, "dtype: Input should be 'float32', 'float16', 'uint16' or 'uint8', not 'int8'"),
        ({"dtype": "Float32"}, "'uint16' or 'uint8', not 'Float32': did you mean 'float32'?"),
        ({"decode": {"color": "gray"}}, "decode.color: Input should be 'rgb' or 'grey', not 'gray': did you mean 'grey'?"),
        ({"decode": {"formats": "jpg"}}, "or 'WEBP', not 'jpg': did you mean 'JPEG'?"),
        ({"deadline_s": "soon"}, "deadline_s: 'soon' is no time: write for instance 8h, 90min, 08:00:00"),
        ({"extractor": {"layers": "2x9"}}, "extractor.layers.0: layer '2x9' is not of the form FILTERSxHEIGHTxWIDTH"),
        ({"limit": 0}, "limit: Input should be greater than 0, not 0"),
        ({"workers": -1}, "workers: Input should be greater than 0, not -1"),
        ({"memory_limit_bytes": "much"}, "memory_limit_bytes: 'much' is no size: write for instance 16 GiB or 4GB"),
        ({"max_quarantined": -1}, "max_quarantined: Input should be greater than or equal to 0, not -1"),
        ({"max_removed": 2}, "max_removed: Input should be less than or equal to 1, not 2"),
        ({"retry_quarantined": "perhaps"}, "retry_quarantined: Input should be a valid boolean"),
        ({"source": 5}, "source: Input should be a valid string, not 5: put it in quotes"),
        ({"decode": {"resize": [0, 5]}}, "decode.resize.0: Input should be greater than 0, not 0"),
        ({"decode": {"resize": 5}}, "decode.resize: Input should be a valid tuple, not 5: write it as a list: [..., ...]"),
        ({"decode": {"background": [0, 0, 256]}}, "decode.background.2: Input should be less than or equal to 255, not 256"),
        ({"decode": {"formats": ["PSD"]}}, "decode.formats.0: Input should be 'AVIF', 'BMP'"),
        ({"decode": {"resize_filter": "box3"}}, "decode.resize_filter: Input should be 'nearest'"),
        ({"decode": {"pixel_limit": 0}}, "decode.pixel_limit: Input should be greater than 0, not 0"),
        ({"decode": None}, "decode: Input should be keys and values, not None"),
        ({"extractor": {"seed": 2**32}}, "extractor.seed: Input should be less than 4294967296"),
        ({"extractor": {"layers": []}}, "extractor.layers: Tuple should have at least 1 item after validation, not 0"),
        (
            {"extractor": {"layers": [{"activation": "softmax"}]}},
            "extractor.layers.0.activation: Input should be 'sigmoid', 'tanh', 'relu' or 'none', not 'softmax'",
        ),
        ({"extractor": {"layers": [{"kernel": 0}]}}, "extractor.layers.0.kernel.0: Input should be greater than 0, not 0"),
        (
            {"extractor": {"outputs": ["conv1", "conv7"]}},
            "extractor: outputs ['conv7'] are neither layers of this extractor nor 'pooled'; known are ['conv1', 'pooled']",
        ),
        ({"extractor": {"outputs": ["conv1", "conv1"]}}, "extractor: outputs ['conv1', 'conv1'] name a layer twice"),
    ],
)
def test_a_bad_value_is_refused_with_what_was_expected_and_what_was_found(values, expected):
    assert expected in refused(values)


def test_all_mistakes_are_named_at_once_and_none_that_only_follows_from_another():
    message = refused({"dtype": "int8", "extractor": {"layers": [{"filers": 3}]}, "zzz": 1})
    problems = message.split(": ", 1)[1].split("; ")
    assert len(problems) == 3
    assert "at least 1 item" not in message


def test_a_missing_key_is_named():
    with pytest.raises(UsageError, match=r"the command is not usable.*key 'store' is missing: add it$"):
        make_job({"source": "photos"})


def test_values_that_are_no_mapping_are_refused():
    with pytest.raises(UsageError, match=r"this is not usable.*the whole: Input should be a valid dictionary"):
        validate_model(Job, [1], "this")


def test_a_key_of_a_plain_mapping_is_part_of_the_place():
    class Shelf(BaseModel):
        by_name: dict[str, DecodeSpec]

    with pytest.raises(UsageError, match=r"unknown key 'by_name\.decode\.colr': did you mean 'color'\?"):
        validate_model(Shelf, {"by_name": {"decode": {"colr": "rgb"}}}, "the shelf")


def test_a_square_kernel_or_pool_is_one_number():
    layer = LayerSpec(kernel=5, pool=2)
    assert (layer.kernel, layer.pool) == ((5, 5), (2, 2))


@pytest.mark.parametrize(
    ("text", "layer"),
    [
        ("2x9x9", LayerSpec()),
        ("20x5x3:tanh", LayerSpec(filters=20, kernel=(5, 3), activation="tanh")),
        ("4x3x3:pool2", LayerSpec(filters=4, kernel=3, pool=2)),
        ("4x3x3:pool2:none", LayerSpec(filters=4, kernel=3, pool=2, activation="none")),
    ],
)
def test_a_layer_of_the_command_line_is_read(text, layer):
    assert LayerSpec.parse(text) == layer


@pytest.mark.parametrize(
    "text", ["", "2", "2x9", "2x9x9x9", "axbxc", "0x9x9", "2x9x9:softmax", "2x9x9:pool", "2x9x9:pool0", "2x-9x9"]
)
def test_a_layer_of_another_form_is_refused_with_an_example(text):
    expected = (
        rf"layer {re.escape(repr(text))} is not of the form FILTERSxHEIGHTxWIDTH.*for instance 2x9x9:sigmoid or 20x5x5:tanh:pool2"
    )
    with pytest.raises(UsageError, match=expected):
        LayerSpec.parse(text)


WORDS = st.one_of(
    st.sampled_from(["sigmoid", "tanh", "relu", "none", "pool1", "pool2", "pool4", "pool02"]),
    st.sampled_from(
        ["pad1", "pad", "stride2", "s2", "dilation2", "foo", "", "Tanh", "tanh ", "pool", "pool0", "pool-1", "pool2x2"]
    ),
    st.text(max_size=6).filter(lambda word: ":" not in word),
)


@given(
    words=st.lists(WORDS, max_size=4), size=st.sampled_from(["2x9x9", "20x5x3", "0x9x9", "2x9", " 2x9x9", "2x+9x9", "1_0x9x9"])
)
@example(words=["pad1", "relu"], size="8x3x3")
@example(words=["stride2", "relu"], size="8x3x3")
@example(words=["foo", "tanh"], size="8x3x3")
@example(words=["relu", "tanh"], size="8x3x3")
@example(words=["relu", "relu"], size="8x3x3")
@example(words=["pool2", "pool4"], size="8x3x3")
def test_every_word_of_a_layer_is_used_once_or_the_layer_is_refused(words, size):
    text = ":".join([size, *words])
    acts = [word for word in words if word in ("sigmoid", "tanh", "relu", "none")]
    pools = [word for word in words if re.fullmatch("pool0*[1-9][0-9]*", word)]
    is_right = len(acts) + len(pools) == len(words) and len(acts) <= 1 and len(pools) <= 1
    if not is_right or not re.fullmatch("[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*", size):
        with pytest.raises(UsageError, match=r"is not of the form FILTERSxHEIGHTxWIDTH\[:ACTIVATION\]\[:poolN\]"):
            LayerSpec.parse(text)
        return
    filters, height, width = map(int, size.split("x"))
    pool = int(pools[0].removeprefix("pool")) if pools else 1
    expected = {"filters": filters, "kernel": (height, width), "pool": (pool, pool), "activation": (acts or ["sigmoid"])[0]}
    assert LayerSpec.parse(text).model_dump() == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8x3x3:foo:tanh", "'foo' is no word of a layer; the nearest is 'pool2'"),
        ("8x3x3:thanh", "'thanh' is no word of a layer; the nearest is 'tanh'"),
        ("8x3x3:ReLU", "'ReLU' is no word of a layer; the nearest is 'relu'"),
        ("8x3x3:pad1:relu", "'pad1' cannot be chosen, because convolutions are valid (no padding), with stride 1"),
        ("8x3x3:stride2:relu", "'stride2' cannot be chosen, because convolutions are valid (no padding), with stride 1"),
        ("8x3x3:relu:tanh", "'tanh' is one word too many, because 'relu' is an activation and a layer has one"),
        ("8x3x3:relu:relu", "'relu' is one word too many, because 'relu' is an activation and a layer has one"),
        ("8x3x3:pool2:pool4", "'pool4' is one word too many, because 'pool2' is a pool and a layer has one"),
        ("8x3x3:pool2x2", "'pool2x2' is no pool: behind pool stands one positive number, as in pool2"),
        ("8x3x3:", "a word between two colons, or after the last one, is missing"),
        ("8x3:tanh", "'8x3' is not three positive numbers, filters x height x width"),
        ("8X3X3", "'8X3X3' is not three positive numbers, filters x height x width, with a small x between them; write"),
        ("0x3x3", "'0x3x3' is not three positive numbers, filters x height x width; write"),
        ("8x3x3,4x3x3", "filters x height x width; give --layers once for each layer; write"),
    ],
)
def test_a_refused_layer_says_which_word_and_what_to_write(text, expected):
    with pytest.raises(UsageError) as caught:
        LayerSpec.parse(text)
    assert expected in str(caught.value)
    assert str(caught.value).endswith("or 20x5x5:tanh:pool2 (activations: sigmoid, tanh, relu, none)")


def test_outputs_come_first_layer_first_whatever_their_order():
    spec = ExtractorSpec(layers=(LayerSpec(),) * 11, outputs=("conv10", "conv2"))
    assert spec.output_names == ("conv2", "conv10")
    assert ExtractorSpec(layers=(LayerSpec(),) * 3).output_names == ("conv3",)


def test_pooled_outputs_are_of_every_layer_and_have_no_maps():
    spec = ExtractorSpec(layers=(LayerSpec(),) * 3, outputs=("pooled", "conv2"))
    assert (spec.map_names, spec.output_names) == (("conv2",), ("conv1", "conv2", "conv3"))
    assert ExtractorSpec(outputs=("pooled",)).map_names == ()


def test_units_and_single_words_are_read_as_people_write_them():
    layers = "20x5x5:tanh:pool2, 50x5x5"
    job = make_job(
        {
            **JOB,
            "memory_limit_bytes": "4 GiB",
            "deadline_s": "10min",
            "decode": {"formats": "PNG"},
            "extractor": {"layers": layers, "outputs": "conv1 pooled"},
        }
    )
    assert (job.memory_limit_bytes, job.deadline_s, job.decode.formats) == (4 * 2**30, 600, ("PNG",))
    assert job.extractor.layers == tuple(map(LayerSpec.parse, layers.split(", ")))
    assert job.extractor.outputs == ("conv1", "pooled")
    assert ExtractorSpec(layers={"filters": 3}).layers == (LayerSpec(filters=3),)
    assert make_job({**JOB, "memory_limit_bytes": 4096, "deadline_s": 90}).deadline_s == 90


def test_a_number_with_colons_or_a_leading_zero_is_a_text(tmp_path):
    (tmp_path / "a.yaml").write_text("[8:00:00, 0123, 12, -3, 0, 1.5, 0x10]")
    assert read_yaml(tmp_path / "a.yaml") == ["8:00:00", "0123", 12, -3, 0, 1.5, "0x10"]


# -- job files -------------------------------------------------------------------------------------------------------------------


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def test_paths_in_a_job_file_are_relative_to_it(tmp_path, monkeypatch):
    job = load_job(write(tmp_path, "source: photos/*.jpg\nstore: ../features.zarr\nextractor: {weights: w.safetensors}"))
    assert job.source == str(tmp_path / "photos/*.jpg")
    assert job.store == str(tmp_path / "../features.zarr")
    assert job.extractor.weights == str(tmp_path / "w.safetensors")
    monkeypatch.chdir(tmp_path)
    assert load_job("job.yaml") == job


def test_absolute_paths_home_folders_and_urls_of_a_job_file_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/me")
    job = load_job(write(tmp_path, "source: ~/photos\nstore: s3://bucket/features.zarr\nextractor: {weights: /w.safetensors}"))
    assert (job.source, job.store, job.extractor.weights) == ("/home/of/me/photos", "s3://bucket/features.zarr", "/w.safetensors")


def test_an_unknown_home_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"names '~nobody-of-that-name/photos', whose home folder is not known"):
        load_job(write(tmp_path, "source: ~nobody-of-that-name/photos\nstore: x"))


def test_overrides_replace_single_values_of_a_job_file(tmp_path):
    path = write(tmp_path, "source: a\nstore: b\ndtype: uint8\ndecode: {color: grey, resize: [64, 48]}\nextractor:\n")
    job = load_job(path, {"decode": {"resize": [32, 32]}, "extractor": {"seed": 7}, "limit": 3})
    assert (job.dtype, job.decode.color, job.decode.resize, job.limit) == ("uint8", "grey", (32, 32), 3)
    assert job.extractor.seed == 7


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            b"source: a\nstore: 'b\nlimit: 3",
            r"cannot be read \(line 3: .*end of stream, while scanning a quoted scalar that begins on line 2\), so nothing was started",
        ),
        (
            b"source: [",
            r"cannot be read \(line 1: expected the node content, but found the end of the file, .*\), so nothing was started",
        ),
        (
            b"dtype:\tuint8\n",
            r"cannot be read \(line 1 has a tab outside quotes: YAML wants spaces\), so nothing was started; correct the file$",
        ),
        (
            b"source: a\nstore: b: c\n",
            r"job\.yaml cannot be read \(line 2: mapping values are not allowed here\), so nothing was",
        ),
        (
            b"decode:\n  \tcolor: grey\n",
            r"job\.yaml cannot be read \(line 2 is indented with a tab: YAML wants spaces\), so nothing",
        ),
        (b"\xff\xfe", r"job file .*job\.yaml cannot be read"),
        (b"- a\n- b\n", r"job file .*job\.yaml holds list, not keys and values"),
        (b"", r"job file .*job\.yaml holds NoneType, not keys and values"),
        (b"source: a\nstore: b\nlimt: 3\n", r"job file .*job\.yaml is not usable.*unknown key 'limt': did you mean 'limit'\?"),
        (b"store: b\n", r"job file .*job\.yaml is not usable.*key 'source' is missing"),
    ],
)
def test_a_job_file_that_makes_no_job_is_refused(tmp_path, content, expected):
    (tmp_path / "job.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=expected):
        load_job(tmp_path / "job.yaml")


def test_a_missing_job_file_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"job file .*none\.yaml cannot be read \(.*No such file.*give a YAML file"):
        load_job(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("source: 2024-02-30", "day is out of range"),
        ("[" * 3000, "recursion"),
        ("1: 2", "key 1 is no text; put it in quotes"),
        ("extractor: {null: 2}", "key None is no text"),
        ("a: &a [*a]", "unknown key 'a'"),
        (
            "a: &a [x, x, x, x, x, x, x, x]\n"
            + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 8)}]\n" for m, n in zip("abcdefghij", "bcdefghijk", strict=True)),
            "unknown key",
        ),
    ],
)
def test_a_hostile_job_file_is_refused_in_a_line(tmp_path, text, expected):
    path = write(tmp_path, text)
    with pytest.raises(UsageError, match=expected) as found:
        load_job(path)
    assert len(str(found.value)) < 3000 + len(str(path))
