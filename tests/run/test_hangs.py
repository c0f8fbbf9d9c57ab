"""Storage that never answers: the worker that waits for it is replaced, the image is left to the next run, and nothing hangs."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.api import run_job
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import load_job, make_job
from pipeline.run.hangs import _start_anew as start_anew
from pipeline.run.hangs import replace_worker
from pipeline.run.new_images import Intake
from tests.conftest import content, make_images
from tests.support.stuck_disk import StuckDisk, mount_stuck
from tests.system.kill.kill_rounds import wait_until

pytestmark = [pytest.mark.kill, pytest.mark.cluster]


@pytest.fixture
def stick(monkeypatch):
    """Have a folder answer no more; all that was stuck is released at the end."""
    monkeypatch.setattr("pipeline.run.driver.RECEIPT_S", 0.5)
    disks: list[StuckDisk] = []

    def mount(folder: Path, *options: str) -> StuckDisk:
        disks.append(mount_stuck(folder, *options))
        return disks[-1]

    yield mount
    for disk in disks:
        disk.release()


@pytest.fixture
def source(tmp_path) -> Path:
    """Forty good images, and two that are on another disk."""
    make_images(tmp_path / "source", 40, [(50, 60), (70, 40)])
    make_images(tmp_path / "source" / "slow", 2, [(50, 60)], seed=1)
    return tmp_path / "source"


def finish(client, job, whole: Path) -> None:
    """The next run does what is left, and the store is as if nothing had happened."""
    assert run_job(job, client).outcome == "complete"
    run_job(job.model_copy(update={"store": str(whole)}), client)
    assert content(Path(job.store)) == content(whole)
    assert not [path for path in Path(job.store).rglob("*.partial") if not path.name.startswith("lock.json")]


async def kill_late(dask_worker) -> None:
    """On the nanny: give the worker time for heartbeats before it is killed."""
    await asyncio.sleep(3)
    await start_anew(dask_worker)


def test_a_worker_is_replaced_also_where_it_is_killed_late(monkeypatch):
    """A worker whose scheduler has forgotten it closes at its next heartbeat, and its nanny with it."""
    with connect(LocalSpec(workers=1)) as own:
        (before,) = own.scheduler_info()["workers"]
        with monkeypatch.context() as patched:
            patched.setattr("pipeline.run.hangs._start_anew", kill_late)
            replace_worker(own, before)
        own.wait_for_workers(1, timeout=900)
        assert own.submit(lambda: 7, pure=False).result(timeout=900) == 7


@pytest.mark.parametrize(
    ("stage", "options"),
    [("probe", ("--killable",)), ("batch", ())],
    ids=["a header", "an image, stuck in the kernel"],
)
def test_an_image_that_never_comes_costs_itself_only(client, source, tmp_path, stick, monkeypatch, stage, options):
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "deadline_s": 5.0})
    disks = []
    real = Intake.append

    def append(*arguments):
        appended = real(*arguments)
        if stage == "batch":
            disks.append(stick(source / "slow", *options))
        return appended

    def mount(progress):
        if stage == "probe" and progress.stage == "starting workers":
            disks.append(stick(source / "slow", *options))

    with monkeypatch.context() as patched, connect(LocalSpec(workers=2)) as own:
        patched.setattr(Intake, "append", append)
        summary = run_job(job, own, on_progress=mount)
        own.wait_for_workers(2, timeout=900)
    assert (summary.outcome, summary.n_done, summary.n_pending) == ("incomplete", 40, 2)
    assert summary.n_quarantined == summary.n_rejected == 0
    assert any("slow/img00000.png: the storage did not answer" in fault for fault in summary.faults)
    disks[0].release()
    finish(client, job, tmp_path / "whole.zarr")


COMMAND = """
import sys, time
from pathlib import Path
import pipeline.run.driver
from pipeline.cli.commands import main
from pipeline.run.new_images import Intake

when, signs = sys.argv.pop(1), Path(sys.argv.pop(1))
real = {"probe": Intake.next_block, "batch": Intake.append}

def wait(*arguments):
    result = real[when](*arguments)
    (signs / "now").touch()
    while not (signs / "go").exists():
        time.sleep(0.01)
    return result

setattr(Intake, {"probe": "next_block", "batch": "append"}[when], wait)
pipeline.run.driver.RECEIPT_S = 0.5
main()
"""


@pytest.mark.parametrize(
    ("when", "what", "options", "message"),
    [
        ("probe", "source", (), r"img0000[0-9].png: the storage did not answer for \d+ s, for 3 tasks in a row"),
        ("batch", "f.zarr/50x60/conv1", (), r"f.zarr: the storage did not answer for \d+ s, for 3 tasks in a row"),
    ],
    ids=["the source", "the store"],
)
def test_a_storage_that_answers_nobody_ends_the_run_as_incomplete(client, source, tmp_path, stick, when, what, options, message):
    job_file = tmp_path / "job.yaml"
    job_file.write_text("source: source\nstore: f.zarr\ndeadline_s: 5\nworkers: 2\n")
    arguments = [sys.executable, "-c", COMMAND, when, str(tmp_path), "run", str(job_file)]
    log = tmp_path / "log"
    with log.open("w") as file:
        quiet = {**os.environ, "DASK_LOGGING__DISTRIBUTED": "critical"}  # as the command itself does, before it imports Dask
        command = subprocess.Popen(arguments, stdout=file, stderr=file, env=quiet)
    assert wait_until(lambda: (tmp_path / "now").exists() or command.poll() is not None, 900)
    disk = stick(tmp_path / what, *options)
    (tmp_path / "go").touch()
    try:
        assert command.wait(900) == 1, log.read_text()  # it ends though some of its processes cannot
    finally:
        command.kill()
        command.wait()
        disk.release()
    output = log.read_text()
    assert "incomplete: " in output
    assert ", 0 quarantined, 0 rejected, " in output
    assert re.search(message, output), output
    assert "Traceback" not in output
    finish(client, load_job(job_file), tmp_path / "whole.zarr")
