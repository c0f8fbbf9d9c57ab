"""Workers that differ from the driver: refused at the start, and sent away where they join later; with real schedulers and workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import Client

from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError
from pipeline.run import admission
from pipeline.run.admission import only_like_this
from tests.conftest import content, make_images
from tests.system.services.test_ssh import Scheduler

pytestmark = [pytest.mark.cluster]


@pytest.fixture
def ours(tmp_path):
    scheduler = Scheduler(tmp_path)
    scheduler.start()
    yield scheduler
    scheduler.stop()


def another_zarr(folder: Path) -> dict[str, str]:
    """An environment in which zarr says that it is 9.9."""
    (folder / "other" / "zarr-9.9.dist-info").mkdir(parents=True)
    (folder / "other" / "zarr-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 9.9\n")
    return os.environ | {"PYTHONPATH": str(folder / "other")}


def join(ours: Scheduler, resources: str, *options: str, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start one more worker by hand; it ends with the scheduler."""
    address = f"tcp://127.0.0.1:{ours.port}"
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        address,
        "--name",
        "late",
        "--no-dashboard",
        "--nthreads",
        "2",
    ]
    command += ["--resources", resources, *options]
    with (ours.folder / "late.log").open("ab") as log:
        ours.processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ours.folder))
    return ours.processes[-1]


@pytest.mark.parametrize("options", [(), ("--no-nanny",)], ids=["nanny", "no nanny"])
def test_a_worker_of_another_zarr_that_joins_in_the_middle_leaves_before_it_works(ours, tmp_path, run, caplog, options):
    source = make_images(tmp_path / "pictures", 60, [(200, 300), (210, 320)], suffix=".jpg")
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "dtype": "uint8"})
    late, touched = [], tmp_path / "it worked"
    with Client(f"tcp://127.0.0.1:{ours.port}") as client:
        client.wait_for_workers(1, timeout=900)

        def add_worker(progress) -> None:
            if progress.stage == "running" and not late:
                waiting = client.submit(Path.touch, touched, resources={"late": 1})  # which is sent to it as soon as it is there
                late.append(join(ours, "read=1 extract=1 write=1 late=1", *options, environment=another_zarr(tmp_path)))
                late[0].wait(900)
                waiting.cancel()

        summary = run_job(job, client, on_progress=add_worker)
    assert (summary.outcome, summary.n_done) == ("complete", 60), summary.faults
    assert not touched.exists()
    line = "worker late does not fit the run, and leaves before it works: zarr 9.9 instead of 3."
    assert (tmp_path / "late.log").read_text().count(line) == 1
    (warning,) = (record.getMessage() for record in caplog.records if "was sent away" in record.getMessage())
    assert warning.startswith("worker late joined and was sent away: zarr 9.9 instead of 3.")
    assert "the run goes on without it" in warning
    run(source, tmp_path / "here.zarr", dtype="uint8")
    assert content(tmp_path / "f.zarr") == content(tmp_path / "here.zarr")


def test_a_worker_that_joins_without_its_gpu_is_sent_away_only_while_the_run_goes_on(ours, tmp_path):
    blind = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with Client(f"tcp://127.0.0.1:{ours.port}") as client:
        client.wait_for_workers(1, timeout=900)
        with only_like_this(client):
            join(ours, "gpu=1", environment=blind).wait(900)
        assert "it should have a GPU, but torch sees none there" in (tmp_path / "late.log").read_text()
        with Client(client.scheduler.address) as killed:
            gone = only_like_this(killed)
            gone.__enter__()  # and is never left, as by a driver that was killed
        join(ours, "gpu=1", environment=blind)
        client.wait_for_workers(2, timeout=900)
        with (
            pytest.raises(FeaturemapsError, match="late should have a GPU, but torch sees none there: no batch was sent"),
            only_like_this(client),
        ):
            pass


def test_workers_of_another_zarr_are_refused_at_the_start(ours, tmp_path):
    join(ours, "read=1", environment=another_zarr(tmp_path))
    with Client(f"tcp://127.0.0.1:{ours.port}") as client:
        client.wait_for_workers(2, timeout=900)
        with (
            pytest.raises(
                FeaturemapsError,
                match=r"would not compute the same: zarr 9\.9 instead of 3\S+ on late\. No batch was sent to them; install",
            ),
            only_like_this(client),
        ):
            pass


@pytest.mark.parametrize("found", [True, False])
def test_workers_that_compute_without_a_gpu_say_whether_they_have_the_compiled_code(monkeypatch, found):
    resources = {"a": {"extract": 1, "read": 1}, "b": {"read": 1}, "c": {"extract": 1, "gpu": 1}}
    asked: list[str] = []
    monkeypatch.setattr(admission, "scheduler_workers", lambda _: {name: {"resources": each} for name, each in resources.items()})
    monkeypatch.setattr(admission, "ask", lambda *given: asked.extend(given[2]) or dict.fromkeys(given[2], found))
    assert admission.all_have_kernel(None) == found
    assert asked == ["a"]
