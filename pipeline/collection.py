"""List the images of a source, each with the size and time that tell whether it has changed.

A source is a folder, a glob pattern, or a list of paths in a .txt, .csv or .parquet file; each may be under s3://, gs:// or
az://, and a list may hold URLs, https:// among them. Names are bytes here, as on disk, and any name is kept: stored paths are
percent-encoded where they are not UTF-8.

Rules of a folder: every file below it with a suffix of `SUFFIXES` counts, hidden ones too, but not the ``._*`` files that
macOS leaves beside them. Links to files and folders are followed; a folder inside itself is not entered again. Fifos,
sockets and devices are left out with a warning, wherever they come from, because opening one may block for ever. The order
is depth first, each folder sorted by the bytes of its names. Patterns follow the shell: a wildcard matches no leading dot.
"""
# pathlib cannot hold paths of bytes, and is several times slower on a million of them:

from __future__ import annotations

import fnmatch
import logging
import os
import re
import stat
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.listing import Listing, clamp_time
from pipeline.lists import READERS, read_list
from pipeline.paths import absolute_path, absolute_url, encode_path, nothing_listed, suffix_of
from pipeline.remote import CONCURRENCY, Meta, Url, is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    State = frozenset[int]  # places in a pattern that a path has reached
    Step = Callable[[State, bytes], State]
    Found = tuple[str, Callable[[], os.stat_result]]  # a path and how to stat it
    Folders = dict[tuple[int, int], tuple[State, list[os.DirEntry[bytes]]]]  # by device and inode

log = logging.getLogger(__name__)

SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .tif .tiff .webp .bmp .dib .gif .ppm .pgm .pbm .pnm .avif".split()  # noqa: SIM905 (reads better)
)
"""Lower-case suffixes of the files in a folder that count as images."""

_MAGIC = re.compile(r"[*?[]")


def list_collection(source: str) -> Listing:
    """List every image of a source.

    Parameters
    ----------
    source : str
        A folder, a glob pattern (``**`` is any depth; every file that it matches counts, whatever its suffix), or a list:
        .txt (a path per line; blank lines and those that start with ``#`` do not count), .csv or .parquet (column
        ``path``). Relative entries of a list are relative to its folder; ``..`` is resolved without looking at links.

    Returns
    -------
    Listing
        With -1 as size and time of what is missing or cannot be read, so that it is accounted for. `Listing.root` of a
        list is its folder if all entries lie below it, else the deepest folder that all entries share.

    Raises
    ------
    UsageError
        When the source cannot be used, or has no images at all.
    """
    if is_url(source):
        return _list_url(source)
    kind, path = _recognise(source)
    if kind == "folder":
        return _list_folder(path)
    if kind == "pattern":
        return _list_pattern(source)
    root, paths = read_list(path)
    if is_url(root):
        return _list_urls(source, root, paths)
    found = ((relative, partial(os.stat, absolute_path(root, relative))) for relative in paths)
    return _measured(root, found, [], lambda: f"list {path!r} names no image")


def absolute_source(source: str) -> str:
    """A source as a store remembers it."""
    return str(Url.parse(source)) if is_url(source) else str(Path(source).absolute())


