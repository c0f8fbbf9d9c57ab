"""A notebook passes a store as text, as a path or as a bucket's address."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline
from pipeline.errors import UsageError

pytestmark = pytest.mark.cluster


def test_every_call_on_a_store_takes_text_or_a_path(finished, monkeypatch):
    monkeypatch.chdir(finished.parent)
    monkeypatch.setenv("HOME", str(finished.parent))
    for store in (finished, str(finished), "f.zarr", Path("f.zarr"), "~/f.zarr"):
        assert pipeline.store_status(store).counts["done"] == 120
        audit = pipeline.verify_store(store, read_source=False, workers=1)
        assert (audit.is_sound, audit.n_maps_checked) == (True, 120)
        assert pipeline.vacuum_store(store, dry_run=True).n_deleted == 0
    pipeline.write_report("f.zarr", "page.html", n_samples=0)
    assert "120" in Path("page.html").read_text()


@pytest.mark.parametrize("call", ["store_status", "verify_store", "vacuum_store", "write_report"])
def test_an_address_is_taken_for_one(call, tmp_path):
    rest = [tmp_path / "page.html"] if call == "write_report" else []
    with pytest.raises(UsageError, match=r"store 'https://host/f\.zarr' cannot be written to, .*give a folder, or s3://"):
        getattr(pipeline, call)("https://host/f.zarr", *rest)
