from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import asyncssh
import pytest
import yaml
from distributed import LocalCluster

from pipeline.checks import cluster as check_cluster
from pipeline.checks import installation, storage, workers
from pipeline.checks.doctor import diagnose
from pipeline.checks.finding import Finding, look
from pipeline.checks.plan import Preview
from pipeline.cli import commands as cli
from pipeline.cluster.config import load_cluster
from pipeline.cluster.kinds.address import AddressSpec
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.extract import kernel
from pipeline.run import admission
from pipeline.run.worker_versions import own_versions
from pipeline.source.urls import connect as connect_bucket
from pipeline.store.lock import StoreLock
from pipeline.store.objects import place
from tests.conftest import make_images
from tests.support.services import BUCKET, environment, free_port, rclone, seaweedfs


def only(findings) -> Finding:
    (finding,) = findings
    return finding


@pytest.fixture
def spec(tmp_path):
    """A cluster, by way of its file."""

    def make(**entry):
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"x": entry}}))
        return load_cluster("x", tmp_path / "cluster.yaml")

    return make


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ("a.yaml is not usable, so nothing was started: unknown key 'b'", "a.yaml is not usable: unknown key 'b'"),
        ("a.yaml has no cluster 'b': nothing was started; it has c", "a.yaml has no cluster 'b'; it has c"),
        ("no store can be accessed: check it; nothing was started", "no store can be accessed: check it"),
    ],
)
def test_a_check_does_not_say_that_nothing_was_started(message, found):
    def check():
        raise UsageError(message)

    assert only(look("x", check)) == Finding("FAIL", "x", found)


def test_a_check_that_raises_is_a_finding():
    assert only(look("x", lambda: 1 / 0)) == Finding(
        "FAIL", "x", "ZeroDivisionError: division by zero", "correct what the error names, and check again"
    )

    def half():
        yield Finding("ok", "x", "fine")
        raise UsageError("no more")

    assert look("x", half) == [Finding("ok", "x", "fine"), Finding("FAIL", "x", "no more")]
    assert str(Finding("ok", "x", "fine")) == "ok    x: fine"
    assert str(Finding("FAIL", "x", "bad", "mend it")) == "FAIL  x: bad -> mend it"


# -- the installation --------------------------------------------------------------------------------------------------------------


def test_this_installation_has_its_packages_and_extras():
    first, *others = installation.packages()
    assert first.level == "ok"
    assert first.found.startswith(f"python {'.'.join(map(str, sys.version_info[:3]))}, featuremaps ")
    assert {other.level for other in others} == {"ok"}
    assert {other.what for other in others} == {f"extra {name}" for name in installation.EXTRAS}


def test_packages_that_are_missing_or_too_old_are_named(tmp_path, monkeypatch):
    """An installation of a featuremaps that wants other things."""
    folder = tmp_path / "featuremaps-9.dist-info"
    folder.mkdir()
    wanted = ["zarr>=99", "no-such-package", 'another-missing-one; extra == "fast"']
    lines = ["Metadata-Version: 2.1", "Name: featuremaps", "Version: 9", *(f"Requires-Dist: {text}" for text in wanted)]
    (folder / "METADATA").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.what: finding for finding in installation.packages()}
    assert found["packages"].level == "FAIL"
    assert "zarr is 3." in found["packages"].found
    assert "has to be >=99; no-such-package is not installed" in found["packages"].found
    assert found["extra fast"].level == "note"
    assert found["extra fast"].found == "another-missing-one is not installed; it is for JPEGs in half the time"
    assert found["extra fast"].remedy == "pip install 'featuremaps[fast]'"


def test_a_kernel_that_was_not_compiled_is_noted(monkeypatch):
    expected = "ok" if kernel.version() != "torch" else "note"
    assert only(installation.compiled_kernel()).level == expected
    monkeypatch.setattr(kernel, "MAX_LANES", 0)
    found = only(installation.compiled_kernel())
    assert (found.level, found.remedy) == ("note", "install a C compiler (cc), then featuremaps again")


def test_gpus_that_torch_does_not_see_are_a_failure_unless_somebody_hid_them(tmp_path, monkeypatch):
    """A folder stands for /dev of a machine with two GPUs."""
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert only(installation.gpus(tmp_path)).level == "ok"
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    found = only(installation.gpus(tmp_path))
    assert found.level == "FAIL"
    assert found.found.startswith("2 device files, and torch ")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert only(installation.gpus(tmp_path)).level == "note"
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 2)
    assert only(installation.gpus(tmp_path)).level == "ok"


