"""Creates stores, checks where one may be, and whether an existing one fits a job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.config import Job
from pipeline.errors import UsageError
from pipeline.extract.layers import Array
from pipeline.extract.weights import load_weights
from pipeline.patterns import is_pattern
from pipeline.source.exclusion import DEFAULT_EXCLUDE
from pipeline.source.fingerprints import Listing
from pipeline.source.identity import is_same_folder
from pipeline.source.listing import list_collection, walks_into
from pipeline.source.names import suffix_of
from pipeline.source.path_lists import READERS
from pipeline.store.codecs import compress
from pipeline.store.objects import Place, children, exists, make_folder, place, put, put_json, remove_folder
from pipeline.store.opening import read_spec
from pipeline.store.schema import (
    EXTRACTOR,
    REJECTED,
    REJECTED_COLUMNS,
    RUNS,
    StoreSpec,
    column_document,
    difference,
    group_document,
    object_key,
    root_document,
    weights_document,
)
from pipeline.store.settings import needed_size, store_spec
from pipeline.store.store import Store, is_store


def check_folder(path: Place) -> None:
    """Check that ``path`` holds a store or can hold one.

    Raises
    ------
    UsageError
        When it is not a folder, or a folder with other content.
    """
    try:
        if is_store(path):
            return
        begun = exists(path / RUNS / "zarr.json")  # a new store writes this file first
        others = [name for name in children(path) if not _is_unfinished(name, begun)]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(
            f"store {path} cannot be written ({error.strerror}): nothing was started; check its permissions and the space, or give "
            "another folder"
        ) from error
    if others:
        raise UsageError(
            f"{path} holds {others[0]!r} but is not a store, so writing there could overwrite somebody's files; give a folder that does "
            "not exist yet, or an existing store"
        )


def prepare_folder(path: Place, *, durable: bool = False) -> None:
    """Make the folder of a new store and its ``runs``, so that it can be locked.

    Raises
    ------
    UsageError
        When the folder holds something else, or cannot be made.
    """
    check_folder(path)
    try:
        make_folder(path / RUNS, durable=durable)
        if not exists(path / RUNS / "zarr.json"):
            put_json(path / RUNS / "zarr.json", group_document({}), durable=durable)
    except OSError as error:
        raise UsageError(
            f"store {path} cannot be written ({error.strerror}): nothing was started; check its permissions and the space, or give "
            "another folder"
        ) from error


def _is_unfinished(name: str, begun: bool) -> bool:
    """Whether an entry of a folder without a store was left by a crash while the store was created."""
    litter = name.startswith("zarr.json.") and name.endswith(".partial")
    return litter or name in ((RUNS, EXTRACTOR, REJECTED) if begun else (RUNS,))


def create_store(path: Place, spec: StoreSpec, weights: Mapping[str, Array], *, durable: bool = False) -> Store:
    """Create an empty store in a folder from `prepare_folder`; it exists as soon as its root metadata does."""
    remove_folder(path / EXTRACTOR)  # left by a crash, maybe with other layers
    for name, values in weights.items():
        make_folder(path / EXTRACTOR / name, durable=durable)
        content = compress(np.ascontiguousarray(values, "float32"))
        put(path / EXTRACTOR / name / object_key(0, values.ndim), content, durable=durable)
        put_json(path / EXTRACTOR / name / "zarr.json", weights_document(name, values), durable=durable)
    put_json(path / EXTRACTOR / "zarr.json", group_document({"sha256": spec.extractor["sha256"]}), durable=durable)
    for name, dtype in REJECTED_COLUMNS.items():
        make_folder(path / REJECTED / name, durable=durable)
        put_json(path / REJECTED / name / "zarr.json", column_document(name, dtype, 0), durable=durable)
    put_json(path / REJECTED / "zarr.json", group_document({}), durable=durable)
    put_json(path / "zarr.json", root_document(spec), durable=durable)
    return Store(path, durable=durable)


def list_job(job: Job) -> Listing:
    """List a job's source, without what the job and its store exclude.

    A store from before excluded names existed excludes nothing: otherwise its rows would count as removed.

    Raises
    ------
    UsageError
        As raised by `list_collection`, or when there is another kind of store.
    """
    path = place(job.store).absolute()
    if job.exclude and suffix_of(job.source) in READERS and not is_pattern(job.source) and not Path(job.source).is_dir():
        raise UsageError(
            f"exclude is for folders, patterns and buckets, and source {job.source!r} is a list, which names its images itself: nothing "
            "was started; take them out of the list"
        )
    by_default = () if not job.default_exclude else read_spec(path).excluded if is_store(path) else DEFAULT_EXCLUDE
    listing = list_collection(job.source, (*job.exclude, *by_default))
    return listing if job.limit is None else listing.limit(job.limit)


def check_job(job: Job, listing: Listing) -> tuple[StoreSpec, dict[str, Array]]:
    """Check settings and store against each other before anything is written; return the store's spec and the weights.

    Raises
    ------
    UsageError
        When they do not fit together.
    """
    path = place(job.store).absolute()
    check_apart(path, job.source, listing.root)
    needed, resize = needed_size(job.extractor), job.decode.resize
    if resize and (resize[0] < needed[0] or resize[1] < needed[1]):
        raise UsageError(
            f"images resized to {resize[0]} x {resize[1]} pixels (height x width) leave no maps, because one value of these layers needs "
            f"{needed[0]} x {needed[1]}: nothing was started; resize to at least that, or change the layers"
        )
    weights = load_weights(job.extractor, job.decode.channels)
    spec = store_spec(job, listing.root, weights)
    check_folder(path)
    open_for(path, spec)
    return spec, weights


def check_apart(store: Place, source: str, root: str) -> None:
    """Refuse a store inside the source folder; a store beside a list of paths is fine.

    Raises
    ------
    UsageError
    """
    if walks_into(source, root, str(store.resolve())):
        raise UsageError(
            f"store {store} lies inside the source {root}: the next listing would walk through the store's own files; nothing was "
            "started; put the store beside the source"
        )


def open_for(path: Place, spec: StoreSpec) -> Store | None:
    """Open an existing store if it was made with the same settings; None if there is none.

    Raises
    ------
    UsageError
        With a line for each setting that differs.
    """
    if not is_store(path):
        return None
    store = Store(path)
    if is_same_folder(store.spec.source_root, spec.source_root):
        spec = replace(spec, source_root=store.spec.source_root)  # the same folder, reached through a link
    lines = difference(store.spec, spec)
    if lines:
        has_maps = any((store.column(c.name, "maps_digest") != "").any() for c in store.classes.values())
        raise UsageError(
            f"store {path} was made with other settings, and one store never mixes two: no image was touched. What differs: "
            f"{'; '.join(lines)}. Run with the store's settings, or give another store"
            + ("" if has_maps else "; this one holds no maps, so it may as well be deleted")
        )
    return store
