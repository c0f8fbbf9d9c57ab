"""Reads lists of paths from a .txt, .csv or .parquet file."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Iterator

from pipeline.errors import UsageError, needs_extra
from pipeline.source.names import decode_path, encode_path, nothing_listed, suffix_of
from pipeline.source.urls import Url, is_object

Reader = Callable[[str], Iterator[tuple[int, bytes]]]  # reads a list: yields the line and the name of each entry

log = logging.getLogger(__name__)


def read_list(path: str, beside: Url | None = None) -> tuple[str, list[str]]:
    """Return the root, and every path once, in the order of the list. ``beside`` is the list's URL: relative entries start there."""
    folder = f"{beside}/".encode() if beside else os.path.join(os.path.dirname(os.fsencode(path)), b"")
    unique: dict[str, None] = {}
    count = empty = 0
    try:
        for line, name in READERS[suffix_of(path)](path):
            if b"\0" in name:
                raise UsageError(
                    f"line {line} of list {path!r} has a NUL byte, which no file name can have, so nothing was listed; "
                    "correct that line, and save the list as UTF-8"
                )
            absolute = _absolute(folder, name)
            if name and absolute != b"/":
                unique[encode_path(absolute)] = None
                count += 1
            else:
                empty += 1
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(
            f"list {path!r} cannot be read ({error}), so nothing was listed and nothing was marked as removed; "
            "check its permissions and its content"
        ) from error
    if not unique:
        raise nothing_listed(f"list {path!r} names no image")
    if count > len(unique):
        log.warning("list %r has %d duplicate entries: each image is listed once", path, count - len(unique))
    if empty:
        log.warning("list %r has %d entries without a name: left out", path, empty)
    return _relative(encode_path(folder), list(unique))


def _absolute(folder: bytes, name: bytes) -> bytes:
    """Join an entry with the folder to which it is relative; URLs stay as they are."""
    for text in (name, folder + name):
        if is_object(os.fsdecode(text)):
            url = Url.parse(text.decode())
            return str(url).encode() if url.is_bucket else text
    return b"/" + os.path.normpath(os.path.join(folder, name)).lstrip(b"/")


def _relative(folder: str, paths: list[str]) -> tuple[str, list[str]]:
    """Return the root of absolute paths, and the paths below it, in the same list to save memory; ``folder`` ends in "/"."""
    if not all(path.startswith(folder) for path in paths):
        shared = os.path.commonprefix(paths)  # noqa: RUF071 (characters are bytes here)
        folder = shared[: shared.rfind("/") + 1]
        if not folder.startswith("/") and "://" not in folder:
            raise UsageError(
                f"a list names entries of several kinds, {paths[0]!r} and others, so nothing was listed; give a list for local paths, and "
                "one for each kind of URL"
            )
    for i, path in enumerate(paths):
        paths[i] = path[len(folder) :]
    root = folder if folder.endswith("://") else folder.rstrip("/") or "/"
    return os.fsdecode(decode_path(root)), paths


def _read_txt(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            name = text.removesuffix(b"\n").removesuffix(b"\r")
            if name.strip() and not name.startswith(b"#"):
                yield number, name


def _read_csv(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter = _delimiter(file.readline())
        file.seek(0)
        rows = csv.reader(file, delimiter=delimiter, strict=True)
        column = _column(path, next(rows, []))
        for row in rows:
            if row:
                yield rows.line_num, (row[column] if column < len(row) else "").encode("utf-8", "surrogateescape")


def _delimiter(header: str) -> str:
    """The separator of columns: spreadsheets write semicolons where the comma is the decimal mark."""

    def fit(delimiter: str) -> tuple[bool, int]:
        columns = next(csv.reader([header], delimiter=delimiter), [])
        return "path" in columns, len(columns)

    return max(",;\t", key=fit)


def _column(path: str, columns: list[str]) -> int:
    if "path" not in columns:
        raise UsageError(
            f"list {path!r} has no column 'path' but {columns}, so nothing was listed; rename the column that holds the paths"
        )
    return columns.index("path")


def _read_parquet(path: str) -> Iterator[tuple[int, bytes]]:
    with needs_extra("parquet", f"list {path!r}", "give a .csv list"):
        from pyarrow import ArrowException, parquet  # noqa: PLC0415 (an extra)
    with open(path, "rb") as file:
        try:
            table = parquet.ParquetFile(file)
            _column(path, table.schema_arrow.names)
            columns = (batch.column(0).cast("binary") for batch in table.iter_batches(columns=["path"]))
            names = (name for column in columns for name in column.to_pylist())
            yield from enumerate((name or b"" for name in names), start=1)
        except ArrowException as error:
            raise ValueError(str(error)) from error


READERS: dict[str, Reader] = {".txt": _read_txt, ".csv": _read_csv, ".parquet": _read_parquet}
