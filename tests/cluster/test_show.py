from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from distributed.core import Status

from pipeline.cluster import show as show_cluster
from pipeline.cluster.batch_workers import job_script
from pipeline.cluster.config import load_cluster
from pipeline.cluster.kinds.address import AddressSpec
from pipeline.cluster.kinds.batch import BatchGroupSpec, BatchSpec, DriverSpec
from pipeline.cluster.kinds.kubernetes import KubernetesGroupSpec, KubernetesSpec
from pipeline.cluster.kinds.local import CudaSpec, LocalSpec
from pipeline.cluster.kinds.ssh import SshGroupSpec, SshSpec
from pipeline.cluster.kubernetes_manifests import manifests
from pipeline.cluster.show import JOB_NAME, list_clusters
from pipeline.cluster.ssh_workers import ssh_launches
from pipeline.errors import UsageError

REPOSITORY_FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def show(tmp_path):
    def call(**entry) -> str:
        (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"x": entry}}, sort_keys=False))
        return show_cluster.show_cluster("x", tmp_path / "cluster.yaml")

    return call


def test_processes_of_this_machine_are_listed_with_what_they_offer(show):
    groups = {
        "read": {"roles": ["read"], "workers": 2, "memory": "1.5 GiB"},
        "extract": {"roles": ["extract"], "threads": 3, "memory": "4 GiB"},
    }
    assert show(kind="local", groups=groups).splitlines() == [
        "# processes of this machine",
        "read-0: 1 thread, 1.5 GiB of memory, no GPU, resources read=1",
        "read-1: 1 thread, 1.5 GiB of memory, no GPU, resources read=1",
        "extract-0: 3 threads, 4.0 GiB of memory, no GPU, resources extract=3 write=3",
    ]


def test_each_gpu_has_processes_of_its_own(show, monkeypatch):
    """Stands for a machine with two GPUs."""
    monkeypatch.setattr("pipeline.cluster.local.local_gpus", lambda wanted: 2 if wanted is None else wanted)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    share = 0.9 * psutil.virtual_memory().total / 2 / 2**30
    assert show(kind="cuda", workers=6).splitlines()[1:] == [
        f"local-{i}: 3 threads, {share:.1f} GiB of memory, GPU {i}, resources read=3 extract=3 write=3 gpu=1" for i in range(2)
    ]
    groups = {"a": {"workers": 3, "gpus": 1, "processes_per_gpu": 2, "memory": "1 GiB"}}
    shared = [show(kind="cuda", workers=6, processes_per_gpu=3, memory="1 GiB"), show(kind="local", groups=groups)]
    found = [re.findall(r"GPU (\d), .* gpu=(\S+)", text) for text in shared]
    assert found == [[(str(i % 2), "0.3333") for i in range(6)], [("0", "0.5"), ("1", "0.5"), ("0", "0.5")]]


def test_gpus_that_are_not_there_are_refused_as_a_run_would(show, monkeypatch):
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 0)
    with pytest.raises(UsageError, match=r"2 GPUs were asked for, and this installation of torch sees 0"):
        show(kind="cuda", gpus=2)


def test_of_a_scheduler_that_runs_the_address_is_said(show):
    assert show(kind="address", address="tcp://a:1") == "# a scheduler that runs already; nothing is launched\ntcp://a:1"


def test_scripts_manifests_and_secrets(tmp_path, monkeypatch):
    """Scripts and manifests are those that would be handed in, but for variables that sound like a secret."""
    monkeypatch.setenv("THE_KEY", "hush")
    group = {"memory": "1 GiB", "environment": {"AWS_SECRET_ACCESS_KEY": "${THE_KEY}", "REGION": "north"}}
    clusters = {
        "pods": {"kind": "kubernetes", "image": "i", "groups": {"all": group, "more": {"memory": "1 GiB"}}},
        "jobs": {"kind": "slurm", "groups": {"all": group, "more": {"memory": "1 GiB", "workers": 3}}},
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"clusters": clusters}))
    pods, jobs = (show_cluster.show_cluster(name, path) for name in ("pods", "jobs"))
    assert list(yaml.safe_load_all(pods.replace("HIDDEN", "hush"))) == manifests(load_cluster("pods", path), JOB_NAME)
    assert "# group more: 3 of these are submitted with sbatch\n" in jobs
    assert job_script(load_cluster("jobs", path), "all", JOB_NAME).replace("hush", "HIDDEN") in jobs
    assert "REGION=north" in jobs
    assert not (tmp_path / "featuremaps-logs").exists()


def test_ssh_commands_run_what_the_driver_would(show, tmp_path):
    key, hosts = tmp_path / "key", tmp_path / "hosts"
    own = {"port": 2222, "user": "me", "key_file": "key", "known_hosts_file": "hosts", "gpus": 1, "memory": "1 GiB"}
    first, second, third = show(
        kind="ssh", groups={"a": {"hosts": ["x y"], "workers": 2} | own, "b": {"hosts": ["z"]}}
    ).splitlines()[1:]
    words = shlex.split(second)
    assert words[:-1] == ["ssh", "-p", "2222", "-l", "me", "-o", f"UserKnownHostsFile={hosts}", "-i", str(key), "x y"]
    assert "CUDA_VISIBLE_DEVICES=0" in first
    assert "CUDA_VISIBLE_DEVICES=1" in second
    assert shlex.split(third)[:2] == ["ssh", "z"]
    launch = ssh_launches(load_cluster("x", tmp_path / "cluster.yaml"))["a-1"]
    worker = launch.cls("tcp://DRIVER:PORT", name="a-1", **launch.options)
    assert words[-1] == f"exec {worker.command}"
    assert worker.status is Status.created, "not started"


