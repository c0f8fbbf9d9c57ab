"""What a report says of stores of every state, and what becomes of bad input; how it looks: ``test_report_page.py``."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_store
from pipeline.config import make_job
from pipeline.errors import EXIT_USAGE, FeaturemapsError, UsageError
from pipeline.extract.layers import Array
from pipeline.extract.weights import load_weights
from pipeline.report import page
from pipeline.report.facts import Facts, gather, run_facts, verdict_of
from pipeline.report.page import write_report
from pipeline.report.samples import choose
from pipeline.run.summary import Summary, receipt
from pipeline.store.create import create_store, prepare_folder
from pipeline.store.lock import StoreLock
from pipeline.store.objects import Place
from pipeline.store.run_ids import new_run_id
from pipeline.store.schema import Status
from pipeline.store.settings import store_spec
from pipeline.store.store import Store
from tests.conftest import make_images
from tests.support.hostile import png
from tests.support.stuck_disk import mount_stuck

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).parents[2]
SIZES = [(40, 60), (40, 60), (90, 120)]


@pytest.fixture
def store(run, tmp_path) -> Path:
    """Six images of two sizes, all done, as uint8."""
    make_images(tmp_path / "source", 6, SIZES)
    assert run(tmp_path / "source", dtype="uint8").outcome == "complete"
    return tmp_path / "features.zarr"


@pytest.fixture
def empty(tmp_path) -> Path:
    """A store without images, made without a run."""
    job = make_job({"source": str(tmp_path), "store": str(tmp_path / "f.zarr")})
    weights = load_weights(job.extractor, 3)
    prepare_folder(tmp_path / "f.zarr")
    create_store(tmp_path / "f.zarr", store_spec(job, str(tmp_path), weights), weights)
    return tmp_path / "f.zarr"


def text_of(store: Place, **options) -> str:
    """The page's words, on one line."""
    found = page.render(open_store(store), **options)
    words = re.sub(r"<(style|script)>.*?</\1>|<[^>]+>", " ", found, flags=re.DOTALL)
    return " ".join(html.unescape(words).split())


def facts_of(store: Place) -> Facts:
    return gather(Store(store), None, 200)


def set_status(store: Path, group: str, rows: list[int], status: Status, error: str = "") -> None:
    opened = Store(store)
    values: dict[str, Array] = {"status": np.full(len(rows), status, np.uint8)}
    if error:
        values["error"] = np.array([error] * len(rows), object)
    opened.commit(group, np.array(rows), values)


def leave_receipt(store: Path, **values: object) -> None:
    """What one more run would have left."""
    before = Store(store).last_receipt() or receipt(Summary("x"))
    (store / "runs" / "20990101T000000.000Z-999999-00000000.json").write_text(json.dumps({**before, "run_id": "later", **values}))


# -- states -----------------------------------------------------------------------------------------------------------------------


def test_a_complete_store(store):
    text = text_of(store)
    assert "Complete: all 6 images are done." in text
    assert "40x60 exact 4 4" in text
    assert str(store.parent / "source") in text
    assert f"store = pipeline.open_store({str(store)!r})" in text
    assert "drawn at random, seed 23455" in text
    assert Store(store).spec.extractor["weights_sha256"] in text
    samples = re.findall(r"(img\d+\.png) (?:40 x 60|90 x 120) the image conv1, channel 0", text)
    assert sorted(samples) == [f"img{i:05}.png" for i in range(6)]
    for stage in ("read", "decode", "extract", "write", "waiting"):
        assert f"{stage} " in text
    assert "None: every image that was looked at could be used." in text


def test_an_empty_store(empty):
    text = text_of(empty)
    assert "The store is empty: no image was entered yet." in text
    assert "There are none: no image is done." in text
    assert "No run has left a receipt." in text


def test_a_small_number_is_not_said_to_be_zero_and_the_hosts_are_those_of_one_run(empty):
    stages = {"read": 0.0001, "decode": 1.0, "extract": 1.0, "write": 1.0}
    leave_receipt(
        empty, outcome="complete", n_done=2, pixels=1568, compute_s=200.0, elapsed_s=0.01, stage_s=stages, hosts={"vm": 2}
    )
    text = text_of(empty)
    assert "0.01 images/s, 7.84e-06 megapixels/s" in text
    assert "read < 0.1 %" in text
    assert "0 0 0 0.01 < 0.1 s" in text
    assert "Hosts vm (2 images); in the last run that computed maps" in text


