"""The services that the tests of clusters stand on do what those tests take for granted."""

from __future__ import annotations

import os
import sys

import psutil
import pytest

from tests.support.batch_services import _environment_of, runs, slurm, sshd, wait_for

pytestmark = pytest.mark.cluster


def test_slurm_runs_jobs_on_its_gpus_requeues_preempts_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEN", "by jobs")
    with slurm(tmp_path / "slurm", kill_wait_s=1) as batch:
        assert batch.command("sinfo", "--noheader", "-o", "%P %t %G").splitlines() == [
            "debug* idle gpu:2",
            "preempting idle gpu:2",
        ]

        script = "echo gpu=$CUDA_VISIBLE_DEVICES; echo $SEEN; python -c 'import sys; print(sys.executable)'; sleep 1000"
        jobs = [batch.submit("--gres=gpu:1", "--job-name=one", script=script) for _ in range(2)]
        for job in jobs:
            batch.wait_until(job, "RUNNING")
            wait_for("output of a job", lambda job=job: len(batch.output(job).splitlines()) == 3)
        first, second = (batch.output(job).splitlines() for job in jobs)
        assert {first[0], second[0]} == {"gpu=0", "gpu=1"}
        assert first[1:] == ["by jobs", sys.executable]
        batch.cancel(jobs[0])
        wait_for("end of the cancelled job", lambda: [job.id for job in batch.squeue()] == [jobs[1]])
        batch.cancel()
        batch.wait_until_idle()

        low = batch.submit("--exclusive", script="trap 'exit 0' TERM; sleep 1000")
        batch.wait_until(low, "RUNNING")
        high = batch.submit("--exclusive", "--partition=preempting", script="sleep 1000")
        batch.wait_until(high, "RUNNING")
        waiting = batch.job(low)
        assert waiting is not None
        assert (waiting.state, waiting.restarts) == ("PENDING", 1)
        batch.cancel(high)
        batch.wait_until(low, "RUNNING")
        wait_for("process of the job", lambda: runs(batch.processes(), "sleep 1000"))
        steps = batch.processes()
    assert not batch.processes()
    assert not [process for process in steps if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_ssh_server_is_known_is_killed_with_its_sessions_and_comes_back(tmp_path):
    with sshd(tmp_path / "ssh") as server:
        assert server.ssh("echo $SSH_CONNECTION; echo hello").stdout.splitlines()[1] == "hello"

        server.ssh(f"setsid {sys.executable} -c 'import time; time.sleep(1000)' >{tmp_path}/out 2>&1 </dev/null &")
        wait_for("process of a session", lambda: runs(server.processes(), "time.sleep"))
        server.kill()
        assert not server.processes()
        assert "Connection refused" in server.ssh("true").stderr
        server.start()
        assert server.ssh("true").returncode == 0

        server.known_hosts.write_text("")
        assert "Host key verification failed" in server.ssh("true").stderr
    assert server.ssh("true").returncode == 255


def test_waiting_ends_with_the_log():
    with pytest.raises(AssertionError, match="within 0 s there was no unicorn: the log"):
        wait_for("unicorn", lambda: False, 0, lambda: ": the log")
    assert f"HOME={os.environ['HOME']}" in _environment_of(os.getpid())
