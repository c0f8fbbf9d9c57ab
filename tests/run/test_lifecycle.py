from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import Client, Nanny, Scheduler, SpecCluster
from PIL import Image
from torch.nn.functional import conv2d

from pipeline import open_store
from pipeline.api import run_job
from pipeline.checks.plan import plan_job
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError, StoreBusyError, UsageError
from pipeline.report.facts import as_summary
from pipeline.run.plan.memory import COMPILED_BASE_BYTES, wanted_limit_bytes
from pipeline.run.summary_text import describe_news
from pipeline.store.lock import StoreLock
from pipeline.store.receipts import read_receipts
from pipeline.store.schema import RUNS, Status, stack
from pipeline.store.store import Store
from tests.conftest import TWELVE_SIZES, content, make_images

pytestmark = pytest.mark.cluster


@pytest.fixture
def commit_often(monkeypatch):
    """Let tests act between a run's first batch and its last."""
    monkeypatch.setattr("pipeline.run.driver.COMMIT_S", 0.02)
    monkeypatch.setattr("pipeline.run.workers.BATCHES_IN_FLIGHT_PER_SLOT", 1)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough work for a dozen batches."""
    return make_images(tmp_path_factory.mktemp("source") / "many", 240, [(400, 500)], suffix=".jpg")


def objects(store: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of all objects but the receipts and the lock."""
    files = (p for p in store.rglob("*") if p.is_file() and RUNS not in p.relative_to(store).parts)
    return {str(p.relative_to(store)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def plain_maps(path: Path) -> np.ndarray:
    """The tutorial's extractor written down a second time: float64, conv2d, one image."""
    rng = np.random.RandomState(23455)
    bound = 1 / np.sqrt(3 * 9 * 9)
    weight = rng.uniform(-bound, bound, (2, 3, 9, 9))[:, :, ::-1, ::-1].copy()
    bias = rng.uniform(-0.5, 0.5, 2)
    pixels = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)[None] / 256.0
    return torch.sigmoid(conv2d(torch.from_numpy(pixels), torch.from_numpy(weight), torch.from_numpy(bias)))[0].numpy()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "uint8"])
def test_every_image_has_the_maps_that_plain_pytorch_computes(run, twelve_sizes, tmp_path, dtype):
    summary = run(twelve_sizes, dtype=dtype)
    assert (summary.outcome, summary.n_done, summary.n_bad_total) == ("complete", 120, 0)
    store = open_store(tmp_path / "features.zarr")
    assert sorted(store.images["path"]) == sorted(p.name for p in twelve_sizes.iterdir())
    assert sorted(store.classes) == sorted(f"{h}x{w}" for h, w in TWELVE_SIZES)
    bound = Store(tmp_path / "features.zarr").spec.layers[0].error_bound
    for name in store.images["path"][::10]:
        expected = plain_maps(twelve_sizes / name)
        image = store.image(name)
        np.testing.assert_allclose(image["conv1"].values, expected, rtol=0, atol=bound + 1e-6)
        np.testing.assert_allclose(image["conv1_mean"].values, expected.mean((1, 2)), atol=1e-6)
        np.testing.assert_allclose(image["conv1_std"].values, expected.std((1, 2)), atol=1e-6)
        np.testing.assert_allclose(image["conv1_min"].values, expected.min((1, 2)), atol=1e-6)
        np.testing.assert_allclose(image["conv1_max"].values, expected.max((1, 2)), atol=1e-6)


MIXED = {
    "reader": {"read": 1},
    "another": {"read": 1},
    "extractor": {"extract": 1, "write": 1},
}
THREADS = {"whole": {"read": 3, "extract": 3, "write": 3}}


@pytest.mark.parametrize("kinds", [MIXED, THREADS], ids=["readers and an extractor", "one worker of three threads"])
def test_other_kinds_of_workers_make_the_same_store(run, twelve_sizes, tmp_path, kinds):
    def worker(resources):
        options = {"resources": resources, "nthreads": max(len(resources), *resources.values()), "memory_limit": "2GiB"}
        return {"cls": Nanny, "options": options}

    run(twelve_sizes, tmp_path / "expected.zarr", dtype="uint8")
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": "127.0.0.1:0", "host": "127.0.0.1"}}
    workers = {name: worker(resources) for name, resources in kinds.items()}
    with SpecCluster(workers, scheduler, silence_logs=False) as cluster, Client(cluster) as client:
        job = make_job({"source": str(twelve_sizes), "store": str(tmp_path / "features.zarr"), "dtype": "uint8"})
        summary = run_job(job, client)
        assert client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) == 0  # nothing is left behind
    assert (summary.outcome, summary.n_done) == ("complete", 120)
    assert content(tmp_path / "features.zarr") == content(tmp_path / "expected.zarr")


