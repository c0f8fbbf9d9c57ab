from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.errors import FeaturemapsError
from pipeline.store.codecs import array_document, compress, decompress, encode_shard, pad

NUMBERS = ("uint8", "uint16", "float16", "float32", "int32", "int64")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
DAMAGED = r"an object of \d+ bytes does not fit its crc32c checksum: it was changed or cut off .* restore it from a copy"
few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fill_of(dtype: str) -> float:
    return math.nan if dtype.startswith("float") else 0


def arrays(shape, dtypes=NUMBERS):
    return st.sampled_from(dtypes).flatmap(lambda dtype: hnp.arrays(dtype, shape))


def texts(values) -> np.ndarray:
    column = np.empty(len(values), object)
    column[:] = values
    return column


def read_with_zarr(document: dict, objects: dict[str, bytes]) -> np.ndarray:
    """What plain Zarr, which knows nothing of this package, makes of the metadata and the objects."""
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        (Path(folder) / "zarr.json").write_text(json.dumps(document, allow_nan=False))
        for key, data in objects.items():
            (Path(folder) / key).write_bytes(data)
        return np.asarray(zarr.open_array(folder, mode="r", zarr_format=3)[...])


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal in dtype, shape and every bit, so that NaN and -0.0 count as well."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()


# -- one chunk -------------------------------------------------------------------------------------------------------------------


@few
@given(arrays(hnp.array_shapes(max_dims=4, max_side=7)))
def test_decompress_undoes_compress(values):
    found = decompress(compress(values), values.dtype.name, values.shape)
    assert_same(found, values)
    found[...] = 1  # the driver changes what it read


@few
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_decompress_undoes_compress_of_strings(values):
    assert decompress(compress(texts(values)), "string", (len(values),)).tolist() == values


@few
@given(arrays(hnp.array_shapes(max_dims=4, max_side=7)))
def test_plain_zarr_reads_a_chunk_of_numbers(values):
    document = array_document(
        values.shape,
        values.dtype.name,
        [f"d{i}" for i in range(values.ndim)],
        chunk=values.shape,
        fill=fill_of(values.dtype.name),
    )
    assert_same(read_with_zarr(document, {".".join("c" + "0" * values.ndim): compress(values)}), values)


@pytest.mark.filterwarnings("error")
@few
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_plain_zarr_reads_a_chunk_of_strings(values):
    document = array_document((len(values),), "string", ("image",), chunk=(len(values),), fill="")
    assert read_with_zarr(document, {"c.0": compress(texts(values))}).tolist() == values


@pytest.mark.parametrize("value", ["", "a\nb\r\n\x00c", "é/日本/🦓 %FF.jpg", " ", "\ufeff\u202e", "x" * 100_000])
def test_strings_with_newlines_unicode_and_nothing_at_all_come_back(value):
    values = texts(["before", value, "after"])
    assert decompress(compress(values), "string", (3,)).tolist() == values.tolist()
    document = array_document((3,), "string", ("image",), chunk=(3,), fill="")
    assert read_with_zarr(document, {"c.0": compress(values)}).tolist() == values.tolist()


@pytest.mark.parametrize("dtype", [*NUMBERS, "string"])
def test_a_chunk_that_is_missing_reads_as_fill(dtype):
    fill = "" if dtype == "string" else fill_of(dtype)
    first = texts(["a", "b"]) if dtype == "string" else np.array([1, 2], dtype)
    document = array_document((5,), dtype, ("image",), chunk=(2,), fill=fill)
    found = read_with_zarr(document, {"c.0": compress(first)}).tolist()
    assert found[:2] == first.tolist()
    assert all(value == fill or (value != value and fill != fill) for value in found[2:])


def test_equal_values_make_equal_bytes():
    values = np.random.default_rng(0).normal(size=(4, 2, 30, 40)).astype(np.float32)
    assert compress(values) == compress(values.copy())
    assert [*encode_shard(values, 2, 8, math.nan)] == [*encode_shard(values.copy(), 2, 8, math.nan)]