def test_the_limit_of_open_files_is_compared_with_what_a_driver_wants():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, before[1]))
        assert only(installation.open_files(2)).level == "ok"
        found = only(installation.open_files(100))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert (found.level, found.found) == ("FAIL", "512, and a driver of 100 workers wants 1128")
    assert found.remedy.startswith("ulimit -n 1128 (the hard limit is ")


# -- where the store is ------------------------------------------------------------------------------------------------------------


def test_a_good_folder_is_left_as_it_was(tmp_path):
    writing, clock = storage.writing(tmp_path / "new" / "f.zarr")
    assert (writing.level, clock.level) == ("ok", "ok")
    assert writing.what.startswith(f"writing in {tmp_path} (")
    assert not list(tmp_path.iterdir())
    assert only(storage.stored(tmp_path / "new" / "f.zarr")).found.endswith("is free for a new store")
    assert only(storage.space(tmp_path, None)).level == "ok"


def remount_read_only(folder: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)


def test_a_read_only_disk_is_a_failure(small_disk):
    folder = small_disk("size=1m")
    remount_read_only(folder)
    found = only(storage.writing(folder / "f.zarr"))
    assert found.level == "FAIL"
    assert found.what == f"writing in {folder} (tmpfs)"
    assert found.found == "writing a file failed (Read-only file system)"


def test_a_full_disk_is_a_failure(small_disk):
    folder = small_disk("size=64k")
    with pytest.raises(OSError, match="No space"):
        (folder / "large").write_bytes(bytes(2**20))
    assert only(storage.writing(folder)).found == "writing a file failed (No space left on device)"
    assert [path.name for path in folder.iterdir()] == ["large"]
    found = only(storage.space(folder, None))
    assert (found.level, found.found) == ("FAIL", "0 bytes free")


def test_a_plan_that_does_not_fit_the_disk_is_a_failure(tmp_path):
    assert only(storage.space(tmp_path, Preview(maps_bytes=1000))).level == "ok"
    found = only(storage.space(tmp_path / "f.zarr", Preview(maps_bytes=10**18)))
    assert found.level == "FAIL"
    assert found.found.endswith("maps take up to 1,000,000 TB before compression")


def test_a_file_system_without_hard_links_is_a_failure(tmp_path, monkeypatch):
    """No such file system can be mounted everywhere; the call fails as it does on FAT, or succeeds twice, as on nothing good."""

    def link(*_):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", link)
        assert only(storage.writing(tmp_path)).found == "a hard link failed (Operation not permitted)"
    monkeypatch.setattr(os, "link", lambda *_: None)
    assert only(storage.writing(tmp_path)).found == ("refusing a second hard link of the same name failed (it was not refused)")
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    assert "replacing a file by renaming another failed" in only(storage.writing(tmp_path)).found
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("skew_s", "level"), [(0, "ok"), (-10, "note"), (500, "FAIL")])
def test_clocks_that_are_apart_are_noted(tmp_path, monkeypatch, skew_s, level):
    """This machine's clock cannot be set in a test; what it says is changed instead."""
    monkeypatch.setattr(storage, "time", SimpleNamespace(time=lambda: time.time() - skew_s))
    _, clock = storage.writing(tmp_path)
    assert clock.level == level
    if skew_s:
        direction = "ahead of" if skew_s > 0 else "behind"
        assert clock.found.split(" s ")[1] == f"{direction} this machine's"


@pytest.mark.parametrize(("skew_s", "found"), [(-0.4, "agrees with this machine's"), (0.6, "0.6 s ahead of this machine's")])
def test_clocks_less_than_half_a_second_apart_agree(tmp_path, monkeypatch, skew_s, found):
    """Both clocks stand still here: a disk cannot be made to say when it wrote."""
    monkeypatch.setattr(storage, "time", SimpleNamespace(time=lambda: 1000.0))
    monkeypatch.setattr(storage, "modified_s", lambda _: 1000.0 + skew_s)
    _, clock = storage.writing(tmp_path)
    assert clock.found == found


