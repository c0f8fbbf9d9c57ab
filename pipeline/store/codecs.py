"""The bytes of one stored object: Zarr v3's ``bytes``/``vlen-utf8``, ``blosc``, ``crc32c`` and ``sharding_indexed`` codecs.

Whole objects are encoded here because Zarr's own pipeline takes several times as long for a shard (docs/store-format.md).
The tests read everything back with plain Zarr, Xarray and TensorStore. The metadata that names these codecs is here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import google_crc32c
import numpy as np
import xxhash
from numcodecs import Blosc, VLenUTF8

from pipeline.errors import FeaturemapsError
from pipeline.extract.layers import Array

BLOSC_LEVEL = 5
_MISSING = np.uint64(2**64 - 1)
_CRC32C = {"name": "crc32c"}


def compress(values: Array) -> bytes:
    """Encode a C-contiguous array of numbers, or a 1-D object array of strings, as one checksummed chunk."""
    return b"".join(_compress(values))


def _compress(values: Array) -> tuple[bytes, bytes]:
    """The chunk and its checksum."""
    if values.dtype == object:
        body = Blosc("lz4", BLOSC_LEVEL, Blosc.NOSHUFFLE).encode(VLenUTF8().encode(values))
    else:
        body = Blosc("lz4", BLOSC_LEVEL, Blosc.BITSHUFFLE).encode(values)
    return body, _checksum(body)


def decompress(data: bytes, dtype: str, shape: tuple[int, ...]) -> Array:
    """Undo `compress`; ``dtype`` is a NumPy name or ``string``.

    Raises
    ------
    FeaturemapsError
        When the checksum does not match the bytes.
    """
    raw = decompress_bytes(data)
    if dtype == "string":
        return texts(raw).reshape(shape)
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape).copy()


def decompress_bytes(data: bytes) -> bytes:
    """Undo `compress` without decoding the values: numbers in C order; for strings their number, then each string after its length.

    Raises
    ------
    FeaturemapsError
        When the checksum does not match the bytes.
    """
    body = data[:-4]
    if len(data) <= 4 or _checksum(body) != data[-4:]:
        raise FeaturemapsError(
            f"an object of {len(data)} bytes does not fit its crc32c checksum: it was changed or cut off after it was written, "
            "so what it holds cannot be trusted; restore it from a copy, or create the store again"
        )
    return bytes(Blosc().decode(body))


def find_text(raw: bytes, text: str) -> list[int]:
    """Positions of a string in a decompressed chunk. If the bytes do not contain it, the chunk is not decoded.

    Examples
    --------
    >>> find_text(decompress_bytes(compress(np.array(["a", "b", "a"], object))), "a")
    [0, 2]
    """
    encoded = text.encode(errors="surrogatepass")  # text that is not valid Unicode is in no chunk
    if len(encoded).to_bytes(4, "little") + encoded not in raw:
        return []
    return [i for i, found in enumerate(texts(raw)) if found == text]


def texts(raw: bytes) -> Array:
    """The strings of a decompressed chunk: (n,) object."""
    return np.asarray(VLenUTF8().decode(raw), dtype=object)


def _checksum(body: bytes) -> bytes:
    return int(google_crc32c.value(body)).to_bytes(4, "little")


def maps_digest(maps: Iterable[Array]) -> str:
    """XXH3-128 of one image's maps as stored, as 32 hex digits.

    Per layer, it covers the valid extent (channel, y, x); for a layer without maps, the pooled values. In C order, little-endian.
    """
    digest = xxhash.xxh3_128()
    for values in maps:
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def encode_shard(block: Array, chunk_rows: int, shard_rows: int, fill: float) -> Iterator[bytes]:
    """Encode the first rows of a shard; inner chunks past the last row are left out, and read as fill.

    One chunk is encoded when it is asked for: so it is written while it is in the cache, and the object is never in memory as a whole.

    Parameters
    ----------
    block : (n, channel, y, x)
        Rows of the shard from its start, ``1 <= n <= shard_rows``.
    chunk_rows : int
        Rows of an inner chunk; divides ``shard_rows``.
    shard_rows : int
    fill : float
        Value of the rows past ``n`` in the last inner chunk.

    Yields
    ------
    bytes
        Parts of the object in order: inner chunks, then the index ``(offset, nbytes)`` as little-endian uint64, with its crc32c.
    """
    index = np.full((shard_rows // chunk_rows, 2), _MISSING, "<u8")
    offset = 0
    for i, start in enumerate(range(0, len(block), chunk_rows)):
        rows = block[start : start + chunk_rows]
        chunk = _compress(pad(rows, (chunk_rows, *rows.shape[1:]), fill))
        yield from chunk
        index[i] = offset, sum(map(len, chunk))
        offset += sum(map(len, chunk))
    table = index.tobytes()
    yield from (table, _checksum(table))


def pad(values: Array, shape: tuple[int, ...], fill: float) -> Array:
    """``values`` as a contiguous array of ``shape``, padded with ``fill`` at the ends."""
    if values.shape == shape:
        return np.ascontiguousarray(values)
    padded = np.full(shape, fill, values.dtype)
    padded[tuple(slice(n) for n in values.shape)] = values
    return padded


def array_document(
    shape: Sequence[int],
    dtype: str,
    dimensions: Sequence[str],
    *,
    chunk: Sequence[int],
    shard: Sequence[int] | None = None,
    fill: float | str = 0,
    attributes: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """``zarr.json`` of an array whose objects `compress` or `encode_shard` writes.

    Parameters
    ----------
    shape : sequence of int
    dtype : str
        A NumPy name, or ``string``.
    dimensions : sequence of str
    chunk : sequence of int
        Shape of the (inner) chunk.
    shard : sequence of int, optional
        Shape of the shard; None stores plain chunks.
    fill : float or str
        Fill value; NaN is written as the Zarr format requires.
    attributes : dict, optional
    """
    codecs = _codecs(dtype)
    if shard is not None:
        configuration = {
            "chunk_shape": list(chunk),
            "codecs": codecs,
            "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, _CRC32C],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": configuration}]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard or chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN" if isinstance(fill, float) and math.isnan(fill) else fill,
        "codecs": codecs,
        "dimension_names": list(dimensions),
        "attributes": attributes or {},
        "storage_transformers": [],
    }


def _codecs(dtype: str) -> list[dict[str, Any]]:
    """The codecs of `compress`."""
    if dtype == "string":
        first: dict[str, Any] = {"name": "vlen-utf8", "configuration": {}}
        itemsize, shuffle = 1, "noshuffle"
    else:
        itemsize, shuffle = np.dtype(dtype).itemsize, "bitshuffle"
        first = {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}
    blosc = {"typesize": itemsize, "cname": "lz4", "clevel": BLOSC_LEVEL, "shuffle": shuffle, "blocksize": 0}
    return [first, {"name": "blosc", "configuration": blosc}, _CRC32C]
