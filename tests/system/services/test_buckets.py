"""Images and stores in buckets: on a real S3 server, behind a proxy that fails, and on a server that ignores conditions."""

from __future__ import annotations

import contextlib
import html
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import xarray as xr

from pipeline import open_store
from pipeline.api import run_job
from pipeline.checks.verify import verify_store
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.cluster.submit.record import Claim, Submission, last_submission
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError, StaleWriterError, StoreBusyError, UsageError
from pipeline.report.page import write_report
from pipeline.source import fetch
from pipeline.source.listing import list_collection
from pipeline.source.urls import ConflictError, Url, errors
from pipeline.source.urls import connect as connect_bucket
from pipeline.store import lock, objects
from pipeline.store.lock import LOCK_TTL_S, StoreLock, current_holder, holds, require_lock
from pipeline.store.lock_owner import Holder
from pipeline.store.objects import Place, children, each, exists, place, read_json, remove_folder
from pipeline.store.schema import RUNS
from pipeline.store.store import Store
from pipeline.store.vacuum import vacuum_store
from tests.conftest import content, make_images
from tests.support.services import BUCKET, SECRET, environment, faulty, rclone, seaweedfs, website
from tests.system.kill.kill_rounds import wait_until

pytestmark = pytest.mark.cluster
COMMAND = [sys.executable, "-c", "from pipeline.cli.commands import main; main()"]
SIZES = [(40, 60), (52, 44), (40, 60), (33, 70)]


@contextlib.contextmanager
def pointed_at(endpoint: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(endpoint).items():
            patch.setenv(name, value)
        connect_bucket.cache_clear()
        yield
    connect_bucket.cache_clear()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The S3 server, and this process' environment pointed at it."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as endpoint, pointed_at(endpoint):
        yield endpoint


@pytest.fixture(scope="module")
def workers(server):
    """Two workers that were started with the server's environment."""
    with connect(LocalSpec(workers=2)) as client:
        yield client


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("pictures"), 60, SIZES)


@pytest.fixture
def bucket(server, request) -> Url:
    """A folder of the bucket for one test."""
    return Url.parse(f"s3://{BUCKET}/{request.node.name.split('[')[0]}")


def upload(folder: Path, url: Url) -> Url:
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        (url / path.relative_to(folder).as_posix()).put(path.read_bytes())
    return url


def work(client, source, store, **values):
    return run_job(make_job({"source": str(source), "store": str(store), **values}), client)


@pytest.fixture(scope="module")
def expected(workers, pictures, tmp_path_factory) -> dict[str, tuple]:
    """What the pictures' maps are, by a run from folder to folder."""
    store = tmp_path_factory.mktemp("expected") / "features.zarr"
    assert work(workers, pictures, store).outcome == "complete"
    return content(store)


# -- runs ------------------------------------------------------------------------------------------------------------------------


def test_a_run_between_buckets_equals_one_between_folders(workers, pictures, expected, bucket, tmp_path):
    source = upload(pictures, bucket / "photos")
    assert work(workers, source, bucket / "features.zarr").n_done == 60
    assert content(bucket / "features.zarr") == expected
    assert work(workers, source, tmp_path / "local.zarr").n_done == 60
    assert content(tmp_path / "local.zarr") == expected
    assert work(workers, pictures, bucket / "uploaded.zarr").n_done == 60
    assert content(bucket / "uploaded.zarr") == expected
    again = work(workers, source, bucket / "features.zarr")
    assert (again.n_unchanged, again.n_done) == (60, 0)
    audit = verify_store(bucket / "features.zarr", n_sample=10, workers=1)
    assert (audit.is_sound, audit.n_maps_checked, audit.n_recomputed) == (True, 60, 10)
    verify_in_processes = verify_store(bucket / "features.zarr", n_sample=4, workers=2)
    assert (verify_in_processes.is_sound, verify_in_processes.n_recomputed) == (True, 4)