def test_a_store_that_somebody_works_on_and_a_folder_that_is_none(tmp_path, run):
    source = make_images(tmp_path / "source", 4, [(40, 50)])
    store = tmp_path / "f.zarr"
    run(source, store)
    assert only(storage.stored(store)).found.endswith("is a store, and nobody works on it")
    with StoreLock(store / "runs", "another"):
        found = only(storage.stored(store))
        assert found.level == "note"
        assert "is held by run another, process" in found.found
    assert only(look("store", storage.stored, source)).found.startswith(f"{source} holds 'img00000.png' but is not a store")
    assert only(storage.source_of_store(store)).found == f"{source} can be read"
    source.rename(tmp_path / "elsewhere")
    found = only(storage.source_of_store(store))
    assert (found.level, found.found) == ("FAIL", f"{source} cannot be read (No such file or directory)")
    source.mkdir()
    assert only(storage.source_of_store(store)).found == f"{source} is empty"
    assert not list(storage.source_of_store(tmp_path / "none.zarr"))


@contextmanager
def pointed_at(endpoint):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(endpoint).items():
            patch.setenv(name, value)
        connect_bucket.cache_clear()
        yield
    connect_bucket.cache_clear()


def test_a_bucket_that_honours_conditions_is_left_as_it_was(tmp_path):
    with seaweedfs(tmp_path) as endpoint, pointed_at(endpoint):
        store = place(f"s3://{BUCKET}/f.zarr")
        writing, clock = storage.writing(store)
        assert (writing.level, clock.level) == ("ok", "ok")
        assert store.is_empty()
        assert only(storage.space(store, None)).found == "in a bucket, which does not say how much there is"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_SECRET_ACCESS_KEY", "another")
            connect_bucket.cache_clear()
            found = only(storage.writing(store))
    assert (found.level, found.what) == ("FAIL", f"writing in s3://{BUCKET}")
    assert "credentials" in found.remedy


def test_a_bucket_that_ignores_conditions_is_a_failure(tmp_path):
    with rclone(tmp_path) as endpoint, pointed_at(endpoint):
        found = only(storage.writing(place(f"s3://{BUCKET}/f.zarr")))
    assert found.level == "FAIL"
    assert "ignores the conditions of puts" in found.found


@pytest.mark.parametrize(
    ("preview", "levels"),
    [
        (Preview(n_listed=3, worker_limit_bytes=100, worker_memory_bytes=50), ["ok", "ok"]),
        (Preview(n_listed=3, worker_limit_bytes=100, worker_memory_bytes=150), ["ok", "FAIL"]),
        (Preview(n_listed=3, n_faults=1), ["note"]),
        (Preview(), ["FAIL"]),
    ],
)
def test_what_a_plan_says_of_source_and_memory(preview, levels):
    assert [finding.level for finding in storage.planned(preview)] == levels


# -- the cluster -------------------------------------------------------------------------------------------------------------------


def test_an_entry_is_compared_with_this_machine(spec, monkeypatch, tmp_path):
    good = {"kind": "ssh", "interface": "lo", "groups": {"all": {"hosts": ["a"]}}}
    assert [(f.level, f.what) for f in check_cluster.entry("x", spec(**good))] == [
        ("ok", "cluster x"),
        ("ok", "interface"),
        ("note", "encryption"),
    ]
    _, found, _ = check_cluster.entry("x", spec(**good | {"interface": "none0"}))
    assert found.level == "FAIL"
    assert found.found == "none0 does not exist on this machine, where the scheduler would be"
    assert "lo" in found.remedy
    monkeypatch.setenv("PATH", str(tmp_path))
    first, *_ = check_cluster.entry("x", spec(kind="slurm", groups={"all": {"memory": "1 GiB"}}))
    assert first.level == "FAIL"
    assert "there is no sbatch on this machine's PATH" in first.found


def test_a_log_folder_that_cannot_be_written_is_a_failure(spec, small_disk):
    folder = small_disk("size=1m")
    jobs = {"kind": "slurm", "groups": {"all": {"memory": "1 GiB"}}}
    *_, found = check_cluster.entry("x", spec(**jobs, log_folder=str(folder / "logs")))
    assert found.level == "ok"
    remount_read_only(folder)
    *_, found = check_cluster.entry("x", spec(**jobs, log_folder=str(folder / "logs")))
    assert (found.level, found.found) == ("FAIL", f"{folder / 'logs'} cannot be written, in {folder}")


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Scripts stand for the commands of batch systems, most of which cannot run here; nothing else is on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**scripts: str) -> None:
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)

    return make


