"""Where a store may be, and how one begins."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pipeline.errors import UsageError
from pipeline.store.codecs import Array, compress
from pipeline.store.objects import Place, children, exists, make_folder, put, put_json, remove_folder
from pipeline.store.schema import (
    EXTRACTOR,
    REJECTED,
    REJECTED_COLUMNS,
    RUNS,
    StoreSpec,
    column_document,
    group_document,
    object_key,
    root_document,
    weights_document,
)
from pipeline.store.store import Store, is_store


def check_folder(path: Place) -> None:
    """Check that a store is or can be at ``path``.

    Raises
    ------
    UsageError
        When it is no folder, or one that holds something else.
    """
    try:
        if is_store(path):
            return
        begun = exists(path / RUNS / "zarr.json")  # which is written first
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
            f"{path} holds {others[0]!r} and is no store, so writing there could overwrite somebody's files; give a folder that does "
            "not exist yet, or an existing store"
        )


def prepare_folder(path: Place, *, durable: bool = False) -> None:
    """Make the folder of a new store with its ``runs``, so that it can be locked.

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
    """Whether an entry of a folder without a store is what a crash in the middle of its creation left."""
    litter = name.startswith("zarr.json.") and name.endswith(".partial")
    return litter or name in ((RUNS, EXTRACTOR, REJECTED) if begun else (RUNS,))


def create_store(path: Place, spec: StoreSpec, weights: Mapping[str, Array], *, durable: bool = False) -> Store:
    """Create an empty store in a folder from `prepare_folder`; it exists from the moment its root metadata does."""
    remove_folder(path / EXTRACTOR)  # what a crash left, maybe of other layers
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
