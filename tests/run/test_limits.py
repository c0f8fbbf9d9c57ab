"""Which images a store takes in may change from run to run; what is done stays."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from pipeline import open_store
from pipeline.checks.plan import plan_job
from pipeline.checks.verify import verify_store
from pipeline.config import make_job
from pipeline.store.store import Store
from tests.conftest import content, make_images

pytestmark = pytest.mark.cluster


@pytest.fixture
def pictures(tmp_path):
    """Three small PNGs, a large one, and a small GIF."""
    folder = make_images(tmp_path / "pictures", 4, [(24, 20), (24, 20), (24, 20), (60, 50)])
    Image.open(folder / "img00000.png").save(folder / "small.gif")
    return folder


def statuses(path) -> dict[str, str]:
    return open_store(path).images.set_index("path")["status"].to_dict()


def test_wider_limits_try_what_they_kept_out_again_and_narrower_ones_keep_what_is_done(run, pictures, tmp_path, caplog):
    path = tmp_path / "f.zarr"
    narrow = {"decode": {"pixel_limit": 1000, "formats": ["PNG"]}}
    run(pictures, path, **narrow)
    assert statuses(path) == {f"img0000{i}.png": "done" for i in range(3)} | dict.fromkeys(
        ("img00003.png", "small.gif"), "rejected"
    )
    done = {name: maps for name, maps in content(path).items() if maps[0] == "DONE"}

    wide = {"decode": {"pixel_limit": 3000}}
    planned = plan_job(make_job({"source": str(pictures), "store": str(path), **wide}))
    assert (planned.n_to_compute, planned.n_unchanged, planned.n_to_reject) == (2, 3, 0)
    summary = run(pictures, path, **wide)
    assert (summary.outcome, summary.n_done, summary.n_unchanged) == ("complete", 2, 3)
    assert set(statuses(path).values()) == {"done"}
    assert done.items() <= content(path).items()
    run(pictures, tmp_path / "at once.zarr", **wide)
    assert content(path) == content(tmp_path / "at once.zarr")
    assert Store(path).spec.decode["pixel_limit"] == 3000

    summary = run(pictures, path, **narrow)
    assert (summary.n_unchanged, summary.n_done, summary.n_rejected, summary.n_removed) == (5, 0, 0, 0)
    (pictures / "img00003.png").rename(pictures / "later.png")
    make_images(tmp_path / "more", 1, [(24, 20)])
    (tmp_path / "more" / "img00000.png").rename(pictures / "more.png")
    summary = run(pictures, path, **narrow, max_removed=1)
    assert (summary.n_unchanged, summary.n_done, summary.n_rejected, summary.n_removed) == (4, 1, 1, 1)
    assert "new images above 1000 pixels are rejected (pixel_limit; it was 3000 before); images that are done stay" in caplog.text
    error = open_store(path).images.set_index("path").loc["later.png", "error"]
    assert error.endswith("the limit is 1000; raise pixel_limit (--pixel-limit) to read it")
    audit = verify_store(path, n_sample=9, workers=1)
    assert audit.is_sound, audit.findings
    assert audit.n_recomputed == 5  # the GIF, too

    summary = run(pictures, path, **wide)
    assert (summary.n_unchanged, summary.n_done, summary.n_rejected) == (5, 1, 0)
    assert json.loads((path / "zarr.json").read_bytes())["attributes"]["featuremaps"]["decode"]["pixel_limit"] == 3000