def test_a_batch_system_is_asked_for_its_queue(spec, commands):
    jobs = spec(kind="slurm", queue="gpu", groups={"all": {"memory": "1 GiB"}})
    assert only(jobs.look_there()).found == "there is no sbatch on the PATH"
    commands(sbatch="", scancel="")
    assert only(jobs.look_there()).found == "squeue: [Errno 2] No such file or directory: 'squeue'"
    commands(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    found = only(jobs.look_there())
    assert (found.level, found.found) == ("FAIL", "squeue: slurm_load_jobs error: Unable to contact slurm controller")
    commands(squeue="for said in 'error: no host' 'error: no host' 'fatal: no file'; do echo squeue: $said >&2; done; exit 1")
    assert only(jobs.look_there()).found == "squeue: no host; no file"
    with pytest.raises(
        FeaturemapsError, match=r"\(no host; no file\): nothing was started; check that this machine is a login node, or"
    ):
        jobs.take_back("name")
    commands(squeue="exit 0", sinfo="echo short; echo long")
    answers, queue = check_cluster.can_be_reached(jobs)
    assert (answers.level, answers.found) == ("ok", "squeue answers")
    assert (queue.level, queue.remedy) == ("FAIL", "set queue to one of long, short")
    commands(sinfo="echo gpu; echo cpu")
    assert only(jobs.look_there()).level == "ok"
    several = jobs.model_copy(update={"queue": "gpu,cpu"})
    assert only(several.look_there()).level == "ok"
    _, queue = several.model_copy(update={"queue": "gpu,none"}).look_there()
    assert queue.found == "Slurm has no partition none"
    commands(condor_submit="", condor_rm="", condor_q="exit 3")
    found = only(spec(kind="htcondor", groups={"all": {"memory": "1 GiB"}}).look_there())
    assert found.found == "condor_q: exit code 3"


@pytest.fixture
def ssh_server(tmp_path):
    """An ssh server of asyncssh: real in what it speaks, with keys of its own, and it runs what it is asked to."""
    key, host_key = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    key.write_private_key(tmp_path / "key")
    (tmp_path / "authorized").write_bytes(key.export_public_key())
    port = free_port()
    (tmp_path / "hosts").write_text(f"[127.0.0.1]:{port} {host_key.export_public_key().decode()}")
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def handle(process):
        done = await asyncio.create_subprocess_shell(process.command, stdout=-1, stderr=-1)
        out, err = await done.communicate()
        process.stdout.write(out.decode())
        process.stderr.write(err.decode())
        process.exit(done.returncode)

    async def serve():
        options = {"server_host_keys": [host_key], "authorized_client_keys": str(tmp_path / "authorized")}
        await asyncssh.listen("127.0.0.1", port, process_factory=handle, **options)
        ready.set()

    def work():
        asyncio.set_event_loop(loop)
        loop.create_task(serve())
        loop.run_forever()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert ready.wait(900)
    yield {"hosts": ["127.0.0.1"], "port": port, "key_file": "key", "known_hosts_file": "hosts", "user": "me"}
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def test_hosts_are_asked_who_they_are(ssh_server, spec, tmp_path):
    def ask(python=sys.executable, **changes):
        return only(check_cluster.can_be_reached(spec(kind="ssh", python=str(python), groups={"all": ssh_server | changes})))

    assert ask().level == "ok"
    assert ask().found.startswith("python 3.")
    old = tmp_path / "old-python"
    old.write_text(
        f"#!/bin/sh\necho 'Welcome!'\necho '{json.dumps(own_versions() | {'python': '3.9', 'distributed': '2020.1.0'})}'"
    )
    old.chmod(0o755)
    found = ask(old)
    assert found.level == "FAIL"
    assert found.found.startswith("python 3.9 instead of 3.")
    assert "distributed 2020.1.0 instead of 20" in found.found
    found = ask(tmp_path / "none")
    assert found.level == "FAIL"
    assert "does not run featuremaps there" in found.found
    (tmp_path / "stranger").write_bytes((tmp_path / "key").read_bytes())
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(tmp_path / "stranger")
    assert "Permission denied" in ask(key_file="stranger").found
    closed = free_port()
    found = ask(port=closed)
    assert found.level == "FAIL"
    assert "Connect call failed" in found.found
    assert "make `ssh 127.0.0.1` work without a password" in found.remedy


def test_kubernetes_is_asked_for_its_version_and_clusters(kubernetes_operator, spec):
    """Against the stand-in for its API."""
    pods = spec(kind="kubernetes", image="i", groups={"all": {"memory": "1 GiB"}})
    assert [finding.found for finding in check_cluster.can_be_reached(pods)] == ["v1.33.0", "0 in namespace default"]
    kubernetes_operator.lacks_operator_kinds = True
    _, found = check_cluster.can_be_reached(pods)
    assert found.level == "FAIL"
    assert "install the operator" in found.remedy
    kubernetes_operator.is_allowed = False
    found = only(check_cluster.can_be_reached(pods))
    assert found.level == "FAIL"
    assert found.found.startswith("it does not answer (ServerError: ")


# -- its workers -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def running():
    """A cluster inside this process, as somebody else may have started it."""
    clusters = []

    def start(n_workers=1, **resources):
        options = {"threads_per_worker": 1, "processes": False, "dashboard_address": "127.0.0.1:0", "protocol": "tcp"}
        clusters.append(LocalCluster(n_workers=n_workers, resources=resources, **options))
        return AddressSpec(kind="address", address=clusters[-1].scheduler_address)

    yield start
    for cluster in clusters:
        cluster.close()


ALL = {"read": 2, "extract": 1, "write": 1}


def levels(findings) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings}


