from __future__ import annotations

import contextlib
import threading

import pytest

from pipeline.checks.plan import plan_job
from pipeline.cluster import config, session
from pipeline.cluster.connection import connector
from pipeline.config import make_job
from tests.conftest import make_images


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that were read for a cluster."""
    names, read = [], config.read_yaml

    def noted(path):
        names.append(path.name)
        return read(path)

    monkeypatch.setattr(config, "read_yaml", noted)
    return names


@pytest.fixture
def job(tmp_path):
    make_images(tmp_path / "source", 2, [(40, 60)])
    (tmp_path / "cluster.yaml").write_text("clusters: {two: {kind: local, workers: 2}}")
    return make_job({"source": str(tmp_path / "source"), "store": str(tmp_path / "f.zarr"), "cluster": "two"})


def test_a_new_store_starts_the_cluster_that_was_checked(tmp_path, monkeypatch, job, reads):
    monkeypatch.setattr(session, "connect", lambda spec, **_: contextlib.nullcontext(spec))
    connect = connector(job, cluster_file=tmp_path / "cluster.yaml")
    (tmp_path / "cluster.yaml").unlink()
    with connect(threading.Event(), lambda _: None, 2) as spec:
        assert spec.workers == 2
    assert reads == ["cluster.yaml"]


def test_a_plan_reads_the_cluster_once(tmp_path, job, reads):
    assert plan_job(job, tmp_path / "cluster.yaml").workers == 2
    assert reads == ["cluster.yaml"]
