"""Job scripts of every batch system: as they were when they were looked at, and what they run, run by a shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pipeline.cluster.batch_workers import job_script
from pipeline.cluster.config import load_cluster
from pipeline.cluster.kinds.batch import BatchSpec
from pipeline.cluster.spec import TlsSpec
from pipeline.errors import UsageError

GOLDEN = Path(__file__).parents[2] / "golden" / "scripts"
KINDS = ("slurm", "pbs", "sge", "htcondor")
OPTIONS = {
    "slurm": ["--constraint=a100"],
    "pbs": ["-W group_list=maps"],
    "sge": ["-l gpu_type=a100,gpu=1"],
    "htcondor": ["requirements = (GPUs_Capability >= 8.0)", '+ProjectName = "maps"'],
}


def spec(kind: str, **changes) -> BatchSpec:
    groups = {
        "read": {
            "roles": ["read"],
            "workers": 4,
            "threads": 2,
            "memory": "4 GiB",
            "environment": {"NOTE": 'it\'s "$(id)" & more'},
        },
        "extract": {"roles": ["extract"], "workers": 2, "threads": 1, "gpus": 1, "memory": "16 GiB", "options": OPTIONS[kind]},
    }
    values = {"kind": kind, "groups": groups, "account": "maps", "walltime": "8:00:00", "interface": "ib0"}
    values |= {"python": "/opt/featuremaps/bin/python", "log_folder": "/home/me/featuremaps-logs", "local_folder": "/scratch"}
    values |= {} if kind == "htcondor" else {"queue": "gpu"}
    if kind == "slurm":
        values |= {
            "prologue": ["module load cuda"],
            "tls": TlsSpec(ca_file="/tls/ca.pem", cert="/tls/cert.pem", key="/tls/key.pem"),
        }
    return BatchSpec(**values | changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", ["read", "extract"])
def test_scripts_are_those_that_were_looked_at(kind, group):
    assert job_script(spec(kind), group, "featuremaps-12345678") == (GOLDEN / f"{kind}-{group}.txt").read_text()


def condor_arguments(text: str) -> list[str]:
    """What HTCondor makes of ``Arguments = "..."``, by its manual: doubled quotes stand for one, single ones keep words together."""
    text = text.removeprefix('"').removesuffix('"').replace('""', '"').replace("$(DOLLAR)", "$")
    words, quoted, i = [""], False, 0
    while i < len(text):
        if text[i] == "'" and quoted and text[i : i + 2] == "''":
            words[-1] += "'"
            i += 1
        elif text[i] == "'":
            quoted = not quoted
        elif text[i] == " " and not quoted:
            words.append("")
        else:
            words[-1] += text[i]
        i += 1
    return words


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_scripts_run_gets_its_arguments_and_variables_whole(tmp_path, kind):
    """The interpreter is one that says what it was given; the lines that are the batch system's are comments to a shell."""
    said, python = tmp_path / "said.json", tmp_path / "python"
    lines = [
        f"#!{sys.executable}",
        "import json, os, sys",
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(said)!r}, 'w'))",
    ]
    python.write_text("\n".join(lines))
    python.chmod(0o755)
    prologue = ["PROLOGUE=$(echo done)", "export PROLOGUE"]
    script = job_script(spec(kind, python=str(python), tls=None, prologue=prologue), "read", "x")
    command = ["bash", "-c", script]
    if kind == "htcondor":
        (line,) = (line for line in script.splitlines() if line.startswith("Arguments = "))
        assert "$(echo" not in line, "HTCondor would take it for a macro of its own"
        command = ["/bin/sh", *condor_arguments(line.removeprefix("Arguments = "))]
    subprocess.run(command, check=True, env={"PATH": os.environ["PATH"]}, timeout=900)
    arguments, environment = json.loads(said.read_text())
    assert arguments[:5] == ["-m", "distributed.cli.dask_worker", "tcp://DRIVER:PORT", "--name", "read-0"]
    options = dict(pairwise(arguments))
    assert (options["--resources"], options["--nthreads"], options["--memory-limit"]) == ("read=2", "2", "4.00GiB")
    assert (options["--lifetime"], options["--lifetime-stagger"], options["--interface"]) == ("28200s", "200s", "ib0")
    assert options["--local-directory"] == "/scratch"
    assert {"--nanny", "--no-dashboard"} < set(arguments)
    assert environment["NOTE"] == 'it\'s "$(id)" & more'
    assert environment["PROLOGUE"] == "done"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE"] == "0.85"


def test_without_a_walltime_an_hour_is_asked_for_and_the_worker_retires_before():
    """Dask-jobqueue would ask for half an hour, at whose end the worker would be killed at its work."""
    values = spec("slurm").model_dump(exclude={"walltime", "kind"})
    script = job_script(BatchSpec(kind="slurm", **values), "read", "x")
    assert "#SBATCH -t 01:00:00\n" in script
    assert "--lifetime 3000s --lifetime-stagger 200s" in script


def test_a_script_leaves_no_folder_behind(tmp_path):
    job_script(spec("slurm", log_folder=str(tmp_path / "logs")), "read", "x")
    assert not (tmp_path / "logs").exists()


def test_resources_that_options_name_are_not_asked_for_twice():
    lines = ["-S /bin/zsh", "-pe threaded 2", "-l h_vmem=8G"]
    groups = {"all": {"memory": "4 GiB", "threads": 2, "gpus": 1, "options": lines}}
    directives = [line for line in job_script(spec("sge", groups=groups), "all", "x").splitlines() if line.startswith("#$ -")]
    assert directives[-4:] == ["#$ -l gpu=1", *(f"#$ {line}" for line in lines)]
    assert not [line for line in directives if "smp" in line or "mem_free" in line or "bash" in line]


def test_a_queue_whose_name_has_gpu_or_mem_in_it_asks_for_neither():
    groups = {"all": {"memory": "4 GiB", "gpus": 1, "options": ["-q gpu.q@himem"]}}
    directives = job_script(spec("sge", groups=groups), "all", "x").splitlines()
    assert {"#$ -l mem_free=4096M", "#$ -l gpu=1", "#$ -q gpu.q@himem"} <= set(directives)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"options": ["requirements"]},
            r"option 'requirements' is not a line of an HTCondor submit file: write it as 'key = value'",
        ),
        ({"queue": "long"}, r"HTCondor has no queues, and queue is 'long': say which machines in options"),
    ],
)
def test_what_htcondor_would_not_understand_is_refused_before_anything_starts(tmp_path, changes, expected):
    group = {"memory": "1 GiB", "options": changes.get("options", [])}
    entry = {"kind": "htcondor", "queue": changes.get("queue"), "groups": {"all": group}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"x": entry}}))
    with pytest.raises(UsageError, match=expected):
        load_cluster("x", tmp_path / "cluster.yaml")
