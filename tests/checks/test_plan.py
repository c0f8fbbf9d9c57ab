from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.api import run_job
from pipeline.checks import plan
from pipeline.checks.plan import plan_job
from pipeline.config import load_job, make_job
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.run.plan.memory import COMPILED_BASE_BYTES, wanted_limit_bytes
from pipeline.store.lock import StoreLock
from pipeline.store.schema import RUNS, Status
from pipeline.store.store import Store
from tests.checks.conftest import job_of
from tests.conftest import make_images

pytestmark = pytest.mark.cluster


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """All there is below a folder: inode, time of change and content."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: (p.stat().st_ino, p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for name, p in files.items()}


def shards(store: Path) -> int:
    """Shards with rows that are done."""
    found = Store(store)
    rows = {
        name: np.flatnonzero(found.column(name, "status") == Status.DONE) for name in (c.name for c in found.classes.values())
    }
    return sum(len(np.unique(rows[c.name] // c.layout.shard_rows)) for c in found.classes.values())


def test_a_plan_is_what_run_then_does_and_changes_nothing(client, source, tmp_path):
    job = job_of(source, tmp_path / "f.zarr")
    before = everything(tmp_path)
    planned = plan_job(job)
    assert everything(tmp_path) == before
    summary = run_job(job, client)
    assert (planned.n_listed, planned.n_to_compute, planned.n_to_reject) == (124, summary.n_done, summary.n_rejected)
    assert planned.reasons == {"empty": 1, "not_an_image": 2, "too_small": 1}
    store = Store(tmp_path / "f.zarr")
    assert planned.classes == {c.name: c.length for c in store.classes.values()}
    assert (planned.n_new_classes, planned.n_shards) == (12, shards(tmp_path / "f.zarr"))
    assert planned.maps_bytes == sum(c.length * c.layout.row_bytes for c in store.classes.values())
    assert summary.bytes_written <= planned.maps_bytes


def test_a_plan_for_an_existing_store_counts_what_is_left_to_do(client, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.store.layout.MAX_SHARD_ROWS", 4)
    source = make_images(tmp_path / "source", 10, [(50, 60)])
    job = job_of(source, tmp_path / "f.zarr")
    run_job(job, client)
    (source / "img00003.png").rename(tmp_path / "away.png")
    make_images(source / "more", 5, [(50, 60), (70, 80)], seed=1)
    (source / "more" / "bad.png").write_text("no image")
    before = everything(tmp_path)
    planned = plan_job(job)
    assert everything(tmp_path) == before
    assert (planned.n_unchanged, planned.n_to_compute, planned.n_removed, planned.n_to_reject) == (9, 5, 1, 1)
    assert planned.classes == {"50x60": 3, "70x80": 2}
    assert planned.n_new_classes == 1
    assert planned.n_shards == 3  # rows 10 and 11 fill the half-full shard, 12 begins one, and there is a new class
    summary = run_job(job, client)
    assert (summary.n_unchanged, summary.n_done, summary.n_removed, summary.n_rejected) == (9, 5, 1, 1)
    (tmp_path / "away.png").rename(source / "img00003.png")
    planned = plan_job(job)
    assert (planned.n_returned, planned.n_to_compute, planned.n_unchanged) == (1, 0, 15)
    assert "0 to mark removed, 1 back" in planned.describe()
    assert run_job(job, client).n_returned == 1


def code_of(action, *args) -> int:
    """The exit code that the command would end with."""
    try:
        return action(*args).exit_code
    except FeaturemapsError as error:
        return error.exit_code


def assert_the_plan_ends_as_the_run(client, job, code: int, why: str = "") -> None:
    if code != 2:
        planned = plan_job(job)
        assert planned.describe().splitlines()[-1] == f"a run would end with exit code {code}: {planned.verdict}"
        assert why in planned.verdict
        assert planned.to_dict()["exit_code"] == code
    assert (code_of(plan_job, job), code_of(run_job, job, client)) == (code, code)


def test_a_plan_of_images_that_are_all_missing_ends_as_the_run(client, tmp_path):
    make_images(tmp_path, 1, [(50, 60)])
    for n, code, why in (
        (100, 3, "no image would be done, and 100 are bad"),
        (600, 1, "most of 500 images in a row cannot be read"),
    ):
        (tmp_path / "list.txt").write_text("".join(f"gone{i}.jpg\n" for i in range(n)))
        assert_the_plan_ends_as_the_run(client, job_of(tmp_path / "list.txt", tmp_path / f"{n}.zarr"), code, why)
    (tmp_path / "list.txt").write_text("img00000.png\ngone.jpg\n")
    assert_the_plan_ends_as_the_run(client, job_of(tmp_path / "list.txt", tmp_path / "some.zarr"), 0, "complete, if")
    assert_the_plan_ends_as_the_run(client, job_of(tmp_path / "list.txt", tmp_path / "some.zarr"), 0)


def test_a_plan_whose_source_cannot_be_read_just_now_ends_as_the_run(client, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.source.fetch.RETRY_PAUSES_S", ())
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_text(f"{tmp_path}/unmounted/1.jpg\n{tmp_path}/unmounted/2.jpg\n")
    job = job_of(tmp_path / "lists" / "list.txt", tmp_path / "f.zarr")
    assert_the_plan_ends_as_the_run(client, job, 1, "2 images cannot be read now")


def test_a_plan_counts_bad_images_as_the_run(client, source, tmp_path):
    store = tmp_path / "f.zarr"
    assert_the_plan_ends_as_the_run(
        client, job_of(source, tmp_path / "g.zarr", max_quarantined=3), 3, "4 images of the store would be bad"
    )
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_quarantined=4), 0)
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_quarantined=3), 3)  # those of an earlier run count
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_quarantined=3, retry_quarantined=True), 3)
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_quarantined=4, retry_quarantined=True), 0)
    (source / "text.jpg").write_text("another text")
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_quarantined=4), 0)
    shutil.copy(source / "img00000.png", source / "text.jpg")
    (source / "text2.jpg").unlink()
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_quarantined=2), 0)
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_quarantined=1), 3)
    for path in sorted(source.iterdir())[:50]:
        path.unlink()
    assert_the_plan_ends_as_the_run(client, job_of(source, store), 2)
    assert_the_plan_ends_as_the_run(client, job_of(source, store, max_removed=1.0), 0)


def test_a_plan_for_a_store_that_is_held_ends_with_75_and_says_by_whom(finished, source, client):
    with StoreLock(finished / RUNS, "20990101T000000Z-other"):
        held = "the store is held by run 20990101T000000Z-other, process "
        assert_the_plan_ends_as_the_run(client, job_of(source, finished), 75, held)
        for path in sorted(source.iterdir())[:50]:
            path.unlink()
        assert_the_plan_ends_as_the_run(client, job_of(source, finished), 75, held)


def test_a_plan_of_what_does_not_fit_ends_as_the_run(client, source, tmp_path, monkeypatch):
    small = job_of(source, tmp_path / "m.zarr", workers=1, memory_limit_bytes=wanted_limit_bytes(COMPILED_BASE_BYTES))
    planned = plan_job(small)
    assert (planned.exit_code, "do not fit a worker's memory" in planned.verdict) == (2, True)
    assert code_of(run_job, small) == 2  # with workers of its own, of this limit
    monkeypatch.setattr(plan, "free_bytes", lambda _: 1000)
    monkeypatch.setattr("pipeline.run.plan.memory.free_bytes", lambda _: 1000)
    assert_the_plan_ends_as_the_run(client, job_of(source, tmp_path / "d.zarr"), 1, "the maps may not fit the disk")


def test_a_store_knows_its_pattern_however_it_is_written(client, tmp_path, monkeypatch):
    source = make_images(tmp_path / "photos", 2, [(50, 60)])
    make_images(source / "raw", 2, [(50, 60)], seed=1)
    make_images(source / "x" / "raw", 2, [(50, 60)], seed=2)
    (tmp_path / "link").symlink_to(source)
    store = tmp_path / "f.zarr"
    assert run_job(job_of(f"{source}/**/raw/**", store), client).n_done == 4
    monkeypatch.chdir(source)
    (source / "job.yaml").write_text("{source: ./**/raw/**, store: ../f.zarr}")
    from_job = load_job(source / "job.yaml").source
    spelled = ["**/raw/**", "./**//raw/**/", "../photos/**/raw/**", "../link/**/raw/**", from_job]
    for n_removed in (0, 1):
        for spelling in spelled:
            planned = plan_job(job_of(spelling, store, max_removed=0.5))
            assert (planned.n_listed, planned.n_to_compute, planned.n_removed) == (4 - n_removed, 0, n_removed), spelling
        (source / "raw" / "img00001.png").unlink(missing_ok=True)
    assert plan_job(job_of("**/raw/*0.png", store)).n_removed == 0  # another pattern says nothing of what it does not list
    summary = run_job(job_of("../link/**/raw/**", store, max_removed=0.5), client)
    assert (summary.n_removed, summary.n_unchanged) == (1, 3)


def test_an_image_that_comes_back_before_it_was_computed_is_to_compute(client, tmp_path):
    source = make_images(tmp_path / "source", 4, [(50, 60)])
    job = job_of(source, tmp_path / "f.zarr", max_removed=1.0)
    run_job(job, client)
    store = Store(tmp_path / "f.zarr")  # as if a run had stopped after it had seen the image vanish
    empty = np.array([""], object)
    store.commit("50x60", np.array([2]), {"maps_digest": empty, "status": np.array([Status.REMOVED], np.uint8)})
    planned = plan_job(job)
    assert (planned.n_returned, planned.n_to_compute, planned.classes, planned.n_shards) == (0, 1, {"50x60": 1}, 1)
    assert run_job(job, client).n_done == 1


def test_quarantined_and_rejected_images_are_planned_again_when_asked(client, source, tmp_path):
    run_job(job_of(source, tmp_path / "f.zarr"), client)
    assert plan_job(job_of(source, tmp_path / "f.zarr")).n_to_reject == 0
    planned = plan_job(job_of(source, tmp_path / "f.zarr", retry_quarantined=True))
    assert (planned.n_to_reject, planned.n_unchanged) == (4, 120)


def test_a_plan_refuses_what_run_would_refuse(client, source, tmp_path):
    run_job(job_of(source, tmp_path / "f.zarr"), client)
    with pytest.raises(UsageError, match="made with other settings"):
        plan_job(job_of(source, tmp_path / "f.zarr", dtype="uint8"))
    with pytest.raises(UsageError, match="lies inside the source"):
        plan_job(job_of(source, source / "f.zarr"))
    for path in sorted(source.iterdir())[:50]:
        path.unlink()
    with pytest.raises(UsageError, match=r"50 of the store's 124 images are not in the source any more, above the allowed 10%"):
        plan_job(job_of(source, tmp_path / "f.zarr"))


def test_a_limit_is_planned_as_it_is_run(source, tmp_path):
    planned = plan_job(job_of(source, tmp_path / "f.zarr", limit=5))
    assert (planned.n_listed, planned.n_to_compute, planned.n_to_reject) == (5, 4, 1)


@pytest.mark.parametrize(
    ("runs", "is_here", "start_s"),
    [
        ([], True, plan.START_S),
        ([], False, None),  # it may wait in a queue
        ([{"start_s": 7.5}], False, 7.5),
        ([{"start_s": 0.1}], True, plan.START_S),  # of a client that was there
        ([{}], True, plan.START_S),  # of a version before
        ([{"start_s": 9.5}, {"start_s": 7.5}, {"start_s": 0.0, "outcome": "failed", "is_refusal": True}], False, 7.5),
        ([{"start_s": 7.5}, {"start_s": 0.0, "outcome": "complete"}], True, 7.5),  # a night with nothing to do
    ],
)
def test_a_plan_knows_how_long_workers_took_to_start(tmp_path, runs, is_here, start_s):
    (tmp_path / RUNS).mkdir()
    for i, run in enumerate(runs):
        (tmp_path / RUNS / f"20260101T000000.000Z-00000{i}-00000000.json").write_text(json.dumps(run))
    assert plan._start_s(SimpleNamespace(path=tmp_path), is_here=is_here) == start_s


def test_a_plan_says_the_start_where_workers_are_needed():
    planned = plan.Preview(n_shards=1, n_batches=1, workers=2, work_s=0.2, start_s=15.2)
    assert "roughly 1 s of one core, and 15 s to start workers\n" in planned.describe()
    planned.start_s = None
    assert "roughly 1 s of one core\n" in planned.describe()


def test_the_process_pool_finds_what_one_process_finds(source, tmp_path, monkeypatch):
    inline = plan_job(job_of(source, tmp_path / "f.zarr"))
    monkeypatch.setattr(plan, "INLINE", 0)
    monkeypatch.setattr(plan, "BLOCK", 10)  # 13 blocks for two processes: more than may wait at once
    pooled = plan_job(job_of(source, tmp_path / "f.zarr"))
    for found in (inline, pooled):
        found.free_bytes = 0
    assert pooled == inline
    assert list(pooled.classes) == list(inline.classes)
    assert list(pooled.reasons) == list(inline.reasons)


def test_images_that_cannot_be_reached_just_now_are_said(source, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.source.fetch.RETRY_PAUSES_S", ())
    real = plan.probe_block
    faulty = plan.Probed(fault="img00000.png: [Errno 5] Input/output error")
    monkeypatch.setattr(plan, "probe_block", lambda *args: [faulty, *real(*args)[1:]])
    planned = plan_job(job_of(source, tmp_path / "f.zarr"))
    assert planned.n_faults == 1
    assert "1 image could not be reached now; a run would try them again" in planned.describe()


def test_a_plan_says_what_does_not_fit(source, tmp_path, monkeypatch):
    assert "DOES NOT FIT" not in plan_job(job_of(source, tmp_path / "f.zarr")).describe()
    monkeypatch.setattr(plan, "free_bytes", lambda _: 1000)
    described = plan_job(job_of(source, tmp_path / "f.zarr")).describe()
    assert "1.0 kB free -- DOES NOT FIT" in described
    assert described.count("DOES NOT FIT") == 1
    small = plan_job(job_of(source, tmp_path / "f.zarr", memory_limit_bytes=wanted_limit_bytes(COMPILED_BASE_BYTES))).describe()
    assert f"MiB per worker of {COMPILED_BASE_BYTES // 2**20} MiB -- DOES NOT FIT" in small
    assert "124 images listed: 120 to compute, 0 unchanged, 4 to reject, 0 to mark removed\n" in described
    assert "12 shape classes (12 new): " in described
    assert "), ...\n" in described
    assert "to reject: 1 empty, 1 too_small, 2 not_an_image" in described


def test_a_plan_for_a_cluster_of_groups_judges_their_memory_and_counts_their_slots(tmp_path):
    source = make_images(tmp_path / "source", 4, [(1000, 1500)])
    groups = "{read: {roles: [read], memory: 600 MiB}, extract: {roles: [extract], workers: 2, threads: 3, memory: MEMORY}}"
    shown = {}
    for memory in ("600 MiB", "8 GiB"):
        (tmp_path / "cluster.yaml").write_text(
            f"clusters: {{two: {{kind: local, groups: {groups.replace('MEMORY', memory).replace('600 MiB', memory)}}}}}"
        )
        shown[memory] = plan_job(
            make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "cluster": "two"}), tmp_path / "cluster.yaml"
        )
    assert [preview.workers for preview in shown.values()] == [6, 6]
    assert [preview.fits for preview in shown.values()] == [False, True]
    alone = plan_job(job_of(source, tmp_path / "f.zarr", workers=2))
    assert shown["8 GiB"].worker_memory_bytes > alone.worker_memory_bytes  # three threads, and images that wait