def test_a_second_run_opens_no_image_and_rewrites_nothing(run, twelve_sizes, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(twelve_sizes, source)
    run(source)
    before = objects(tmp_path / "features.zarr")
    accessed = 1_000_000_000  # older than the change, so that relatime notes the next access
    for path in source.iterdir():
        os.utime(path, ns=(accessed, path.stat().st_mtime_ns))
    summary = run(source)
    assert (summary.outcome, summary.n_done, summary.n_unchanged) == ("complete", 0, 120)
    assert objects(tmp_path / "features.zarr") == before
    assert {path.stat().st_atime_ns for path in source.iterdir()} == {accessed}


def test_no_cluster_is_started_when_there_is_nothing_to_do(run, twelve_sizes, tmp_path, monkeypatch):
    run(twelve_sizes)
    monkeypatch.setattr("pipeline.cluster.session.with_client", None)
    job = make_job({"source": str(twelve_sizes), "store": str(tmp_path / "features.zarr"), "cluster": "there is none"})
    assert run_job(job).outcome == "complete"


def test_new_images_are_appended_and_the_old_are_kept(run, twelve_sizes, tmp_path):
    source = make_images(tmp_path / "source", 60, TWELVE_SIZES)
    run(source)
    first = content(tmp_path / "features.zarr")
    make_images(source, 120, [*TWELVE_SIZES, (33, 99)][:12])
    make_images(source / "more", 5, [(33, 99)], seed=1)
    summary = run(source)
    assert (summary.n_done, summary.n_new) == (125, 125)  # the sixty were written anew, with a new time
    run(source, tmp_path / "whole.zarr")
    assert content(tmp_path / "features.zarr") == content(tmp_path / "whole.zarr")
    assert first.items() <= content(tmp_path / "features.zarr").items()


def test_added_images_fill_the_half_full_shard_without_touching_its_rows(run, tmp_path):
    source = make_images(tmp_path / "source", 7, [(50, 60)])
    run(source)
    make_images(source / "more", 8, [(50, 60)], seed=1)
    summary = run(source)
    assert (summary.n_done, summary.n_unchanged) == (8, 7)
    run(source, tmp_path / "whole.zarr")
    assert content(tmp_path / "features.zarr") == content(tmp_path / "whole.zarr")


def test_changed_vanished_and_returning_images(run, tmp_path):
    source = make_images(tmp_path / "source", 30, TWELVE_SIZES)
    run(source)
    gone = source / "img00003.png"
    gone.rename(tmp_path / "kept.png")
    make_images(tmp_path / "other", 1, [(77, 88)], seed=9)
    shutil.copy(tmp_path / "other" / "img00000.png", source / "img00005.png")
    summary = run(source)
    assert (summary.n_removed, summary.n_done, summary.n_unchanged) == (1, 1, 28)
    assert describe_news(summary) == ["since the last run: 1 changed, 1 removed"]
    assert gone.name not in content(tmp_path / "features.zarr")
    run(source, tmp_path / "whole.zarr")
    assert content(tmp_path / "features.zarr") == content(tmp_path / "whole.zarr")
    (tmp_path / "kept.png").rename(gone)
    summary = run(source)
    assert (summary.n_returned, summary.n_done) == (1, 0)
    assert describe_news(summary) == ["since the last run: 1 back"]
    run(source, tmp_path / "again.zarr")
    assert content(tmp_path / "features.zarr") == content(tmp_path / "again.zarr")


def test_padded_classes_hold_the_same_maps(run, twelve_sizes, tmp_path, monkeypatch):
    run(twelve_sizes)
    monkeypatch.setattr("pipeline.store.layout.MAX_EXACT_CLASSES", 3)
    monkeypatch.setattr("pipeline.store.layout.assign_classes.__defaults__", (3,))
    run(twelve_sizes, tmp_path / "padded.zarr")
    store = Store(tmp_path / "padded.zarr")
    assert {c.kind for c in store.classes.values()} == {"exact", "padded"}
    assert len(store.classes) < 12
    assert content(tmp_path / "padded.zarr") == content(tmp_path / "features.zarr")
    padded = next(c for c in store.classes.values() if c.kind == "padded")
    dataset = open_store(tmp_path / "padded.zarr").dataset(padded.name)
    lost = padded.size[0] - int(dataset["input_height"][0])
    maps = dataset["conv1"][0].values
    assert np.isnan(maps[:, maps.shape[1] - lost :]).all()
    assert not np.isnan(maps[:, : maps.shape[1] - lost, :5]).any()


def test_resize_makes_one_class(run, twelve_sizes, tmp_path):
    run(twelve_sizes, decode={"resize": [64, 48]})
    assert open_store(tmp_path / "features.zarr").classes == ("64x48",)


def test_a_stack_of_layers_keeps_the_ones_that_were_asked_for(run, twelve_sizes, tmp_path):
    layers = [{"filters": 4, "kernel": 5, "pool": 2, "activation": "tanh"}, {"filters": 6, "kernel": 3}]
    run(twelve_sizes, extractor={"layers": layers, "outputs": ["conv1", "conv2"]}, decode={"color": "grey"})
    image = open_store(tmp_path / "features.zarr").image("img00000.png")
    assert image["conv1"].shape == (4, 18, 28)
    assert image["conv2"].shape == (6, 16, 26)
    assert image["conv2_y"].values[:2].tolist() == [4.5, 6.5]


def test_limit_takes_the_first_of_the_listing_and_removes_nothing(run, twelve_sizes, tmp_path):
    run(twelve_sizes)
    summary = run(twelve_sizes, limit=5)
    assert (summary.n_listed, summary.n_unchanged, summary.n_removed) == (5, 5, 0)
    run(twelve_sizes, tmp_path / "few.zarr", limit=5)
    assert sorted(content(tmp_path / "few.zarr")) == [f"img{i:05d}.png" for i in range(5)]


def test_a_stopped_run_commits_what_was_in_flight_and_the_next_finishes(client, tmp_path, commit_often, many):
    job = make_job({"source": str(many), "store": str(tmp_path / "features.zarr")})
    stop = threading.Event()

    stages = []

    def on_progress(progress):
        stages.append(progress.stage)
        if progress.n_finished:
            stop.set()

    summary = run_job(job, client, stop=stop, on_progress=on_progress)
    assert summary.outcome == "stopped"
    assert 0 < summary.n_done < 240
    assert stages[-1].startswith("stopping")
    assert summary.faults == []
    assert summary.n_done + summary.n_pending == 240
    assert run_job(job, client).n_done == 240 - summary.n_done
    run_job(job.model_copy(update={"store": str(tmp_path / "whole.zarr")}), client)
    assert content(tmp_path / "features.zarr") == content(tmp_path / "whole.zarr")


def test_a_run_that_was_asked_to_stop_before_it_had_workers_starts_none(tmp_path, monkeypatch):
    stop = threading.Event()
    monkeypatch.setattr("pipeline.cluster.session.with_client", None)
    source = make_images(tmp_path / "source", 2, [(50, 60)])
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    summary = run_job(job, stop=stop, on_progress=lambda progress: progress.stage == "starting workers" and stop.set())
    assert (summary.outcome, summary.n_pending, summary.exit_code) == ("stopped", 2, 75)
    assert describe_news(summary) == ["since the last run: 2 new"]
    make_images(source / "more", 1, [(50, 60)])
    assert describe_news(run_job(job, stop=stop)) == ["since the last run: 1 new, 2 that it had not begun"]


def test_a_progress_that_cannot_be_shown_ends_no_run(client, tmp_path, caplog):
    shown = []

    def on_progress(progress):
        shown.append(progress.stage)
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # also a ConnectionError, as of a lost scheduler

    source = make_images(tmp_path / "source", 1, [(50, 60)])
    summary = run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client, on_progress=on_progress)
    assert (summary.outcome, shown) == ("complete", ["listing"])
    assert "on_progress failed, and is not called again ([Errno 32] Broken pipe); the run goes on" in caplog.text


