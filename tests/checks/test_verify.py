from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import zarr

from pipeline import open_store
from pipeline.api import run_job
from pipeline.checks import verify
from pipeline.checks.verify import verify_store
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError, StoreBusyError, UsageError
from pipeline.store import folder
from pipeline.store.lock import StoreLock
from pipeline.store.schema import RUNS, Status
from pipeline.store.store import Store, is_store
from pipeline.store.vacuum import vacuum_store
from tests.conftest import content, make_images

pytestmark = pytest.mark.cluster

SIZES = [(40, 50), (30, 60)]
N = 14


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    """A source with a bad image, and its store of two layers."""
    folder = tmp_path_factory.mktemp("verify")
    make_images(folder / "source", N, SIZES)
    (folder / "source" / "bad.png").write_bytes(b"no image")
    layers = [{"filters": 3, "kernel": 5, "activation": "tanh"}, {"filters": 2, "kernel": 3, "pool": 2}]
    extractor = {"layers": layers, "outputs": ["conv1", "conv2"]}
    job = make_job({"source": str(folder / "source"), "store": str(folder / "f.zarr"), "dtype": "uint8", "extractor": extractor})
    assert run_job(job, client).n_done == N
    return job


@pytest.fixture
def copy(made, tmp_path):
    """A store of one's own to damage."""
    shutil.copytree(made.store, tmp_path / "f.zarr")
    return tmp_path / "f.zarr"


def kinds(path: Path, n_sample: int = 0) -> set[str]:
    audit = verify_store(path, n_sample=n_sample, workers=1)
    assert audit.is_sound == (not audit.findings)
    return {finding.kind for finding in audit.findings}


def shard(path: Path, layer: str = "conv1") -> Path:
    return next((path / "40x50" / layer).glob("c.*"))


def test_a_store_that_nothing_happened_to_is_sound(made):
    audit = verify_store(Path(made.store), n_sample=100)
    assert (audit.n_rows, audit.n_done, audit.n_maps_checked, audit.n_recomputed, audit.n_not_reachable) == (N, N, N, N, 0)
    assert (audit.n_compared, audit.not_compared) == (N, {})
    assert f"the bytes of {N} images at the source were compared with their digests\n" in audit.describe()
    assert audit.is_sound, audit.findings
    assert 0 <= audit.largest_difference < 1e-5
    assert audit.describe().endswith("nothing is wrong")


def test_a_flipped_byte_in_any_object_is_found(made, tmp_path):
    rng = random.Random(5)
    files = [path.relative_to(made.store) for path in sorted(Path(made.store).rglob("*")) if path.is_file()]
    objects = [path for path in files if path.name.startswith("c.") and path.parts[0] != RUNS]
    assert len(objects) > 30
    store = tmp_path / "f.zarr"
    shutil.copytree(made.store, store)
    for path in objects:
        before = (store / path).read_bytes()
        damaged = bytearray(before)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        (store / path).write_bytes(damaged)
        assert kinds(store), path
        (store / path).write_bytes(before)
    assert not kinds(store)


def test_a_change_of_any_metadata_is_found_or_is_none(made, tmp_path):
    rng = random.Random(6)
    store = tmp_path / "f.zarr"
    shutil.copytree(made.store, store)
    documents = sorted(store.rglob("zarr.json"))
    assert len(documents) > 30
    n_found = 0
    for path in documents:
        before = path.read_bytes()
        for _ in range(4):
            damaged = bytearray(before)
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(7)
            path.write_bytes(damaged)
            try:
                same = essence(damaged) == essence(before)
            except ValueError:
                same = False
            try:
                found = bool(kinds(store))
            except FeaturemapsError:
                found = True
            assert found != same, (path, bytes(damaged))
            n_found += found
        path.write_bytes(before)
    assert n_found > len(documents)


def essence(data: bytes) -> object:
    """What a document says."""
    document = json.loads(data)
    if isinstance(document, dict) and document.get("node_type") == "array" and isinstance(document.get("shape"), list):
        document["shape"] = [None, *document["shape"][1:]]  # arrays may be longer than the ledger, which tests below look at
    return document