def _recognise(source: str) -> tuple[str, str]:
    """``folder``, ``pattern`` or the suffix of a list, and the absolute path."""
    path = _absolute(source)
    try:
        mode = os.stat(source and path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and _MAGIC.search(source):
            return "pattern", path
        raise UsageError(
            f"source {source!r} does not exist or cannot be reached ({error}), so nothing was listed and nothing was marked as "
            "removed; give a folder, a glob pattern or a .txt, .csv or .parquet list, and check that its disk is mounted"
        ) from error
    return ("folder" if stat.S_ISDIR(mode) else _list_suffix(source, mode)), path


def _list_suffix(source: str, mode: int) -> str:
    suffix = suffix_of(source)
    if suffix in SUFFIXES:
        raise UsageError(
            f"source {source!r} is a single image, and a source is a collection, so nothing was listed; "
            "give its folder, or a .txt list that names it"
        )
    if suffix not in READERS or not stat.S_ISREG(mode):
        raise UsageError(
            f"source {source!r} is neither a folder nor a list that can be read, so nothing was listed; "
            f"give a folder, a glob pattern, or a regular file that ends in {', '.join(READERS)}"
        )
    return suffix


def _absolute(path: str) -> str:
    return "/" + os.path.abspath(path).lstrip("/")  # POSIX keeps a leading "//"


def _measured(root: str, found: Iterable[Found], unreadable: list[str], nothing: Callable[[], str]) -> Listing:
    """Stat what was found; ``unreadable`` may fill meanwhile, and ``nothing`` says what there is instead of images."""
    listing = Listing(root, [], array("q"), array("q"))
    for path, read in found:
        measure = _measure(read)
        if measure is None:
            log.warning("%r in %r is a fifo, socket or device: left out, because opening it may block for ever", path, root)
            continue
        listing.paths.append(path)
        listing.size_bytes.append(measure[0])
        listing.mtime_ns.append(measure[1])
    if not listing.paths:
        raise nothing_listed(nothing(), unreadable)
    return replace(listing, unreadable=tuple(unreadable))


def _measure(read: Callable[[], os.stat_result]) -> tuple[int, int] | None:
    """Size and time of a file, -1 where that fails; None for what must never be opened."""
    try:
        status = read()
    except OSError:
        return -1, -1
    if stat.S_ISREG(status.st_mode):
        return status.st_size, clamp_time(status.st_mtime_ns)
    return (-1, -1) if stat.S_ISDIR(status.st_mode) else None


def _list_url(source: str) -> Listing:
    url = Url.parse(source)
    if url.query:
        raise UsageError(
            f"source {str(url)!r} has a query (?...), so nothing was listed; give the URL of a list or a folder without one"
        )
    try:
        if _is_list(source) and not _MAGIC.search(url.key):
            return _list_urls(source, *_fetch_list(url))
        if not url.is_bucket:
            raise UsageError(
                f"source {source!r} cannot be listed, so nothing was listed: the web has no folders; give a .txt, .csv or .parquet list of "
                "URLs, or a bucket (s3://, gs://, az://)"
            )
        return _list_bucket(source, url)
    except OSError as error:
        raise UsageError(
            f"source {source!r} cannot be listed ({error}), so nothing was listed and nothing was marked as removed; check the name, "
            "the credentials in the environment and the endpoint"
        ) from error


def _fetch_list(url: Url) -> tuple[str, list[str]]:
    with NamedTemporaryFile(suffix=suffix_of(url.key)) as file:
        file.write(url.read_bytes())
        file.flush()
        try:
            return read_list(file.name, url.parent)
        except UsageError as error:
            raise UsageError(str(error).replace(file.name, str(url))) from error


def _list_bucket(source: str, url: Url) -> Listing:
    """Every object below a prefix, or of a pattern, by the bytes of its key."""
    if suffix_of(url.key) in SUFFIXES and not _MAGIC.search(url.key):
        raise UsageError(
            f"source {source!r} is a single image, and a source is a collection, so nothing was listed; give its folder"
        )
    names = url.key.split("/") if url.key else []
    first = next((i for i, name in enumerate(names) if _MAGIC.search(name)), len(names))
    root, parts = Url(url.base, "/".join(names[:first])), tuple(names[first:])
    others: Counter[str] = Counter()
    listing = _listing_of(str(root), _objects(root, parts, others))
    if not listing.paths:
        raise nothing_listed(f"pattern {source!r} matches no object" if parts else _without_images(str(root), others))
    order = sorted(range(len(listing)), key=listing.paths.__getitem__)
    sizes = array("q", (listing.size_bytes[i] for i in order))
    paths, identities = ([column[i] for i in order] for column in (listing.paths, listing.identities))
    return replace(listing, paths=paths, size_bytes=sizes, identities=identities, ignored=dict(others.most_common()))


def _objects(root: Url, parts: Sequence[str], others: Counter[str]) -> Iterator[tuple[str, Meta]]:
    """What counts of the objects below a prefix, as it is listed."""
    for key, meta in root.walk():
        state = _reach(parts, 0)
        for name in key.split("/") if parts else ():
            state = _advance(parts, state, name.encode())
        if len(parts) in state if parts else _is_image(key.rpartition("/")[2], others):
            yield encode_path(key.encode()), meta


def _list_urls(source: str, root: str, paths: list[str]) -> Listing:
    """The entries of a list, each looked at."""
    if not is_url(root):
        raise UsageError(
            f"list {source!r} holds local paths, which mean nothing at another place, so nothing was listed; write URLs"
        )
    blocks = (paths[start : start + 1000] for start in range(0, len(paths), 1000))  # an interrupt has few requests to wait for
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = (zip(block, pool.map(partial(_stat_url, root), block), strict=True) for block in blocks)
        return _listing_of(root, chain.from_iterable(found))


def _stat_url(root: str, path: str) -> Meta | None:
    try:
        return Url.parse(absolute_url(root, path)).stat()
    except OSError as error:
        log.info("%s cannot be looked at: %s", path, error)
        return None


def _listing_of(root: str, found: Iterable[tuple[str, Meta | None]]) -> Listing:
    listing = Listing(root, [], array("q"), array("q"))
    for path, meta in found:
        listing.paths.append(path)
        listing.size_bytes.append(meta.size_bytes if meta else -1)
        listing.mtime_ns.append(0)
        listing.identities.append(meta.identity if meta else "")
    return listing


def _list_folder(root: str) -> Listing:
    others: Counter[str] = Counter()
    unreadable: list[str] = []
    # a folder is the pattern "**" that matches hidden names too: always at its only part, and always at its end
    walk = _walk(root, lambda state, _: state, frozenset({0, 1}), 1, unreadable)
    found = ((path, entry.stat) for path, entry in walk if _is_image(entry.name, others))
    listing = _measured(root, found, unreadable, partial(_without_images, root, others))
    return replace(listing, ignored=dict(others.most_common()))


def _without_images(root: str, others: Counter[str]) -> str:
    if not others:
        return f"folder {root!r} is empty (no files at any depth)"
    seen = ", ".join(repr(suffix) if suffix else "none" for suffix, _ in others.most_common(8))
    return f"folder {root!r} holds no images but {others.total()} other files (suffixes: {seen})"


def _is_image(name: bytes | str, others: Counter[str]) -> bool:
    """Whether the name counts; the suffixes of those that do not are counted in ``others``, a few at most."""
    suffix = "._*" if os.fsencode(name).startswith(b"._") else suffix_of(name)
    if suffix in SUFFIXES:
        return True
    others[suffix if suffix in others or len(others) < 20 else "..."] += 1
    return False


def _list_pattern(source: str) -> Listing:
    root, parts = _split_pattern(source)
    unreadable: list[str] = []
    walk = _walk(root, partial(_advance, parts), _reach(parts, 0), len(parts), unreadable)
    found = ((path, entry.stat) for path, entry in walk)
    return _measured(root, found, unreadable, lambda: f"pattern {source!r} matches no file")


def _is_list(source: str) -> bool:
    return suffix_of(source) in READERS and (is_url(source) or os.path.isfile(source))


def _split_pattern(source: str) -> tuple[str, tuple[str, ...]]:
    """Return the absolute folder before the first wildcard, and the parts of the pattern below it."""
    parts = os.path.normpath(source).split("/")
    first = next((i for i, part in enumerate(parts) if _MAGIC.search(part)), len(parts))
    root = _absolute("/".join(parts[:first]) + "/" if first else ".")
    return root, tuple(part for i, part in enumerate(parts) if i >= first and not part == parts[i - 1] == "**")


def _reach(parts: Sequence[str], place: int) -> State:
    """Return the places reached with ``place``: ``**`` may also match nothing."""
    return frozenset({place, place + 1} if parts[place : place + 1] == ("**",) else {place})


def _advance(parts: Sequence[str], state: State, name: bytes) -> State:
    """Return the places of the pattern after one more name of a path."""
    text = os.fsdecode(name)
    after: State = frozenset()
    for place in state - {len(parts)}:
        part = parts[place]
        if text.startswith(".") and not part.startswith("."):
            continue
        if part == "**":
            after |= _reach(parts, place)
        elif fnmatch.fnmatchcase(text, part):
            after |= _reach(parts, place + 1)
    return after


def walks_into(source: str, root: str, folder: str) -> bool:
    """Whether listing ``source``, whose root is ``root``, looks into an absolute ``folder``."""
    if is_url(source) != is_url(folder) or _is_list(source):
        return False
    if is_url(source):
        if not f"{folder}/".startswith(f"{root}/"):
            return False
        below = folder[len(root) + 1 :].split("/")
    else:
        below = os.path.relpath(folder, os.path.realpath(root)).split("/")
    if below[0] == "..":
        return False
    if not _MAGIC.search(source) if is_url(source) else os.path.isdir(source):
        return True
    parts = _split_pattern(source)[1]
    state = _reach(parts, 0)
    for name in below:
        state = _advance(parts, state, os.fsencode(name)) if name != "." else state
    return min(state, default=len(parts)) < len(parts)


def _walk(root: str, step: Step, start: State, end: int, unreadable: list[str]) -> Iterator[tuple[str, os.DirEntry[bytes]]]:
    """Yield what lies below ``root``, is no folder and brings the pattern to its end; lost folders go to ``unreadable``."""
    top = os.fsencode(root)
    skip = len(os.path.join(top, b""))
    folders: Folders = {}  # from the root to the folder at hand
    try:
        _enter(folders, top, start)
    except OSError as error:
        raise UsageError(
            f"folder {root!r} cannot be read ({error.strerror}), so nothing was listed and nothing was marked as removed; "
            "check the path, its permissions and that its disk is mounted"
        ) from error
    while folders:
        state, entries = folders[next(reversed(folders))]
        if not entries:
            folders.popitem()
            continue
        entry = entries.pop()
        after = step(state, entry.name)
        if not after:
            continue
        is_folder = _is_folder(entry)
        if is_folder is not False and min(after) < end:
            try:
                _enter(folders, entry.path, after)
            except OSError as error:
                unreadable.append(encode_path(entry.path[skip:]))
                log.warning("folder %r cannot be read (%s): its images stay as they are", entry.path, error.strerror)
        if not is_folder and end in after:
            yield encode_path(entry.path[skip:]), entry


def _enter(folders: Folders, folder: bytes, state: State) -> None:
    """Put a folder and its entries on top of ``folders``, unless it is inside itself."""
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity not in folders:
        with os.scandir(folder) as entries:  # last name first, so that `list.pop` frees each entry once it is done
            folders[identity] = state, sorted(entries, key=attrgetter("name"), reverse=True)


def _is_folder(entry: os.DirEntry[bytes]) -> bool | None:
    """Whether this is a folder; None for a link that cannot be followed and may lead to one, on a disk that is not mounted."""
    try:
        if entry.is_dir():
            return True
        lost = entry.is_symlink() and not suffix_of(entry.name) and not os.path.exists(entry.path)
    except OSError:
        lost = suffix_of(entry.name) not in SUFFIXES
    return None if lost else False
