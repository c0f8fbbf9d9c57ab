"""Stores that keep the pooled values of layers without their maps: `outputs: [pooled]`."""

from __future__ import annotations

import multiprocessing
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from pipeline.checks.verify import verify_store
from pipeline.store.codecs import compress, decompress
from pipeline.store.schema import STATISTICS, Status, pooled_chunk
from pipeline.store.store import Store
from pipeline.store.vacuum import vacuum_store
from tests.conftest import make_images
from tests.support.growth import run_and_die

pytestmark = pytest.mark.cluster

LAYERS = [{"filters": 3, "kernel": 5, "pool": 2, "activation": "tanh"}, {"filters": 2, "kernel": 3}]
SIZES = [(40, 50), (30, 60)]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("pooled") / "source", 20, SIZES)
    (folder / "bad.png").write_bytes((folder / "img00000.png").read_bytes()[:200])  # its header can be read
    return folder


def columns(path: Path, names) -> dict[str, tuple]:
    """Values of some columns by path, of images that are done."""
    store, found = Store(path), {}
    for c in store.classes.values():
        paths, status = store.column(c.name, "path"), store.column(c.name, "status")
        values = [store.column(c.name, name) for name in names]
        for row in np.flatnonzero(status == Status.DONE):
            found[paths[row]] = tuple(np.asarray(v[row]).tobytes() for v in values)
    return found


def pooled_of(*layers) -> list[str]:
    return [f"{layer}_{statistic}" for layer in layers for statistic in STATISTICS]


@pytest.mark.parametrize("layers", [None, LAYERS], ids=["one layer", "two layers"])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_pooled_values_equal_those_of_a_run_that_keeps_maps(run, photographs, tmp_path, dtype, layers):
    names = ["conv1", "conv2"] if layers else ["conv1"]
    stack = {"layers": layers} if layers else {}
    run(photographs, tmp_path / "maps.zarr", dtype=dtype, extractor=stack | {"outputs": names})
    summary = run(photographs, tmp_path / "pooled.zarr", dtype=dtype, extractor=stack | {"outputs": ["pooled"]})
    assert (summary.n_done, summary.n_quarantined, summary.bytes_written) == (20, 1, 0)
    expected = columns(tmp_path / "maps.zarr", [*pooled_of(*names), "digest"])
    assert len(expected) == 20
    assert columns(tmp_path / "pooled.zarr", [*pooled_of(*names), "digest"]) == expected
    assert not list((tmp_path / "pooled.zarr").glob("*x*/conv?"))
    audit = verify_store(tmp_path / "pooled.zarr", n_sample=20, workers=1)
    assert audit.is_sound, audit.describe()
    assert audit.n_recomputed == 20
    assert 0 < audit.largest_difference < 1e-5  # of float32 sums from exact ones: measured, and not nothing
    assert f"{audit.n_rows} rows" in audit.describe()


def test_maps_of_one_layer_and_pooled_values_of_all(run, photographs, tmp_path):
    path = tmp_path / "some.zarr"
    run(photographs, path, extractor={"layers": LAYERS, "outputs": ["pooled", "conv1"]}, dtype="uint8")
    run(photographs, tmp_path / "all.zarr", extractor={"layers": LAYERS, "outputs": ["conv1", "conv2"]}, dtype="uint8")
    names = pooled_of("conv1", "conv2")
    assert columns(path, names) == columns(tmp_path / "all.zarr", names)
    store = Store(path)
    assert [(layer.name, layer.has_maps, layer.dtype) for layer in store.spec.layers] == [
        ("conv1", True, "uint8"),
        ("conv2", False, "float32"),
    ]
    assert store.spec.extractor["outputs"] == ["conv1", "pooled"]
    assert {f.name for f in (path / "40x50").iterdir()} >= {"conv1", "conv1_mean", "conv2_mean"}
    assert not (path / "40x50" / "conv2").exists()
    assert verify_store(path, n_sample=20, workers=1).is_sound
    assert run(photographs, path, extractor={"layers": LAYERS, "outputs": ["conv1", "pooled"]}, dtype="uint8").n_unchanged == 21


