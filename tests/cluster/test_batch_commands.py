"""What batch systems say of jobs; scripts stand for the commands, which print what those of the real ones do, as far as is known."""

from __future__ import annotations

import asyncio
import subprocess
from types import SimpleNamespace

import pytest

from pipeline.cluster import batch_commands
from pipeline.cluster.batch_workers import batch_job_class

TABLE = """Job id            Name             User              Time Use S Queue
----------------  ---------------- ----------------  -------- - -----
1.head            maps             me                00:00:00 R workq
2.head            maps             me                       0 Q workq
3.head            maps             me                00:01:00 C workq"""
CUT = TABLE.replace("1.head ", "1.hea* ")
UNKNOWN = "qstat: Unknown Job Id 4.head.example.org"
DETAILS = """==============================================================
job_number:                 1
job_name:                   maps
job_state             1:    r
==============================================================
job_number:                 2
scheduling info:            (Collecting of scheduler job information is turned off)"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Make a command that prints, says, ends with a code, and counts its calls."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(name: str, out: str = "", said: str = "", code: int = 0) -> None:
        (tmp_path / "out").write_text(out)
        (tmp_path / "said").write_text(said)
        lines = ["#!/bin/sh", f'echo "$@" >>{tmp_path}/calls', f"cat {tmp_path}/out", f"cat {tmp_path}/said >&2", f"exit {code}"]
        (tmp_path / name).write_text("\n".join(lines))
        (tmp_path / name).chmod(0o755)
        (tmp_path / "calls").write_text("")

    make.calls = lambda: (tmp_path / "calls").read_text().splitlines()
    return make


@pytest.mark.parametrize(
    ("kind", "name", "said", "code"),
    [
        ("pbs", "qstat", "qstat: cannot connect to server head (errno=15034)", 122),
        ("pbs", "qstat", "", 1),
        ("pbs", "qstat", f"{UNKNOWN}\nConnection refused\nqstat: cannot connect to server other", 111),
        ("sge", "qstat", "error: commlib error: got select error (Connection refused)", 1),
        ("htcondor", "condor_q", "Error: Couldn't contact the condor_collector", 1),
        ("slurm", "squeue", "slurm_load_jobs error: Unable to contact slurm controller", 1),
    ],
)
def test_a_batch_system_that_does_not_answer_has_lost_no_jobs(command, kind, name, said, code):
    command(name, said=said, code=code)
    with pytest.raises(subprocess.CalledProcessError) as failed:
        batch_commands.queue(kind, ["1", "4"])
    assert batch_commands.said(failed.value).startswith(" ".join(said.split()))
    job = SimpleNamespace(job_id="1", state="as before")
    assert asyncio.run(batch_job_class(kind).find_gone({"all-0": job})) == {}
    assert job.state == "as before"


@pytest.mark.parametrize(("table", "said", "code"), [(TABLE, UNKNOWN, 153), (CUT, UNKNOWN, 153), (TABLE, "", 0)])
def test_pbs_is_asked_once_for_all_jobs_and_those_that_have_ended_are_gone(command, table, said, code):
    command("qstat", table, said, code)
    found = batch_commands.queue("pbs", ["1.head.example.org", "2.head.example.org", "3.head.example.org", "4.head.example.org"])
    assert {job_id: job.state for job_id, job in found.items()} == {"1.head.example.org": "R", "2.head.example.org": "Q"}
    assert len(command.calls()) == 1


@pytest.mark.parametrize(
    ("said", "code"), [(UNKNOWN, 153), ("", 153), ("", 35), ("qstat: 4.head Job has finished, use -x or -H to obtain it", 35)]
)
def test_words_and_codes_of_pbs_that_mean_that_a_job_is_gone(command, said, code):
    command("qstat", "", said, code)
    assert batch_commands.queue("pbs", ["4.head"]) == {}


def test_grid_engine_is_asked_once_for_all_jobs(command):
    command("qstat", DETAILS)
    assert {job_id: job.state for job_id, job in batch_commands.queue("sge", ["1", "2"]).items()} == {"1": "r", "2": ""}
    command("qstat", DETAILS, "Following jobs do not exist: \n3\n4\n", 1)
    assert set(batch_commands.queue("sge", ["1", "2", "3", "4"])) == {"1", "2"}
    assert command.calls() == ["-j 1,2,3,4"]


def test_htcondor_is_asked_once_for_all_jobs_and_one_that_is_held_is_gone_with_its_reason(command):
    command("condor_q", "1 0 2 undefined\n2 0 1 undefined\n3 0 5 Cannot open /data/in: no such file")
    assert {job_id: job.state for job_id, job in batch_commands.queue("htcondor", ["1.0", "2", "3.0", "4.0"]).items()} == {
        "1.0": "running",
        "2": "idle",
    }
    assert len(command.calls()) == 1
    jobs = {
        f"all-{i}": SimpleNamespace(job_id=f"{i}.0", state="", log_directory="/nowhere", job_name="maps") for i in (1, 2, 3, 4)
    }
    assert asyncio.run(batch_job_class("htcondor").find_gone(jobs)) == {
        "all-3": "job 3.0 held: Cannot open /data/in: no such file",
        "all-4": "job 4.0 has left the queue",
    }


def test_slurm_is_asked_for_the_jobs_of_who_asks_whatever_the_environment_says(command, monkeypatch):
    monkeypatch.setenv("LOGNAME", "somebody-else")
    command("squeue", "1|maps|PENDING|Resources\n2|maps|COMPLETING|None")
    assert set(batch_commands.queue("slurm", ["1", "2"])) == {"1"}
    assert command.calls() == ["--noheader --me --format=%i|%j|%T|%r"]
