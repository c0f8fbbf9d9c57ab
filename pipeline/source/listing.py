"""List the images of a source, each with the size and time that tell whether it has changed.

A source is a folder, a glob pattern, or a list of paths in a .txt, .csv or .parquet file. Each may be under s3://, gs:// or az://,
and a list may hold URLs, https:// among them. Names may contain any bytes, as on disk. Stored paths are percent-encoded where they
are not UTF-8.

Rules for a folder:

- Every file below it with a suffix of `SUFFIXES` counts, also a hidden one. The ``._*`` files that macOS leaves, and what the
  caller excludes, do not count.
- Links to files and folders are followed. A folder inside itself is not entered again.
- Fifos, sockets and devices are left out with a warning, because opening one may block for ever. This holds for all sources.
- The order is depth first; each folder is sorted by the bytes of its names.

Patterns follow the shell: a wildcard matches no leading dot.
"""
# pathlib cannot hold paths of bytes, and is several times slower on a million of them:

from __future__ import annotations

import logging
import os
import stat
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from operator import attrgetter
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from pipeline.config import IMAGE_SUFFIXES
from pipeline.errors import UsageError
from pipeline.patterns import Pattern, absolute, absolute_patterns, has_unknown_user, is_pattern, what_to_type
from pipeline.source.exclusion import HIDDEN, Exclusion
from pipeline.source.fingerprints import Listing, clamp_time
from pipeline.source.identity import bucket_pattern, named_by
from pipeline.source.names import absolute_path, absolute_url, encode_path, nothing_listed, suffix_of
from pipeline.source.path_lists import READERS, read_list
from pipeline.source.urls import CONCURRENCY, Meta, Url, is_url

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from pipeline.patterns import State

    Found = tuple[str, Callable[[], os.stat_result]]  # a path and how to stat it
    Folders = dict[tuple[int, int], tuple[State, list[os.DirEntry[bytes]]]]  # by device and inode

log = logging.getLogger(__name__)

SUFFIXES = frozenset(" ".join(IMAGE_SUFFIXES.values()).split())
"""Lower-case suffixes; a file in a folder counts as an image if it has one."""


def list_collection(source: str, exclude: Sequence[str] = ()) -> Listing:
    """List every image of a source.

    Parameters
    ----------
    source : str
        A folder, a glob pattern, or a list. In a pattern (`patterns`), ``**`` is any depth, and every matching file counts, whatever
        its suffix. A list is a .txt (one path per line; blank lines and lines that start with ``#`` are ignored), .csv or .parquet
        (column ``path``). Relative entries of a list are relative to its folder; ``..`` is resolved without looking at links.
    exclude : sequence of str
        Names to leave out of folders, patterns and buckets (`exclusion.Exclusion`); for a list it has no effect.

    Returns
    -------
    Listing
        Missing or unreadable images have size and time -1, so that they are accounted for. `Listing.root` of a list is its
        folder if all entries are below it, else the deepest folder that all entries share.

    Raises
    ------
    UsageError
        When the source cannot be used, or has no images at all.
    """
    is_remote = is_url(source)
    kind, path = ("pattern" if is_pattern(source) else "folder", source) if is_remote else _recognise(source)
    # No wildcard matches a leading dot, so if a pattern has a hidden folder, the user named it.
    exclusion = Exclusion([p for p in exclude if kind != "pattern" or p != HIDDEN])
    if is_remote or kind in {"folder", "pattern"}:
        list_it = _list_url if is_remote else _list_folder if kind == "folder" else _list_pattern
        return replace(list_it(path if kind == "folder" else source, exclusion), excluded=dict(exclusion.found))
    root, paths = read_list(path)
    if is_url(root):
        return _list_urls(source, root, paths)
    found = ((relative, partial(os.stat, absolute_path(root, relative))) for relative in paths)
    return _measured(root, found, [], lambda: f"list {path!r} names no image")


