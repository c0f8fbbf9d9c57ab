from __future__ import annotations

import shutil

import pytest

from pipeline.api import run_job
from pipeline.config import make_job
from tests.conftest import make_images


def job_of(source, store, **values):
    return make_job({"source": str(source), "store": str(store), "workers": 2, **values})


@pytest.fixture
def source(tmp_path, twelve_sizes):
    """120 good images and four bad ones."""
    source = tmp_path / "source"
    shutil.copytree(twelve_sizes, source)
    (source / "empty.png").touch()
    (source / "text.jpg").write_text("no image")
    (source / "text2.jpg").write_text("no image")
    make_images(tmp_path / "small", 1, [(8, 100)])
    shutil.move(tmp_path / "small" / "img00000.png", source / "small.png")
    return source


@pytest.fixture
def finished(client, source, tmp_path):
    run_job(job_of(source, tmp_path / "f.zarr"), client)
    return tmp_path / "f.zarr"
