"""Where a store may be, and how one begins."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.chunks import Array, compress
from pipeline.errors import UsageError
from pipeline.objects import put, put_json
from pipeline.schema import (
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
from pipeline.store import Store, is_store


def check_folder(path: Path) -> None:
    """Check that a store is or can be at ``path``.

    Raises
    ------
    UsageError
        When it is no folder, or one that holds something else.
    """
    try:
        others = [] if is_store(path) else sorted(p.name for p in path.iterdir() if not _is_unfinished(p))
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


def prepare_folder(path: Path) -> None:
    """Make the folder of a new store with its ``runs``, so that it can be locked.

    Raises
    ------
    UsageError
        When the folder holds something else, or cannot be made.
    """
    check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / RUNS).mkdir(exist_ok=True)
        if not (path / RUNS / "zarr.json").exists():
            put_json(path / RUNS / "zarr.json", group_document({}))
    except OSError as error:
        raise UsageError(
            f"store {path} cannot be written ({error.strerror}): nothing was started; check its permissions and the space, or give "
            "another folder"
        ) from error


def _is_unfinished(entry: Path) -> bool:
    """Whether an entry of a folder without a store is what a crash in the middle of its creation left."""
    begun = (entry.parent / RUNS / "zarr.json").exists()  # which is written first
    litter = entry.name.startswith("zarr.json.") and entry.name.endswith(".partial")
    return litter or entry.name in ((RUNS, EXTRACTOR, REJECTED) if begun else (RUNS,))


def create_store(path: Path, spec: StoreSpec, weights: Mapping[str, Array]) -> Store:
    """Create an empty store in a folder from `prepare_folder`; it exists from the moment its root metadata does."""
    shutil.rmtree(path / EXTRACTOR, ignore_errors=True)  # what a crash left, maybe of other layers
    (path / EXTRACTOR).mkdir()
    for name, values in weights.items():
        (path / EXTRACTOR / name).mkdir()
        put(path / EXTRACTOR / name / object_key(0, values.ndim), compress(np.ascontiguousarray(values, "float32")))
        put_json(path / EXTRACTOR / name / "zarr.json", weights_document(name, values))
    put_json(path / EXTRACTOR / "zarr.json", group_document({"sha256": spec.extractor["sha256"]}))
    for name, dtype in REJECTED_COLUMNS.items():
        (path / REJECTED / name).mkdir(parents=True, exist_ok=True)
        put_json(path / REJECTED / name / "zarr.json", column_document(name, dtype, 0))
    put_json(path / REJECTED / "zarr.json", group_document({}))
    put_json(path / "zarr.json", root_document(spec))
    return Store(path)