def test_a_store_of_pooled_values_says_why_there_are_no_maps(run, tmp_path):
    make_images(tmp_path / "source", 6, SIZES)
    assert run(tmp_path / "source", extractor={"outputs": ["pooled"]}).outcome == "complete"
    text = text_of(tmp_path / "features.zarr")
    assert "Complete: all 6 images are done." in text
    assert "conv1: pooled values only, no maps" in text
    assert "The store keeps pooled values only" in text
    assert "store.pooled()" in text
    assert "the image" not in text.partition("Sample images")[2]
    assert "Filters of conv1" in text
    assert "Values of conv1" not in text


def test_all_images_rejected(run, tmp_path):
    (tmp_path / "source").mkdir()
    for i in range(3):
        (tmp_path / "source" / f"{i}.png").write_bytes(b"no picture")
    run(tmp_path / "source")
    text = text_of(tmp_path / "features.zarr")
    assert "No image is done: all 3 are bad (3 not_an_image)." in text
    assert "All 3 bad images" in text


def test_the_runs_say_what_they_did_and_which_were_refused(empty):
    leave_receipt(empty, outcome="failed", message="UsageError: gone", n_quarantined=2, n_rejected=1, n_changed=4, n_removed=5)
    run = next(run_facts(facts_of(empty).receipts, None))
    assert (run.state, run.exit_code, run.n_bad) == ("refused", 2, 3)
    assert "Done Bad Changed Removed Images/s Took not said refused 2 0 3 4 5 \u2013 0.0 s gone" in text_of(empty)


def test_a_quiet_night_says_what_it_did_and_that_it_started_no_worker(empty):
    leave_receipt(empty, outcome="complete", n_removed=2, n_unchanged=3)
    assert "The last run computed no maps: 2 removed." in text_of(empty)
    leave_receipt(empty, outcome="complete", n_removed=0, n_checked=3, start_s=4.0)
    assert "The last run computed no maps: 3 compared." in text_of(empty)
    leave_receipt(empty, outcome="complete", n_checked=0, start_s=0.0)
    assert "The last run computed no maps: there was nothing to do, so no worker was started." in text_of(empty)
    leave_receipt(empty, outcome="complete", n_unreachable=1)
    assert "computed no maps" not in text_of(empty)
    leave_receipt(empty, outcome="complete", n_unreachable=0, n_done=1)
    assert "computed no maps" not in text_of(empty)


def test_a_run_without_a_reason_takes_one_row(empty):
    leave_receipt(empty, outcome="complete", n_removed=2)
    found = page.render(open_store(empty))
    assert "complete 0 0 0 0 2 \u2013 0.0 s Done, bad, changed" in text_of(empty)
    assert '<tr class="reason">' not in found
    leave_receipt(empty, outcome="failed", message="KeyError: 3")
    assert '<tr class="reason"><td colspan="9"><bdi>KeyError: 3</bdi>' in page.render(open_store(empty))
    leave_receipt(empty, outcome="failed", message="OSError: disk full")
    assert '<tr class="reason"><td colspan="9"><bdi>disk full</bdi>' in page.render(open_store(empty))


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        ({"outcome": "stopped"}, "2 of 6 images are missing: the last run was stopped before its end."),
        (
            {"outcome": "incomplete", "faults": ["a.png: Stale\nhandle"]},
            "2 of 6 images are missing: the storage failed, which may pass (a.png: Stale\\nhandle).",
        ),
        ({"outcome": "complete"}, "2 of 6 images are missing: no run has reached them yet."),
        ({"outcome": "failed", "message": "disk full"}, "The last run failed; 2 of 6 images are missing: disk full."),
        (
            {"outcome": "failed", "message": "UsageError: gone"},
            "The last run was refused; 2 of 6 images are missing: gone.",
        ),
        ({"outcome": "running"}, "The last run died before its end; 2 of 6 images are missing."),
        ({"outcome": "stopped", "n_listed": 100}, "96 of 100 images are missing: the last run was stopped"),
    ],
)
def test_a_half_written_store_says_how_much_is_missing_and_why(store, outcome, said):
    set_status(store, "40x60", [0, 2], Status.PENDING)
    leave_receipt(store, **outcome)
    verdict = verdict_of(facts_of(store))
    assert verdict.text.startswith(said)
    assert "run the same command again" in verdict.remedy.lower()
    text = text_of(store)
    assert said in text
    assert "pending 2 33.3 %" in text