def test_a_receipt_says_what_was_run_on_what(run, twelve_sizes, tmp_path):
    summary = run(twelve_sizes)
    (receipt,) = Store(tmp_path / "features.zarr").receipts()
    assert receipt["run_id"] == summary.run_id
    assert receipt["outcome"] == "complete"
    assert receipt["n_done"] == sum(receipt["hosts"].values()) == 120
    assert receipt["bytes_read"] == sum(p.stat().st_size for p in twelve_sizes.iterdir())
    assert receipt["versions"]["featuremaps"]
    assert receipt["config"]["dtype"] == "float32"
    assert set(receipt["stage_s"]) == {"read", "decode", "extract", "write"}
    assert abs(sum(receipt["shares"].values()) - 1) < 1e-6


def test_two_runs_on_one_store_never_mix(run, twelve_sizes, tmp_path):
    run(twelve_sizes)
    with StoreLock(tmp_path / "features.zarr" / RUNS, "another"), pytest.raises(StoreBusyError, match="held by run another"):
        run(twelve_sizes)


def test_a_run_that_lost_its_store_commits_nothing(client, twelve_sizes, tmp_path):
    job = make_job({"source": str(twelve_sizes), "store": str(tmp_path / "features.zarr")})

    def steal(progress):
        if progress.stage == "starting workers":
            (tmp_path / "features.zarr" / RUNS / "lock.json").write_text('{"run_id": "thief"}')

    with pytest.raises(FeaturemapsError, match="no longer holds the store"):
        run_job(job, client, on_progress=steal)
    assert content(tmp_path / "features.zarr") == {}


