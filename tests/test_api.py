"""What a program of one's own calls, with a client of its own: which clients fit, and what Ctrl-C does in a script and in a notebook."""

from __future__ import annotations

import asyncio
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from distributed import Client, LocalCluster
from jupyter_client import KernelManager

import pipeline
from pipeline import api, errors
from pipeline.config import make_job
from pipeline.run.summary import Summary
from pipeline.store.schema import RUNS
from pipeline.store.store import Store
from tests.conftest import content, make_images
from tests.system.kill.kill_rounds import wait_until

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "workflows/python/script.py"
LIMIT_S = 600
N_IMAGES, N_COPIES = 240, 2
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def job(tmp_path):
    return make_job({"source": str(make_images(tmp_path / "photos", 4, [(40, 50)])), "store": str(tmp_path / "features.zarr")})


@pytest.fixture(scope="module")
def in_threads():
    """A cluster inside this process, whose one worker offers every role."""
    resources = {"read": 1, "extract": 1, "write": 1}
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, protocol="tcp", resources=resources
    ) as cluster:
        yield cluster


# -- which clients fit -----------------------------------------------------------------------------------------------------------


def test_a_run_with_a_client_prints_nothing(in_threads, job, capfd):
    with Client(in_threads) as client:
        summary = pipeline.run_job(job, client)
        assert client.status == "running", "it is left as it is"
    assert (summary.outcome, summary.n_done, summary.exit_code) == ("complete", 4, 0)
    assert capfd.readouterr() == ("", "")


def test_what_is_no_client_is_refused_before_anything_is_written(in_threads, job):
    expected = (
        r"client must be a distributed\.Client; got LocalCluster: nothing was started; give Client\(\.\.\.\) of the cluster"
    )
    with pytest.raises(errors.UsageError, match=expected):
        pipeline.run_job(job, in_threads)
    assert not Path(job.store).exists()


def test_an_asynchronous_client_is_refused_with_the_call_that_works(in_threads, job):
    async def run() -> Summary:
        async with Client(in_threads.scheduler_address, asynchronous=True) as client:
            with pytest.raises(errors.UsageError, match=r"this client is asynchronous.*nothing was started") as refused:
                pipeline.run_job(job, client)
            assert not Path(job.store).exists()
            (call,) = re.findall(r"`await (.+)`", str(refused.value))
            return await eval(call, {"asyncio": asyncio, "pipeline": pipeline, "job": job, "client": client})

    assert asyncio.run(run()).outcome == "complete"


@pytest.mark.cluster
def test_a_plain_client_of_one_machine_works_in_all_its_threads(job):
    with Client(processes=False, n_workers=1, threads_per_worker=2, dashboard_address=None) as client:
        summary = pipeline.run_job(job, client)
        assert (summary.outcome, summary.n_done) == ("complete", 4)
        checked = pipeline.run_job(job.model_copy(update={"check": "digest"}), client)
    assert (checked.outcome, checked.n_checked, checked.n_done) == ("complete", 4, 0)


# -- Ctrl-C ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_that(monkeypatch, job):
    """Have a run do something in place of its work."""

    def start(does, **options):
        def run(_job, _connect, *, on_progress, stop):
            does(stop)
            return Summary("1", outcome="stopped" if stop and stop.is_set() else "complete", n_done=3)

        monkeypatch.setattr(api.lifecycle, "run_job", run)
        return pipeline.run_job(job, **options)

    return start


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_the_first_ctrl_c_asks_for_a_drain_and_is_raised_after_it(run_that, caplog):
    drained = []

    def does(stop):
        assert not stop.is_set()
        interrupt()
        drained.append(stop.is_set())

    with pytest.raises(KeyboardInterrupt, match=r"^stopped: 3 images done.*What was computed is committed; run the job again"):
        run_that(does)
    assert drained == [True]
    assert "finishing what is in flight; nothing is lost; interrupt again to end at once" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_at_once(run_that):
    def does(_stop):
        interrupt()
        interrupt()
        pytest.fail("it went on")

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        run_that(does)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_failure_after_a_ctrl_c_is_not_hidden_by_it(run_that):
    def does(_stop):
        interrupt()
        raise errors.FeaturemapsError("the disk is full")

    with pytest.raises(errors.FeaturemapsError, match="the disk is full"):
        run_that(does)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_whoever_gives_a_stop_decides_about_ctrl_c(run_that):
    mine = threading.Event()

    def does(stop):
        assert stop is mine
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        run_that(does, stop=mine)
    assert not mine.is_set()


def test_a_handler_of_the_program_stays(run_that):
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    try:
        assert run_that(lambda _stop: interrupt()).outcome == "complete"
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.SIGINT]


def test_a_run_in_another_thread_leaves_signals_alone(run_that):
    answers: queue.SimpleQueue = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: answers.put(run_that(lambda _stop: answers.put(signal.getsignal(signal.SIGINT)))))
    thread.start()
    thread.join()
    assert answers.get_nowait() is signal.default_int_handler
    assert answers.get_nowait().outcome == "complete"


