from __future__ import annotations

import pickle
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import xxhash
from distributed.core import Status as WorkerStatus

from pipeline.config import DecodeSpec, make_job
from pipeline.errors import PassingFaultError, StaleWriterError
from pipeline.extract.weights import load_weights
from pipeline.run import tasks
from pipeline.run.activity import DrainPlugin, is_draining
from pipeline.run.tasks import ExtractorPlugin, Target, WorkPiece, extract, keep_memory, maps_digest, process, read, write
from pipeline.source import fetch
from pipeline.source.fetch import Source
from pipeline.source.listing import list_collection
from pipeline.store.create import create_store, prepare_folder
from pipeline.store.lock import StoreLock
from pipeline.store.schema import RUNS, Status, stack
from pipeline.store.settings import extractor_spec, layout_of, store_spec
from tests.conftest import make_images

SIZE = (40, 50)
WORKER = SimpleNamespace(name=0, metrics={}, state=SimpleNamespace(total_resources={"extract": 1}))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A store with five pending rows of one class, the piece that computes them, and a worker's plugin in this process."""
    make_images(tmp_path / "source", 5, [SIZE])
    job = make_job({"source": str(tmp_path / "source"), "store": str(tmp_path / "f.zarr"), "dtype": "uint16"})
    listing = list_collection(job.source)
    weights = load_weights(job.extractor, 3)
    prepare_folder(tmp_path / "f.zarr")
    store = create_store(tmp_path / "f.zarr", store_spec(job, listing.root, weights), weights)
    layout = layout_of(SIZE, job.extractor, 2, 3)
    fingerprints = tuple(listing.fingerprint(i) for i in range(5))
    columns = {"path": stack(listing.paths), "fingerprint": stack(fingerprints), "size_bytes": np.array(listing.size_bytes)}
    for name in ("source_height", "input_height"):
        columns[name] = np.full(5, SIZE[0], np.int32)
    for name in ("source_width", "input_width"):
        columns[name] = np.full(5, SIZE[1], np.int32)
    store.create_class(layout, "exact", columns)
    plugin = ExtractorPlugin("ours", extractor_spec(store.spec), store.weights(), store.spec.layers)
    monkeypatch.setattr("pipeline.run.tasks.signal.signal", lambda *_: None)  # this process keeps its Ctrl-C
    plugin.setup(WORKER)
    monkeypatch.setattr(tasks, "get_worker", lambda: SimpleNamespace(plugins={"ours": plugin}, status=WorkerStatus.running))
    piece = WorkPiece(layout, 0, 5, tuple(range(5)), tuple(listing.paths), fingerprints)
    with StoreLock(tmp_path / "f.zarr" / RUNS, "this run"):
        yield SimpleNamespace(
            store=store,
            piece=piece,
            source=Source(listing.root, DecodeSpec()),
            target=Target(str(store.path), "this run", "ours"),
            plugin=plugin,
        )


def only(piece, *rows):
    """The part of a piece that computes some rows of its shard."""
    paths, fingerprints = (tuple(values[row] for row in rows) for values in (piece.paths, piece.fingerprints))
    return WorkPiece(piece.layout, piece.start, piece.stop, rows, paths, fingerprints)


def test_a_batch_is_read_extracted_and_written_with_its_digests_and_pooled_values(work):
    result = write(work.target, extract(work.target, read(work.source, "this run", [work.piece])))
    (outcome,) = result.pieces
    assert outcome.status.tolist() == [Status.DONE] * 5
    stored = np.asarray(work.store.array("40x50", "conv1")[:])
    assert stored.dtype == np.uint16
    assert (stored > 0).all()
    assert outcome.maps_digest == [maps_digest([rows]) for rows in stored]
    layer = work.store.spec.layers[0]
    means = (stored * layer.scale_factor + layer.add_offset).mean((2, 3))
    np.testing.assert_allclose(outcome.pooled["conv1"][:, 0], means, atol=layer.error_bound)
    assert result.bytes_read == sum(p.stat().st_size for p in Path(work.source.root).iterdir())
    assert (result.pixels, result.bytes_written > 1000) == (5 * 40 * 50, True)
    assert all(seconds > 0 for seconds in result.stage_s.values())


