"""The images of a store, and their pooled values, as pandas tables; and such a table as a Parquet file."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd

from pipeline.errors import UsageError, needs_extra
from pipeline.extract.layers import Array
from pipeline.store.schema import REJECTED, Status, StoredLayer, stack
from pipeline.store.store import Store

SIZES = ("source_height", "source_width", "input_height", "input_width")
COLUMNS = ("path", "class", "row", *SIZES, "size_bytes", "digest", "status", "error")
Table: TypeAlias = pd.DataFrame


def images_table(store: Store) -> Table:
    """Live rows and rejected images, a line each, columns `COLUMNS`."""
    classes = [c.name for c in store.classes.values()]
    parts = [_live_rows(store, name) for name in classes]
    parts.append(_live_rows(store, REJECTED))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0] if name != "class"}
    lengths = [len(part["path"]) for part in parts]
    columns["class"] = np.repeat(stack([*classes, ""]), lengths)
    return pd.DataFrame({name: columns[name] for name in COLUMNS})


def _live_rows(store: Store, group: str) -> dict[str, Array]:
    status = store.column(group, "status")
    rows = np.flatnonzero(status < Status.REMOVED)
    found = {name: store.column(group, name)[rows] for name in ("path", "size_bytes", "error")}
    is_class = group != REJECTED
    sizes = {name: store.column(group, name)[rows] if is_class else np.zeros(len(rows), np.int32) for name in SIZES}
    sizes["digest"] = store.column(group, "digest")[rows] if is_class else stack([""] * len(rows))
    names = stack([member.name.lower() if is_class else "rejected" for member in Status])
    return found | sizes | {"row": rows, "status": names[status[rows]]}


def rows_by_class(table: Table) -> Iterator[tuple[str, Array, Array]]:
    """Per class of a part of `images_table`: its name, positions in the table, rows in the store."""
    rows = table["row"].to_numpy()
    for name, found in table.groupby("class", sort=False).indices.items():
        positions = np.asarray(found)
        yield str(name), positions, rows[positions]


def done(table: Table) -> Table:
    """The images that are done; each has one such row, also after a crash."""
    return table[table["status"] == "done"]


def pooled(store: Store, images: Table, layers: Sequence[StoredLayer], statistics: Sequence[str]) -> Table:
    """Pooled values of some rows: columns ``conv1_mean_0``, ... float32, indexed by path in the order of the images."""
    columns = {f"{la.name}_{statistic}": la.channels for la in layers for statistic in statistics}
    values = np.empty((len(images), sum(columns.values())), np.float32)
    for name, positions, rows in rows_by_class(images):
        start = 0
        for column, n_channels in columns.items():
            values[positions, start : start + n_channels] = store.column(name, column)[rows]
            start += n_channels
    names = [f"{column}_{channel}" for column, n_channels in columns.items() for channel in range(n_channels)]
    return pd.DataFrame(values, pd.Index(images["path"], name="path"), names)


def write_parquet(table: Table, file: str | os.PathLike[str]) -> None:
    """Write a table whole, in place of a file of that name.

    Raises
    ------
    UsageError
        When pyarrow is missing, the place cannot be written, or a column holds values of several kinds.
    """
    path = Path(file)
    if "://" in str(file):
        raise UsageError(
            f"{file} is a URL, and Parquet files are written to this machine's folders only: give a local path, and copy the file"
        )
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with needs_extra("parquet", f"{path}"):
            table.to_parquet(temporary, engine="pyarrow", index=False)
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error}): check its folder, permissions and space") from error
    except (ValueError, TypeError) as error:  # pyarrow's are such
        raise UsageError(
            f"the table cannot be written to {path} ({error}): a joined column may hold values of several kinds; bring them to one, for "
            "instance with table[column].astype(str), and join again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def plain(values: pd.Series) -> Array:
    """A column as a NumPy array that Xarray can keep: text as objects, what is missing as NaN.

    Integers with some missing are float64 where that holds them exactly, else objects.

    Examples
    --------
    >>> plain(pd.Series([1, None], dtype="Int64")), plain(pd.Series([2**53 + 1, None], dtype="Int64"))
    (array([ 1., nan]), array([9007199254740993, nan], dtype=object))
    """
    if isinstance(values.dtype, np.dtype):
        return values.to_numpy()
    if pd.api.types.is_integer_dtype(values.dtype):
        there = values.dropna()
        if len(there) == len(values):
            return there.to_numpy()
        if there.between(-(2**53), 2**53).all():
            return values.to_numpy(np.float64, na_value=np.nan)
    return values.astype(object).where(values.notna(), np.nan).to_numpy(object)


def nullable(table: Table) -> Table:
    """Integers and booleans in pandas' types that may be missing: as floats the large ones would lose digits."""
    kinds = {name: dtype for name, dtype in table.dtypes.items() if isinstance(dtype, np.dtype) and dtype.kind in "iub"}
    return table.astype(
        {name: "boolean" if d.kind == "b" else d.name.replace("i", "I").replace("u", "U") for name, d in kinds.items()}
    )
