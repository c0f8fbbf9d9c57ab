from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest
from distributed import KilledWorker

from pipeline.api import run_job
from pipeline.checks.plan import plan_job
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError
from pipeline.run import content_check
from pipeline.source import fetch
from pipeline.store.schema import Status
from pipeline.store.store import Store
from tests.conftest import content, make_images

pytestmark = pytest.mark.cluster

SIZES = [(30, 40), (36, 32)]
DIGEST = {"check": "digest"}


@pytest.fixture
def source(run, tmp_path):
    """Twelve images of two sizes and their store."""
    folder = make_images(tmp_path / "source", 12, SIZES, suffix=".bmp")
    assert run(folder, **DIGEST).n_checked == 0  # all are new
    return folder


@pytest.fixture
def store(tmp_path, source):
    return tmp_path / "features.zarr"


def edit(path: Path) -> None:
    """Change a byte of the content, and neither size nor time."""
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x40
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def statuses(store: Path, group: str = "30x40") -> list[str]:
    return [Status(status).name for status in Store(store).column(group, "status")]


def test_content_that_changed_without_a_sign_is_found_only_by_reading_it(run, source, store, tmp_path):
    edit(source / "img00002.bmp")
    assert run(source).n_done == 0
    summary = run(source, **DIGEST)
    assert (summary.outcome, summary.n_checked, summary.n_new, summary.n_done, summary.n_unchanged) == ("complete", 12, 1, 1, 11)
    assert statuses(store) == ["DONE", "SUPERSEDED", *["DONE"] * 5]
    run(source, tmp_path / "whole.zarr")
    assert content(store) == content(tmp_path / "whole.zarr")
    again = run(source, **DIGEST)
    assert (again.n_checked, again.n_new, again.n_unchanged) == (12, 0, 12)
    assert Store(store).last_receipt()["n_checked"] == 12


def test_a_new_time_alone_is_taken_down_and_nothing_is_computed(run, source, store):
    for i in (0, 3):
        os.utime(source / f"img{i:05d}.bmp", ns=(1, 10**18 + i))
    before = content(store)
    summary = run(source, **DIGEST)
    assert (summary.n_checked, summary.n_touched, summary.n_new, summary.n_done, summary.n_unchanged) == (12, 2, 0, 0, 12)
    assert content(store) == before
    assert statuses(store) == ["DONE"] * 6
    summary = run(source)
    assert (summary.n_new, summary.n_unchanged) == (0, 12)


def test_an_image_of_another_time_and_content_is_changed_as_ever(run, source, store):
    edit(source / "img00004.bmp")
    os.utime(source / "img00004.bmp", ns=(1, 10**18))
    summary = run(source, **DIGEST)
    assert (summary.n_checked, summary.n_touched, summary.n_new, summary.n_done) == (12, 0, 1, 1)
    assert statuses(store) == ["DONE", "DONE", "SUPERSEDED", "DONE", "DONE", "DONE", "DONE"]


def test_an_image_that_comes_back_with_other_content_is_computed(run, source, store, tmp_path):
    for i in (1, 3):
        (source / f"img{i:05d}.bmp").rename(tmp_path / f"{i}.bmp")
    run(source, max_removed=1.0)
    edit(tmp_path / "1.bmp")
    for i in (1, 3):
        (tmp_path / f"{i}.bmp").rename(source / f"img{i:05d}.bmp")
    summary = run(source, **DIGEST)
    assert (summary.n_checked, summary.n_returned, summary.n_done, summary.n_unchanged) == (12, 1, 1, 10)
    run(source, tmp_path / "whole.zarr")
    assert content(store) == content(tmp_path / "whole.zarr")


def test_what_cannot_be_reached_keeps_what_it_has(run, source, store, monkeypatch):
    """Stands for a file without permission, because root may read everything."""
    before = content(store)
    digest_block = content_check.digest_block

    def deny(root, images):
        found = [digest_block(root, [image])[0] for image in images]
        return tuple(fetch.Digested(error="permission_denied: no") if "0002" in images[i][0] else found[i] for i in range(6))

    monkeypatch.setattr("pipeline.run.content_check.digest_block", deny)
    edit(source / "img00002.bmp")
    summary = run(source, **DIGEST)
    assert (summary.outcome, summary.n_checked, summary.n_unchecked, summary.n_done) == ("complete", 11, 1, 0)
    assert content(store) == before


def test_faults_that_may_pass_leave_the_run_incomplete_and_the_store_as_it_is(run, source, store, monkeypatch):
    before = content(store)

    def fail(root, images):
        return tuple(fetch.Digested(fault=f"{path}: Input/output error") for path, _ in images)

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.run.content_check.digest_block", fail)
        summary = run(source, **DIGEST)
    assert (summary.outcome, summary.n_checked, summary.n_unchecked, len(summary.faults)) == ("incomplete", 0, 12, 12)
    assert content(store) == before
    assert run(source, **DIGEST).outcome == "complete"


