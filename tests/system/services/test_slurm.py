"""Runs on a real Slurm of one node: jobs that are lost, refused, preempted and out of time; nothing is ever left in its queue."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pipeline.api import run_job
from pipeline.cluster.config import load_cluster
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.store.store import Store, is_store
from tests.conftest import content, make_images
from tests.support.batch_services import slurm, wait_for

GROUPS = {
    "read": {"roles": ["read"], "workers": 2, "memory": "1 GiB"},
    "extract": {"roles": ["extract"], "workers": 2, "memory": "2 GiB", "options": ["--gres=gpu:1"]},
}
SLOW = """
import time
from pipeline.source import decoding as decode

if decode.decode.__name__ == "decode":  # Dask may load this twice
    at_once = decode.decode

    def decode_slowly(*arguments):
        time.sleep(DELAY_S)
        return at_once(*arguments)

    decode.decode = decode_slowly
"""
"""What workers load first, so that a run of small pictures lasts long enough to be disturbed: stands for slow storage."""

pytestmark = [pytest.mark.cluster, pytest.mark.kill]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm") / "s", kill_wait_s=2) as running:
        yield running


@pytest.fixture(autouse=True)
def queue(service, monkeypatch):
    """The tests' Slurm for this process, and an empty queue after each test."""
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, service.env[key])
    yield service
    left = service.squeue()
    service.cancel()
    service.wait_until_idle()
    assert not [job for job in left if job.state not in {"COMPLETING", "CANCELLED"}]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """500 pictures of five sizes."""
    sizes = [(150 + 7 * k, 200 + 5 * k) for k in range(5)]
    return make_images(tmp_path_factory.mktemp("source") / "pictures", 500, sizes, suffix=".jpg")


def slowly(folder: Path, groups=GROUPS, delay_s: float = 0.06) -> dict:
    """The groups, with workers that take their time over each image."""
    (folder / "slow.py").write_text(SLOW.replace("DELAY_S", str(delay_s)))
    environment = {"DASK_DISTRIBUTED__WORKER__PRELOAD": f"['{folder}/slow.py']"}
    return {name: group | {"environment": environment} for name, group in groups.items()}


def cluster_file(folder: Path, groups=None, **values) -> Path:
    entry = {"kind": "slurm", "interface": "lo", "start_timeout_s": 900, "groups": groups or GROUPS, **values}
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"slurm": entry}}, sort_keys=False))
    return folder / "cluster.yaml"


def featuremaps(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=900)


def write_job(folder: Path, **job: object) -> Path:
    (folder / "job.yaml").write_text(yaml.safe_dump({"store": "f.zarr", "cluster": "slurm", **job}))
    return folder / "job.yaml"


def hand_in(folder: Path, *arguments: object, **job: object) -> str:
    """Submit a job file, as a user would; the job's number."""
    done = featuremaps(folder, "submit", write_job(folder, **job), *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1]


def log_of(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted((folder / "featuremaps-logs").glob("*driver*")))


def test_a_submitted_run_whose_jobs_are_cancelled_and_which_is_requeued_makes_the_same_store(service, tmp_path, pictures, run):
    assert run(pictures, tmp_path / "here.zarr", dtype="uint8").n_done == 500
    cluster_file(tmp_path, slowly(tmp_path))
    number = hand_in(tmp_path, source=str(pictures), dtype="uint8")
    chance = random.Random(0)
    for i in range(3):
        wait_for("worker", lambda: len(workers(service)) >= 3 and is_store(tmp_path / "f.zarr"), log=lambda: log_of(tmp_path))
        time.sleep(3 * chance.random())
        victim = chance.choice(workers(service))
        service.cancel(victim.id)
        wait_for("end of the cancelled job", lambda: victim.id not in {job.id for job in workers(service)})  # noqa: B023 (called here)
        if i == 1:
            service.requeue(number)
            wait_for("requeued driver", lambda: (job := service.job(number)) is not None and job.restarts == 1)
            service.wait_until(number, "RUNNING")
    wait_for("end of the run", lambda: service.job(number) is None, log=lambda: log_of(tmp_path))
    log = log_of(tmp_path)
    assert "nothing is wrong" in log, log
    assert content(tmp_path / "f.zarr") == content(tmp_path / "here.zarr")
    status = json.loads(featuremaps(tmp_path, "status", "f.zarr", "--json").stdout)
    assert status["submission"]["state"] == "not in the queue any more"
    assert status["counts"]["done"] == 500
    assert len(Store(tmp_path / "f.zarr").receipts()) >= 2