def test_the_analysis_of_a_store_in_a_bucket_equals_that_of_the_same_in_a_folder(workers, pictures, bucket, tmp_path):
    work(workers, pictures, tmp_path / "f.zarr", dtype="uint8")
    local, remote = open_store(tmp_path / "f.zarr"), open_store(str(upload(tmp_path / "f.zarr", bucket / "f.zarr")))
    labels = pd.DataFrame({"path": ["img00003.png", "img00001.png", "img00005.png"], "label": [1, 2, 2]})
    found = []
    for store in (local, remote):
        some = store.join(labels).select(label=2)
        found.append(
            {
                "counts": store.counts,
                "classes": store.classes,
                "runs": [receipt["run_id"] for receipt in store.receipts],
                "images": store.images,
                "some": some.images,
                "pooled": some.pooled(),
                "nearest": store.nearest("img00002.png", 3),
                "image": store.join(labels).image("img00003.png"),
                "pixels": store.pixels("img00002.png"),
                "mapped": store.map_images(lambda maps: maps.mean((1, 2))),
                "dataset": store.dataset(store.classes[0]).load(),
            }
        )
    assert found[0]["counts"]["done"] == 60
    for name, here in found[0].items():
        there = found[1][name]
        if isinstance(here, pd.DataFrame):
            pd.testing.assert_frame_equal(there, here)
        elif isinstance(here, xr.Dataset):
            xr.testing.assert_identical(there, here)
        else:
            np.testing.assert_array_equal(there, here, name)
    with pytest.raises(UsageError, match=r"'img0002\.png' is not an image of s3://.*; did you mean 'img0002"):
        remote.image("img0002.png")


def test_a_bucket_that_grows_changes_and_shrinks(workers, pictures, bucket, tmp_path):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    work(workers, source, store)
    more = make_images(tmp_path / "more", 66, SIZES, seed=5)
    (source / "img00002.png").put((more / "img00003.png").read_bytes())  # another size
    (source / "img00004.png").put((more / "img00004.png").read_bytes())  # of the same
    (source / "img00007.png").unlink()
    (source / "new" / "img00065.png").put((more / "img00065.png").read_bytes())
    (source / "bad.png").put(b"no picture")
    summary = work(workers, source, store)
    assert (summary.n_done, summary.n_rejected, summary.n_removed, summary.n_unchanged) == (3, 1, 1, 57)
    work(workers, source, bucket / "fresh.zarr")
    assert content(store) == content(bucket / "fresh.zarr")
    assert verify_store(store, n_sample=5, workers=1).is_sound


