"""Finds the row of an image by its path, even among millions, and similar names for a path that does not exist."""

from __future__ import annotations

import difflib
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from threading import Lock

import numpy as np

from pipeline.errors import FeaturemapsError
from pipeline.extract.layers import Array
from pipeline.source.names import encode_path
from pipeline.store.codecs import decompress_bytes, find_text, texts
from pipeline.store.objects import each, fetch, is_remote
from pipeline.store.schema import COLUMN_ROWS, REJECTED, Status, object_key
from pipeline.store.store import Store

SCANS = 100
"""After this many look-ups a sorted index pays: making it takes about as long as they do."""
SHORTLIST = 400
MAX_HINTS = 3
Row = tuple[str, int]
"""Group and row."""
_SURROGATES = re.compile("[\ud800-\udfff]")
"""They stand for bytes of a file name that are not UTF-8; pandas and the stored columns refuse them."""


class PathIndex:
    """Row of each image of a store, by path.

    The first look-ups search the bytes of the ledger's ``path`` columns, which are kept in memory. After `SCANS` look-ups a sorted
    index of hashes replaces them.

    Parameters
    ----------
    store : Store
        Rows that are appended later are not found.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = Lock()
        self._n_scans = 0
        self._raw: dict[tuple[str, int], bytes] = {}
        self._hashes: tuple[Array, Array] | None = None

    def __reduce__(self) -> tuple[type[PathIndex], tuple[Store]]:
        """Pickle without the lock and without the columns; another process reads them again."""
        return PathIndex, (self._store,)

    def find(self, path: str) -> Row | None:
        """The image's done row, otherwise its last live row, otherwise a row from before it left; None if there is none."""
        with self._lock:
            if self._hashes is None and self._n_scans >= SCANS:
                self._hashes = self._sort()
                self._raw = {}
            self._n_scans += 1
            rows = self._rows_of(path) if self._hashes is not None else self._scan(path)
            best: tuple[int, Row] | None = None
            for row in rows:
                status = self.status(row)
                rank = 2 if status == Status.DONE else 1 if status < Status.REMOVED else 0
                if rank == 2:
                    return row  # an image has at most one done row
                if best is None or rank >= best[0]:
                    best = rank, row
            return best[1] if best else None

    def status(self, row: Row) -> Status:
        """The current status of a row in the ledger."""
        return Status(int(self._store.cell(row[0], "status", row[1])))

    def _scan(self, path: str) -> Iterator[Row]:
        for (group, start), raw in self._chunks():
            n_rows = self._store.length(group) - start
            yield from ((group, start + i) for i in find_text(raw, path) if i < n_rows)

    def _chunks(self) -> Iterator[tuple[tuple[str, int], bytes]]:
        """The bytes of the path columns, by group and first row; from a bucket, all are requested at once."""
        keys = [(group, start) for group in self._groups() for start in range(0, self._store.length(group), COLUMN_ROWS)]
        if is_remote(self._store.path) and not self._raw:
            self._raw = dict(zip(keys, each(self._read, keys, self._store.path), strict=True))
        for key in keys:
            if key not in self._raw:
                self._raw[key] = self._read(key)
            yield key, self._raw[key]

    def _groups(self) -> list[str]:
        """Groups, the largest first: it most likely holds the path."""
        names = [c.name for c in self._store.classes.values()]
        return [*sorted(names, key=self._store.length, reverse=True), REJECTED]

    def _read(self, key: tuple[str, int]) -> bytes:
        group, start = key
        path = self._store.path / group / "path" / object_key(start // COLUMN_ROWS, 1)
        data = fetch(path)[0]
        try:
            return b"" if data is None else decompress_bytes(data)
        except FeaturemapsError as error:
            raise FeaturemapsError(f"{path}: {error}") from error

    def _sort(self) -> tuple[Array, Array]:
        """Hashes of all paths in ascending order, and the position of each among all rows."""
        hashes = np.fromiter(
            (hash(path) for (group, start), raw in self._chunks() for path in self._texts(group, start, raw)), np.int64
        )
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _texts(self, group: str, start: int, raw: bytes) -> Array:
        n_rows = min(COLUMN_ROWS, self._store.length(group) - start)
        return texts(raw)[:n_rows] if raw else np.full(n_rows, "", object)

    def names(self) -> list[str]:
        """Paths of all images that are still in the collection."""
        found = []
        for group in self._groups():
            is_live = self._store.column(group, "status") < Status.REMOVED
            found += self._store.column(group, "path")[is_live].tolist()
        return found

    def _rows_of(self, path: str) -> Iterator[Row]:
        assert self._hashes is not None  # noqa: S101 (for the type checker)
        hashes, order = self._hashes
        first, last = (int(np.searchsorted(hashes, hash(path), side)) for side in ("left", "right"))
        groups = self._groups()
        ends = np.cumsum([self._store.length(group) for group in groups])
        for position in order[first:last].tolist():
            i = int(np.searchsorted(ends, position, "right"))
            row = groups[i], position - (int(ends[i - 1]) if i else 0)
            if self._store.cell(row[0], "path", row[1]) == path:
                yield row


def stored_name(path: str) -> str:
    """Convert a path, as a shell completes it, to the form of the ledger: "%" and bytes that are not text become %XX."""
    try:
        return encode_path(os.fsencode(path))
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may contain: no file has such a name
        return path.encode(errors="backslashreplace").decode()


def stored_forms(path: str | os.PathLike[str]) -> tuple[str, ...]:
    r"""Possible stored forms of a path that a user gives, the most likely first; all are valid Unicode.

    Examples
    --------
    >>> stored_forms("50%.png"), stored_forms("a.png"), stored_forms("caf\udce9.png")
    (('50%.png', '50%25.png'), ('a.png',), ('caf%E9.png',))
    """
    text = os.fspath(path)
    encoded = stored_name(text)
    return tuple(dict.fromkeys((text, encoded))) if _is_unicode(text) else (encoded,)


def _is_unicode(text: str) -> bool:
    return text.isascii() or not _SURROGATES.search(text)


def similar_names(wanted: str, names: Sequence[str]) -> list[str]:
    """Names that the user may have meant, nearest first, at most `MAX_HINTS`.

    Comparing two texts takes about 100 microseconds. So ``wanted`` is compared only with names that share its longest beginning or
    its longest end, ignoring case.

    Examples
    --------
    >>> similar_names("/photos/Cats/tom.jpg", ["cats/tom.jpg", "cats/kit.jpg", "dogs/rex.jpg"])
    ['cats/tom.jpg']
    """
    lower = wanted.lower().replace("\\", "/")
    text = "\0".join(["", *names, ""]).lower()
    start = _longest(len(lower), lambda n: "\0" + lower[:n] in text)
    end = _longest(len(lower), lambda n: lower[len(lower) - n :] + "\0" in text)
    places = [*(_places(text, "\0" + lower[:start]) if start else ())]
    places += _places(text, lower[len(lower) - end :] + "\0") if end else ()
    found = {names[i].lower(): names[i] for i in dict.fromkeys(places)}
    same_end = [key for key in found if f"/{lower}".endswith(f"/{key}") or (lower and key.endswith(f"/{lower}"))]
    near = difflib.get_close_matches(lower, found, n=MAX_HINTS, cutoff=0.5)
    return [found[key] for key in dict.fromkeys([*same_end, *near])][:MAX_HINTS]


def _longest(n: int, is_there: Callable[[int], bool]) -> int:
    """The largest number up to ``n`` for which ``is_there`` holds; it must hold for all smaller numbers too."""
    return bisect_left(range(1, n + 1), 1, key=lambda m: not is_there(m))


def _places(text: str, piece: str) -> Iterator[int]:
    """Indices of the names that contain a piece, first matches only; ``text`` holds the names, each after a NUL."""
    name, position = -1, 0
    at = text.find(piece)
    for _ in range(SHORTLIST):
        if at < 0:
            return
        name += text.count("\0", position, at + (piece[:1] == "\0"))
        position = at + (piece[:1] == "\0")
        yield name
        at = text.find(piece, at + 1)