def test_a_store_without_receipts(store):
    for path in (store / "runs").glob("*Z-*.json"):
        path.unlink()
    set_status(store, "40x60", [0], Status.PENDING)
    assert verdict_of(facts_of(store)).text == "1 of 6 images is missing: no run has left a receipt."
    assert "No run has left a receipt." in text_of(store)


def test_a_store_that_a_run_works_on_is_only_read(store):
    run_id = new_run_id()
    leave_receipt(store, outcome="running", run_id=run_id)
    set_status(store, "40x60", [0], Status.PENDING)
    with StoreLock(store / "runs", run_id):
        before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file() and "lock" not in path.name}
        text = text_of(store)
        assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "A run is at work: 5 of 6 images are done so far." in text
    assert "at work" in text.partition("All runs")[2]


def test_too_many_bad_images_are_said_with_the_limit(run, tmp_path):
    source = make_images(tmp_path / "source", 2, SIZES)
    (source / "bad.png").write_bytes(b"no picture")
    assert run(source, max_quarantined=0).exit_code == 3
    text = text_of(tmp_path / "features.zarr")
    assert "Complete, but with 1 bad image (1 not_an_image), more than the 0 that the run allows." in text
    (state,) = run_facts(Store(tmp_path / "features.zarr").receipts(), None)
    assert (state.state, state.exit_code) == ("complete", 3)


def test_bad_images_are_grouped_and_the_rest_is_counted_with_the_command_that_lists_them(store):
    set_status(store, "40x60", [0, 1, 2], Status.QUARANTINED, "truncated: the file ends")
    set_status(store, "90x120", [1], Status.QUARANTINED, "corrupt: cannot")
    text = text_of(store, n_bad=2)
    assert "Complete: 2 images are done, and 4 cannot be (3 truncated, 1 corrupt)." in text
    assert "3 truncated 1 corrupt" in text
    assert "The first 2 of 4 bad images" in text
    assert f"featuremaps status {store} --quarantined 4" in text


def test_of_many_runs_and_sizes_the_first_are_shown_and_the_rest_is_counted(run, tmp_path):
    make_images(tmp_path / "source", 24, [(30 + i, 40) for i in range(24)])
    run(tmp_path / "source")
    for i in range(15):
        shutil.copy(
            next((tmp_path / "features.zarr" / "runs").glob("2*Z-*.json")),
            tmp_path / "features.zarr" / "runs" / f"20990101T0000{i:02}.000Z-00000000.json",
        )
    text = text_of(tmp_path / "features.zarr")
    assert "The largest 20 of 24 size classes; 4 images are in the others" in text
    assert "The last 10 of 16 runs, newest first" in text


def test_the_source_is_out_of_reach_or_a_photograph_has_changed(store):
    source = store.parent / "source"
    shutil.copy(source / "img00002.png", source / "img00000.png")
    whole = (source / "img00001.png").read_bytes()
    (source / "img00001.png").write_bytes(whole[:-20] + bytes(20))  # of the same size
    text = text_of(store)
    assert text.count("the file has changed since its maps were computed, so it is not shown beside them") == 2
    shutil.rmtree(source)
    text = text_of(store)
    assert text.count("the source image cannot be read any more") == 6
    assert "conv1, channel 1" in text


def test_a_source_that_hangs_costs_the_photographs_only(store, tmp_path, monkeypatch):
    """Also where those who read from it cannot be killed."""
    monkeypatch.setattr("pipeline.report.sandbox.TOTAL_S", 100.0)
    monkeypatch.setattr("pipeline.report.sandbox.IMAGE_S", 0.5)
    set_status(store, "40x60", [0], Status.QUARANTINED, "truncated: the file ends")
    disk = mount_stuck(store.parent / "source")
    try:
        text = text_of(store)
    finally:
        disk.release()
    assert text.count("the source image is out of reach: reading it took too long") == 5
    assert "Values of conv1" in text
    assert "conv1, channel 1" in text