def test_a_run_in_a_bucket_that_is_killed_goes_on(pictures, expected, bucket, tmp_path):
    """Driver and workers, by SIGKILL, a few times; the lock of a dead process of this host is taken over at once."""
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    rng = random.Random(3)
    n_killed = 0
    for _ in range(3):
        process = subprocess.Popen(
            [*COMMAND, "run", str(source), str(store), "--workers", "2"],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        until = time.monotonic() + 900
        while process.poll() is None and time.monotonic() < until and not _has_begun(store):
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        n_killed += process.poll() is None
        _kill_all(process)
    assert n_killed >= 2
    ended = subprocess.run(
        [*COMMAND, "run", str(source), str(store), "--workers", "2"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    assert content(store) == expected
    assert verify_store(store, n_sample=5, workers=1).is_sound


def _has_begun(store: Url) -> bool:
    return exists(store / "zarr.json") and current_holder(store) is not None


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()
    process.stderr.close()


def test_a_second_run_says_who_holds_the_bucket_and_ends_with_75(pictures, bucket):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    with StoreLock(store / RUNS, "20261123T000000Z-first"):
        ended = subprocess.run(
            [*COMMAND, "run", str(source), str(store), "-vv"],
            capture_output=True,
            text=True,
            check=False,
        )
    assert ended.returncode == 75
    assert f"is held by run 20261123T000000Z-first, process {os.getpid()}" in ended.stderr
    assert children(store) == [RUNS]


def test_throttling_and_server_errors_in_the_middle_are_survived(server, pictures, expected, bucket):
    """Every sixth request is refused, fails or is cut off."""
    source = upload(pictures, bucket / "photos")
    rng = random.Random(7)
    asked = []

    def judge(method: str, path: str) -> int:
        asked.append(method)
        return rng.choice([503, 500, -1]) if rng.random() < 1 / 6 else 0

    with faulty(server, judge) as endpoint, pointed_at(endpoint), connect(LocalSpec(workers=2)) as client:
        summary = work(client, source, bucket / "features.zarr")
    assert (summary.outcome, summary.n_done, summary.n_quarantined) == ("complete", 60, 0)
    assert len(asked) > 200
    assert content(bucket / "features.zarr") == expected


def test_images_that_cannot_be_reached_for_long_stay_pending_and_are_done_by_the_next_run(server, pictures, expected, bucket):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"

    def judge(method: str, path: str) -> int:
        return 503 if method == "GET" and path.split("?", maxsplit=1)[0].endswith(("img00003.png", "img00004.png")) else 0

    with faulty(server, judge) as endpoint, pointed_at(endpoint), connect(LocalSpec(workers=2)) as client:
        summary = work(client, source, store)
    assert (summary.outcome, summary.n_done, summary.n_quarantined, summary.n_pending) == ("incomplete", 58, 0, 2)
    assert "SlowDown" in summary.faults[0]
    with connect(LocalSpec(workers=2)) as client:
        assert work(client, source, store).n_done == 2
    assert content(store) == expected


def test_a_listing_whose_second_page_fails_is_no_listing(server, bucket, workers, tmp_path):
    source = bucket / "many"
    data = (make_images(tmp_path / "one", 1, [(20, 20)]) / "img00000.png").read_bytes()
    urls = [source / f"{i:05d}.png" for i in range(1100)]
    each(lambda url: url.put(data), urls, source)
    assert len(list_collection(str(source))) == 1100
    with faulty(server, lambda _, path: 500 if "continuation-token" in path else 0) as endpoint, pointed_at(endpoint):
        check = pytest.raises(UsageError, match=r"cannot be listed .*InternalError.*nothing was marked as removed")
        with check:
            list_collection(str(source))


def test_no_credentials_in_store_receipts_or_logs(pictures, bucket):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    ended = subprocess.run(
        [*COMMAND, "run", str(source), str(store), "--limit", "8", "-vv"],
        capture_output=True,
        check=False,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    written = b"".join((store / key).read_bytes() for key, _ in store.walk())
    for text in (ended.stdout, ended.stderr, written):
        assert SECRET.encode() not in text
        assert b"key-of-the-tests" not in text
        assert b"Signature" not in text


def test_wrong_credentials_are_said_and_write_nothing(bucket, pictures, tmp_path, monkeypatch):
    source = upload(pictures, bucket / "photos")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for arguments in ([source, tmp_path / "a.zarr"], [pictures, bucket / "features.zarr"]):
        ended = subprocess.run([*COMMAND, "run", *map(str, arguments)], capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert "403 Forbidden" in ended.stderr
        assert "Traceback" not in ended.stderr
    assert not (tmp_path / "a.zarr").exists()
    monkeypatch.undo()
    assert children(bucket / "features.zarr") == []


def test_a_bucket_that_was_emptied_removes_nothing(workers, pictures, bucket):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    work(workers, source, store, limit=8)
    before = content(store)
    remove_folder(source)
    with pytest.raises(UsageError, match=r"is empty.*Nothing was marked as removed"):
        work(workers, source, store)
    (source / "img00000.png").put((pictures / "img00000.png").read_bytes())
    with pytest.raises(UsageError, match="above the allowed 10%"):
        work(workers, source, store)
    assert content(store) == before


# -- sources ---------------------------------------------------------------------------------------------------------------------


def test_names_and_patterns_of_a_bucket(bucket):
    names = ["a b+%41#?é.jpg", "deep/er/ü.PNG", "deep/x.txt", "._a.jpg", "deep/er/.hidden.jpg", "a-b/x.jpg", "a/x.jpg"]
    for name in names:
        (bucket / name).put(b"x")
    listing = list_collection(f"{bucket}/")
    assert listing.paths == sorted(["a b+%2541#?é.jpg", "deep/er/ü.PNG", "deep/er/.hidden.jpg", "a-b/x.jpg", "a/x.jpg"])
    assert (listing.root, listing.ignored) == (str(bucket), {".txt": 1, "._*": 1})
    source = fetch.Source(listing.root, make_job({"source": "x", "store": "y"}).decode)
    for i, path in enumerate(listing.paths):
        assert fetch.read_bytes(source, path, listing.fingerprint(i), fetch.Patience()) == b"x"
    assert list_collection(f"{bucket}/**/*.jpg").paths == ["a b+%2541#?é.jpg", "a-b/x.jpg", "a/x.jpg"]
    assert list_collection(f"{bucket}/a*/*").paths == ["a-b/x.jpg", "a/x.jpg"]
    with pytest.raises(UsageError, match="matches no object"):
        list_collection(f"{bucket}/**/*.gif")


def test_a_list_in_a_bucket_and_a_list_of_urls(workers, pictures, expected, bucket, tmp_path):
    source = upload(pictures, bucket / "photos")
    names = [path.name for path in sorted(pictures.iterdir())][:10]
    (source / "list.csv").put(("path\n" + "\n".join([*names, "gone.png"])).encode())
    listing = list_collection(f"{source}/list.csv")
    assert (listing.root, listing.paths[-1], listing.fingerprint(10)) == (str(source), "gone.png", "unreadable")
    (tmp_path / "list.txt").write_text("\n".join(f"{source}/{name}" for name in names))
    summary = work(workers, tmp_path / "list.txt", tmp_path / "a.zarr")
    assert summary.n_done == 10
    assert content(tmp_path / "a.zarr") == {name: expected[name] for name in names}
    (tmp_path / "mixed.txt").write_text(f"{source}/{names[0]}\n/a.jpg\n")
    with pytest.raises(UsageError, match="entries of several kinds"):
        list_collection(str(tmp_path / "mixed.txt"))


def test_a_list_of_web_addresses_on_several_hosts(workers, pictures, expected, tmp_path):
    odd = tmp_path / "web"
    odd.mkdir()
    (odd / "a b%.png").write_bytes((pictures / "img00001.png").read_bytes())
    with website(pictures) as one, website(odd) as two:
        entries = [f"{one}/img00000.png", f"{two}/a%20b%25.png", f"{one}/img00002.png?size=large", f"{one}/gone.png"]
        (tmp_path / "list.txt").write_text("\n".join(entries))
        summary = work(workers, tmp_path / "list.txt", tmp_path / "features.zarr")
        assert (summary.n_done, summary.n_rejected) == (3, 1)
        again = work(workers, tmp_path / "list.txt", tmp_path / "features.zarr")
        assert again.n_done == 0
    found = list(content(tmp_path / "features.zarr").values())
    for name in ("img00000.png", "img00001.png", "img00002.png"):
        assert expected[name] in found
    (tmp_path / "odd.txt").write_text("https://host.invalid/a%0Ab.png\n")
    with pytest.raises(OSError, match="obstore cannot ask for an object of such a name"):
        Url.parse("https://host.invalid/a%0Ab.png").stat()
    assert list_collection(str(tmp_path / "odd.txt")).fingerprint(0) == "unreadable"
    (tmp_path / "signed.txt").write_text("https://host/a.jpg?X-Amz-Signature=123\n")
    with pytest.raises(UsageError, match="carries a signature") as refused:
        list_collection(str(tmp_path / "signed.txt"))
    assert "123" not in str(refused.value)


def test_reading_ahead_is_in_order_bounded_and_fails_in_its_turn(bucket, monkeypatch):
    names = [f"{i:03d}.bin" for i in range(40)]
    for i, name in enumerate(names):
        (bucket / name).put(bytes([i]) * 1000)
    listing = [f"1000-{(bucket / name).stat().identity}" for name in names]
    listing[7] = "1000-other"
    under_way = []
    real = fetch.read_bytes
    monkeypatch.setattr(fetch, "read_bytes", lambda *a: under_way.append(a[1]) or real(*a))
    source = fetch.Source(str(bucket), make_job({"source": "x", "store": "y"}).decode)
    for limit, most in ((32 * 2**20, fetch.READ_AHEAD), (2500, 2), (10, 1)):
        monkeypatch.setattr(fetch, "READ_AHEAD_BYTES", limit)
        under_way.clear()
        for i, result in enumerate(fetch.read_ahead(source, names, listing, fetch.Patience())):
            if i == 7:
                with pytest.raises(Exception, match="changed after it was listed"):
                    result()
            else:
                assert result() == bytes([i]) * 1000
            assert len(under_way) <= i + most


# -- the lock --------------------------------------------------------------------------------------------------------------------


def _stale(folder: Place, run_id: str, **other: object) -> None:
    (folder / "lock.json").put(json.dumps(asdict(Holder.current(run_id)) | other).encode())


def test_a_bucket_has_one_holder_at_a_time(bucket):
    folder = bucket / RUNS
    with StoreLock(folder, "first"):
        assert holds(folder, "first")
        assert current_holder(bucket)["run_id"] == "first"
        with pytest.raises(StoreBusyError, match="held by run first"):
            StoreLock(folder, "second")
    assert not holds(folder, "first")
    assert current_holder(bucket) is None
    with StoreLock(folder, "second") as second:
        assert not second.took_over
        require_lock(folder, "second")
        with pytest.raises(StaleWriterError):
            require_lock(folder, "first")


def test_a_lock_in_a_bucket_is_taken_over_from_a_dead_process_and_from_a_silent_host(bucket, monkeypatch):
    folder = bucket / RUNS
    _stale(folder, "dead", process_started=1)
    with StoreLock(folder, "next") as taken:
        assert taken.took_over
    _stale(folder, "elsewhere", host="another")
    with pytest.raises(StoreBusyError, match=f"silent for {LOCK_TTL_S:.0f} s is taken over"):
        StoreLock(folder, "next")
    monkeypatch.setattr(lock, "LOCK_TTL_S", 2.0)
    time.sleep(4)
    with StoreLock(folder, "next") as taken:
        assert taken.took_over


def test_a_heartbeat_keeps_a_lock_in_a_bucket_and_ends_where_another_took_it(bucket, monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.2)
    folder = bucket / RUNS
    with StoreLock(folder, "first"):
        before = (folder / "lock.json").stat().e_tag
        assert wait_until(lambda: (folder / "lock.json").stat().e_tag != before, 900)
        _stale(folder, "thief")
        time.sleep(1)
        assert holds(folder, "thief")
    assert holds(folder, "thief")  # what is another's is not given back


def test_of_two_that_take_a_stale_lock_at_once_one_gets_it(bucket):
    """Both have seen the dead run's lock before either writes."""
    folder = bucket / RUNS
    _stale(folder, "dead", process_started=1)
    meta = (folder / "lock.json").stat()
    (folder / "lock.json").put(b"{1}", only=meta.condition)
    with pytest.raises(ConflictError):
        (folder / "lock.json").put(b"{2}", only=meta.condition)


def test_a_server_that_ignores_conditions_is_refused_unless_told_otherwise(tmp_path, pictures):
    with rclone(tmp_path) as endpoint, pointed_at(endpoint), connect(LocalSpec(workers=1)) as client:
        store = Url.parse(f"s3://{BUCKET}/features.zarr")
        with pytest.raises(UsageError, match=r"ignores the conditions of puts.*--sole-writer"):
            work(client, pictures, store, limit=4)
        assert not exists(store / "zarr.json")
        assert work(client, pictures, store, limit=4, sole_writer=True).n_done == 4
        assert Store(store).column("40x60", "status").tolist() == [
            1,
            1,
        ]  # its maps rclone cannot serve: it knows no suffix ranges


def test_a_late_driver_overwrites_nothing_of_its_successors_ledger(workers, pictures, bucket):
    """Its put was under way when another run took over: refused when it arrives."""
    store_url = bucket / "features.zarr"
    work(workers, pictures, store_url, limit=8)
    late = Store(store_url)
    group = "40x60"
    real = objects.fetch
    with pytest.MonkeyPatch.context() as patch:

        def fetch_then_lose(path):
            found = real(path)
            if path.parent.name == "error":
                patch.undo()
                Store(store_url).commit(group, np.array([0]), {"error": np.array(["of the successor"], object)})
            return found

        patch.setattr("pipeline.store.columns.fetch", fetch_then_lose)
        with pytest.raises(StaleWriterError, match="another run has taken the store over"):
            late.commit(group, np.array([1]), {"error": np.array(["late"], object), "status": np.array([2], np.uint8)})
    assert Store(store_url).column(group, "error").tolist()[:2] == ["of the successor", ""]
    assert Store(store_url).column(group, "status").tolist()[:2] == [1, 1]


def test_a_put_whose_answer_was_lost_is_known_as_its_own(bucket):
    objects.put(bucket / "a", b"1", only="create")
    objects.put(bucket / "a", b"1", only="create")
    with pytest.raises(StaleWriterError):
        objects.put(bucket / "a", b"2", only="create")


def test_a_class_of_a_bucket_that_lost_its_metadata_is_not_cleared_away(workers, pictures, bucket):
    store = bucket / "features.zarr"
    work(workers, pictures, store, limit=8)
    (store / "40x60" / "zarr.json").unlink()
    before = sorted(key for key, _ in store.walk())
    with pytest.raises(FeaturemapsError, match=r"has rows but no zarr\.json"):
        Store(store).repair()
    assert sorted(key for key, _ in store.walk()) == before


def test_urls_with_secrets_are_refused_without_showing_them():
    for text in (
        "https://host/a.jpg?access_token=SECRET",
        "https://host/a.jpg?X-Amz-Credential=SECRET&X-Amz-Signature=SECRET",
        "https://host/a.jpg?api%5Fkey=SECRET",
        "ftp://user:SECRET@host/a.jpg",
        "s3a://AKIA:SECRET@bucket/a.jpg",
        "https://user:SECRET@host/a.jpg",
    ):
        with pytest.raises(UsageError) as refused:
            Url.parse(text)
        assert "SECRET" not in str(refused.value)


def test_a_damaged_store_on_a_disk_is_named_where_obstore_is_not_installed(monkeypatch):
    for name in ("obstore", "obstore.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="checksum"), errors("f.zarr"):
        raise ValueError("checksum")


def test_queries_that_only_look_like_secrets_are_read():
    for text in ("https://host/a.jpg?design=3", "https://host/a.jpg?keyword=cat&size=large", "https://host/a.jpg?author=me"):
        assert Url.parse(text).query


# -- looking ---------------------------------------------------------------------------------------------------------------------


def test_a_store_in_a_bucket_opens_in_a_notebook(workers, pictures, expected, bucket, tmp_path):
    store = bucket / "features.zarr"
    work(workers, pictures, store)
    opened = open_store(str(store))
    assert len(opened.images) == 60
    maps = opened.image("img00002.png")["conv1"]
    assert maps.dtype == np.float32
    table = opened.dataset("40x60")
    assert float(table["conv1"].mean().compute()) == pytest.approx(float(table["conv1_mean"].mean()), abs=1e-5)
    show = subprocess.run([*COMMAND, "show", str(store), "img00002.png", "-o", str(tmp_path / "a.png")], check=False)
    assert (show.returncode, (tmp_path / "a.png").exists()) == (0, True)
    status = subprocess.run([*COMMAND, "status", str(store), "--json"], check=False, capture_output=True, text=True)
    assert json.loads(status.stdout)["counts"]["done"] == 60


def test_a_page_about_a_store_in_a_bucket(workers, pictures, bucket, tmp_path):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    (source / "cut.png").put((pictures / "img00000.png").read_bytes()[:800])
    work(workers, source, store)
    write_report(store, tmp_path / "report.html")
    text = html.unescape((tmp_path / "report.html").read_text())
    assert "Complete: 60 images are done, and 1 cannot be (1 truncated)." in text
    assert "What can be decoded of cut.png" in text
    assert f"pipeline.open_store('{store}')" in text
    assert "not counted" in text
    assert text.count("as the extractor saw it") == 6


def test_a_damaged_object_of_a_bucket_is_found_and_repaired(workers, pictures, expected, bucket):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    work(workers, source, store)
    shard = store / "40x60" / "conv1" / "c.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.put(bytes(data))
    audit = verify_store(store, n_sample=0, workers=1, repair=True)
    assert {finding.kind for finding in audit.findings} == {"maps"}
    assert work(workers, source, store).n_done == audit.n_repaired
    assert content(store) == expected
    assert verify_store(store, n_sample=3, workers=1).is_sound


def test_the_dead_rows_of_a_bucket_are_vacuumed_and_their_images_may_come_back(workers, pictures, expected, bucket):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    work(workers, source, store)
    names = ["img00001.png", "img00005.png"]
    for name in names:
        (source / name).unlink()
    work(workers, source, store)
    freed = vacuum_store(store)
    assert (freed.n_dead, freed.n_rewritten) == (2, 1)
    assert freed.freed_bytes > 1000
    assert verify_store(store, n_sample=2, workers=1).is_sound
    for name in names:
        (source / name).put((pictures / name).read_bytes())
    assert work(workers, source, store).n_done == 2
    assert content(store) == expected


def test_images_of_a_bucket_are_compared_by_their_bytes_where_that_is_asked_for(workers, pictures, expected, bucket):
    source, store = upload(pictures, bucket / "photos"), bucket / "features.zarr"
    work(workers, source, store)
    summary = work(workers, source, store, check="digest")
    assert (summary.n_checked, summary.n_done, summary.outcome) == (60, 0, "complete")


def test_where_a_store_cannot_be(server):
    for text in ("s3://bucket", "https://host/a.zarr", "ftp://host/a.zarr"):
        with pytest.raises(UsageError):
            place(text)
    with pytest.raises(UsageError, match=f"there is no store at s3://{BUCKET}/nothing"):
        Store(place(f"s3://{BUCKET}/nothing"))


def test_a_folder_of_a_bucket_that_holds_something_else_is_left_alone(workers, pictures, bucket):
    (bucket / "features.zarr" / "thesis.pdf").put(b"x")
    with pytest.raises(UsageError, match=r"holds 'thesis\.pdf' but is not a store"):
        work(workers, pictures, bucket / "features.zarr")
    with pytest.raises(UsageError, match="lies inside the source"):
        work(workers, upload(pictures, bucket / "photos"), bucket / "photos" / "features.zarr")


def test_without_obstore_a_bucket_is_refused_with_the_command_that_installs_it(monkeypatch):
    connect_bucket.cache_clear()
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UsageError, match=r"pip install 'featuremaps\[cloud\]'"):
        list_collection("s3://bucket/photos")
    connect_bucket.cache_clear()


def test_metadata_that_is_missing_in_a_bucket_is_an_error_for_people(workers, pictures, bucket):
    work(workers, pictures, bucket / "features.zarr", limit=4)
    (bucket / "features.zarr" / "40x60" / "status" / "zarr.json").unlink()
    with pytest.raises(FeaturemapsError, match="cannot be read"):
        read_json(bucket / "features.zarr" / "40x60" / "status" / "zarr.json")
    with pytest.raises(FeaturemapsError, match="cannot be read"):
        Store(bucket / "features.zarr")


def test_of_two_who_submit_for_a_bucket_in_the_same_second_one_may(bucket):
    new = Submission("slurm", "x", "", "featuremaps-1", "node", "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:00+00:00")
    for _ in range(2):  # without and with a submission of before
        first, second = Claim(bucket), Claim(bucket)
        first.take(new)
        with pytest.raises(StoreBusyError, match="was just submitted by somebody else"):
            second.take(new)
        new.write(bucket)
    first = Claim(bucket)
    first.take(new)
    first.give_back()
    assert last_submission(bucket) == new