def workers(service) -> list:
    return [job for job in service.squeue() if job.state == "RUNNING" and not job.name.endswith("driver")]


# -- what is refused, and what is waited for in vain -------------------------------------------------------------------------------


def attempt(folder: Path, pictures: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A run from the login node."""
    return featuremaps(folder, "run", pictures, folder / "f.zarr", "--cluster", "slurm", "--limit", 20, *arguments)


def test_a_partition_that_does_not_exist_is_refused_in_slurms_words(tmp_path, pictures):
    cluster_file(tmp_path, queue="nowhere")
    done = attempt(tmp_path, pictures)
    assert done.returncode == 1
    assert "Slurm did not take the job (sbatch: " in done.stderr
    assert "invalid partition specified: nowhere" in done.stderr
    assert "nothing was computed, what was started was stopped" in done.stderr


def test_no_workers_in_time_is_said_with_the_state_of_the_queue(tmp_path, pictures, queue):
    queue.submit("--cpus-per-task=8", "--mem=1G", script="sleep 300")
    cluster_file(tmp_path, start_timeout_s=12)
    done = attempt(tmp_path, pictures)
    assert done.returncode == 1
    assert "came within 12 s (read: 0 of 2 workers; extract: 0 of 2 workers; extract-0: job" in done.stderr
    assert "PENDING: Resources" in done.stderr
    assert "\nwaiting for workers (read: 0 of 2 workers" in done.stderr
    assert [job.name for job in queue.squeue() if job.state == "RUNNING"] == ["wrap"]
    queue.cancel()


def test_jobs_that_end_before_their_worker_is_there_are_said_so_with_the_end_of_their_log(tmp_path, pictures):
    cluster_file(tmp_path, prologue=["echo the module is not there >&2", "exit 3"])
    done = attempt(tmp_path, pictures)
    assert done.returncode == 1
    assert "has left the queue; " in done.stderr
    assert "ends with: the module is not there" in done.stderr


def test_where_there_is_no_sbatch_nothing_is_started(tmp_path, pictures, monkeypatch):
    cluster_file(tmp_path)
    job_file = write_job(tmp_path, source=str(pictures))
    with monkeypatch.context() as emptied:
        emptied.setenv("PATH", "/nowhere")
        tried = [attempt(tmp_path, pictures), featuremaps(tmp_path, "submit", job_file)]
    for done in tried:
        assert done.returncode == 2
        assert (
            "there is no sbatch on this machine's PATH, so no job can be submitted to Slurm: nothing was started" in done.stderr
        )


def test_a_worker_that_was_to_have_a_gpu_and_sees_none_is_refused(tmp_path, pictures):
    groups = {"all": {"workers": 1, "memory": "2 GiB", "gpus": 1}}
    cluster_file(tmp_path, groups)
    done = attempt(tmp_path, pictures)
    assert done.returncode == 1
    assert "all-0 should have a GPU, but torch sees none there: no batch was sent to them" in done.stderr


def test_workers_of_another_version_are_refused(tmp_path, pictures):
    other = tmp_path / "other" / "zarr-9.9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 9.9\n")
    groups = {"all": {"workers": 1, "memory": "2 GiB", "environment": {"PYTHONPATH": str(tmp_path / "other")}}}
    cluster_file(tmp_path, groups)
    done = attempt(tmp_path, pictures)
    assert done.returncode == 1
    assert "would not compute the same: zarr 9.9 instead of" in done.stderr
    assert "on all-0. No batch was sent" in done.stderr
    assert not json.loads((next((tmp_path / "f.zarr" / "runs").glob("2*.json"))).read_text())["n_done"]


# -- how a run lives ---------------------------------------------------------------------------------------------------------------


RETIRE = """
import threading
import time
from pathlib import Path
from pipeline.source import decoding as decode

workers, seen, lock = [], [], threading.Lock()

def dask_setup(worker):
    if worker.lifetime:  # `dask worker` was given the option, whose time is up as soon as the worker has seen a few images
        workers.append(worker)

def retire(worker):
    worker.loop.add_callback(worker.close_gracefully, reason="worker-lifetime-reached")
    while worker.status.name not in {"closing", "closed", "failed"}:  # so that it leaves in the middle of its batch
        time.sleep(0.01)

if decode.decode.__name__ == "decode":  # Dask may load this twice
    at_once = decode.decode

    def decode_until_retired(*arguments):
        with lock:
            seen.append(1)
            if workers and len(seen) == 20 and not Path(f"FOLDER/{workers[0].name}").exists():
                Path(f"FOLDER/{workers[0].name}").touch()
                retire(workers[0])
        return at_once(*arguments)

    decode.decode = decode_until_retired
"""
"""What workers load first, so that the first of each name retires at its 20th image, as when its lifetime is over; no later one does."""


def test_workers_that_retire_before_their_walltime_are_replaced(tmp_path, pictures, run, queue):
    retired = tmp_path / "retired"
    retired.mkdir()
    (tmp_path / "retire.py").write_text(RETIRE.replace("FOLDER", str(retired)))
    environment = {"DASK_DISTRIBUTED__WORKER__PRELOAD": f"['{tmp_path}/retire.py']"}
    groups = {"all": {"workers": 2, "memory": "2 GiB", "environment": environment}}
    spec = load_cluster("slurm", cluster_file(tmp_path, groups))
    run(pictures, tmp_path / "here.zarr")
    with connect(spec) as client:
        summary = run_job(make_job({"source": str(pictures), "store": str(tmp_path / "f.zarr")}), client)
    assert (summary.outcome, summary.n_done) == ("complete", 500)
    assert content(tmp_path / "f.zarr") == content(tmp_path / "here.zarr")
    numbers = {path.stem.rpartition("-")[2] for path in (tmp_path / "featuremaps-logs").glob("*.err")}
    assert list(retired.iterdir()), "nobody retired"
    assert len(numbers) > 2, "nobody was replaced"


def test_a_run_that_is_asked_to_stop_while_it_waits_leaves_no_job(tmp_path, pictures, queue):
    queue.submit("--cpus-per-task=8", "--mem=1G", script="sleep 300")
    cluster_file(tmp_path)
    command = [sys.executable, "-m", "pipeline", "run", str(pictures), str(tmp_path / "f.zarr"), "--cluster", "slurm"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for("jobs in the queue", lambda: len(queue.squeue()) == 5)
    process.terminate()
    _, err = process.communicate(timeout=900)
    assert process.returncode == 75
    assert "stopped while waiting for workers: nothing was computed" in err
    assert [job.name for job in queue.squeue() if job.state == "RUNNING"] == ["wrap"]
    queue.cancel()


def test_attempts_that_lead_nowhere_come_to_an_end(tmp_path, pictures, queue):
    cluster_file(tmp_path, prologue=["case $SLURM_JOB_NAME in *driver) ;; *) exit 3;; esac"])
    number = hand_in(tmp_path, "--attempts", 2, source=str(pictures))
    wait_for("end of the attempts", lambda: queue.job(number) is None, log=lambda: log_of(tmp_path))
    log = log_of(tmp_path)
    assert log.count("workers could not be started, in 3 tries each") == 2, log
    assert "2 attempts in a row ended without one more image, so there is no further one" in log


def test_a_driver_that_its_user_cancels_does_not_come_back_and_the_next_one_goes_on(tmp_path, pictures, queue):
    cluster_file(tmp_path, slowly(tmp_path))
    number = hand_in(tmp_path, source=str(pictures), limit=100)
    again = featuremaps(tmp_path, "submit", "job.yaml")
    assert again.returncode == 75
    assert f"job {number} (featuremaps-" in again.stderr
    assert "two runs on one store never mix, so nothing was submitted" in again.stderr
    wait_for("workers", lambda: len(workers(queue)) == 4, log=lambda: log_of(tmp_path))
    queue.cancel(number)
    wait_for("end of the driver", lambda: queue.job(number) is None)
    wait_for("end of its workers", lambda: not workers(queue))
    assert featuremaps(tmp_path, "status", "f.zarr").returncode == 0
    number = hand_in(tmp_path, source=str(pictures), limit=100)
    wait_for("end of the run", lambda: queue.job(number) is None, log=lambda: log_of(tmp_path))
    assert "nothing is wrong" in log_of(tmp_path)
    [page] = (tmp_path / "featuremaps-logs").glob("featuremaps-*-report.html")
    assert f"page about the store: {page}" in log_of(tmp_path)
    assert "Complete: all 100 images are done." in page.read_text()


def test_a_preempted_run_goes_on_when_it_may(tmp_path, pictures, queue, run):
    cluster_file(tmp_path, slowly(tmp_path))
    number = hand_in(tmp_path, source=str(pictures), limit=200, dtype="uint8")
    wait_for("workers", lambda: len(workers(queue)) == 4, log=lambda: log_of(tmp_path))
    above = queue.submit("--partition=preempting", "--cpus-per-task=8", "--mem=1G", script="sleep 2")
    wait_for("preemption", lambda: (job := queue.job(number)) is not None and job.restarts == 1)
    wait_for("end of the other job", lambda: queue.job(above) is None)
    wait_for("end of the run", lambda: queue.job(number) is None, log=lambda: log_of(tmp_path))
    assert "nothing is wrong" in log_of(tmp_path)
    run(pictures, tmp_path / "here.zarr", limit=200, dtype="uint8")
    assert content(tmp_path / "f.zarr") == content(tmp_path / "here.zarr")


def test_of_a_run_that_has_no_store_yet_it_is_said_whether_it_waits_or_is_over(tmp_path, queue):
    (tmp_path / "none").mkdir()
    cluster_file(tmp_path)
    number = hand_in(tmp_path, source=str(tmp_path / "none"))
    wait_for("end of the driver", lambda: queue.job(number) is None)
    over = featuremaps(tmp_path, "status", "f.zarr")
    assert over.returncode == 2
    assert f"as job {number} on " in over.stderr
    assert "not in the queue any more. It ended before the store was created; featuremaps-" in over.stderr
    assert "is empty (no files at any depth)" in log_of(tmp_path)
    queue.submit("--cpus-per-task=8", "--mem=1G", script="sleep 300")
    number = hand_in(tmp_path, source=str(tmp_path / "none"))
    assert re.search(
        rf"job {number} \(.*\) PENDING.*\. Wait until it has begun", featuremaps(tmp_path, "status", "f.zarr").stderr
    )
    queue.cancel()


def test_what_is_no_batch_system_takes_no_whole_run(tmp_path, pictures):
    (tmp_path / "cluster.yaml").write_text("clusters: {here: {kind: local}}")
    done = featuremaps(tmp_path, "submit", write_job(tmp_path, source=str(pictures), cluster="here"))
    assert done.returncode == 2
    assert (
        "cluster 'here' is of kind local, and only a batch system (slurm, pbs, sge, htcondor) can be handed a whole run"
        in done.stderr
    )


def test_two_interrupts_leave_no_job_and_the_first_one_drains(tmp_path, pictures, queue):
    cluster_file(tmp_path, slowly(tmp_path))
    command = [sys.executable, "-m", "pipeline", "run", str(pictures), str(tmp_path / "f.zarr"), "--cluster", "slurm"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for("rows", lambda: is_store(tmp_path / "f.zarr") and Store(tmp_path / "f.zarr").classes)
    process.send_signal(signal.SIGINT)
    said = next((line for line in process.stderr if "SIGINT: finishing what is in flight" in line), "")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=900)
    assert said, err
    assert process.returncode == 75, err
    assert not workers(queue)


def test_jobs_that_are_replaced_as_the_run_ends_are_taken_back_too(tmp_path, queue):
    """Cancelled all at once, and the cluster closed while others are handed in for them."""
    spec = load_cluster("slurm", cluster_file(tmp_path))
    with connect(spec) as client:
        wait_for("workers", lambda: len(workers(queue)) == 4)
        queue.cancel(*(job.id for job in workers(queue)))
        wait_for("the loss", lambda: not client.cluster.present)
        client.cluster.start()
        time.sleep(0.05)
    wait_for("end of the jobs", lambda: not [job for job in queue.squeue() if job.state != "COMPLETING"])


def test_the_scheduler_needs_an_interface_that_is_there(tmp_path, pictures):
    cluster_file(tmp_path, interface="none7")
    done = attempt(tmp_path, pictures)
    assert done.returncode == 2
    assert "the scheduler could not be started" in done.stderr
    assert "'none7' is not a valid network interface" in done.stderr
