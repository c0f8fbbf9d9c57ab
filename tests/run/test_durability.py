"""What is on the disk for sure when `durability: machine` was asked for.

Power cannot be cut here. These tests stand for it: they note every sync and every rename of a real run, and hold that an object is
synced before it gets its name, and its folder before anything else is named that relies on it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from pipeline.api import run_job
from pipeline.config import make_job
from tests.conftest import content, make_images


class Disk:
    """Syncs and renames, in their order, by inode."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, str]] = []
        self._sync, self._replace = os.fsync, Path.replace
        patch.setattr(os, "fsync", self.sync)
        patch.setattr(Path, "replace", self._note_name)

    def sync(self, descriptor: int) -> None:
        self._sync(descriptor)
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        self.events.append(("folder synced" if is_folder else "synced", name))

    @property
    def _note_name(self) -> Callable[[Path, Path], Path]:
        def replace(path: Path, target: Path) -> Path:
            self.events.append(("named", f"{path} {target}"))
            return self._replace(path, target)

        return replace


@pytest.fixture(scope="module")
def threads():
    """Workers that are threads of this process, so that what they sync can be seen."""
    resources = {"read": 1, "extract": 1, "write": 1}
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, processes=False, resources=resources, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def run(client, source: Path, store: Path, **values: object) -> None:
    run_job(make_job({"source": str(source), "store": str(store), **values}), client)


def test_every_object_is_synced_before_it_has_its_name_and_its_folder_right_after(threads, disk, tmp_path):
    source, store = make_images(tmp_path / "in", 12, [(40, 60), (50, 50)]), tmp_path / "features.zarr"
    run(threads, source, store, durability="machine")
    make_images(tmp_path / "in", 20, [(40, 60), (50, 50), (44, 44)])
    run(threads, source, store, durability="machine")
    names = [text.split(" ") for what, text in disk.events if what == "named"]
    assert len(names) > 100
    assert {Path(target).name for _, target in names} >= {"zarr.json", "c.0", "c.0.0", "c.0.0.0.0"}
    # Receipts and the lock say nothing of images, and are written beside them by another thread.
    events = [event for event in disk.events if f"{store}/runs" not in event[1]]
    for i, (what, text) in enumerate(events):
        if what != "named":
            continue
        temporary, target = text.split(" ")
        assert events[i - 1] == ("synced", temporary)
        assert events[i + 1] == ("folder synced", str(Path(target).parent))


def test_the_name_of_every_new_folder_is_synced_too(threads, disk, tmp_path):
    run(threads, make_images(tmp_path / "in", 3, [(40, 60)]), tmp_path / "features.zarr", durability="machine")
    synced = {text for what, text in disk.events if what == "folder synced"}
    folders = [path for path in (tmp_path / "features.zarr").rglob("*") if path.is_dir()]
    assert len(folders) > 15
    assert {str(path.parent) for path in folders} <= synced
    assert str(tmp_path) in synced  # that of the store itself


def test_a_run_that_need_not_survive_the_machine_syncs_nothing_and_writes_the_same(threads, disk, tmp_path):
    source = make_images(tmp_path / "in", 12, [(40, 60), (50, 50)])
    run(threads, source, tmp_path / "quick.zarr")
    assert not [event for event in disk.events if event[0] != "named" and "/runs/lock.json" not in event[1]]
    run(threads, source, tmp_path / "safe.zarr", durability="machine")
    assert content(tmp_path / "quick.zarr") == content(tmp_path / "safe.zarr")
