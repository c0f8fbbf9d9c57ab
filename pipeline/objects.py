"""Objects of a store on a file system, each written whole."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import FeaturemapsError


def put(path: Path, *parts: bytes) -> None:
    """Write one object whole: a reader sees the old bytes or the new ones, also after a kill."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def put_json(path: Path, document: Mapping[str, Any], indent: int | None = None) -> None:
    """`put` a JSON document; with an indent it takes ten times as long to make."""
    put(path, json.dumps(document, indent=indent, ensure_ascii=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a metadata document.

    Raises
    ------
    FeaturemapsError
        When it cannot be read or understood.
    """
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FeaturemapsError(
            f"metadata {path} cannot be read ({error}), so this store cannot be trusted as it is; check the disk and the "
            "permissions, or restore that file from a copy"
        ) from error
    if not isinstance(document, dict):
        raise FeaturemapsError(f"metadata {path} holds {type(document).__name__}, not an object; restore it from a copy")
    return document


def exists(path: Path) -> bool:
    """Whether there is such an object; storage that cannot tell raises, because what does not exist is cleared away."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def size_bytes(path: Path) -> int:
    """Size of an object; 0 where there is none."""
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def delete(path: Path) -> None:
    """Delete an object, if there is one."""
    path.unlink(missing_ok=True)


def free_bytes(path: Path) -> int:
    """Free space of the file system that a store is or will be on."""
    while not path.exists():
        path = path.parent
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