def test_other_settings_are_refused_with_their_difference(run, twelve_sizes, tmp_path):
    run(twelve_sizes)
    before = objects(tmp_path / "features.zarr")
    with pytest.raises(UsageError, match=r'made with other settings.*dtype: the store has "float32", this run asks for "uint8"'):
        run(twelve_sizes, dtype="uint8")
    with pytest.raises(UsageError, match=r"extractor\.weights_sha256: the store has .* this run asks for"):
        run(twelve_sizes, extractor={"seed": 1})
    with pytest.raises(UsageError, match=r'decode\.color: the store has "rgb", this run asks for "grey"'):
        run(twelve_sizes, decode={"color": "grey"})
    other = make_images(tmp_path / "other", 1, [(50, 50)])
    with pytest.raises(UsageError, match=r"source_root: the store has .*twelve.* this run asks for .*other"):
        run(other)
    assert objects(tmp_path / "features.zarr") == before
    summaries = [as_summary(receipt) for receipt in read_receipts(tmp_path / "features.zarr")]
    assert [summary.exit_code for summary in summaries] == [2, 2, 2, 2, 0]
    assert "source_root" in summaries[0].message


def test_a_store_inside_its_source_is_refused(run, tmp_path):
    source = make_images(tmp_path / "source", 1, [(50, 50)])
    with pytest.raises(UsageError, match=r"lies inside the source .* put the store beside"):
        run(source, source / "features.zarr")
    assert not (source / "features.zarr").exists()


def test_an_emptied_source_is_refused_and_nothing_is_marked(run, twelve_sizes, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(twelve_sizes, source)
    run(source)
    before = content(tmp_path / "features.zarr")
    for path in source.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="mounted"):
        run(source)
    source.rename(tmp_path / "unmounted")
    with pytest.raises(UsageError, match="does not exist"):
        run(source)
    (tmp_path / "unmounted").rename(source)
    summaries = [as_summary(receipt) for receipt in read_receipts(tmp_path / "features.zarr")]
    assert [(summary.outcome, summary.exit_code) for summary in summaries] == [("failed", 2), ("failed", 2), ("complete", 0)]
    assert "does not exist" in summaries[0].message
    make_images(source, 100, TWELVE_SIZES, seed=5)
    for i in range(95):
        (source / f"img{i:05d}.png").unlink()
    with pytest.raises(UsageError, match=r"not in the source any more, above the allowed 10%"):
        run(source)
    assert content(tmp_path / "features.zarr") == before