def test_one_task_does_what_three_do(work):
    (Path(work.source.root) / work.piece.paths[1]).write_bytes(b"no image")
    pieces = [only(work.piece, 0, 1, 2), only(work.piece, 3, 4)]  # the second keeps what the first wrote of their shard
    three = write(work.target, extract(work.target, read(work.source, "this run", pieces)))
    stored = (work.store.path / "40x50" / "conv1" / "c.0.0.0.0").read_bytes()
    (work.store.path / "40x50" / "conv1" / "c.0.0.0.0").unlink()
    one = process(work.source, work.target, pieces)
    assert (work.store.path / "40x50" / "conv1" / "c.0.0.0.0").read_bytes() == stored
    for a, b in zip(one.pieces, three.pieces, strict=True):
        assert (a.rows, a.status.tolist(), a.digest, a.maps_digest, a.error) == (
            b.rows,
            b.status.tolist(),
            b.digest,
            b.maps_digest,
            b.error,
        )
        assert np.array_equal(a.pooled["conv1"], b.pooled["conv1"], equal_nan=True)
    names = ("bytes_read", "bytes_written", "pixels", "kernels", "host")
    assert [getattr(one, name) for name in names] == [getattr(three, name) for name in names]
    assert all(seconds > 0 for seconds in one.stage_s.values())


def test_kernels_count_each_image_by_what_computed_it_not_by_its_class(work, monkeypatch):
    make_images(Path(work.source.root), 3, [SIZE, (20, 30), (41, 50)])  # the last does not fit its class
    listing = list_collection(work.source.root)
    fingerprints = tuple(listing.fingerprint(i) for i in range(5))
    pieces = [WorkPiece(work.piece.layout, 0, 5, work.piece.rows, work.piece.paths, fingerprints)]
    pieces += [only(pieces[0], 3)]
    monkeypatch.setattr(work.plugin.extractor, "version", lambda size, most: f"{size} in {most}")
    result = process(work.source, work.target, pieces)
    assert result.kernels == {"(40, 50) in (40, 50)": 4, "(20, 30) in (40, 50)": 1}


def test_a_bad_image_leaves_fill_in_its_row_and_its_reason_in_the_result(work):
    (Path(work.source.root) / work.piece.paths[2]).write_bytes(b"no image")
    (Path(work.source.root) / work.piece.paths[3]).unlink()
    (outcome,) = write(work.target, extract(work.target, read(work.source, "this run", [work.piece]))).pieces
    assert outcome.status.tolist() == [1, 1, 2, 2, 1]
    assert [error.split(":")[0] for error in outcome.error] == ["", "", "changed", "missing", ""]
    assert [bool(digest) for digest in outcome.maps_digest] == [True, True, False, False, True]
    stored = np.asarray(work.store.array("40x50", "conv1")[:])
    assert [bool((row == 0).all()) for row in stored] == [False, False, True, True, False]
    assert np.isnan(outcome.pooled["conv1"][2:4]).all()


def test_an_image_that_decodes_larger_than_its_class_is_not_squeezed_in(work):
    make_images(Path(work.source.root), 1, [(41, 50)])
    fingerprints = (list_collection(work.source.root).fingerprint(0), *work.piece.fingerprints[1:])
    piece = WorkPiece(work.piece.layout, 0, 5, work.piece.rows, work.piece.paths, fingerprints)
    outcome = read(work.source, "this run", [piece]).result.pieces[0]
    assert outcome.error[0] == "changed: decoded to 41 x 50 pixels, more than its header said"