def test_a_chunk_of_a_shard_is_encoded_when_it_is_asked_for():
    block = np.zeros((4, 1, 8, 8), np.float32)
    parts = encode_shard(block, 1, 4, math.nan)
    next(parts)
    block[1] = 7
    assert decompress(b"".join([*parts][1:3]), "float32", (1, 1, 8, 8)).max() == 7


def test_repeated_values_and_repeated_strings_are_stored_small():
    assert len(compress(np.zeros(16_384, np.int64))) < 2_000
    assert len(compress(texts([""] * 16_384))) < 2_000
    smooth = np.linspace(0, 1, 100_000, dtype=np.float32)  # what the shuffle is for
    assert len(compress(smooth)) < 0.6 * smooth.nbytes


# -- damage ----------------------------------------------------------------------------------------------------------------------

SAMPLE = {
    "float32": np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32),
    "uint8": np.random.default_rng(2).integers(0, 256, (2, 3, 4), dtype=np.uint8),
    "string": texts(["photos/cat.jpg", "", "é\n"]),
}


@pytest.mark.parametrize("dtype", SAMPLE)
def test_every_flipped_byte_of_a_chunk_is_found(dtype):
    values = SAMPLE[dtype]
    data = compress(values)
    for position in range(len(data)):  # header, body and checksum
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[position] ^= flip
            with pytest.raises(FeaturemapsError, match=DAMAGED):
                decompress(bytes(damaged), dtype, values.shape)


@pytest.mark.parametrize("dtype", SAMPLE)
def test_every_truncated_chunk_is_found(dtype):
    values = SAMPLE[dtype]
    data = compress(values)
    for length in range(len(data)):
        with pytest.raises(FeaturemapsError, match=f"an object of {length} bytes does not fit"):
            decompress(data[:length], dtype, values.shape)
    with pytest.raises(FeaturemapsError, match=DAMAGED):
        decompress(data + b"\0", dtype, values.shape)


@pytest.mark.parametrize("dtype", SAMPLE)
def test_plain_zarr_finds_flipped_bytes_and_truncation_of_a_chunk_as_well(dtype):
    values = SAMPLE[dtype]
    document = array_document(
        values.shape, dtype, [f"d{i}" for i in range(values.ndim)], chunk=values.shape, fill="" if dtype == "string" else 0
    )
    key, data = ".".join("c" + "0" * values.ndim), compress(values)
    for position in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(ValueError, match=r"(?i)checksum"):
            read_with_zarr(document, {key: bytes(damaged)})
    with pytest.raises(ValueError, match=r"(?i)checksum"):
        read_with_zarr(document, {key: data[:-1]})


def test_plain_zarr_finds_every_flipped_byte_of_a_shard():
    values = SAMPLE["float32"][..., None]
    document = array_document((2, 3, 4, 1), "float32", "abcd", chunk=(1, 3, 4, 1), shard=(4, 3, 4, 1), fill=math.nan)
    data = b"".join(encode_shard(values, 1, 4, math.nan))
    for position in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        with pytest.raises(ValueError, match=r"(?i)checksum"):
            read_with_zarr(document, {"c.0.0.0.0": bytes(damaged)})


# -- a shard ---------------------------------------------------------------------------------------------------------------------


@st.composite
def shards(draw):
    """An array of several shards, the last of them partial: values, chunk_rows, shard_rows."""
    chunk_rows = draw(st.integers(1, 4))
    shard_rows = chunk_rows * draw(st.integers(1, 4))
    n = draw(st.integers(1, 3 * shard_rows))
    shape = (n, *draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)))
    return draw(arrays(shape)), chunk_rows, shard_rows


@few
@given(shards(), st.integers(0, 20))
def test_plain_zarr_reads_shards_and_what_lies_past_their_last_row_is_fill(sample, grown):
    values, chunk_rows, shard_rows = sample
    dtype, inner = values.dtype.name, values.shape[1:]
    fill = fill_of(dtype)
    length = len(values) + grown  # rows that were appended after the shards were written
    document = array_document(
        (length, *inner), dtype, ("image", "c", "y", "x"), chunk=(chunk_rows, *inner), shard=(shard_rows, *inner), fill=fill
    )
    objects = {
        f"c.{start // shard_rows}.0.0.0": b"".join(encode_shard(values[start : start + shard_rows], chunk_rows, shard_rows, fill))
        for start in range(0, len(values), shard_rows)
    }
    found = read_with_zarr(document, objects)
    assert_same(found[: len(values)], values)
    assert_same(found[len(values) :], np.full((grown, *inner), fill, dtype))