def _recognise(source: str) -> tuple[str, str]:
    """``folder``, ``pattern`` or the suffix of a list, and the absolute path."""
    path = absolute(source)
    try:
        mode = os.stat(source and path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_pattern(source):
            named = named_by(absolute_patterns(source))
            return ("pattern", path) if named is None else (_kind(source, os.stat(named).st_mode), named)
        user = "; there is no user of that name" if has_unknown_user(source) else ""
        raise UsageError(
            f"source {source!r} does not exist or cannot be reached ({error}{user}), so nothing was listed and nothing was marked as "
            "removed; give a folder, a glob pattern or a .txt, .csv or .parquet list, and check that its disk is mounted"
        ) from error
    return _kind(source, mode), path


def _kind(source: str, mode: int) -> str:
    return "folder" if stat.S_ISDIR(mode) else _list_suffix(source, mode)


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


def _measured(root: str, found: Iterable[Found], unreadable: list[str], nothing: Callable[[], str]) -> Listing:
    """Stat what was found. ``unreadable`` may grow meanwhile; ``nothing`` says what there is instead of images."""
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
    """Size and time of a file, -1 if that fails; None for a file that must never be opened."""
    try:
        status = read()
    except OSError:
        return -1, -1
    if stat.S_ISREG(status.st_mode):
        return status.st_size, clamp_time(status.st_mtime_ns)
    return (-1, -1) if stat.S_ISDIR(status.st_mode) else None


def _list_url(source: str, exclusion: Exclusion) -> Listing:
    url = Url.parse(source)
    if url.query:
        raise UsageError(
            f"source {str(url)!r} has a query (?...), so nothing was listed; give the URL of a list or a folder without one"
        )
    try:
        if suffix_of(source) in READERS and not is_pattern(url.key):
            return _list_urls(source, *_fetch_list(url))
        if not url.is_bucket:
            raise UsageError(
                f"source {source!r} cannot be listed, so nothing was listed: the web has no folders; give a .txt, .csv or .parquet list of "
                "URLs, or a bucket (s3://, gs://, az://)"
            )
        return _list_bucket(source, url, exclusion)
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


def _list_bucket(source: str, url: Url, exclusion: Exclusion) -> Listing:
    """Every object below a prefix, or that matches a pattern, sorted by the bytes of its key."""
    if suffix_of(url.key) in SUFFIXES and not is_pattern(url.key):
        raise UsageError(
            f"source {source!r} is a single image, and a source is a collection, so nothing was listed; give its folder"
        )
    pattern = bucket_pattern(url)
    root, others = Url(url.base, pattern.root), Counter[str]()
    listing = _listing_of(str(root), _objects(root, pattern, others, exclusion))
    if not listing.paths:
        nothing = (
            f"pattern {source!r} matches no object{what_to_type(url.key)}"
            if pattern.tails
            else _without_images(str(root), others, exclusion)
        )
        raise nothing_listed(nothing)
    order = sorted(range(len(listing)), key=listing.paths.__getitem__)
    sizes = array("q", (listing.size_bytes[i] for i in order))
    paths, identities = ([column[i] for i in order] for column in (listing.paths, listing.identities))
    return replace(listing, paths=paths, size_bytes=sizes, identities=identities, ignored=dict(others.most_common()))


def _objects(root: Url, pattern: Pattern, others: Counter[str], exclusion: Exclusion) -> Iterator[tuple[str, Meta]]:
    """The objects below a prefix that count as images, as they are listed."""
    for key, meta in root.walk():
        if exclusion.leaves_out_key(key):
            continue
        state = pattern.start
        for name in key.split("/") if pattern.tails else ():
            state = pattern.step(state, name.encode())
        if pattern.ends(state) if pattern.tails else _is_image(key.rpartition("/")[2], others):
            yield encode_path(key.encode()), meta


def _list_urls(source: str, root: str, paths: list[str]) -> Listing:
    """The entries of a list, with the size and version of each."""
    if not is_url(root):
        raise UsageError(
            f"list {source!r} holds local paths, which mean nothing at another place, so nothing was listed; write URLs"
        )
    blocks = (paths[start : start + 1000] for start in range(0, len(paths), 1000))  # so that an interrupt waits for few requests
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = (zip(block, pool.map(partial(_stat_url, root), block), strict=True) for block in blocks)
        return _listing_of(root, chain.from_iterable(found))


def _stat_url(root: str, path: str) -> Meta | None:
    try:
        return Url.parse(absolute_url(root, path)).stat()
    except OSError as error:
        log.info("%s cannot be accessed: %s", path, error)
        return None


def _listing_of(root: str, found: Iterable[tuple[str, Meta | None]]) -> Listing:
    listing = Listing(root, [], array("q"), array("q"))
    for path, meta in found:
        listing.paths.append(path)
        listing.size_bytes.append(meta.size_bytes if meta else -1)
        listing.mtime_ns.append(0)
        listing.identities.append(meta.identity if meta else "")
    return listing


def _list_folder(root: str, exclusion: Exclusion) -> Listing:
    others: Counter[str] = Counter()
    unreadable: list[str] = []
    found = ((path, entry.stat) for path, entry in _walk(root, None, unreadable, exclusion) if _is_image(entry.name, others))
    listing = _measured(root, found, unreadable, partial(_without_images, root, others, exclusion))
    return replace(listing, ignored=dict(others.most_common()))


def _without_images(root: str, others: Counter[str], exclusion: Exclusion) -> str:
    left_out = exclusion.describe()
    if not others:
        return (
            f"folder {root!r} holds nothing else{left_out}" if left_out else f"folder {root!r} is empty (no files at any depth)"
        )
    seen = ", ".join(repr(suffix) if suffix else "none" for suffix, _ in others.most_common(8))
    return f"folder {root!r} holds no images but {others.total()} other files (suffixes: {seen}){left_out}"


def _is_image(name: bytes | str, others: Counter[str]) -> bool:
    """Whether the name has an image suffix; if not, count its suffix in ``others``, up to a few suffixes."""
    suffix = "._*" if os.fsencode(name).startswith(b"._") else suffix_of(name)
    if suffix in SUFFIXES:
        return True
    others[suffix if suffix in others or len(others) < 20 else "..."] += 1
    return False


def _list_pattern(source: str, exclusion: Exclusion) -> Listing:
    spelled = absolute_patterns(source)
    for alternative in spelled if len(spelled) > 1 else ():  # each is refused with the same message as alone
        _check_folder(Pattern.of([alternative]).root or "/")
    pattern = Pattern.of(spelled)
    unreadable: list[str] = []
    found = ((path, entry.stat) for path, entry in _walk(pattern.root or "/", pattern, unreadable, exclusion))
    nothing = f"pattern {source!r} matches no file{what_to_type(source)}"
    return _measured(pattern.root or "/", found, unreadable, lambda: nothing + exclusion.describe())


def _check_folder(folder: str) -> None:
    try:
        with os.scandir(folder):
            pass
    except OSError as error:
        raise _cannot_be_read(folder, error) from error


def walks_into(source: str, root: str, folder: str) -> bool:
    """Whether listing ``source``, with its root ``root``, would enter an absolute ``folder``."""
    if is_url(source) != is_url(folder):
        return False
    if is_url(source):
        url = Url.parse(source)
        if not f"{folder}/".startswith(f"{root}/") or (suffix_of(source) in READERS and not is_pattern(url.key)):
            return False
        pattern = bucket_pattern(url)
        return not pattern.tails or _goes_into(pattern, folder[len(root) + 1 :].split("/"))
    kind = _recognise(source)[0]
    below = os.path.relpath(folder, os.path.realpath(root)).split("/")
    if kind in READERS or below[0] == "..":
        return False
    return kind == "folder" or _goes_into(Pattern.of(absolute_patterns(source)), below)


def _goes_into(pattern: Pattern, names: list[str]) -> bool:
    """Whether the pattern enters a folder below its root."""
    state = pattern.start
    for name in names:
        state = pattern.step(state, os.fsencode(name)) if name != "." else state
    return pattern.goes_on(state)


def _walk(
    root: str, pattern: Pattern | None, unreadable: list[str], exclusion: Exclusion
) -> Iterator[tuple[str, os.DirEntry[bytes]]]:
    """Yield what is below ``root``, is not a folder and matches the pattern, if any; add unreadable folders to ``unreadable``."""
    top = os.fsencode(root)
    skip = len(os.path.join(top, b""))
    folders: Folders = {}  # from the root to the current folder
    try:
        _enter(folders, top, pattern.start if pattern else frozenset())
    except OSError as error:
        raise _cannot_be_read(root, error) from error
    while folders:
        state, entries = folders[next(reversed(folders))]
        if not entries:
            folders.popitem()
            continue
        entry = entries.pop()
        after = pattern.step(state, entry.name) if pattern else state
        if pattern and not after:
            continue
        is_folder = _is_folder(entry)
        if exclusion.leaves_out(os.fsdecode(entry.path[skip:]), is_folder=is_folder is not False):
            continue
        if is_folder is not False and (not pattern or pattern.goes_on(after)):
            try:
                _enter(folders, entry.path, after)
            except OSError as error:
                unreadable.append(encode_path(entry.path[skip:]))
                log.warning("folder %r cannot be read (%s): its images stay as they are", entry.path, error.strerror)
        if not is_folder and (not pattern or pattern.ends(after)):
            yield encode_path(entry.path[skip:]), entry


def _cannot_be_read(root: str, error: OSError) -> UsageError:
    return UsageError(
        f"folder {root!r} cannot be read ({error.strerror}), so nothing was listed and nothing was marked as removed; "
        "check the path, its permissions and that its disk is mounted"
    )


def _enter(folders: Folders, folder: bytes, state: State) -> None:
    """Put a folder and its entries on top of ``folders``, unless it is inside itself."""
    status = os.stat(folder)
    identity = status.st_dev, status.st_ino
    if identity not in folders:
        with os.scandir(folder) as entries:  # in reverse order, so that `list.pop` frees each entry when it is done
            folders[identity] = state, sorted(entries, key=attrgetter("name"), reverse=True)


def _is_folder(entry: os.DirEntry[bytes]) -> bool | None:
    """Whether this is a folder; None for a broken link, which may lead to a folder on a disk that is not mounted."""
    try:
        if entry.is_dir():
            return True
        lost = entry.is_symlink() and not suffix_of(entry.name) and not os.path.exists(entry.path)
    except OSError:
        lost = suffix_of(entry.name) not in SUFFIXES
    return None if lost else False
