"""Real faults in the middle of a run: it says what happened or goes on, quarantines nothing that may pass, and the next run finishes.

Kills of whole processes are in `test_kill`, images that crash the decoder in `test_trial`, storage that hangs in `test_stalls`.
"""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from distributed import WorkerPlugin
from PIL import Image

from pipeline.api import run_job
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError
from pipeline.run.slots import scheduler_workers
from pipeline.source import decoding
from tests.conftest import content, make_images
from tests.system.kill.kill_rounds import done_rows, litter, wait_until

pytestmark = [pytest.mark.kill, pytest.mark.cluster]

SIZES = [(200 + 10 * k, 300 - 10 * k) for k in range(12)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Work for a dozen batches of the fixture `small_batches`."""
    return make_images(tmp_path_factory.mktemp("chaos") / "images", 120, SIZES, suffix=".jpg")


@pytest.fixture(scope="module")
def expected(client, images, tmp_path_factory):
    """What an undisturbed run makes of them."""
    store = tmp_path_factory.mktemp("chaos") / "whole.zarr"
    run_job(make_job({"source": str(images), "store": str(store)}), client)
    return content(store)


@pytest.fixture
def small_batches(monkeypatch):
    """Something is done, and something is left to do, when the first progress comes."""
    monkeypatch.setattr("pipeline.run.driver.COMMIT_S", 0.02)
    monkeypatch.setattr("pipeline.run.workers.BATCHES_IN_FLIGHT_PER_SLOT", 1)
    monkeypatch.setattr("pipeline.store.layout.MIN_BATCH_S", 0.005)


@pytest.fixture
def disturbed(client, small_batches):
    """Run a job to which something is done once the first images are committed; return the outcome, or what was raised."""

    def call(job, act):
        acted = []

        def once(progress):
            if 0 < progress.n_finished < 120 and not acted:
                acted.append(progress.n_finished)
                act()

        try:
            return run_job(job, client, on_progress=once)
        except FeaturemapsError as failure:
            return failure
        finally:
            assert acted, "the run was over before anything happened"

    return call


def finish(client, job, expected):
    """The next run does the rest, and nothing tells of what happened."""
    summary = run_job(job, client)
    assert (summary.outcome, summary.n_bad_total) == ("complete", 0)
    assert content(Path(job.store)) == expected
    assert not litter(Path(job.store))


def sh(*arguments) -> None:
    subprocess.run(arguments, check=True)


def make_read_only(disk: Path) -> None:
    """The kernel refuses while a file is open for writing, so this waits for a moment between two."""
    command = ["mount", "-o", "remount,ro", disk]
    assert wait_until(lambda: subprocess.run(command, capture_output=True, check=False).returncode == 0, 900, 0.002)


def test_a_disk_that_others_fill_stops_the_run_before_it_is_full(client, images, expected, disturbed, small_disk):
    disk = small_disk("size=200m")
    job = make_job({"source": str(images), "store": str(disk / "f.zarr")})

    def fill():
        free = os.statvfs(disk).f_bavail * 4096
        (disk / "ballast").write_bytes(bytes(free - 20_000_000))

    failure = disturbed(job, fill)
    assert isinstance(failure, FeaturemapsError)
    assert "it would run full, so the run stopped before that, and what was committed stands; free space" in str(failure)
    assert failure.exit_code == 1
    assert os.statvfs(disk).f_bavail > 0
    assert 0 < len(done_rows(disk / "f.zarr")) < 120
    (disk / "ballast").unlink()
    finish(client, job, expected)


def test_a_disk_that_is_full_at_once_is_said_and_the_next_run_finishes(client, images, expected, disturbed, small_disk):
    disk = small_disk("size=200m")
    job = make_job({"source": str(images), "store": str(disk / "f.zarr")})

    def fill():
        with (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 16))
                except OSError:
                    return

    failure = disturbed(job, fill)
    assert isinstance(failure, FeaturemapsError)
    assert "free space and run the same command again" in str(failure)
    (disk / "ballast").unlink()
    finish(client, job, expected)


def test_a_store_that_becomes_read_only_is_said_and_the_next_run_finishes(client, images, expected, disturbed, small_disk):
    disk = small_disk("size=200m")
    job = make_job({"source": str(images), "store": str(disk / "f.zarr")})
    failure = disturbed(job, lambda: make_read_only(disk))
    assert isinstance(failure, FeaturemapsError)
    assert "cannot be written any more (" in str(failure)
    assert "Read-only file system" in str(failure)
    sh("mount", "-o", "remount,rw", disk)
    finish(client, job, expected)


def test_a_store_that_is_deleted_in_the_middle_is_said_and_the_next_run_makes_it_anew(
    client, images, expected, disturbed, tmp_path
):
    job = make_job({"source": str(images), "store": str(tmp_path / "f.zarr")})
    failure = disturbed(job, lambda: (tmp_path / "f.zarr").rename(tmp_path / "gone"))
    assert isinstance(failure, FeaturemapsError)
    assert "f.zarr" in str(failure)
    finish(client, job, expected)


def test_a_source_that_is_unmounted_in_the_middle_leaves_its_images_to_the_next_run(
    client, images, expected, disturbed, small_disk, tmp_path
):
    disk = small_disk("size=1m")
    sh("umount", disk)  # which may be mounted here
    sh("mount", "--bind", images, disk)
    job = make_job({"source": str(disk), "store": str(tmp_path / "f.zarr")})
    summary = disturbed(job, lambda: sh("umount", "-l", disk))
    assert (summary.outcome, summary.n_quarantined, summary.n_rejected) == ("incomplete", 0, 0)
    assert summary.n_pending == 120 - summary.n_done > 0
    sh("mount", "--bind", images, disk)
    finish(client, job, expected)


# -- processes -------------------------------------------------------------------------------------------------------------------


class Ballast(WorkerPlugin):
    """Decoding the black square takes more memory than the worker may have, the first time."""

    name = "ballast"

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def setup(self, worker) -> None:
        real = decoding.decode

        def swell(data, spec):
            image = real(data, spec)
            if (image == 0).all() and not self.sign.exists():
                self.sign.touch()
                ballast = np.ones(1 << 28)  # 2 GiB
                time.sleep(60)
                del ballast
            return image

        decoding.decode = swell


def test_a_worker_that_runs_out_of_memory_is_replaced_and_its_images_are_done(client, tmp_path):
    source = make_images(tmp_path / "source", 12, [(40, 50)])
    Image.new("RGB", (50, 40)).save(source / "huge.png")
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    with connect(LocalSpec(workers=2, memory=1 << 30)) as own:
        own.register_plugin(Ballast(tmp_path / "sign"))
        before = set(scheduler_workers(own))
        summary = run_job(job, own)
        assert (tmp_path / "sign").exists()
        assert before - set(scheduler_workers(own))
    assert (summary.outcome, summary.n_done, summary.n_quarantined) == ("complete", 13, 0)
    run_job(job.model_copy(update={"store": str(tmp_path / "whole.zarr")}), client)
    assert content(tmp_path / "f.zarr") == content(tmp_path / "whole.zarr")
