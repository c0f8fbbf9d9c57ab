"""Checks the place of a store and of its images; leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from pipeline.checks.finding import Finding
from pipeline.checks.plan import Preview
from pipeline.errors import UsageError
from pipeline.source.urls import Url, is_url
from pipeline.store.bucket import server_clock_s
from pipeline.store.create import check_folder
from pipeline.store.lock import HEARTBEAT_S, current_holder
from pipeline.store.objects import Place, free_bytes, modified_s, nearest_folder
from pipeline.store.store import Store, is_store
from pipeline.text import count, human_size

MAX_SKEW_S = 3 * HEARTBEAT_S
"""Clocks that are further apart cannot tell whether a run is alive."""
NOTED_SKEW_S = 3.0
EQUAL_SKEW_S = 0.5
"""Clocks that are no further apart agree, as nearly as can be measured."""


def stored(store: Place) -> Iterator[Finding]:
    """What is there now."""
    check_folder(store)
    holder = current_holder(store)
    if not is_store(store):
        yield Finding("ok", "store", f"{store} is free for a new store")
    elif holder is None:
        yield Finding("ok", "store", f"{store} is a store, and nobody works on it")
    else:
        text = f"{store} is held by run {holder['run_id']}, process {holder['pid']} on {holder['host']}"
        yield Finding("note", "store", text, "a run would end with exit code 75 until that one has ended")


def writing(store: Place) -> Iterator[Finding]:
    """Check that objects can be written, replaced and created exclusively, and how far the clocks are apart."""
    if isinstance(store, Url):
        yield from _bucket(store)
    else:
        yield from _folder(nearest_folder(store))


def _folder(folder: Path) -> Iterator[Finding]:
    names = [folder / f"doctor.{uuid.uuid4().hex}.partial" for _ in range(3)]
    what, step = f"writing in {folder} ({file_system(folder)})", ""
    try:
        for step in _exercise(*names):  # noqa: B007 (names the step that failed)
            pass
        yield Finding("ok", what, "files are written, replaced and created exclusively")
        names[1].touch()
        yield _skew(f"clock of {folder}", modified_s(names[1]) - time.time())
    except OSError as error:
        remedy = "give a folder that you may write to, on a file system with renaming and hard links (local ones, NFS), with space left"
        yield Finding("FAIL", what, f"{step} failed ({error.strerror or error})", remedy)
    finally:
        for name in names:
            with contextlib.suppress(OSError):
                name.unlink(missing_ok=True)


def _exercise(first: Path, second: Path, third: Path) -> Iterator[str]:
    """Try what lock and store need of a file system; yield each step before it is tried."""
    yield "writing a file"
    for path in (first, second):
        path.write_bytes(path.name.encode())
    yield "replacing a file by renaming another"
    first.replace(second)
    if second.read_bytes() != first.name.encode():
        raise OSError("it holds something else than was written")
    yield "a hard link"
    os.link(second, third)
    yield "refusing a second hard link of the same name"
    if not _refuses(second, third):
        raise OSError("it was not refused")


def _refuses(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return True
    return False


def _bucket(url: Url) -> Iterator[Finding]:
    what = f"writing in {url.base}"
    try:
        asked_s = time.time()
        server_s = server_clock_s(url)
    except UsageError as error:
        yield Finding("FAIL", what, str(error), "use a server with conditional puts, or --sole-writer")
        return
    except OSError as error:
        remedy = "check the bucket's name, the endpoint, and the credentials in the environment (docs/buckets.md)"
        yield Finding("FAIL", what, f"it failed ({error})", remedy)
        return
    yield Finding("ok", what, "objects are written, and the conditions of puts are honoured")
    yield _skew(f"clock of {url.base}", server_s - (asked_s + time.time()) / 2)


def _skew(what: str, skew_s: float) -> Finding:
    if abs(skew_s) <= EQUAL_SKEW_S:
        return Finding("ok", what, "agrees with this machine's")
    found = f"{abs(skew_s):.1f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's"
    if abs(skew_s) <= NOTED_SKEW_S:
        return Finding("ok", what, found)
    remedy = "set both clocks by NTP: status and doctor tell by them whether a run is alive, and fingerprints hold times"
    return Finding("FAIL" if abs(skew_s) > MAX_SKEW_S else "note", what, found, remedy)


def file_system(folder: Path) -> str:
    """Type of the file system of a folder."""
    best, kind = -1, "unknown file system"
    for line in Path("/proc/self/mounts").read_text(errors="replace").splitlines():
        _, mount, found, *_ = line.split(" ")
        point = Path(mount.encode().decode("unicode_escape"))
        if folder.resolve().is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), found
    return kind


def space(store: Place, preview: Preview | None) -> Iterator[Finding]:
    """Free space, and whether the planned maps fit."""
    free = free_bytes(store)
    if free is None:
        yield Finding("ok", "space", "in a bucket, which does not say how much there is")
        return
    found = f"{human_size(free)} free"
    if preview is None:
        yield Finding("ok" if free > 0 else "FAIL", "space", found, "" if free > 0 else "make room")
        return
    found += f", and maps take up to {human_size(preview.maps_bytes)} before compression"
    if preview.maps_bytes <= free:
        yield Finding("ok", "space", found)
    else:
        yield Finding("FAIL", "space", found, "make room, choose --dtype uint8, --resize or --limit, or another disk")


def planned(preview: Preview) -> Iterator[Finding]:
    """A plan's findings about source and memory."""
    text = f"{count(preview.n_listed, 'image')} listed, {preview.n_to_compute} to compute, {preview.n_to_reject} to reject"
    if preview.n_faults:
        remedy = "check links, permissions and the file server"
        yield Finding("note", "source", f"{text}; {preview.n_faults} could not be reached now", remedy)
    elif not preview.n_listed:
        yield Finding(
            "FAIL", "source", "no images were found", "check the path; in a folder, only files with an image suffix count"
        )
    else:
        yield Finding("ok", "source", text)
    limit, wanted = preview.worker_limit_bytes, preview.worker_memory_bytes
    if limit:
        found = f"up to {wanted / 2**20:.0f} MiB per worker of {limit / 2**20:.0f} MiB"
        fits = wanted <= limit
        yield Finding("ok" if fits else "FAIL", "memory", found, "" if fits else "fewer --workers, or --dtype uint8 or --resize")


def source_of_store(store: Place) -> Iterator[Finding]:
    """Check that the source of a store can be read, without listing it."""
    if not is_store(store):
        return
    source, root = (spec := Store(store).spec).source, spec.source_root
    try:
        if is_url(root):
            is_empty = Url.parse(root).is_empty()
        elif Path(source).is_file():
            is_empty = not Path(source).stat().st_size
        else:
            with os.scandir(root) as entries:
                is_empty = next(entries, None) is None
    except OSError as error:
        yield Finding(
            "FAIL", "source", f"{source} cannot be read ({error.strerror or error})", "mount it, or correct its permissions"
        )
        return
    if is_empty:
        yield Finding("FAIL", "source", f"{source} is empty", "mount it: a run would treat its images as deleted, or refuse")
    else:
        yield Finding("ok", "source", f"{source} can be read")
