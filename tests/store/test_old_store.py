"""Stores that commit a66da02 made, before the package had folders: they open, resume and verify."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline import open_store
from pipeline.checks.verify import verify_store
from pipeline.store.schema import REJECTED, Status, with_digest
from pipeline.store.store import Store
from tests.conftest import make_images

pytestmark = pytest.mark.cluster

ARCHIVE = Path(__file__).parents[1] / "golden" / "old_store.tar.xz"
MTIMES_S = {name: 1_700_000_000 + i for i, name in enumerate(("broken", "img0", "img1", "img2", "img3", "tiny"))}
"""By which the fingerprints in the stores know their images."""
JOBS = {"float32": {}, "uint8": {"dtype": "uint8"}, "pooled": {"extractor": {"outputs": ["pooled"]}}}


@pytest.fixture
def old(tmp_path) -> Path:
    """The stores beside their photos; their root is told where these are now."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    for name, mtime_s in MTIMES_S.items():
        os.utime(tmp_path / "photos" / f"{name}.png", ns=(mtime_s * 10**9,) * 2)
    for kind in JOBS:
        root = tmp_path / f"{kind}.zarr" / "zarr.json"
        document = json.loads(root.read_bytes())
        spec = document["attributes"]["featuremaps"]
        del spec["sha256"]
        spec["source"] = spec["source_root"] = str(tmp_path / "photos")
        document["attributes"]["featuremaps"] = with_digest(spec)
        root.write_text(json.dumps(document))
    return tmp_path


def state(path: Path) -> dict[str, bytes]:
    """Every object of a store but the root and the receipts."""
    files = (file for file in path.rglob("*") if file.is_file() and "runs" not in file.parts)
    return {str(file.relative_to(path)): file.read_bytes() for file in files if file != path / "zarr.json"}


def check(path: Path, n_images: int) -> None:
    """Verify a store whole, with every image computed anew."""
    audit = verify_store(path, n_sample=n_images, workers=1)
    assert audit.is_sound, audit.findings
    assert audit.n_recomputed == n_images


@pytest.mark.parametrize("kind", JOBS)
def test_a_store_from_before_opens_resumes_and_verifies(run, old, kind):
    path = old / f"{kind}.zarr"
    opened = open_store(path)
    assert opened.counts["done"] == 4
    assert np.isfinite(opened.pooled("conv1").to_numpy()).all()
    check(path, 4)

    before = state(path)
    summary = run(old / "photos", path, **JOBS[kind])
    assert (summary.outcome, summary.n_unchanged, summary.n_new, summary.n_changed, summary.n_done) == ("complete", 6, 0, 0, 0)
    assert state(path) == before

    make_images(old / "new", 1, [(24, 20)], seed=5)
    (old / "new" / "img00000.png").rename(old / "photos" / "new.png")
    summary = run(old / "photos", path, **JOBS[kind])
    assert (summary.outcome, summary.n_unchanged, summary.n_new, summary.n_done) == ("complete", 6, 1, 1)
    store = Store(path)
    assert store.column("24x20", "path").tolist() == ["img0.png", "img1.png", "img3.png", "new.png"]
    assert (store.column("24x20", "status") == Status.DONE).all()
    assert store.column(REJECTED, "path").tolist() == ["broken.png", "tiny.png"]
    assert len(store.receipts()) == 3
    check(path, 5)