def test_a_passing_fault_leaves_the_row_pending(work, monkeypatch):
    monkeypatch.setattr("pipeline.source.fetch.RETRY_PAUSES_S", ())
    monkeypatch.setattr("pipeline.source.fetch.os.open", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    outcome = read(work.source, "this run", [work.piece]).result.pieces[0]
    assert outcome.status.tolist() == [Status.PENDING] * 5
    assert outcome.error[0] == "img00000.png: [Errno 5] Input/output error"


def test_the_time_of_reads_that_fail_is_that_of_reading(work, monkeypatch):
    def slow(*_):
        time.sleep(0.05)
        raise PassingFaultError("gone")

    monkeypatch.setattr(fetch, "read_bytes", slow)
    seconds = process(work.source, work.target, [work.piece]).stage_s
    assert seconds["read"] >= 5 * 0.05 > seconds["extract"]


def test_rows_of_the_shard_that_are_not_computed_are_kept(work):
    write(work.target, extract(work.target, read(work.source, "this run", [only(work.piece, 0, 3)])))
    before = np.asarray(work.store.array("40x50", "conv1")[:])
    assert [bool(row.any()) for row in before] == [True, False, False, True, False]
    write(work.target, extract(work.target, read(work.source, "this run", [only(work.piece, 1, 4)])))
    after = np.asarray(work.store.array("40x50", "conv1")[:])
    assert np.array_equal(after[[0, 3]], before[[0, 3]])
    assert [bool(row.any()) for row in after] == [True, True, False, True, True]


def test_a_batch_of_bad_images_only_writes_nothing(work):
    for path in work.piece.paths:
        (Path(work.source.root) / path).write_bytes(b"")
    result = write(work.target, extract(work.target, read(work.source, "this run", [work.piece])))
    assert result.bytes_written == 0
    assert not list((work.store.path / "40x50" / "conv1").glob("c.*"))


def test_a_late_task_of_another_run_writes_nothing(work):
    extracted = extract(work.target, read(work.source, "this run", [work.piece]))
    with pytest.raises(StaleWriterError, match="run yesterday's no longer holds the store"):
        write(Target(work.target.path, "yesterday's", "ours"), extracted)
    assert not list((work.store.path / "40x50" / "conv1").glob("c.*"))


def test_the_digest_of_maps_is_over_their_bytes_layer_by_layer_in_c_order():
    first = np.arange(24, dtype="<f4").reshape(2, 3, 4)
    second = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    expected = xxhash.xxh3_128(first.tobytes() + second.tobytes()).hexdigest()
    assert len(expected) == 32
    assert maps_digest([first, second]) == expected
    wider = np.zeros((2, 5, 9), np.float32)
    wider[:, :3, :4] = first
    assert maps_digest([wider[:, :3, :4], second]) == expected  # a view of a padded row is its valid extent
    assert maps_digest([second, first]) != expected


def test_memory_is_kept_without_a_word_where_that_is_possible_and_where_not(monkeypatch):
    keep_memory()
    monkeypatch.setattr("pipeline.run.tasks.ctypes.CDLL", lambda _: object())  # a C library without mallopt
    keep_memory()


def test_the_plugin_travels_to_the_workers_and_builds_its_extractor_there(work):
    fresh = ExtractorPlugin("ours", work.plugin.spec, work.plugin.weights, work.plugin.layers)
    travelled = pickle.loads(pickle.dumps(fresh))
    assert (travelled.name, travelled.spec) == ("ours", work.plugin.spec)
    assert pickle.dumps(travelled.layers) == pickle.dumps(work.plugin.layers)
    assert np.array_equal(travelled.weights["conv1_weight"], work.plugin.weights["conv1_weight"])
    assert not hasattr(travelled, "extractor")
    travelled.setup(WORKER)
    assert travelled.extractor is not None


def test_tasks_import_neither_torch_nor_zarr():
    code = "import sys, pipeline.run.tasks; print({'torch', 'zarr'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def drain_before(monkeypatch, image: int) -> None:
    """The run is asked to stop as this image of the piece is about to begin."""
    begun = iter(range(1000))
    monkeypatch.setattr(
        "pipeline.run.activity.is_draining", lambda _worker, run_id: run_id == "this run" and next(begun) >= image
    )


def test_a_batch_that_had_not_begun_when_the_run_was_to_stop_comes_back_as_it_went(work, monkeypatch):
    drain_before(monkeypatch, 0)
    result = process(work.source, work.target, [work.piece, only(work.piece, 1)])
    assert [piece.status.tolist() for piece in result.pieces] == [[Status.PENDING] * 5, [Status.PENDING]]
    assert (result.bytes_read, result.bytes_written, {error for piece in result.pieces for error in piece.error}) == (0, 0, {""})


def test_a_batch_that_begins_no_further_image_begins_none_later(work, monkeypatch):
    """Files come in turn: one that is left out would give the next row its pixels."""
    draining = iter([False, True, False, False, False])
    monkeypatch.setattr("pipeline.run.activity.is_draining", lambda *_: next(draining))
    (outcome,) = process(work.source, work.target, [work.piece]).pieces
    assert outcome.status.tolist() == [Status.DONE] + [Status.PENDING] * 4


def test_a_batch_that_had_begun_writes_what_was_begun_and_the_next_run_the_rest(work, monkeypatch):
    drain_before(monkeypatch, 2)
    (outcome,) = process(work.source, work.target, [work.piece]).pieces
    assert outcome.status.tolist() == [Status.DONE] * 2 + [Status.PENDING] * 3
    monkeypatch.undo()
    assert is_draining(SimpleNamespace(plugins={DrainPlugin("this run").name: None}), "this run")
    assert not is_draining(SimpleNamespace(plugins={DrainPlugin("another").name: None}), "this run")
