"""Runs on workers that a real sshd starts; what travels between groups; and a scheduler of one's own that is restarted."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import yaml
from distributed import Client

from pipeline.api import run_job
from pipeline.cluster.config import load_cluster
from pipeline.cluster.kinds.local import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError
from tests.conftest import content, make_images
from tests.support.batch_services import runs, sshd, wait_for
from tests.support.services import free_port
from tests.system.kill.kill_rounds import COMMAND, hashed_content, wait_until

LONG = {"extractor": {"layers": [{"filters": 8, "kernel": 15}]}}
"""Work enough to be disturbed at it."""

N_PICTURES = 120

pytestmark = [pytest.mark.cluster, pytest.mark.kill]


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Two SSH servers on ports of their own: two machines, as far as the driver can see."""
    folder = tmp_path_factory.mktemp("ssh")
    with sshd(folder / "a") as a, sshd(folder / "b") as b:
        yield a, b


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    sizes = [(300 + 7 * k, 400 + 5 * k) for k in range(8)]
    return make_images(tmp_path_factory.mktemp("source") / "pictures", N_PICTURES, sizes, suffix=".jpg")


@pytest.fixture(scope="module")
def whole(client, pictures, tmp_path_factory) -> dict[str, str]:
    """What a store of the long work holds that nothing disturbed."""
    store = tmp_path_factory.mktemp("whole") / "f.zarr"
    run_job(job_of(pictures, store, **LONG), client)
    return hashed_content(store)


def group(server, **values) -> dict:
    return {
        "hosts": ["127.0.0.1"],
        "port": server.port,
        "user": server.user,
        "key_file": str(server.client_key),
        "known_hosts_file": str(server.known_hosts),
        "memory": "1.5 GiB",
        **values,
    }


def cluster_file(folder: Path, groups: dict, **values) -> Path:
    entry = {"kind": "ssh", "interface": "lo", "start_timeout_s": 60, "groups": groups, **values}
    (folder / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"machines": entry}}, sort_keys=False))
    return folder / "cluster.yaml"


def job_of(source: Path, store: Path, **values):
    return make_job({"source": str(source), "store": str(store), "dtype": "uint8", **values})


def test_two_groups_of_which_one_is_killed_in_the_middle_make_the_same_store(servers, tmp_path, pictures, whole, monkeypatch):
    monkeypatch.setattr("pipeline.run.driver.COMMIT_S", 0.05)  # so that the first progress comes before the last image
    reader, extractor = servers
    groups = {"read": group(reader, roles=["read"]), "extract": group(extractor, roles=["extract"], threads=2)}
    spec = load_cluster("machines", cluster_file(tmp_path, groups))
    job, killed = job_of(pictures, tmp_path / "f.zarr", **LONG), []

    def kill(progress) -> None:
        if progress.n_finished and not killed:
            killed.append(progress.n_finished)
            extractor.kill()  # the server, its sessions, and the workers in them
            threading.Timer(3.0, extractor.start).start()

    with connect(spec) as client:
        assert client.cluster.counts() == {"read": (1, 1), "extract": (1, 1)}
        summary = run_job(job, client, on_progress=kill)
    assert (summary.outcome, summary.n_done) == ("complete", N_PICTURES), summary.faults
    assert 0 < killed[0] < N_PICTURES
    assert hashed_content(tmp_path / "f.zarr") == whole
    for server in servers:
        wait_for("end of the workers", lambda server=server: not runs(server.processes(), "distributed"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"port": 1}, "Connect call failed"),
        ({"known_hosts_file": "none"}, "Host key is not trusted"),
        ({"key_file": "other"}, "Permission denied"),
    ],
    ids=["nobody answers", "unknown host", "wrong key"],
)
def test_a_host_that_lets_nobody_in_is_named_with_the_reason(servers, tmp_path, pictures, change, reason):
    (tmp_path / "none").write_text("")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    spec = load_cluster("machines", cluster_file(tmp_path, {"all": group(servers[0]) | change}))
    with pytest.raises(
        FeaturemapsError, match=rf"(?s)ssh to 127\.0\.0\.1 failed \(.*{reason}.*no worker was started there; make `ssh"
    ):
        run_with(spec, job_of(pictures, tmp_path / "f.zarr"))