def test_inner_chunks_past_the_last_row_are_left_out_of_the_shard():
    block = np.ones((3, 1, 8, 8), np.float32)
    data = b"".join(encode_shard(block, 2, 8, math.nan))
    index = np.frombuffer(data[-4 - 4 * 16 : -4], "<u8").reshape(4, 2)
    assert index[2:].tolist() == [[2**64 - 1, 2**64 - 1]] * 2
    assert index[0].tolist()[0] == 0
    assert index[1].tolist()[0] == index[0].tolist()[1]
    assert index[1].sum() == len(data) - 4 * 16 - 4
    last = decompress(data[index[1][0] : index[1].sum()], "float32", (2, 1, 8, 8))
    assert (last[0] == 1).all()
    assert np.isnan(last[1]).all()


@few
@given(arrays((5, 2, 7, 9)), st.integers(1, 8), st.integers(1, 10))
def test_plain_zarr_reads_maps_that_are_cut_in_y_and_x(values, height, width):
    fill = fill_of(values.dtype.name)
    document = array_document(values.shape, values.dtype.name, "abcd", chunk=(2, 2, height, width), fill=fill)
    objects = {
        f"c.{n // 2}.0.{y // height}.{x // width}": compress(
            pad(values[n : n + 2, :, y : y + height, x : x + width], (2, 2, height, width), fill)
        )
        for n in range(0, 5, 2)
        for y in range(0, 7, height)
        for x in range(0, 9, width)
    }
    assert_same(read_with_zarr(document, objects), values)


# -- padding and metadata --------------------------------------------------------------------------------------------------------


def test_pad_fills_the_ends_and_gives_contiguous_values():
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    padded = pad(values[:, ::2], (4, 3), 9)
    assert padded.tolist() == [[0, 2, 9], [4, 6, 9], [8, 10, 9], [9, 9, 9]]
    assert padded.dtype == np.uint8
    transposed = pad(values.T, (4, 3), 0)
    assert transposed.flags.c_contiguous
    assert transposed.tolist() == values.T.tolist()


def test_the_metadata_of_a_sharded_array_is_what_zarr_itself_would_write():
    document = array_document(
        (10, 2, 3, 4),
        "float16",
        ("image", "c", "y", "x"),
        chunk=(2, 2, 3, 4),
        shard=(8, 2, 3, 4),
        fill=math.nan,
        attributes={"error_bound": 0.5},
    )
    with TemporaryDirectory() as folder:
        (Path(folder) / "zarr.json").write_text(json.dumps(document))
        array = zarr.open_array(folder, mode="r", zarr_format=3)
        assert json.loads(json.dumps(array.metadata.to_dict())) | {"attributes": {}} == document | {"attributes": {}}
        assert (array.shards, array.chunks) == ((8, 2, 3, 4), (2, 2, 3, 4))
        assert array.metadata.dimension_names == ("image", "c", "y", "x")
        assert dict(array.attrs) == {"error_bound": 0.5}
        assert np.isnan(array.fill_value)


@pytest.mark.parametrize("dtype", [*NUMBERS, "string"])
def test_every_array_is_checksummed_and_compressed_by_lz4(dtype):
    document = array_document((4,), dtype, ("image",), chunk=(4,), fill="" if dtype == "string" else fill_of(dtype))
    names = [codec["name"] for codec in document["codecs"]]
    assert names == ["vlen-utf8" if dtype == "string" else "bytes", "blosc", "crc32c"]
    blosc = document["codecs"][1]["configuration"]
    assert (blosc["cname"], blosc["shuffle"]) == ("lz4", "noshuffle" if dtype == "string" else "bitshuffle")
    assert blosc["typesize"] == (1 if dtype == "string" else np.dtype(dtype).itemsize)
    assert document["chunk_key_encoding"]["configuration"] == {"separator": "."}
    assert document["attributes"] == {}
