"""Reads and writes the columns of the ledger by chunks, and the lengths of a group's arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from pipeline.errors import FeaturemapsError
from pipeline.extract.layers import Array
from pipeline.store.codecs import compress, decompress
from pipeline.store.objects import Place, children, each, fetch, parse_json, put, put_json, read_json
from pipeline.store.schema import Columns, StoredLayer, column_type, object_key


class Ledger:
    """Reads and writes the columns of a store.

    Parameters
    ----------
    path : Path or Url
        The store.
    layers : sequence of StoredLayer
        Layers whose pooled values are columns too.
    durable : bool
        Same as for `Store`.
    """

    def __init__(self, path: Place, layers: Sequence[StoredLayer], *, durable: bool) -> None:
        self.path, self.layers, self.durable = path, layers, durable
        self.fence: Callable[[], None] = _unfenced
        """Called before columns or lengths of a group are written; raises if this process may no longer write."""

    def read(self, group: str, name: str, length: int) -> Array:
        """The first ``length`` values of a column."""
        dtype, chunk = column_type(self.layers, group, name)
        parts = each(partial(self._read_chunk, group, name, dtype, chunk), range(-(-length // chunk[0])), self.path)
        return np.concatenate(parts)[:length] if parts else np.empty((0, *chunk[1:]), object if dtype == "string" else dtype)

    def cell(self, group: str, name: str, row: int) -> Any:
        """The current value of one cell; reads one chunk."""
        dtype, chunk = column_type(self.layers, group, name)
        return self._read_chunk(group, name, dtype, chunk, row // chunk[0])[row % chunk[0]]

    def _read_chunk(self, group: str, name: str, dtype: str, chunk: tuple[int, ...], i: int) -> Array:
        path = self.path / group / name / object_key(i, len(chunk))
        return _decode_chunk(path, fetch(path)[0], dtype, chunk)

    def write(self, group: str, rows: Array, columns: Columns) -> None:
        """Write columns of some rows: ``maps_digest`` second to last, ``status`` last."""
        self.fence()
        last = [name for name in ("maps_digest", "status") if name in columns]
        first = [name for name in columns if name not in last]
        each(lambda name: self._write_column(group, name, rows, columns[name]), first, self.path)
        for name in last:
            self._write_column(group, name, rows, columns[name])

    def _write_column(self, group: str, name: str, rows: Array, values: Array) -> None:
        dtype, chunk = column_type(self.layers, group, name)
        for i in np.unique(rows // chunk[0]):
            inside = rows // chunk[0] == i
            path = self.path / group / name / object_key(int(i), len(chunk))
            data, condition = fetch(path)
            content = _decode_chunk(path, data, dtype, chunk)
            content[rows[inside] - i * chunk[0]] = values[inside]
            put(path, compress(content), durable=self.durable, only=condition)

    def resize(self, group: str, length: int) -> None:
        """Set the length of all arrays of a group, ``status`` last."""
        self.fence()
        names = [name for name in children(self.path / group) if name not in {"zarr.json", "status"}]
        each(lambda name: self._resize_array(self.path / group / name, length), names, self.path)
        self._resize_array(self.path / group / "status", length)

    def _resize_array(self, folder: Place, length: int) -> None:
        path = folder / "zarr.json"
        content, condition = fetch(path)
        if content is None:
            return
        document = parse_json(path, content)
        if document["shape"][0] != length:
            document["shape"][0] = length
            put_json(path, document, durable=self.durable, only=condition)


def _unfenced() -> None:
    """Allow every write; a named function, so that an open store can be pickled."""


def read_array(folder: Place, dtype: str) -> Array:
    """An array that is a single object, in the shape that its metadata say.

    Raises
    ------
    FeaturemapsError, KeyError, TypeError, ValueError
        When the object is missing or damaged, or its metadata do not fit it.
    """
    shape = tuple(read_json(folder / "zarr.json")["shape"])
    path = folder / object_key(0, len(shape))
    data, _ = fetch(path)
    if data is None:
        raise FeaturemapsError(f"{path} is missing")
    return _decode_chunk(path, data, dtype, shape)


def _decode_chunk(path: Place, data: bytes | None, dtype: str, chunk: tuple[int, ...]) -> Array:
    if data is None:
        return (
            np.full(chunk, "", object) if dtype == "string" else np.full(chunk, np.nan if dtype.startswith("float") else 0, dtype)
        )
    try:
        return decompress(data, dtype, chunk)
    except FeaturemapsError as error:
        raise FeaturemapsError(f"{path}: {error}") from error