def test_a_scheduler_that_runs_is_asked_for_its_workers(running, tmp_path):
    found = list(workers.started(running(**ALL), tmp_path / "f.zarr"))
    assert levels(found) == {"workers": "ok", "roles": "ok", "versions of 1 worker": "ok", "store from workers": "ok"}
    assert "2 batches are read at once, 1 extracted" in [finding.found for finding in found]
    assert not list(tmp_path.iterdir())


def test_workers_that_lack_roles_gpus_or_versions_are_found(running, monkeypatch):
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 0)
    monkeypatch.setattr("pipeline.run.worker_versions.own_versions", lambda: own_versions() | {"zarr": "9.9"})
    assert levels(workers.started(running(**ALL, gpu=1), None)) == {
        "workers": "ok",
        "roles": "ok",
        "versions of 1 worker": "FAIL",
        "GPUs of workers": "FAIL",
    }
    found = list(workers.started(running(read=1), None))
    assert levels(found) == {"workers": "ok", "roles": "FAIL", "versions of 1 worker": "FAIL"}
    found = list(workers.started(running(n_workers=0), None))
    assert levels(found)["workers"] == "FAIL"


def test_a_worker_that_hangs_is_found_and_not_waited_for(running, monkeypatch):
    """In one process a worker hangs whatever it is asked; `ask` is given less patience, and the rest is real."""
    monkeypatch.setattr(admission, "ANSWER_S", 0.5)
    monkeypatch.setattr(workers, "asking_for_versions", lambda: lambda: time.sleep(3))
    found = {finding.what: finding for finding in workers.started(running(**ALL), None)}
    assert found["answers of workers"].level == "FAIL"
    assert found["answers of workers"].found.startswith("1 of 1 workers gave no answer; ")


