"""Storage that never answers: the worker that waits for it is replaced, the image is left to the next run, and nothing hangs."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.cluster import LocalSpec, connect
from pipeline.config import make_job
from pipeline.intake import Intake
from pipeline.run import run_job
from tests.conftest import content, make_images

pytestmark = [pytest.mark.kill, pytest.mark.cluster]


class StuckDisk:
    """`tests.stuck_disk` on a folder."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        arguments = [sys.executable, "-m", "tests.stuck_disk", str(folder), *options]
        self.server = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.is_mounted = self.server.stdout.readline() == b"mounted\n"

    def release(self) -> None:
        self.server.kill()
        self.server.communicate()
        if self.is_mounted:
            subprocess.run(["umount", "-l", self.folder], check=True)
            self.is_mounted = False


@pytest.fixture
def stick(monkeypatch):
    """Have a folder answer no more; all that was stuck is released at the end."""
    monkeypatch.setattr("pipeline.driver.RECEIPT_S", 0.5)
    disks: list[StuckDisk] = []

    def mount(folder: Path, *options: str) -> StuckDisk:
        disks.append(StuckDisk(folder, *options))
        if not disks[-1].is_mounted:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"may not mount a file system here: {disks[-1].server.stderr.read()}")
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


@pytest.mark.parametrize("options", [(), ("--killable",)], ids=["stuck in the kernel", "killable"])
@pytest.mark.parametrize("stage", ["probe", "batch"])
def test_an_image_that_never_comes_costs_itself_only(source, tmp_path, stick, monkeypatch, stage, options):
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "deadline_s": 2.0})
    disks = []

    def mount(progress):
        if progress.stage == "starting workers" and stage == "probe":
            disks.append(stick(source / "slow", *options))

    real = Intake.append

    def append(*arguments):
        appended = real(*arguments)
        if stage == "batch":
            disks.append(stick(source / "slow", *options))
        return appended

    monkeypatch.setattr(Intake, "append", append)
    began = time.monotonic()
    with connect(LocalSpec(workers=2)) as client:
        summary = run_job(job, client, on_progress=mount)
    print(time.monotonic() - began, summary)
    assert (summary.outcome, summary.n_done, summary.n_pending) == ("incomplete", 40, 2)
    assert summary.n_quarantined == summary.n_rejected == 0
    assert any("slow/img00000.png: the storage did not answer" in fault for fault in summary.faults)
    assert {row[0] for path, row in content(tmp_path / "f.zarr").items() if "slow" not in path} == {"DONE"}
    for disk in disks:
        disk.release()
    monkeypatch.setattr(Intake, "append", real)
    with connect(LocalSpec(workers=2)) as client:
        assert run_job(job, client).outcome == "complete"
        run_job(job.model_copy(update={"store": str(tmp_path / "whole.zarr")}), client)
    assert content(tmp_path / "f.zarr") == content(tmp_path / "whole.zarr")