def run_with(spec, job):
    with connect(spec) as client:
        return run_job(job, client)


def test_a_python_that_is_not_there_is_said_with_what_the_machine_said(servers, tmp_path, pictures):
    spec = load_cluster("machines", cluster_file(tmp_path, {"all": group(servers[0])}, python="/nowhere/python"))
    with pytest.raises(
        FeaturemapsError, match=r"the worker on 127\.0\.0\.1 ended; it said: env: .*/nowhere/python.*No such file"
    ):
        run_with(spec, job_of(pictures, tmp_path / "f.zarr"))


# -- groups of this machine ------------------------------------------------------------------------------------------------------


def test_between_groups_pixels_travel_and_maps_never_do(tmp_path, pictures, run):
    groups = {"read": {"roles": ["read"], "workers": 1}, "extract": {"roles": ["extract"], "workers": 2, "threads": 2}}
    with connect(LocalSpec.model_validate({"groups": groups})) as client:
        summary = run_job(job_of(pictures, tmp_path / "f.zarr"), client)
        sent = client.run(lambda dask_worker: (str(dask_worker.name), dask_worker.transfer_outgoing_bytes_total))
    assert summary.n_done == N_PICTURES
    by_group = {name: sum(n for worker, n in sent.values() if worker.startswith(name)) for name in groups}
    pixels = 3 * summary.pixels
    assert pixels <= by_group["read"] <= 1.1 * pixels
    assert by_group["extract"] < 0.01 * pixels  # of the maps, which are two thirds of that
    assert summary.bytes_written
    run(pictures, tmp_path / "here.zarr", dtype="uint8")
    assert content(tmp_path / "f.zarr") == content(tmp_path / "here.zarr")


# -- a scheduler of one's own ------------------------------------------------------------------------------------------------------


class Scheduler:
    """A scheduler and a worker that somebody started by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.processes = folder, free_port(), []

    def start(self) -> None:
        resources = "read=1 extract=1 write=1"
        options = [
            "--nthreads",
            "1",
            "--memory-limit",
            "2GiB",
            "--death-timeout",
            "30",
            "--no-dashboard",
            "--resources",
            resources,
        ]
        self._begin("scheduler", "--host", "127.0.0.1", "--port", str(self.port), "--no-dashboard")
        self._begin("worker", f"tcp://127.0.0.1:{self.port}", *options)
        with Client(f"tcp://127.0.0.1:{self.port}") as client:  # a run does not wait for workers that others start
            client.wait_for_workers(1, timeout=900)

    def _begin(self, what: str, *arguments: str) -> None:
        with (self.folder / f"{what}.log").open("ab") as log:
            command = [sys.executable, "-m", "distributed.cli.dask_" + what, *arguments]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder))

    def stop(self) -> None:
        for process in reversed(self.processes):
            children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            for one in (process, *children):
                one.kill()
            process.wait()
        self.processes.clear()


def test_a_run_whose_scheduler_is_restarted_ends_with_a_message_and_the_next_one_finishes(tmp_path, pictures, whole):
    scheduler = Scheduler(tmp_path)
    address = f"tcp://127.0.0.1:{scheduler.port}"
    (tmp_path / "cluster.yaml").write_text(f"clusters: {{ours: {{kind: address, address: '{address}'}}}}")
    command = [sys.executable, "-c", COMMAND, "run", str(pictures), "f.zarr", "--cluster", "ours", "--dtype", "uint8"]
    command += ["--layers", "8x15x15"]
    scheduler.start()
    try:
        first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert wait_until(lambda: done_of(tmp_path / "f.zarr"), 900)
        scheduler.stop()
        scheduler.start()
        _, err = first.communicate(timeout=900)
        assert first.returncode == 1
        assert "what was committed stands" in err
        assert "scheduler" in err
        before = done_of(tmp_path / "f.zarr")
        assert 0 < before < N_PICTURES
        second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900)
        assert second.returncode == 0, second.stderr
        assert f"complete: {N_PICTURES - before} images done, {before} unchanged" in second.stdout
    finally:
        scheduler.stop()
    assert hashed_content(tmp_path / "f.zarr") == whole


def done_of(path: Path) -> int:
    from pipeline.store.contents import count_statuses
    from pipeline.store.store import Store, is_store

    return count_statuses(Store(path))["done"] if is_store(path) else 0
