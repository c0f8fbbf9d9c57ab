from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import zarr

from pipeline import open_store
from pipeline.api import run_job
from pipeline.checks.verify import verify_store
from pipeline.config import make_job
from pipeline.errors import StoreBusyError, UsageError
from pipeline.store import folder, objects
from pipeline.store.lock import StoreLock
from pipeline.store.schema import RUNS, Status
from pipeline.store.store import Store
from pipeline.store.vacuum import vacuum_store
from tests.conftest import content, make_images

pytestmark = pytest.mark.cluster

GONE = ("img00000.png", "img00001.png", "img00004.png", "b/img00000.png")
CHANGED = ("img00002.png", "img00007.png")


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    """A store of shards of three rows, of which one holds dead rows only and two some."""
    folder = tmp_path_factory.mktemp("vacuum")
    source = make_images(folder / "source", 10, [(40, 50)])
    make_images(source / "b", 3, [(30, 60)])
    job = make_job({"source": str(source), "store": str(folder / "f.zarr"), "max_removed": 1.0})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("pipeline.store.layout.SHARD_BYTES", 3 * 2 * 32 * 42 * 4)
        monkeypatch.setattr("pipeline.store.layout.MIN_CHUNK_BYTES", 1)
        run_job(job, client)
    for name in GONE:
        (folder / "away" / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(folder / "away" / name)
    make_images(folder / "other", 2, [(40, 50)], seed=5)
    for name, other in zip(CHANGED, sorted((folder / "other").iterdir()), strict=True):
        shutil.copy(other, source / name)
    assert run_job(job, client).n_done == 2
    return job


@pytest.fixture
def mine(made, tmp_path):
    """Source and store of one's own."""
    folder = Path(made.store).parent
    shutil.copytree(folder / "away", tmp_path / "away", copy_function=shutil.copy2)
    shutil.copytree(made.store, tmp_path / "f.zarr")
    return made.model_copy(update={"store": str(tmp_path / "f.zarr")})


@contextmanager
def returned(job) -> Iterator[None]:
    """All that was gone is back, as it was."""
    folder = Path(job.source).parent
    for name in GONE:
        shutil.copy2(folder / "away" / name, Path(job.source) / name)
    try:
        yield
    finally:
        for name in GONE:
            (Path(job.source) / name).unlink()


@pytest.fixture(scope="module")
def whole(client, made, tmp_path_factory):
    """What a store that never lost an image holds."""
    path = tmp_path_factory.mktemp("whole") / "f.zarr"
    with returned(made):
        run_job(made.model_copy(update={"store": str(path)}), client)
    return content(path)


def shards(store: Path, group: str = "40x50") -> list[str]:
    return sorted(path.name.split(".")[1] for path in (store / group / "conv1").glob("c.*"))


def check_sound(store: Path) -> None:
    audit = verify_store(store, n_sample=0, workers=1)
    assert audit.is_sound, audit.describe()


def test_dead_rows_are_freed_and_the_others_stay_as_they_are(made, mine):
    store = Path(mine.store)
    before, statuses = content(store), Store(store).column("40x50", "status").tolist()
    assert shards(store) == ["0", "1", "2", "3"]
    size = sum(path.stat().st_size for path in store.rglob("c.*.0.0.0"))
    planned = vacuum_store(store, dry_run=True)
    assert (planned.n_deleted, planned.n_rewritten) == (1, 3)
    assert content(store) == before
    assert sum(path.stat().st_size for path in store.rglob("c.*.0.0.0")) == size
    done = vacuum_store(store)
    assert (done.n_dead, done.n_deleted, done.n_rewritten, done.freed_bytes) == (6, 1, 3, planned.freed_bytes)
    assert shards(store) == ["1", "2", "3"]
    assert sum(path.stat().st_size for path in store.rglob("c.*.0.0.0")) == size - done.freed_bytes
    assert content(store) == before
    assert Store(store).column("40x50", "status").tolist() == statuses
    maps = zarr.open_array(str(store / "40x50" / "conv1"), mode="r", zarr_format=3)
    dead = [row for row, status in enumerate(statuses) if status >= Status.REMOVED]
    assert dead == [0, 1, 2, 4, 7]
    assert all(np.isnan(maps[row]).all() for row in dead)
    check_sound(store)
    assert not (store / RUNS / "lock.json").exists()


def test_a_second_vacuum_finds_nothing_to_do(mine):
    vacuum_store(Path(mine.store))
    again = vacuum_store(Path(mine.store))
    assert (again.n_dead, again.n_deleted, again.n_rewritten, again.freed_bytes) == (6, 0, 0, 0)


def test_notebooks_read_a_vacuumed_store(mine):
    store = Path(mine.store)
    expected = {path: open_store(store).image(path)["conv1"].values for path in open_store(store).images["path"]}
    mean = open_store(store).dataset("40x50")["conv1"].mean().compute()
    vacuum_store(store)
    opened = open_store(store)
    assert sorted(opened.images["path"]) == sorted(expected)
    for path, maps in expected.items():
        np.testing.assert_array_equal(opened.image(path)["conv1"].values, maps)
    assert opened.dataset("40x50")["conv1"].mean().compute() == mean


def test_a_removed_image_that_comes_back_is_computed_anew(client, mine, whole):
    vacuum_store(Path(mine.store))
    with returned(mine):
        summary = run_job(mine, client)
        assert (summary.n_done, summary.n_returned, summary.n_new) == (4, 4, 0)
        assert content(Path(mine.store)) == whole
        check_sound(Path(mine.store))


def test_new_images_fill_the_last_shard_of_a_vacuumed_store(client, made, mine, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(made.source, source)
    shutil.copytree(source, tmp_path / "moved", copy_function=shutil.copy2)
    job = mine.model_copy(update={"source": str(source), "store": str(tmp_path / "g.zarr")})
    run_job(job, client)
    (source / "img00009.png").rename(tmp_path / "last.png")
    run_job(job, client)
    vacuum_store(tmp_path / "g.zarr")
    make_images(source / "c", 3, [(40, 50)], seed=8)
    assert run_job(job, client).n_done == 3
    run_job(job.model_copy(update={"store": str(tmp_path / "whole.zarr")}), client)
    assert content(tmp_path / "g.zarr") == content(tmp_path / "whole.zarr")
    check_sound(tmp_path / "g.zarr")


class Crash(BaseException):
    """A kill."""


@contextmanager
def crash_after(n: int) -> Iterator[None]:
    """Let the process end at its put or deletion number ``n``."""
    left = n

    def or_crash(action):
        def call(*arguments, **options):
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            action(*arguments, **options)

        return call

    with (
        patch("pipeline.store.folder.put", or_crash(folder.put)),
        patch("pipeline.store.vacuum.delete", or_crash(objects.delete)),
    ):
        yield


def test_a_kill_at_any_put_or_deletion_leaves_a_sound_store(client, mine, whole, tmp_path):
    store = Path(mine.store)
    before = content(store)
    for n in range(100):
        path = tmp_path / f"{n}.zarr"
        shutil.copytree(store, path)
        try:
            with crash_after(n):
                vacuum_store(path)
        except Crash:
            assert content(path) == before
            check_sound(path)
            shutil.copytree(path, tmp_path / "back.zarr")
            with returned(mine):
                run_job(mine.model_copy(update={"store": str(tmp_path / "back.zarr")}), client)
                assert content(tmp_path / "back.zarr") == whole, f"after a crash at {n}"
                check_sound(tmp_path / "back.zarr")
            shutil.rmtree(tmp_path / "back.zarr")
            vacuum_store(path)
        else:
            break
        assert vacuum_store(path, dry_run=True).freed_bytes == 0
        assert shards(path) == ["1", "2", "3"]
        shutil.rmtree(path)
    assert n > 10


KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.store import folder; from pipeline.store import vacuum

left = int(sys.argv[2])
real = folder.put

def put(path, parts, **options):
    global left
    left -= 1
    if left < 0:  # half of it is on the disk
        path.with_name(path.name + ".x.partial").write_bytes(b"".join(parts)[:20])
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, parts, **options)

folder.put = put
vacuum.vacuum_store(Path(sys.argv[1]))
"""


@pytest.mark.kill
@pytest.mark.parametrize("n_puts", [3, 11])
def test_a_killed_vacuum_is_taken_over_by_the_next_command(mine, n_puts):
    store = Path(mine.store)
    before = content(store)
    ended = subprocess.run([sys.executable, "-c", KILLED, str(store), str(n_puts)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (store / RUNS / "lock.json").exists()
    assert list(store.rglob("*.partial"))
    assert content(store) == before
    assert vacuum_store(store).n_dead == 6
    assert not list(store.rglob("*.partial"))
    assert content(store) == before
    check_sound(store)


def test_damaged_maps_that_nobody_needs_are_freed_and_needed_ones_are_left(mine):
    store = Path(mine.store)
    path = store / "40x50" / "conv1" / "c.1.0.0.0"  # rows 3 to 5, of which 4 is dead
    size = path.stat().st_size // 3
    data = path.read_bytes()
    for row, n_damaged in ((3, 1), (4, 0)):
        damaged = bytearray(data)
        damaged[(row - 3) * size + size // 2] ^= 1
        path.write_bytes(damaged)
        result = vacuum_store(store)
        assert result.n_damaged == n_damaged
        assert ("hold damaged maps that are needed" in result.describe()) == bool(n_damaged)
    check_sound(store)


def test_nobody_vacuums_a_store_that_a_run_holds(mine, command):
    with StoreLock(Path(mine.store) / RUNS, "another"):
        with pytest.raises(StoreBusyError, match="is held by run another"):
            vacuum_store(Path(mine.store))
        code, _, err = command("vacuum", mine.store)
        assert (code, "is held by run another" in err) == (75, True)
        assert vacuum_store(Path(mine.store), dry_run=True).n_deleted == 1


def test_the_command_says_what_was_freed(command, mine):
    code, out, _ = command("vacuum", mine.store, "--dry-run")
    assert code == 0
    assert re.search(r"[kM]B would be freed of 6 rows .* superseded: 1 object would be deleted, 3 would be rewritten", out)
    code, out, _ = command("vacuum", mine.store, "--json")
    assert (code, json.loads(out)["n_rewritten"]) == (0, 3)
    code, _, err = command("vacuum", Path(mine.store).parent / "none.zarr")
    assert (code, "there is no store" in err) == (2, True)


def test_there_is_nothing_to_vacuum_where_there_is_no_store(tmp_path):
    with pytest.raises(UsageError, match="there is no store at"):
        vacuum_store(tmp_path)
    assert not list(tmp_path.iterdir())