def written(store: Path) -> bool:
    """Whether maps of some class have an object."""
    return any(path.suffix != ".partial" for path in store.glob("[0-9]*x[0-9]*/conv1/c.*"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """So many batches that a run has not sent them all when its first maps are there."""
    made = tmp_path_factory.mktemp("interrupted")
    first = make_images(made / "photos/0", N_IMAGES // N_COPIES, [(300 + 17 * k, 360 + 15 * k) for k in range(12)], suffix=".jpg")
    for i in range(1, N_COPIES):
        shutil.copytree(first, made / "photos" / str(i))
    layers = "extractor: {layers: [{filters: 2, kernel: 21}]}\n"  # so that a batch has few images, and there are many batches
    (made / "job.yaml").write_text(f"source: photos\nstore: features.zarr\n{layers}")
    return made


def script(folder: Path, **options) -> subprocess.Popen[str]:
    arguments = [sys.executable, str(SCRIPT), "job.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, cwd=folder, env=ENVIRONMENT, text=True, start_new_session=True, **pipes, **options)


def must_be_stopped(path: Path) -> dict[str, tuple]:
    """The last receipt says so, nobody holds the store, and all that was written is committed; return what is done."""
    receipt = Store(path).receipts()[0]
    done = {name: found for name, found in content(path).items() if found[0] == "DONE"}
    assert receipt["outcome"] == "stopped", receipt
    assert 0 < receipt["n_done"] == len(done) < N_IMAGES
    assert not (path / RUNS / "lock.json").exists()
    return done


@pytest.mark.cluster
@pytest.mark.long
def test_ctrl_c_at_a_script_drains_and_the_next_call_finishes(folder, tmp_path):
    """The signal goes to all processes, as a terminal sends it: also to the workers of the script's own cluster."""
    shutil.copytree(folder, tmp_path / "work")
    path = tmp_path / "work/features.zarr"
    process = script(tmp_path / "work")
    assert wait_until(lambda: written(path) or process.poll() is not None, LIMIT_S)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == errors.EXIT_RUN_AGAIN, out + err
    assert "interrupted: finishing what is in flight; nothing is lost; interrupt again to end at once" in err
    assert re.search(r"^stopped: \d+ images done.*run the job again to go on$", err, re.MULTILINE)
    assert "Traceback" not in err
    done = must_be_stopped(path)
    process = script(tmp_path / "work")
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, out + err
    assert out.startswith(f"complete: {N_IMAGES - len(done)} images done, {len(done)} unchanged, 0 bad")
    assert done.items() <= content(path).items()


CELL = """
import time
from pathlib import Path

from distributed import Client

import pipeline
from pipeline.run import driver

driver.COMMIT_S = 0.02  # so that the first progress comes before the last image
folder = Path({folder!r})
resources = {{"read": 1, "extract": 1, "write": 1}}
client = Client(n_workers=2, threads_per_worker=1, resources=resources, dashboard_address=":0")
job = pipeline.load_job(folder / "job.yaml")


def wait_for_the_interrupt(progress):
    if progress.n_finished and not (folder / "sent").exists():
        (folder / "running").touch()
        while not (folder / "sent").exists():
            time.sleep(0.01)


summary = pipeline.run_job(job, client, on_progress=wait_for_the_interrupt)
"""


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A real Jupyter kernel, with a home of its own."""
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    channels = manager.client()
    channels.start_channels()
    channels.wait_for_ready(timeout=LIMIT_S)
    yield manager, channels
    channels.stop_channels()
    manager.shutdown_kernel(now=True)


def reply(channels, request: str) -> dict:
    while True:
        message = channels.get_shell_msg(timeout=LIMIT_S)
        if message["parent_header"].get("msg_id") == request:
            return message["content"]


@pytest.mark.cluster
@pytest.mark.long
def test_interrupting_a_notebook_drains_and_running_the_cell_again_finishes(kernel, folder, tmp_path):
    manager, channels = kernel
    shutil.copytree(folder, tmp_path / "work")
    path = tmp_path / "work/features.zarr"
    request = channels.execute(textwrap.dedent(CELL).format(folder=str(tmp_path / "work")))
    assert wait_until((tmp_path / "work/running").exists, LIMIT_S)
    manager.interrupt_kernel()
    (tmp_path / "work/sent").touch()
    first = reply(channels, request)
    assert (first["status"], first["ename"]) == ("error", "KeyboardInterrupt"), first
    assert re.match(r"stopped: \d+ images done.*run the job again to go on", first["evalue"])
    done = must_be_stopped(path)
    again = reply(channels, channels.execute("assert pipeline.run_job(job, client).outcome == 'complete'"))
    assert again["status"] == "ok", again
    assert done.items() <= content(path).items()
    assert len(content(path)) == N_IMAGES
    assert reply(channels, channels.execute("client.close()"))["status"] == "ok"