def test_a_missing_and_a_truncated_shard_are_found(copy):
    data = shard(copy).read_bytes()
    shard(copy).write_bytes(data[: len(data) // 2])
    assert kinds(copy) == {"maps"}
    shard(copy).unlink()
    audit = verify_store(copy, n_sample=0, workers=1)
    assert {(f.kind, f.group) for f in audit.findings} == {("maps", "40x50")}
    assert len(audit.findings) == 7
    assert all(f.text.endswith("are missing") for f in audit.findings)
    assert audit.describe().endswith(
        "7 things are wrong; --repair sets rows with bad maps to pending, and the next run computes them"
    )
    assert "no image was recomputed" in audit.describe()
    assert audit.to_dict()["largest_difference"] is None


def test_a_ledger_that_claims_too_much_is_found(copy):
    store = Store(copy)
    columns = {"maps_digest": np.array([""], object), "status": np.array([Status.DONE], np.uint8)}
    store.commit("40x50", np.array([2]), columns)
    audit = verify_store(copy, n_sample=0, workers=1)
    assert {(f.kind, f.row) for f in audit.findings} == {("ledger", 2), ("maps", 2)}
    assert any(f.text == "done without a digest" for f in audit.findings)


def test_claims_that_contradict_each_other_are_found(copy):
    store = Store(copy)
    wrong = {
        "status": np.array([9, Status.QUARANTINED], np.uint8),
        "input_height": np.array([41, 40], np.int32),
        "path": np.array(["img00012.png"] * 2, object),
    }
    store.commit("40x50", np.array([0, 1]), wrong)
    texts = {f.text for f in verify_store(copy, n_sample=0, workers=1).findings}
    assert texts >= {
        "unknown status",
        "the size does not fit the class",
        "quarantined without a reason",
        "the image has 2 live rows or entries",
    }


def test_swapped_rows_are_found(copy):
    maps = zarr.open_array(str(copy / "40x50" / "conv2"), mode="r+", zarr_format=3)
    first, second = maps[1], maps[3]
    maps[1], maps[3] = second, first
    audit = verify_store(copy, n_sample=0, workers=1)
    assert {(f.kind, f.row) for f in audit.findings} == {("maps", 1), ("maps", 3)}
    (text,) = {f.text for f in audit.findings}
    assert text == "the maps in 40x50/conv1/c.0.*, 40x50/conv2/c.0.* do not match the digest in the ledger"


def test_weights_that_do_not_match_are_found(copy):
    weights = zarr.open_array(str(copy / "extractor" / "conv2_weight"), mode="r+", zarr_format=3)
    weights[0, 0, 0, 0] += 0.5
    assert kinds(copy) == {"weights"}
    audit = verify_store(copy, n_sample=4, workers=1)
    assert (audit.n_maps_checked, audit.n_recomputed) == (N, 0)  # with what weights?


def test_pooled_values_that_are_not_the_maps_own_are_found_by_recomputing(copy):
    store = Store(copy)
    mean = np.asarray(store.column("30x60", "conv1_mean"))[:1] + 0.01
    store.commit("30x60", np.array([0]), {"conv1_mean": mean})
    assert not kinds(copy)
    (finding,) = verify_store(copy, n_sample=100, workers=1).findings
    assert (finding.kind, finding.group, finding.row) == ("recomputation", "30x60", 0)
    assert finding.text.startswith("conv1: the pooled mean is")


def test_images_that_are_gone_or_changed_are_said_to_be_out_of_reach(client, tmp_path):
    make_images(tmp_path / "source", 3, [(40, 50)])
    run_job(make_job({"source": str(tmp_path / "source"), "store": str(tmp_path / "f.zarr")}), client)
    (tmp_path / "source" / "img00000.png").unlink()
    make_images(tmp_path / "source", 1, [(40, 50)], seed=9).joinpath("img00000.png").rename(tmp_path / "source" / "img00001.png")
    audit = verify_store(tmp_path / "f.zarr", workers=1)
    assert (audit.n_recomputed, audit.n_not_reachable, audit.is_sound) == (1, 2, True)
    assert "2 more could not be recomputed, because their images are gone or changed" in audit.describe()
    assert (audit.n_compared, audit.not_compared) == (1, {"missing": 1, "changed": 1})
    assert (
        "of 1 image at the source were compared with their digests; 2 could not be: 1 gone, 1 changed since" in audit.describe()
    )


def test_an_image_that_changed_without_a_sign_and_a_digest_of_another_are_found(client, tmp_path):
    source = make_images(tmp_path / "source", 4, [(40, 50)], suffix=".bmp")
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    run_job(job, client)
    path = source / "img00001.bmp"
    times, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    store = Store(tmp_path / "f.zarr")
    store.commit("40x50", np.array([3]), {"digest": store.column("40x50", "digest")[[2]]})
    audit = verify_store(tmp_path / "f.zarr", n_sample=0, workers=1)
    assert [(f.kind, f.row, f.path) for f in audit.findings] == [("source", 1, path.name), ("source", 3, "img00003.bmp")]
    assert audit.describe().endswith("2 things are wrong; a run with --check digest recomputes images whose content changed")
    assert verify_store(tmp_path / "f.zarr", n_sample=0, workers=1, repair=True).n_repaired == 0
    unread = verify_store(tmp_path / "f.zarr", read_source=False, workers=1)
    assert (unread.is_sound, unread.n_compared, unread.n_recomputed) == (True, 0, 0)
    assert "the source was not read" in unread.describe()
    assert run_job(job.model_copy(update={"check": "digest"}), client).n_done == 2
    assert verify_store(tmp_path / "f.zarr", workers=1).is_sound


def test_a_source_that_is_gone_is_given_up_soon_and_is_no_fault_of_the_store(client, tmp_path, monkeypatch):
    source = make_images(tmp_path / "source", 9, [(20, 20)])
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    shutil.rmtree(source)
    monkeypatch.setattr("pipeline.source.fetch.RETRY_PAUSES_S", ())
    monkeypatch.setattr("pipeline.checks.audit.ORIGINALS", 2)
    monkeypatch.setattr("pipeline.source.health.SAMPLE", 4)
    looked = []
    check = verify.check_originals
    monkeypatch.setattr("pipeline.checks.verify.check_originals", lambda part: looked.append(part) or check(part))
    audit = verify_store(tmp_path / "f.zarr", n_sample=0, workers=1)
    assert (audit.is_sound, audit.n_compared, audit.not_compared, len(looked)) == (True, 0, {"storage_fault": 9}, 2)
    assert "9 could not be: 9 because the storage failed" in audit.describe()


def test_any_change_of_the_roots_texts_is_found_and_older_stores_have_no_sum(copy):
    root = copy / "zarr.json"
    before = json.loads(root.read_text())
    texts = before["attributes"]["featuremaps"]
    for key in ("source", "source_root", "created_version", "written_version"):
        root.write_text(json.dumps(before | {"attributes": {"featuremaps": texts | {key: texts[key] + "x"}}}))
        (finding,) = verify_store(copy, read_source=False, workers=1).findings
        assert finding.text == "its texts (source, source root, versions, settings) do not match their sha256"
    older = {key: value for key, value in texts.items() if key != "sha256"}
    root.write_text(json.dumps(before | {"attributes": {"featuremaps": older}}))
    assert not kinds(copy)
    assert Store(copy).spec.source == texts["source"]


LAYERS = [
    [{}],
    [{"filters": 3, "kernel": 3, "pool": 2, "activation": "tanh"}, {"filters": 2, "kernel": 5, "activation": "relu"}],
    [{"filters": 1, "kernel": [5, 3], "activation": "none"}],
]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_found_in_a_store_that_lived_through_growth_kills_and_vacuum(client, tmp_path, seed):
    rng = random.Random(seed)
    source, store = tmp_path / "source", tmp_path / "f.zarr"
    sizes = [(rng.randrange(16, 60), rng.randrange(16, 60)) for _ in range(rng.randrange(1, 4))]
    make_images(source, rng.randrange(3, 9), sizes, seed, rng.choice([".png", ".jpg"]))
    (source / "bad.png").write_bytes(b"no image")
    layers = rng.choice(LAYERS)
    values = {
        "dtype": rng.choice(["float32", "float16", "uint16", "uint8"]),
        "extractor": {"layers": layers, "outputs": [f"conv{i + 1}" for i in range(rng.choice([1, len(layers)]))]},
        "decode": {"color": rng.choice(["rgb", "grey"]), "resize": rng.choice([None, None, [24, 20]])},
        "max_removed": 1.0,
    }
    job = make_job({"source": str(source), "store": str(store), **values})
    killed_at = rng.randrange(5, 60)
    with contextlib.suppress(Crash), crash_after(killed_at):
        run_job(job, client)
    if is_store(store):
        assert verify_store(store, workers=1).is_sound, f"killed at put {killed_at}"
    run_job(job, client)
    assert verify_store(store, n_sample=3, workers=1).is_sound
    make_images(source / "more", rng.randrange(1, 5), sizes, seed + 100)
    next(source.glob("img*")).unlink()
    shutil.copy(next((source / "more").iterdir()), next(source.glob("img*")))
    run_job(job, client)
    audit = verify_store(store, n_sample=3, workers=1)
    assert audit.is_sound, audit.describe()
    vacuum_store(store)
    run_job(job.model_copy(update={"check": "digest"}), client)
    audit = verify_store(store, n_sample=3, workers=1)
    assert audit.is_sound, audit.describe()
    assert (audit.n_compared, audit.not_compared, audit.n_pending) == (audit.n_done, {}, 0)


class Crash(BaseException):
    """A kill."""


@contextlib.contextmanager
def crash_after(n: int):
    """Let the driver end at its put number ``n``."""
    left, put = n, folder.put

    def put_or_crash(path, parts, **options):
        nonlocal left
        left -= 1
        if left < 0 and threading.current_thread() is threading.main_thread():
            raise Crash
        put(path, parts, **options)

    with patch("pipeline.store.folder.put", put_or_crash):
        yield


def test_repair_has_the_next_run_compute_bad_rows_again(client, made, copy):
    job = made.model_copy(update={"store": str(copy)})
    data = bytearray(shard(copy).read_bytes())
    data[100] ^= 1
    shard(copy).write_bytes(data)
    audit = verify_store(copy, repair=True)
    assert 0 < audit.n_repaired <= 7
    assert not audit.is_sound
    assert f"{audit.n_repaired} rows were set to pending" in audit.describe()
    summary = run_job(job, client)
    assert (summary.n_done, summary.outcome) == (audit.n_repaired, "complete")
    assert verify_store(copy, n_sample=100, workers=1).is_sound
    assert content(copy) == content(Path(made.store))


def test_one_bad_image_of_a_shard_costs_itself_only(client, tmp_path):
    make_images(tmp_path / "source", 5, [(400, 420)])
    job = make_job({"source": str(tmp_path / "source"), "store": str(tmp_path / "f.zarr"), "dtype": "uint8"})
    run_job(job, client)
    before = content(tmp_path / "f.zarr")
    (path,) = (tmp_path / "f.zarr" / "400x420" / "conv1").glob("c.*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # in the third image's chunk
    path.write_bytes(data)
    status = Store(tmp_path / "f.zarr")
    status.commit("400x420", np.array([0]), {"status": np.array([Status.PENDING], np.uint8)})
    with pytest.raises(FeaturemapsError, match=r"rows 2 to 3 of .* are damaged .*verify .*--repair"):
        run_job(job, client)
    status.commit("400x420", np.array([0]), {"status": np.array([Status.DONE], np.uint8)})
    audit = verify_store(tmp_path / "f.zarr", repair=True, n_sample=0, workers=1)
    assert [(f.kind, f.row) for f in audit.findings] == [("maps", 2)]
    assert audit.n_repaired == 1
    assert run_job(job, client).n_done == 1
    assert content(tmp_path / "f.zarr") == before


def test_a_shard_whose_index_is_damaged_is_made_anew_though_it_holds_a_bad_image(client, tmp_path):
    make_images(tmp_path / "source", 5, [(400, 420)])
    bad = tmp_path / "source" / "img00001.png"
    bad.write_bytes(bad.read_bytes()[:20_000])  # its header is good
    job = make_job({"source": str(tmp_path / "source"), "store": str(tmp_path / "f.zarr"), "dtype": "uint8"})
    assert run_job(job, client).n_quarantined == 1
    before = content(tmp_path / "f.zarr")
    (path,) = (tmp_path / "f.zarr" / "400x420" / "conv1").glob("c.*")
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    assert verify_store(tmp_path / "f.zarr", repair=True, workers=1).n_repaired == 4
    audit = verify_store(tmp_path / "f.zarr", workers=1)
    assert (audit.n_pending, audit.is_sound) == (4, True)
    assert "0 of them done, 4 pending" in audit.describe()
    assert run_job(job, client).n_done == 4
    assert content(tmp_path / "f.zarr") == before


def test_a_damaged_chunk_that_nobody_needs_is_found_and_vacuumed(client, tmp_path):
    make_images(tmp_path / "source", 4, [(400, 420)])
    job = make_job({"source": str(tmp_path / "source"), "store": str(tmp_path / "f.zarr"), "dtype": "uint8", "max_removed": 1.0})
    run_job(job, client)
    (tmp_path / "source" / "img00000.png").unlink()
    run_job(job, client)
    vacuum_store(tmp_path / "f.zarr")
    (path,) = (tmp_path / "f.zarr" / "400x420" / "conv1").glob("c.*")
    data = bytearray(path.read_bytes())
    data[50] ^= 1  # of the first chunk, which is fill
    path.write_bytes(data)
    (finding,) = verify_store(tmp_path / "f.zarr", workers=1).findings
    assert (finding.kind, finding.row) == ("maps", 0)
    assert "no image needs them, but a read of the whole class fails: featuremaps vacuum frees them" in finding.text
    vacuum_store(tmp_path / "f.zarr")
    assert verify_store(tmp_path / "f.zarr", workers=1).is_sound


def test_bad_maps_of_a_removed_image_are_computed_when_it_returns(client, tmp_path):
    make_images(tmp_path / "source", 4, [(400, 420)])
    job = make_job({"source": str(tmp_path / "source"), "store": str(tmp_path / "f.zarr"), "dtype": "uint8", "max_removed": 1.0})
    run_job(job, client)
    before = content(tmp_path / "f.zarr")
    (tmp_path / "source" / "img00002.png").rename(tmp_path / "away.png")
    run_job(job, client)
    maps = zarr.open_array(str(tmp_path / "f.zarr" / "400x420" / "conv1"), mode="r+", zarr_format=3)
    maps[2] = maps[1]
    audit = verify_store(tmp_path / "f.zarr", repair=True, workers=1)
    assert [(f.kind, f.row) for f in audit.findings] == [("maps", 2)]
    assert audit.n_repaired == 1
    (tmp_path / "away.png").rename(tmp_path / "source" / "img00002.png")
    assert run_job(job, client).n_done == 1
    assert content(tmp_path / "f.zarr") == before


def test_a_missing_object_is_an_error_for_who_looks_at_the_image(copy):
    shard(copy).unlink()
    with pytest.raises(FeaturemapsError, match=r"the ledger says done, but there are no values: an object is missing"):
        open_store(copy).image("img00000.png")


def test_repair_waits_for_nobody(copy):
    shard(copy).unlink()
    with StoreLock(copy / RUNS, "another"), pytest.raises(StoreBusyError, match="is held by run another"):
        verify_store(copy, repair=True, n_sample=0, workers=1)
    assert (Store(copy).column("40x50", "status") == Status.DONE).all()


def test_the_command_says_what_it_found_and_its_code_too(command, copy):
    code, out, _ = command("verify", copy, "--sample", 2, "--seed", 1)
    assert (code, out.splitlines()[-1]) == (0, "nothing is wrong")
    shard(copy).unlink()
    code, out, _ = command("verify", copy, "--workers", 1, "--json")
    found = json.loads(out)
    assert (code, found["is_sound"], found["n_findings"]) == (1, False, len(found["findings"]))
    code, _, err = command("verify", copy.parent / "none.zarr")
    assert code == 2
    assert "there is no store" in err


def test_there_is_nothing_to_verify_where_there_is_no_store(tmp_path):
    with pytest.raises(UsageError, match="there is no store at"):
        verify_store(tmp_path)


def test_a_store_of_before_layers_could_lack_maps_is_sound(client, tmp_path):
    """Its root was written by the commit before `has_maps` came."""
    root = json.loads((Path(__file__).parents[1] / "golden" / "root_of_before_has_maps.json").read_text())
    source = make_images(tmp_path / "source", 3, SIZES)
    run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "dtype": "uint8"}), client)
    made = json.loads((tmp_path / "f.zarr" / "zarr.json").read_text())
    assert made["attributes"]["featuremaps"].keys() - root["attributes"]["featuremaps"].keys() == {"excluded"}
    assert made["attributes"]["featuremaps"]["layers"] == root["attributes"]["featuremaps"]["layers"]
    (tmp_path / "f.zarr" / "zarr.json").write_text(json.dumps(root))
    assert kinds(tmp_path / "f.zarr") == set()