def test_when_most_images_cannot_be_read_the_source_is_at_fault(run, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.source.health.SAMPLE", 8)
    folder = make_images(tmp_path / "source", 12, SIZES)
    run(folder)
    before = content(tmp_path / "features.zarr")
    gone = tuple(fetch.Digested(error="missing: gone") for _ in range(6))
    monkeypatch.setattr("pipeline.run.content_check.digest_block", lambda root, images: gone[: len(images)])
    with pytest.raises(FeaturemapsError, match=r"most of 8 images in a row cannot be read at all: the source .* is at fault"):
        run(folder, **DIGEST)
    assert content(tmp_path / "features.zarr") == before


def test_a_worker_that_dies_over_a_block_is_a_fault_that_may_pass(run, source, store, monkeypatch):
    """Stands for a worker that is killed again and again, which takes a minute for real."""

    result = content_check._result

    def die(future):
        future.result = Mock(side_effect=KilledWorker("digest", None, 4))
        return result(future)

    monkeypatch.setattr("pipeline.run.content_check._result", die)
    summary = run(source, **DIGEST)
    assert (summary.outcome, summary.n_unchecked) == ("incomplete", 12)
    assert min(summary.faults) == "img00000.bmp: its worker died whenever it was read with its neighbours"


def test_a_stopped_comparison_keeps_what_it_found(client, source, store, monkeypatch):
    monkeypatch.setattr("pipeline.run.content_check.BLOCK_IMAGES", 1)
    monkeypatch.setattr("pipeline.run.content_check.COMMIT_S", 0.0)
    for i in range(12):
        os.utime(source / f"img{i:05d}.bmp", ns=(1, 10**18 + i))
    stop = threading.Event()
    job = make_job({"source": str(source), "store": str(store), **DIGEST})

    def on_progress(progress):
        if progress.stage.startswith("comparing") and not progress.stage.startswith("comparing digests, 0 "):
            stop.set()

    first = run_job(job, client, stop=stop, on_progress=on_progress)
    assert (first.outcome, first.n_done) == ("stopped", 0)
    assert 0 < first.n_touched < 12
    second = run_job(job, client)
    assert (second.outcome, second.n_checked, second.n_touched) == ("complete", 12, 12 - first.n_touched)


def test_a_cluster_that_is_gone_ends_the_comparison_with_what_to_do(run, source, monkeypatch):
    def vanish(*_):
        raise OSError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("pipeline.run.content_check._wait", vanish)
    with pytest.raises(FeaturemapsError, match=r"cannot be written any more .*Broken pipe"):
        run(source, **DIGEST)


def test_plan_says_how_many_images_would_be_read(source, store):
    preview = plan_job(make_job({"source": str(source), "store": str(store), "workers": 1, **DIGEST}))
    assert (preview.n_to_check, preview.n_to_compute) == (12, 0)
    assert "12 images to read and compare with their digests; those that differ are computed too" in preview.describe()


def test_the_command_says_how_many_were_compared(command, source, store):
    code, out, _ = command("run", source, store, "--check", "digest")
    assert code == 0
    assert "12 images were read and compared with their digests, 0 could not be; 0 had a new time only" in out


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path, monkeypatch):
    folder = make_images(tmp_path, 1, SIZES)
    name = "img00000.png"
    fingerprint = fetch.fingerprint_of((folder / name).stat())
    digest = fetch.hashlib.file_digest

    def touch(file, algorithm):
        os.utime(folder / name, ns=(1, 1))
        return digest(file, algorithm)

    monkeypatch.setattr("pipeline.source.fetch.hashlib.file_digest", touch)
    (found,) = fetch.digest_block(str(folder), [(name, fingerprint)])
    assert found.error.startswith("changed: the file changed after it was listed")
    assert not found.digest


def test_a_file_is_digested_as_sha256sum_does_and_a_missing_one_says_so(tmp_path):
    folder = make_images(tmp_path, 1, SIZES)
    name = "img00000.png"
    fingerprint = fetch.fingerprint_of((folder / name).stat())
    found, missing = fetch.digest_block(str(folder), [(name, fingerprint), ("none.png", "1-1")])
    assert found == fetch.Digested(hashlib.sha256((folder / name).read_bytes()).hexdigest())
    assert missing.error.startswith("missing:")


def test_faults_of_the_storage_are_told_from_the_images_own(tmp_path, monkeypatch):
    folder = make_images(tmp_path, 1, SIZES)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("pipeline.source.fetch.RETRY_PAUSES_S", (0.0,))
    monkeypatch.setattr("pipeline.source.fetch._open", fail)
    (found,) = fetch.digest_block(str(folder), [("img00000.png", "1-1")])
    assert found == fetch.Digested(fault="img00000.png: [Errno 5] Input/output error")