def test_groups_that_share_a_host_have_gpus_of_their_own(show):
    own = {"hosts": ["x", "y"], "memory": "1 GiB"}
    groups = {"a": own | {"gpus": 1, "workers": 2}, "b": own | {"gpus": 2}, "c": own | {"gpus": 1, "port": 2222}, "d": own}
    lines = show(kind="ssh", groups=groups).splitlines()[1:]
    given = [word.removeprefix("CUDA_VISIBLE_DEVICES=") for line in lines for word in line.split() if "CUDA_VIS" in word]
    assert given == ["0", "1", "0", "1", "2,3", "2,3", "0", "0", "", ""]  # another port is another machine


def test_the_list_says_kind_and_groups_and_what_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 0)
    group = {"roles": ["read", "extract"], "workers": 2, "threads": 4, "gpus": 1, "memory": "1 GiB"}
    clusters = {
        "here": {"kind": "local", "workers": 2, "gpus": 0},
        "there": {"kind": "address", "address": "tcp://a:1"},
        "jobs": {"kind": "slurm", "groups": {"all": group}},
        "lab": {"kind": "ssh", "groups": {"all": {"hosts": ["a", "b"], "workers": 3}}},
        "gpus": {"kind": "cuda"},
        "wrong": {"kind": "locl"},
        "unset": {"kind": "address", "address": "${NO_SUCH_VARIABLE}"},
        "odd": 5,
    }
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({"clusters": clusters}, sort_keys=False))
    lines = list_clusters(path).splitlines()
    assert lines[0] == "here   local    local: 2 workers, 1 thread each, read and extract"
    assert lines[1] == "there  address  tcp://a:1"
    assert lines[2].startswith(
        "jobs   slurm    all: 2 workers, 4 threads each, 1 GPU each, read and extract; NOT USABLE HERE: it is of kind slurm"
    )
    assert lines[3] == "lab    ssh      all: 3 workers on each of 2 hosts, 1 thread each, read and extract"
    assert lines[4].startswith("gpus   cuda     NOT USABLE HERE: 1 GPUs were asked for")
    assert lines[5].startswith("wrong  locl     NOT USABLE: ")
    assert "the environment has no 'NO_SUCH_VARIABLE'" in lines[6]
    assert lines[7].startswith("odd    ?        NOT USABLE: ")


def test_a_missing_extra_is_said_in_the_list(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.show.find_spec", lambda _: None)
    (tmp_path / "cluster.yaml").write_text("clusters: {lab: {kind: ssh, groups: {all: {hosts: [a]}}}}")
    assert "NOT USABLE HERE: asyncssh is not installed (pip install 'featuremaps[ssh]')" in list_clusters(
        tmp_path / "cluster.yaml"
    )


def test_without_a_file_there_is_this_machine(tmp_path):
    assert list_clusters(tmp_path / "cluster.yaml").startswith("local  local  this machine, without a cluster.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("clusters: [", r"cannot be read \(.*nothing is known of its clusters"),
        ("clusters: {}", "names no clusters: it needs the key"),
    ],
)
def test_a_file_without_clusters_is_refused(tmp_path, text, expected):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(UsageError, match=f"(?s){expected}"):
        list_clusters(tmp_path / "cluster.yaml")


def test_the_documentation_names_every_key():
    named = set(re.findall(r"`(\w+)`", (REPOSITORY_FILE.parent / "docs" / "clusters.md").read_text()))
    specs = (
        LocalSpec,
        CudaSpec,
        AddressSpec,
        BatchSpec,
        SshSpec,
        KubernetesSpec,
        BatchGroupSpec,
        SshGroupSpec,
        KubernetesGroupSpec,
        DriverSpec,
    )
    assert not {key for spec in specs for key in spec.model_fields} - named - {"kind"}


def test_the_commands_print_them(tmp_path, monkeypatch, capfd):
    from pipeline.cli import commands

    for arguments in (["list"], ["show", "lab"]):
        monkeypatch.setattr(sys, "argv", ["featuremaps", "cluster", *arguments, "--cluster-file", str(REPOSITORY_FILE)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        assert not ended.value.code
    out = capfd.readouterr().out
    assert "\nlab             ssh         desktops: 4 workers on each of 2 hosts" in out
    assert "\nssh alpha 'exec env " in out


def test_without_dask_jobqueue_the_settings_of_its_script_are_shown(show, monkeypatch):
    monkeypatch.setattr("pipeline.cluster.kinds.batch.find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "dask_jobqueue.htcondor", None)
    text = show(kind="slurm", queue="long", walltime="2:00:00", groups={"all": {"workers": 3, "threads": 2, "memory": "4 GiB"}})
    assert text.startswith(
        "# group all: 3 of these are submitted with sbatch\n# dask-jobqueue writes the script and is not installed (pip"
    )
    lines = text.splitlines()
    assert {"cores: 2", "queue: long", "walltime: 02:00:00", f"memory: {4 * 2**30} B"} <= set(lines)