def tamper(path: Path, layer: str, row: int) -> None:
    """Change one pooled value, its checksum with it, as no disk but a program would."""
    store = Store(path)
    channels = next(found.channels for found in store.spec.layers if found.name == layer)
    file = path / "40x50" / f"{layer}_mean" / "c.0.0"
    values = decompress(file.read_bytes(), "float32", pooled_chunk(channels)).copy()
    values[row] += 0.25
    file.write_bytes(compress(values))


@pytest.mark.parametrize("outputs", [["pooled"], ["conv1", "pooled"]])
def test_a_pooled_value_that_is_not_what_was_computed_is_found_and_repaired(run, photographs, tmp_path, outputs):
    path = tmp_path / "features.zarr"
    extractor = {"layers": LAYERS, "outputs": outputs}
    run(photographs, path, extractor=extractor)
    before = columns(path, [*pooled_of("conv1", "conv2"), "maps_digest"])
    tamper(path, "conv2", 3)
    audit = verify_store(path, n_sample=0, workers=1)
    assert [(found.kind, found.group, found.row) for found in audit.findings] == [("maps", "40x50", 3)]
    assert re.fullmatch(
        "the pooled values of conv1, conv2 do not match the digest in the ledger"
        if outputs == ["pooled"]
        else r"the maps in 40x50/conv1/c\.0\.\* or the pooled values of conv2 do not match the digest in the ledger",
        audit.findings[0].text,
    )
    verify_store(path, n_sample=0, workers=1, repair=True)
    assert run(photographs, path, extractor=extractor).n_done == 1
    assert columns(path, [*pooled_of("conv1", "conv2"), "maps_digest"]) == before


def test_images_that_leave_return_and_change(run, tmp_path):
    source, path = make_images(tmp_path / "source", 12, SIZES), tmp_path / "features.zarr"
    values = {"extractor": {"outputs": ["pooled"]}, "max_removed": 1.0}
    run(source, path, **values)
    names = [*pooled_of("conv1"), "maps_digest"]
    before = columns(path, names)
    away = tmp_path / "away.png"
    (source / "img00003.png").rename(away)
    assert run(source, path, **values).n_removed == 1
    away.rename(source / "img00003.png")
    summary = run(source, path, **values)
    assert (summary.n_returned, summary.n_done) == (1, 0)
    assert columns(path, names) == before
    (source / "img00003.png").unlink()
    run(source, path, **values)
    vacuum_store(path)
    assert verify_store(path, n_sample=0, workers=1).is_sound
    make_images(tmp_path / "other", 12, SIZES)
    (tmp_path / "other" / "img00003.png").rename(source / "img00003.png")
    assert run(source, path, **values).n_done == 1
    assert columns(path, names) == before


def test_the_command_keeps_pooled_values_alone(command, photographs, tmp_path):
    code, out, _ = command("plan", photographs, tmp_path / "f.zarr", "--outputs", "pooled")
    assert code == 0, out
    code, out, err = command("run", photographs, tmp_path / "f.zarr", "--outputs", "pooled")
    assert code == 0, err
    assert not list((tmp_path / "f.zarr").glob("*x*/conv?"))
    code, _, err = command("run", photographs, tmp_path / "f.zarr")
    assert code == 2
    assert 'extractor.outputs: the store has ["pooled"], this run asks for ["conv1"]' in err


@pytest.mark.parametrize("change", [40, 60, 80])
def test_a_run_that_is_killed_is_finished_by_the_next(run, photographs, tmp_path, change):
    extractor = {"layers": LAYERS, "outputs": ["pooled"]}
    values = {"source": str(photographs), "store": str(tmp_path / "features.zarr"), "extractor": extractor}
    process = multiprocessing.get_context("spawn").Process(target=run_and_die, args=(values, change))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL  # before its n-th change of the store
    run(photographs, tmp_path / "features.zarr", extractor=extractor)
    run(photographs, tmp_path / "whole.zarr", extractor=extractor)
    names = [*pooled_of("conv1", "conv2"), "digest", "maps_digest"]
    assert columns(tmp_path / "features.zarr", names) == columns(tmp_path / "whole.zarr", names)
    assert verify_store(tmp_path / "features.zarr", n_sample=0, workers=1).is_sound