def test_photographs_that_are_large_and_were_resized_are_not_decoded_and_their_maps_are_shown(run, tmp_path):
    make_images(tmp_path / "source", 1, [(40, 60)])
    (tmp_path / "source" / "large.png").write_bytes(png(5000, 5000))
    run(tmp_path / "source", decode={"resize": [28, 28]})
    text = text_of(tmp_path / "features.zarr")
    assert "large.png 28 x 28 the source image has 25,000,000 pixels, and at most 20,000,000 are decoded for this page" in text
    assert text.count("conv1, channel 0") == 2


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"outcome": "complete", "n_done": 3},
        {
            "started": None,
            "versions": None,
            "elapsed_s": None,
            "outcome": None,
            "hosts": [],
            "stage_s": {"read": "long"},
            "n_done": 2,
        },
        {"outcome": "incomplete", "faults": [1, {}], "versions": {"a": 1}, "n_listed": "many", "n_done": "2", "elapsed_s": 1e999},
        {"outcome": "complete", "config": {"max_quarantined": "ten"}, "n_bad_total": 2, "n_done_total": 1},
        {"outcome": "running", "new": [1], "run_id": 7, "config": None},
    ],
    ids=["empty", "little", "null", "of other kinds", "a limit of another kind", "newer"],
)
def test_receipts_of_other_versions_say_what_they_have(store, odd):
    set_status(store, "40x60", [0], Status.PENDING)
    (store / "runs" / "20990101T000000.000Z-999999-00000000.json").write_text(json.dumps(odd))
    assert verdict_of(facts_of(store)).tone in {"warning", "bad"}
    for path in (store / "runs").glob("202*Z-*.json"):
        path.unlink()
    assert "All runs, newest first" in text_of(store)


def test_maps_that_cannot_be_read_are_said_and_nothing_falls_over(store):
    for path in (store / "40x60" / "conv1").glob("c*"):
        path.write_bytes(b"damaged")
    text = text_of(store)
    assert len(re.findall(r"its maps of conv1 cannot be read \([^)]+\).*?: run featuremaps verify", text)) == 4
    assert text.count("conv1, channel 0") == 2, "of the other size"


def test_large_images_are_left_out_and_counted(store, monkeypatch):
    monkeypatch.setattr("pipeline.report.samples.MAX_VALUES", 8000)
    text = text_of(store)
    assert "Images of 1 large size (90x120) are not shown" in text
    monkeypatch.setattr("pipeline.report.samples.MAX_VALUES", 1)
    assert "There are none: the images that are done are too large to be shown here." in text_of(store)


def test_samples_are_spread_over_the_sizes_and_the_same_each_time(store):
    chosen, _ = choose(Store(store), 4, 1)
    assert [c.shape_class.name for c in chosen] == ["40x60", "90x120", "40x60", "90x120"]
    assert [c.row for c in chosen] == [c.row for c in choose(Store(store), 4, 1)[0]]
    assert len({(c.shape_class.name, c.row) for c in choose(Store(store), 50, 1)[0]}) == 6


def test_pictures_keep_within_their_budget(store, monkeypatch):
    monkeypatch.setattr(page, "PICTURE_BYTES", 1)
    text = text_of(store)
    assert "5 images more were chosen, and left out to keep this page small." in text
    assert text.count("conv1, channel 0") == 1


def test_drawings_keep_within_their_budget(store, monkeypatch):
    monkeypatch.setattr(page, "PLOT_BYTES", 1)
    text = text_of(store)
    assert "Filters of conv1" in text
    assert "Values of conv1" not in text
    assert "Histograms of 1 more layer are left out to keep this page small." in text


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "uint8"])
def test_the_largest_error_is_measured_and_within_its_bound(run, tmp_path, dtype):
    make_images(tmp_path / "source", 3, SIZES)
    run(tmp_path / "source", dtype=dtype)
    features = open_store(tmp_path / "features.zarr")
    store = Store(features.path)
    shown = list(page.samples(store, choose(store, 3, 0)[0], page.histograms(store, choose(store, 3, 0)[0]), 3))
    largest = max(sample.differences["conv1"] for sample in shown)
    bound = features.spec.layers[0].error_bound
    assert bound / 2 < largest <= bound if dtype != "float32" else largest <= 1e-6


