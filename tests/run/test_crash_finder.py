from __future__ import annotations

import os
import shutil
import signal
import time

import pytest
from distributed import WorkerPlugin

from pipeline.api import run_job
from pipeline.cluster import dask_settings
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.run.crash_finder import GUILTY, CrashFinder, HeaderTrial, Trial
from pipeline.run.in_flight import BatchTask, ProbeTask, TrialTask
from pipeline.run.tasks import WorkPiece
from pipeline.source import decoding
from pipeline.source.fetch import Probed
from pipeline.store.layout import class_layout
from pipeline.store.schema import Status
from tests.conftest import content, make_images


def piece(start: int, *rows: int) -> WorkPiece:
    layout = class_layout((20, 30), [("conv1", 2, (12, 22))], 4)
    return WorkPiece(layout, start, start + 4, rows, tuple(f"{r}.png" for r in rows), tuple(f"f{r}" for r in rows))


def test_every_image_is_tried_alone_and_only_the_guilty_are_recorded():
    trial = Trial([piece(0, 0, 2), piece(4, 5, 6, 7)])
    tried = []
    while (alone := trial.next()) is not None:
        assert (alone.start, alone.stop) == (alone.rows[0], alone.rows[0] + 1)
        assert len(alone.rows) == len(alone.paths) == len(alone.fingerprints) == 1
        tried.append(alone.rows[0])
        trial.judge(survived=alone.rows[0] not in {0, 2, 6})
    assert tried == [0, 2, 5, 6, 7]
    assert trial.n_guilty == 3
    (rest,) = trial.innocent()  # the first piece has none left
    assert (rest.start, rest.stop, rest.rows, rest.paths, rest.fingerprints) == (4, 8, (5, 7), ("5.png", "7.png"), ("f5", "f7"))
    verdicts = trial.verdicts()
    assert [(v.rows, v.error, v.status.tolist()) for v in verdicts] == [((r,), [GUILTY], [Status.QUARANTINED]) for r in (0, 2, 6)]
    assert verdicts[0].pooled == {}


class FlightOfOne:
    """Stands for the tasks in flight: a list that the test empties."""

    def __init__(self):
        self.tasks = []

    def __len__(self):
        return len(self.tasks)

    def send(self, task):
        self.tasks.append(task)


class Headers:
    """Stands for the intake."""

    def __init__(self):
        self.taken = []

    def take(self, block, probed):
        self.taken.append((block, probed))


def test_suspects_wait_until_nothing_is_in_flight_and_go_one_by_one():
    flight, headers, results = FlightOfOne(), Headers(), []
    finder = CrashFinder(flight, headers, results.append)
    flight.send(ProbeTask(9, ["z"]))
    finder.suspect(BatchTask([piece(0, 0, 2)], 1))
    finder.suspect(ProbeTask(3, ["a"]))
    finder.try_next()
    assert (len(finder), finder.n_images, len(flight)) == (2, 2, 1)  # somebody else might die with it
    flight.tasks.clear()
    for survived in (True, False):
        finder.try_next()
        (alone,) = flight.tasks
        assert isinstance(alone, TrialTask)
        flight.tasks.clear()
        finder.judge(None, survived=survived)
    finder.try_next()
    assert [result.pieces[0].rows for result in results] == [(2,)]
    (innocent,) = flight.tasks
    assert ([p.rows for p in innocent.pieces], innocent.n_acquittals) == ([(0,)], 0)
    flight.tasks.clear()
    finder.try_next()
    assert flight.tasks == [TrialTask("a")]
    flight.tasks.clear()
    finder.judge([Probed(20, 30)], survived=True)
    finder.try_next()
    assert (headers.taken, len(finder), len(flight)) == ([(3, [Probed(20, 30)])], 0, 0)


def test_a_batch_without_a_guilty_image_goes_again_and_is_counted():
    flight, results = FlightOfOne(), []
    finder = CrashFinder(flight, Headers(), results.append)
    finder.suspect(BatchTask([piece(0, 0)], 1))
    finder.try_next()
    flight.tasks.clear()
    finder.judge(None, survived=True)
    finder.try_next()
    assert (results, flight.tasks[0].n_acquittals) == ([], 2)


class Poison(WorkerPlugin):
    """The decoder of every worker crashes on grey squares, as a bug of a native library would; it really kills the process."""

    name = "poison"

    def setup(self, worker) -> None:
        real = decoding.decode

        def crash(data, spec):
            image = real(data, spec)
            if (image == 128).all():
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return image

        decoding.decode = crash


class PoisonHeader(WorkerPlugin):
    """As `Poison`, while the header is looked at."""

    name = "poison-header"

    def setup(self, worker) -> None:
        from pipeline.source import fetch

        real = fetch._probe

        def crash(source, needed, patience, path):
            if path == "poison.png":
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return real(source, needed, patience, path)

        fetch._probe = crash


def test_headers_are_tried_one_by_one():
    trial = HeaderTrial(3, ["a", "b", "c"])
    good = Probed(40, 50, 40, 50)
    for outcome in ([good], None, [good]):
        assert trial.next() == "abc"[len(trial.probed)]
        trial.judge(outcome)
    assert trial.next() is None
    assert trial.probed == [good, Probed(error=GUILTY), good]
    assert (trial.block, trial.n_images) == (3, 0)


@pytest.fixture
def two_deaths(monkeypatch):
    """Two deaths make a task a suspect, in place of four: after each one a worker has to start."""
    monkeypatch.setitem(dask_settings.DASK_SETTINGS, "distributed.scheduler.allowed-failures", 1)


@pytest.mark.cluster
@pytest.mark.kill
@pytest.mark.usefixtures("two_deaths")
def test_a_header_that_kills_its_worker_costs_itself_only(tmp_path):
    source = make_images(tmp_path / "source", 6, [(40, 50)])
    shutil.copy(source / "img00000.png", source / "poison.png")
    with connect(LocalSpec(workers=2)) as client:
        client.register_plugin(PoisonHeader())
        summary = run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)
    assert (summary.outcome, summary.n_done, summary.n_rejected, summary.n_pending) == ("complete", 6, 1, 0)
    assert content(tmp_path / "f.zarr")["poison.png"] == ("REJECTED", GUILTY)


@pytest.mark.cluster
@pytest.mark.kill
@pytest.mark.usefixtures("two_deaths")
def test_an_image_that_kills_its_worker_costs_itself_only(client, tmp_path):
    from PIL import Image

    source = make_images(tmp_path / "source", 12, [(40, 50), (60, 50)])
    Image.new("RGB", (50, 40), (128, 128, 128)).save(source / "poison.png")
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    with connect(LocalSpec(workers=2)) as own:
        own.register_plugin(Poison())
        summary = run_job(job, own)
    assert (summary.outcome, summary.n_done, summary.n_quarantined, summary.n_pending) == ("complete", 12, 1, 0)
    found = content(tmp_path / "f.zarr")
    assert [name for name, row in found.items() if row[0] != "DONE"] == ["poison.png"]
    (tmp_path / "source" / "poison.png").unlink()
    clean = make_job({"source": str(source), "store": str(tmp_path / "clean.zarr")})
    run_job(clean, client)
    assert {name: row for name, row in found.items() if name != "poison.png"} == content(tmp_path / "clean.zarr")