def test_a_plan_that_does_not_fit_memory_is_refused_with_the_number_that_would(tmp_path, twelve_sizes):
    job = make_job(
        {
            "source": str(twelve_sizes),
            "store": str(tmp_path / "f.zarr"),
            "workers": 1,
            "memory_limit_bytes": wanted_limit_bytes(COMPILED_BASE_BYTES),
        }
    )
    with pytest.raises(
        UsageError, match=r"need up to \d+ MiB per worker, and a worker of \d+ MiB may use \d+ MiB: it would be paused"
    ):
        run_job(job)
    tiny = make_job({"source": str(twelve_sizes), "store": str(tmp_path / "g.zarr"), "memory_limit_bytes": 100 * 2**20})
    with pytest.raises(
        UsageError, match=r"workers have a limit of 100 MiB each, and they need \d+ MiB before they hold an image"
    ):
        run_job(tiny)
    assert not (tmp_path / "g.zarr").exists()


def test_a_plan_that_does_not_fit_the_disk_is_refused(run, twelve_sizes, monkeypatch):
    monkeypatch.setattr("pipeline.run.plan.memory.free_bytes", lambda _: 1000)
    with pytest.raises(FeaturemapsError, match=r"need up to 0\.01 GB, and .* has 0\.00 GB free"):
        run(twelve_sizes)


def test_when_most_images_cannot_be_reached_the_source_is_at_fault(run, tmp_path):
    source = tmp_path / "list.txt"
    source.write_text("\n".join(f"missing{i}.png" for i in range(600)))
    with pytest.raises(
        FeaturemapsError, match=r"most of 500 images in a row cannot be read at all: the source .* tries all of them again"
    ):
        run(source)
    assert content(tmp_path / "features.zarr") == {}


def test_a_source_that_vanishes_in_the_middle_quarantines_nothing(client, tmp_path, commit_often, many):
    source = tmp_path / "source"
    shutil.copytree(many, source)
    job = make_job({"source": str(source), "store": str(tmp_path / "features.zarr")})
    moved = tmp_path / "unmounted"

    def unmount(progress):
        if progress.n_finished and not moved.exists():
            source.rename(moved)
            source.mkdir()

    summary = run_job(job, client, on_progress=unmount)
    assert summary.outcome == "incomplete"
    assert summary.n_quarantined == summary.n_rejected == 0
    assert summary.n_pending == 240 - summary.n_done > 0
    assert summary.faults
    source.rmdir()
    moved.rename(source)
    assert run_job(job, client).outcome == "complete"
    run_job(job.model_copy(update={"store": str(tmp_path / "whole.zarr")}), client)
    assert content(tmp_path / "features.zarr") == content(tmp_path / "whole.zarr")


def test_an_image_that_changes_after_it_was_listed_is_quarantined_and_done_by_the_next_run(client, tmp_path):
    source = make_images(tmp_path / "source", 3, [(50, 60)])
    job = make_job({"source": str(source), "store": str(tmp_path / "features.zarr")})

    def change(progress):
        if progress.stage == "starting workers":
            make_images(source, 1, [(50, 60)], seed=7)
            (source / "img00002.png").unlink()

    summary = run_job(job, client, on_progress=change)
    assert (summary.n_done, summary.n_quarantined + summary.n_rejected) == (1, 2)
    assert summary.reasons == {"changed": 1, "missing": 1}
    time.sleep(0.01)
    summary = run_job(job.model_copy(update={"max_removed": 1.0}), client)
    assert (summary.n_done, summary.n_removed, summary.n_bad_total) == (1, 1, 0)


def test_a_thousand_good_images_after_a_failed_stretch_do_not_hide_it(run, tmp_path):
    """The rule holds within one block of the listing, too."""
    make_images(tmp_path / "good", 520, [(20, 20)])
    source = tmp_path / "list.txt"
    good = sorted(path.name for path in (tmp_path / "good").iterdir())
    source.write_text("\n".join([*(f"missing{i}.png" for i in range(400)), *(f"good/{name}" for name in good)]))
    with pytest.raises(FeaturemapsError, match="most of 500 images in a row cannot be read at all"):
        run(source)