def test_maps_that_are_further_off_than_they_may_be_are_said(store):
    opened = Store(store)
    array = opened.array("40x60", "conv1")
    import zarr

    values = np.asarray(array[...])
    values[:, 0] += 9
    zarr.open_array(store / "40x60" / "conv1", mode="r+")[...] = values
    assert re.search(r"conv1 is off by 0\.0\d+, more than its bound 0\.00\d+: .* run featuremaps verify", text_of(store))


def test_the_space_on_disk_is_counted_or_not(store, monkeypatch):
    facts = facts_of(store)
    blocks = sum(path.stat().st_blocks * 512 for path in store.rglob("*") if path.is_file())
    assert facts.disk_bytes == blocks
    monkeypatch.setattr("pipeline.report.facts.WALK_OBJECTS", 3)
    assert facts_of(store).disk_bytes is None
    assert "The space on disk was not counted" in text_of(store)


# -- bad input ---------------------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_page_and_says_so(store, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = command("report", store)
    assert (code, out) == (0, "wrote report.html\n")
    assert "<!doctype html>" in (tmp_path / "report.html").read_text()
    (tmp_path / "job.yaml").write_text(f"source: {tmp_path / 'source'}\nstore: {store}\n")
    assert command("report", tmp_path / "job.yaml", "-o", "other.html", "--samples", "0")[0] == 0
    assert "There are none: none were asked for." in (tmp_path / "other.html").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_no_store_keeps_the_page_that_is_there(command, tmp_path):
    (tmp_path / "report.html").write_text("of before")
    code, _, err = command("report", tmp_path / "none.zarr", "-o", tmp_path / "report.html")
    assert code == EXIT_USAGE
    assert "there is no store at" in err
    assert (tmp_path / "report.html").read_text() == "of before"


def test_damaged_weights_and_columns_are_named(store, tmp_path):
    shutil.copytree(store, tmp_path / "other.zarr")
    (chunk,) = (path for path in (store / "extractor" / "conv1_weight").rglob("c*") if path.is_file())
    chunk.write_bytes(b"x")
    with pytest.raises(
        FeaturemapsError,
        match=r"weights in .* cannot be read \(.*an object under extractor/ is damaged or out of reach; restore it",
    ):
        write_report(store, tmp_path / "report.html")
    (tmp_path / "other.zarr" / "40x60" / "status" / "c.0").write_bytes(b"x")
    with pytest.raises(FeaturemapsError, match=r"status/c\.0: .*restore it from a copy"):
        write_report(tmp_path / "other.zarr", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_an_output_in_a_folder_that_is_not_there(store, tmp_path):
    with pytest.raises(UsageError, match=r"would lie in a folder that is not there, so nothing was written: make the folder"):
        write_report(store, tmp_path / "none" / "report.html")


def test_an_output_that_is_a_folder(store, tmp_path):
    with pytest.raises(UsageError, match=r"would replace a folder, so nothing was written: give a file in it"):
        write_report(store, tmp_path)


def test_a_full_disk_keeps_the_page_that_is_there(store, small_disk):
    folder = small_disk("size=64k")
    (folder / "report.html").write_text("of before")
    with pytest.raises(UsageError, match=r"report\.html cannot be written \(.*No space left.*\): check its folder"):
        write_report(store, folder / "report.html")
    assert (folder / "report.html").read_text() == "of before"
    assert [path.name for path in folder.iterdir()] == ["report.html"]


def test_without_matplotlib_the_extra_is_named_and_the_page_kept(store, tmp_path):
    (tmp_path / "report.html").write_text("of before")
    code = "import sys; sys.modules['matplotlib'] = None; from pipeline.cli.commands import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "report", store, "-o", tmp_path / "report.html"], capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_USAGE
    assert "a figure needs matplotlib, which is not installed (" in done.stderr
    assert "pip install 'featuremaps[figures]'" in done.stderr
    assert (tmp_path / "report.html").read_text() == "of before"