@pytest.fixture
def waiting_jobs(commands, tmp_path, monkeypatch):
    """Scripts stand for a Slurm whose jobs wait for ever; what was taken back is in a file."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    taken_back = tmp_path / "taken back"
    commands(
        sbatch="echo Submitted batch job 7", scancel=f"echo $@ >>'{taken_back}'", squeue="echo '7|x|PENDING|Resources'", sinfo=""
    )
    return taken_back


def test_workers_that_do_not_come_are_waited_for_two_minutes_at_most(waiting_jobs, spec, monkeypatch):
    assert workers.MAX_WAIT_S == 120
    monkeypatch.setattr(workers, "MAX_WAIT_S", 1.0)
    lines = []
    jobs = spec(kind="slurm", interface="lo", start_timeout_s=3600, groups={"all": {"memory": "1 GiB"}})
    found = only(workers.started(jobs, None, on_wait=lines.append))
    assert "no worker of group 'all' came within 1 s" in found.found
    assert "all: 0 of 1 worker" in lines[0]
    assert waiting_jobs.read_text().split()[-1] == "7"


def test_a_doctor_that_is_asked_to_end_takes_its_jobs_back(waiting_jobs, spec, tmp_path):
    spec(kind="slurm", interface="lo", groups={"all": {"memory": "1 GiB"}})
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "doctor",
        "--cluster",
        "x",
        "--start",
        "--cluster-file",
        tmp_path / "cluster.yaml",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "waiting for workers (all: 0 of 1 worker; all-0: job 7 (x) PENDING: Resources" in line:
            break
    process.terminate()
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "FAIL  starting: stopped while waiting for workers" in out
    assert waiting_jobs.read_text().split()[-1] == "7"


def test_a_scheduler_that_does_not_answer_is_a_failure(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.kinds.address.CONNECT_TIMEOUT_S", 0.2)
    found = only(workers.started(AddressSpec(kind="address", address=f"tcp://127.0.0.1:{free_port()}"), None))
    assert (found.level, found.what) == ("FAIL", "scheduler")
    assert "no Dask scheduler answers at" in found.found


@pytest.mark.cluster
def test_a_worker_that_has_another_disk_of_the_same_name_is_found(running, small_disk, tmp_path):
    """The worker lives in a namespace of its own, in which another file system is mounted over the store's folder."""
    small_disk("size=1m")  # says what to do where nothing may be mounted
    folder = tmp_path / "store"
    folder.mkdir()
    spec = running(n_workers=0)
    dask = Path(sys.executable).with_name("dask")
    worker = f"exec {dask} worker {spec.address} --no-nanny --nthreads 1 --resources 'read=1 extract=1 write=1' --no-dashboard"
    command = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs {folder} && {worker}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        from distributed import Client

        with Client(spec.address) as client:
            client.wait_for_workers(1, timeout=900)
        found = {finding.what: finding for finding in workers.started(spec, folder / "f.zarr")}
    finally:
        process.terminate()
        process.wait()
    assert found["store from workers"].level == "FAIL"
    assert found["store from workers"].found.endswith(f"do not see {folder} (No such file or directory)")


# -- all of it ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def doctor(monkeypatch, capfd):
    """Call the command as a shell would: exit code and what it printed."""

    def call(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["featuremaps", "doctor", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capfd.readouterr().out

    return call


@pytest.mark.cluster
def test_a_job_on_this_machine_is_looked_at_from_source_to_workers(doctor, tmp_path, monkeypatch):
    make_images(tmp_path / "photos", 4, [(40, 50)])
    (tmp_path / "job.yaml").write_text("{source: photos, store: features.zarr, cluster: two}")
    (tmp_path / "cluster.yaml").write_text("clusters: {two: {kind: local, groups: {all: {workers: 2, memory: 2 GiB}}}}")
    code, out = doctor(tmp_path / "job.yaml", "--cluster-file", tmp_path / "cluster.yaml", "--start", "--json")
    document = json.loads(out)
    found = {finding["what"]: finding for finding in document["findings"]}
    assert code == 0, document
    assert document["is_well"]
    assert found["source"]["found"] == "4 images listed, 4 to compute, 0 to reject"
    assert found["group all"]["found"] == "all of 2 workers are there"
    assert found["store from workers"]["level"] == "ok"
    assert not (tmp_path / "features.zarr").exists()


def test_what_fails_makes_the_exit_code_1_and_hides_nothing_else(doctor, tmp_path):
    code, out = doctor(tmp_path / "f.zarr", "--cluster", "x", "--cluster-file", tmp_path / "none.yaml")
    lines = out.splitlines()
    assert code == 1
    assert [line for line in lines if line.startswith("FAIL")] == [line for line in lines if "cluster x: cluster 'x'" in line]
    assert any(line.startswith("ok    store: ") for line in lines)


def test_a_batch_system_is_asked_although_the_interface_is_wrong(spec, commands, tmp_path):
    spec(kind="slurm", queue="gpu", interface="none0", groups={"all": {"memory": "1 GiB"}})
    commands(sbatch="", scancel="", squeue="", sinfo="echo short")
    found = diagnose(cluster="x", cluster_file=tmp_path / "cluster.yaml", start=True).findings
    assert [finding.what for finding in found if finding.level == "FAIL"] == ["interface", "queue"]  # and nothing was started


def test_a_source_that_is_not_there_is_a_failure(tmp_path):
    (tmp_path / "job.yaml").write_text("{source: photos, store: features.zarr}")
    from pipeline.config import load_job

    found = {finding.what: finding for finding in diagnose(load_job(tmp_path / "job.yaml", {})).findings}
    assert found["source"].level == "FAIL"
    assert "does not exist or cannot be reached" in found["source"].found
    assert found["space"].level == "ok"