@pytest.fixture
def links(tmp_path):
    """Six links into a disk that can be unmounted."""
    make_images(tmp_path / "disk", 6, [(30, 40)])
    (tmp_path / "links").mkdir()
    for path in (tmp_path / "disk").iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    return tmp_path / "links"


def test_links_to_an_unmounted_disk_are_refused_and_cost_nothing(run, links, tmp_path):
    run(links)
    before = content(tmp_path / "features.zarr")
    (tmp_path / "disk").rename(tmp_path / "unmounted")
    with pytest.raises(UsageError, match="6 of the store's 6 images are not in the source any more, above the allowed 10%"):
        run(links)
    summary = run(links, max_removed=1.0)
    assert (summary.n_unreachable, summary.n_unchanged, summary.n_removed, summary.n_rejected) == (6, 6, 0, 0)
    assert content(tmp_path / "features.zarr") == before
    (tmp_path / "unmounted").rename(tmp_path / "disk")
    assert run(links).n_unchanged == 6
    assert content(tmp_path / "features.zarr") == before


def test_what_could_not_be_read_is_tried_again_without_being_asked(run, tmp_path):
    source = make_images(tmp_path / "source", 3, [(30, 40)])
    run(source)
    store = Store(tmp_path / "features.zarr")
    store.commit("30x40", np.array([1]), {"error": stack(["missing: gone"]), "status": np.array([Status.QUARANTINED], np.uint8)})
    assert run(source).n_done == 1
    assert {row[0] for row in content(tmp_path / "features.zarr").values()} == {"DONE"}


def test_a_resize_below_the_receptive_field_is_refused_by_plan_and_run(run, twelve_sizes, tmp_path):
    job = make_job({"source": str(twelve_sizes), "store": str(tmp_path / "f.zarr"), "decode": {"resize": [5, 5]}})
    for start in (plan_job, run_job):
        with pytest.raises(UsageError, match=r"resized to 5 x 5 pixels .* leave no maps, because .* needs 9 x 9"):
            start(job)
    assert not (tmp_path / "f.zarr").exists()


def test_plan_refuses_the_folder_and_the_cluster_that_run_refuses(twelve_sizes, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for start in (plan_job, run_job):
        with pytest.raises(UsageError, match=r"holds 'thesis\.tex' but is not a store"):
            start(make_job({"source": str(twelve_sizes), "store": str(tmp_path / "mine")}))
        job = make_job({"source": str(twelve_sizes), "store": str(tmp_path / "f.zarr"), "cluster": "big"})
        with pytest.raises(UsageError, match=r"cluster 'big' is looked up in"):
            start(job, cluster_file=tmp_path / "no")
    assert not (tmp_path / "f.zarr").exists()


def test_a_store_beside_the_files_of_a_pattern_is_fine(run, tmp_path, monkeypatch):
    make_images(tmp_path, 2, [(30, 40)])
    monkeypatch.chdir(tmp_path)
    assert run("*.png", tmp_path / "f.zarr").n_done == 2
    assert run("*.png", tmp_path / "f.zarr").n_unchanged == 2
    with pytest.raises(UsageError, match="lies inside the source"):
        run("**/*.png", tmp_path / "g.zarr")


def test_many_images_that_stay_unreachable_do_not_hide_the_new_ones(run, tmp_path):
    """Those that are tried again by every run are no sign that the source is gone."""
    store, source = tmp_path / "features.zarr", tmp_path / "list.txt"
    make_images(tmp_path / "good", 3, [(20, 20)])
    (tmp_path / "folders").mkdir()
    for i in range(600):  # which have a size and a time, but are no files
        (tmp_path / "folders" / f"{i}.png").mkdir()
    good = [f"good/img{i:05d}.png" for i in range(3)]
    source.write_text(good[0])
    run(source)
    listed = Store(store)
    listed.append(
        "rejected",
        {
            "path": stack([f"folders/{i}.png" for i in range(600)]),
            "size_bytes": np.full(600, -1, np.int64),
            "fingerprint": stack(["unreadable"] * 600),
            "error": stack(["not_a_file: a folder"] * 600),
            "status": np.full(600, Status.QUARANTINED, np.uint8),
        },
    )
    source.write_text("\n".join([*good, *(f"folders/{i}.png" for i in range(600))]))
    assert run(source).n_done == 2
