"""Handing a run in, and coming back: the batch systems' commands are stand-ins, small scripts that keep a queue in a file.

What a real Slurm does is in ``test_slurm.py``; PBS, Grid Engine and HTCondor are not to be had here.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from pipeline.api import run_job
from pipeline.cli.terminal import stop_on_signal
from pipeline.cluster.submit import clock, ending, next_attempt, record
from pipeline.cluster.submit.hand_in import adopt, submit
from pipeline.cluster.submit.inside_job import job_clock
from pipeline.cluster.submit.next_attempt import NextAttempt
from pipeline.cluster.submit.record import last_submission
from pipeline.cluster.submit.script import Order, driver_script
from pipeline.config import make_job
from pipeline.errors import EXIT_FAILED, EXIT_RUN_AGAIN, FeaturemapsError, StoreBusyError
from pipeline.store.create import prepare_folder
from pipeline.store.run_ids import next_number
from pipeline.store.store import receipt_ids
from tests.conftest import make_images
from tests.support.stuck_disk import mount_stuck
from tests.system.docs.test_scripts import condor_arguments

GOLDEN = Path(__file__).parents[1] / "golden" / "scripts"
KINDS = {"s": "slurm", "p": "pbs", "g": "sge", "c": "htcondor"}
COMMANDS = {
    "sbatch": """
echo $$ >> submitted
echo "$$|$(sed -n 's/.*--job-name=//p')|PENDING|None" >> queue
echo Submitted batch job $$""",
    "squeue": "cat queue",
    "scancel": ": > queue",
    "scontrol": 'echo "$@" >> requeued',
    "qsub": "cat > /dev/null; echo $$ >> submitted; echo $$.server",
    "qstat": """
if [ "$1" = -j ]; then echo "Following jobs do not exist:"; echo "$2"; exit 1; fi
for job in "$@"; do case $job in -*) ;; *) echo "qstat: Unknown Job Id $job" >&2 ;; esac; done
exit 153""",
    "qdel": ":",
}


FAILING = """
n=$(cat down-NAME 2>/dev/null || echo 0)
if [ $n -gt 0 ]; then
    echo $((n-1)) > down-NAME
    echo "cannot contact controller" >&2
    exit 1
fi"""
"""A file holds how often the command fails before it answers."""


class Commands:
    """The stand-ins, and what they were called for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "queue").touch()
        for name, body in COMMANDS.items():
            (folder / name).write_text(f"#!/bin/sh\ncd {folder}\n{FAILING.replace('NAME', name)}\n{body}\n")
            (folder / name).chmod(0o755)

    def fail(self, name: str, n: int) -> None:
        (self.folder / f"down-{name}").write_text(str(n))

    def queue(self, *lines: str) -> None:
        (self.folder / "queue").write_text("".join(f"{line}\n" for line in lines))

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def commands(tmp_path, monkeypatch):
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    monkeypatch.setattr(clock, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(clock, "PATIENCE_S", 2.0)
    monkeypatch.setattr(next_attempt, "VAIN_PAUSE_S", 0.01)
    monkeypatch.setattr(next_attempt, "KILLED_S", 0.2)
    return Commands(folder)


@pytest.fixture
def order(tmp_path):
    def make(cluster: str = "s", **changes) -> Order:
        entry = {"groups": {"all": {"memory": "1 GiB"}}, "walltime": f"{changes.pop('walltime', 3600)}s"}
        entry |= {"driver": changes.pop("driver", {})}
        (tmp_path / "cluster.yaml").write_text(
            yaml.safe_dump({"clusters": {name: {"kind": kind, **entry} for name, kind in KINDS.items()}})
        )
        job = make_job({"source": str(tmp_path / "pictures"), "store": str(tmp_path / "f.zarr"), "cluster": cluster})
        return Order(job, tmp_path / "job.yaml", tmp_path / "cluster.yaml", **changes)

    return make


@pytest.fixture
def attempt(commands):
    def make(order: Order, signalled: threading.Event | None = None) -> NextAttempt:
        said: list[str] = []
        made = NextAttempt(order, job_clock(order, signalled or threading.Event()), said.append)
        made.said = said
        made.begin()
        return made

    return make


def test_slurm_that_does_not_answer_for_a_moment_does_not_end_a_run(commands, order, attempt):
    prepare_folder(Path(order().job.store))
    commands.queue("7|x|RUNNING|None")
    commands.fail("squeue", 3)
    commands.fail("scontrol", 3)
    assert attempt(order()).come_back() == EXIT_RUN_AGAIN
    assert commands.lines("requeued") == ["requeue 7"]


@pytest.mark.parametrize("command", ["squeue", "scontrol"])
def test_slurm_that_does_not_answer_at_all_ends_it_with_a_message(commands, order, attempt, command):
    prepare_folder(Path(order().job.store))
    commands.queue("7|x|RUNNING|None")
    commands.fail(command, 10_000)
    tried = attempt(order())
    assert tried.come_back() == EXIT_FAILED
    assert "Slurm did not start another attempt" in tried.said[-1]
    assert "cannot contact controller" in tried.said[-1]
    assert "submit again to go on" in tried.said[-1]


def test_patience_ends_with_the_walltime(commands, order, attempt, monkeypatch):
    monkeypatch.setattr(clock, "PATIENCE_S", 10_000.0)
    monkeypatch.setattr(clock, "LONGEST_PAUSE_S", 0.1)
    commands.fail("squeue", 10_000)
    assert attempt(order(walltime=6)).come_back() == EXIT_FAILED


def test_a_job_that_is_taken_back_is_not_put_back(commands, order, attempt):
    tried = attempt(order())
    assert tried.come_back() == EXIT_RUN_AGAIN
    assert "Slurm is ending job 7" in tried.said[-1]
    assert not commands.lines("requeued")


def test_a_requeued_job_ends_as_soon_as_it_is_told(commands, order, attempt, monkeypatch):
    monkeypatch.setattr(next_attempt, "KILLED_S", 1000.0)
    prepare_folder(Path(order().job.store))
    commands.queue("7|x|RUNNING|None")
    signalled = threading.Event()
    signalled.set()  # by the warning before a preemption, which is not the end
    (commands.folder / "scontrol").write_text(f"#!/bin/sh\nkill -TERM {os.getpid()}\n")
    before = signal.signal(signal.SIGTERM, lambda *_: signalled.set())
    try:
        assert attempt(order(), signalled).come_back() == EXIT_RUN_AGAIN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("cluster", ["s", "p", "g"])
def test_attempts_in_vain_come_to_an_end_also_where_there_never_was_a_store(commands, order, attempt, cluster):
    submit(order(cluster, attempts=3))
    codes, n = [], len(commands.lines("submitted"))
    for _ in range(5):
        commands.queue("7|x|RUNNING|None")
        tried = attempt(order(cluster, attempts=3))
        codes.append(tried.come_back())
    assert codes == [EXIT_RUN_AGAIN] * 2 + [EXIT_FAILED] * 3
    assert len(commands.lines("requeued" if cluster == "s" else "submitted")) == (2 if cluster == "s" else n + 2)
    assert "attempts in a row ended without one more image" in tried.said[-1]
    commands.queue()
    submit(order(cluster, attempts=3))
    assert last_submission(Path(order().job.store)).n_vain == 0


def test_what_counts_as_progress(commands, order, attempt, client, tmp_path):
    """The ledger's growth, and more digests than ever; not the same images once more, and not a receipt of long ago."""
    made = order("p", attempts=9)
    store = Path(made.job.store)
    make_images(tmp_path / "pictures", 4, [(30, 40)])

    def vain(receipt: dict | None = None) -> int:
        tried = attempt(made)
        if receipt is not None:
            number = next_number(receipt_ids(store))
            made_up = {"outcome": "incomplete", "n_done": 0, "number": number, **receipt}
            (store / "runs" / f"20000101T000000.000Z-{number:06}-00000000.json").write_text(json.dumps(made_up))
        tried.come_back()
        return last_submission(store).n_vain

    submit(made)
    assert vain() == 1
    run_job(make_job({"source": str(tmp_path / "pictures"), "store": str(store), "limit": 2}), client)
    assert vain() == 0
    assert vain() == 1, "the receipt of the run before counts no more"
    assert vain({"n_checked": 0, "n_quarantined": 3}) == 2, "the same bad images again"
    assert vain({"n_checked": 100}) == 0
    assert vain({"n_checked": 100}) == 1, "a digest pass that comes as far as before"
    assert vain({"n_checked": 101}) == 0
    submit(made)
    assert vain({"n_checked": 0}) == 1, "images that were done before it was handed in are no progress"


def test_a_user_who_takes_the_job_back_while_it_drains_at_its_end_is_obeyed(commands, order, attempt):
    prepare_folder(Path(order().job.store))
    signalled = threading.Event()
    tried = attempt(order("p"), signalled)
    signalled.set()
    assert tried.come_back() == EXIT_RUN_AGAIN
    assert not commands.lines("submitted")
    assert "the job was asked to end" in tried.said[-1]


def test_time_that_is_up_is_no_signal():
    with stop_on_signal() as stop:
        stop.set()
        assert not stop.signalled.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stop.signalled.is_set()


def test_a_damaged_store_is_the_drivers_to_refuse(commands, order):
    store = Path(order().job.store)
    prepare_folder(store)
    (store / "zarr.json").write_text("torn")
    assert submit(order("p")).n_settled == 0


def test_another_attempt_is_asked_for_once(commands, order, attempt):
    prepare_folder(Path(order().job.store))
    tried = attempt(order("p"))
    assert (tried.come_back(), tried.come_back()) == (EXIT_RUN_AGAIN, EXIT_RUN_AGAIN)
    assert len(commands.lines("submitted")) == 1


def test_a_batch_system_that_refuses_for_a_moment_gets_the_next_attempt_later(commands, order, attempt):
    prepare_folder(Path(order().job.store))
    commands.fail("qsub", 2)
    assert attempt(order("p")).come_back() == EXIT_RUN_AGAIN
    assert len(commands.lines("submitted")) == 1


def test_where_attempts_cannot_be_counted_none_is_handed_in(commands, order, attempt):
    prepare_folder(Path(order().job.store))
    (Path(order().job.store) / "zarr.json").write_text("torn")
    tried = attempt(order("p"))
    assert tried.come_back() == EXIT_FAILED
    assert not commands.lines("submitted")


# -- handing in -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", ["s", "p"])
def test_of_many_who_submit_at_once_one_hands_in(commands, order, cluster):
    made = order(cluster)
    prepare_folder(Path(made.job.store))
    results: list[str] = []

    def hand_in() -> None:
        try:
            results.append(submit(made).job_id)
        except StoreBusyError as error:
            results.append(str(error))

    for command in ("sbatch", "qsub"):
        path = commands.folder / command
        path.write_text(path.read_text().replace("#!/bin/sh\n", "#!/bin/sh\nsleep 0.3\n", 1))
    threads = [threading.Thread(target=hand_in) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(commands.lines("submitted")) == 1
    assert sum("nothing was submitted" in text for text in results) == 7
    assert not list((Path(made.job.store) / "runs").glob("*.partial"))


def test_a_job_whose_number_was_not_written_down_is_found_by_its_name(commands, order):
    made = order()
    submit(made)
    store = Path(made.job.store)
    (store / "runs" / "submitted.json").unlink()
    with pytest.raises(
        StoreBusyError, match=r"job \d+ \(featuremaps-\w+-driver\) PENDING was already submitted for store .*: two runs"
    ):
        submit(made)


def test_a_claim_stands_until_it_is_old_and_the_job_itself_says_its_number(commands, order, monkeypatch):
    """What a crash between qsub and the record leaves."""
    made = order("p")
    store = Path(made.job.store)
    submit(made)
    path = store / "runs" / "submitted.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job_id": ""}))
    with pytest.raises(
        StoreBusyError, match=r"is being submitted on .* since .*, or that was interrupted.*submit again when 10 minutes"
    ):
        submit(made)
    assert "its number is not known" in last_submission(store).look()[0]
    adopt(made, "12.server")
    assert last_submission(store).job_id == "12.server"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job_id": ""}))
    monkeypatch.setattr(record, "CLAIM_S", 0.0)
    assert submit(made).job_id == last_submission(store).job_id != ""


def test_somebody_who_was_faster_is_not_overwritten(commands, order):
    made = order("p")
    submit(made)
    store = Path(made.job.store)
    claim = record.Claim(store)
    second = submit(made)
    with pytest.raises(StoreBusyError, match=r"was just submitted by somebody else.*nothing was submitted"):
        claim.take(second)
    assert last_submission(store) == second


def test_after_a_refusal_one_may_submit_at_once(commands, order):
    commands.fail("qsub", 1)
    with pytest.raises(FeaturemapsError, match="PBS did not take the job"):
        submit(order("p"))
    assert last_submission(Path(order().job.store)) is None
    submit(order("p"))


def test_a_queue_that_cannot_be_seen_is_no_empty_queue(commands, order):
    commands.fail("squeue", 1)
    with pytest.raises(
        FeaturemapsError,
        match=r"Slurm does not answer \(cannot contact controller\), so nobody can tell.*check that this machine is a login node, or try",
    ):
        submit(order())
    assert not commands.lines("submitted")


# -- the audit --------------------------------------------------------------------------------------------------------------------

AUDIT = """
import sys, threading, time
from pathlib import Path
from pipeline.cluster.submit.ending import finish
from pipeline.cluster.submit.inside_job import job_clock
from pipeline.config import make_job
from pipeline.cluster.submit.script import Order
from pipeline.run.summary import Summary

order = Order(make_job({"source": "x", "store": "f.zarr", "cluster": "p"}), Path("job.yaml"), Path("cluster.yaml"))
clock = job_clock(order, threading.Event())
clock.end_s = time.monotonic() + clock.quarter_s + 0.5
audit = lambda: time.sleep(1000)  # stands for that of a large store
sys.exit(finish(order, clock, Summary("x", outcome="complete"), report=print, audit=audit))
"""


def test_an_audit_ends_before_the_job_is_killed_and_it_is_said_what_is_left(order, tmp_path):
    order("p")
    done = subprocess.run([sys.executable, "-c", AUDIT], cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == EXIT_FAILED, done.stderr
    assert "the store is complete, but the job's time ended before its audit did" in done.stdout
    assert "featuremaps verify f.zarr" in done.stdout


# -- the page ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def complete(order, client, tmp_path):
    """The end of a run that is complete."""
    source = make_images(tmp_path / "pictures", 2, [(30, 40)])
    summary = run_job(make_job({"source": str(source), "store": str(tmp_path / "f.zarr")}), client)

    def finish(**changes) -> tuple[int, list[str]]:
        said: list[object] = []
        made = order("p", verify=False, **changes)
        code = ending.finish(made, job_clock(made, threading.Event()), summary, report=said.append, audit=lambda: None)
        return code, [str(text) for text in said]

    return finish


def test_a_page_about_the_store_lies_beside_the_drivers_log(complete, tmp_path, monkeypatch):
    """A program in the job's folder that is named as one of Python's is not run for it."""
    (tmp_path / "json.py").write_text("open('was_run', 'w').close(); raise SystemExit")
    monkeypatch.chdir(tmp_path)
    code, said = complete()
    assert not (tmp_path / "was_run").exists()
    (page,) = (tmp_path / "featuremaps-logs").glob("featuremaps-*-report.html")
    assert code == 0
    assert said == [f"page about the store: {page}"]
    assert "Complete: all 2 images are done" in page.read_text()


def test_a_page_that_cannot_be_written_is_said_and_changes_no_exit_code(complete, tmp_path):
    (tmp_path / "featuremaps-logs").write_text("a file in the place of the folder")
    code, said = complete()
    assert code == 0
    assert "the page about the store was not written" in said[0]
    assert f"`featuremaps report {tmp_path / 'f.zarr'}` writes it" in said[0]


def test_why_there_is_no_page_is_said_in_the_words_of_the_command(complete, tmp_path):
    (tmp_path / "f.zarr" / "zarr.json").unlink()
    code, said = complete()
    assert code == 0
    assert "was not written (featuremaps: there is no store at" in said[0]


def test_a_page_for_which_there_is_no_time_ends_nothing(complete):
    code, said = complete(walltime=2)
    assert code == 0
    assert "was not written (Command" in said[0]
    assert "timed out" in said[0]


def test_a_source_that_hangs_costs_the_page_its_photographs_and_a_store_that_hangs_the_page(complete, tmp_path, monkeypatch):
    """Processes that wait for such a file system cannot be ended, and the job goes on without them."""
    disk = mount_stuck(tmp_path / "pictures")
    try:
        code, said = complete()
    finally:
        disk.release()
    (page,) = (tmp_path / "featuremaps-logs").glob("featuremaps-*-report.html")
    assert (code, said) == (0, [f"page about the store: {page}"])
    assert "the source image is out of reach" in page.read_text()
    monkeypatch.setattr("pipeline.cluster.submit.ending.PAGE_S", 6.0)
    disk = mount_stuck(tmp_path / "f.zarr")
    try:
        code, said = complete()
    finally:
        disk.release()
    assert code == 0
    assert "timed out" in said[0]


def test_a_page_that_takes_more_memory_than_it_may_is_not_written_and_ends_nothing(complete):
    code, said = complete(driver={"memory": "200 MiB"})
    assert code == 0
    assert "the page about the store was not written" in said[0]


# -- scripts ----------------------------------------------------------------------------------------------------------------------


def script(tmp_path: Path, kind: str, python: str = "/opt/python", **changes) -> str:
    entry = {"kind": kind, "account": "maps", "walltime": "8:00:00", "python": python, "log_folder": "/home/me/logs"}
    entry |= {"prologue": ["# what the site wants", "module load cuda  # 12", 'export NOTE="it\'s $(echo \\"\\\\n\\") done"']}
    entry |= {"groups": {"all": {"memory": "1 GiB"}}, "driver": {"walltime": "2-00:00:00"}}
    entry |= {} if kind == "htcondor" else {"queue": "long"}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"x": entry | changes}}))
    job = make_job({"source": "/data/photos", "store": "/data/features.zarr", "cluster": "x"})
    return driver_script(Order(job, tmp_path / "it's my job.yaml", tmp_path / "cluster.yaml"))


@pytest.mark.parametrize("kind", KINDS.values())
def test_scripts_are_those_that_were_looked_at(tmp_path, monkeypatch, kind):
    monkeypatch.chdir("/")
    assert script(tmp_path, kind).replace(str(tmp_path), "/home/me") == (GOLDEN / f"{kind}-driver.txt").read_text()


@pytest.mark.parametrize("kind", KINDS.values())
def test_what_the_scripts_run_gets_its_arguments_and_variables_whole(tmp_path, monkeypatch, kind):
    """The interpreter is one that says what it was given; the batch system's own lines are comments to a shell."""
    said, python, logs = tmp_path / "said.json", tmp_path / "python", tmp_path / "logs"
    logs.mkdir()
    lines = [
        f"#!{sys.executable}",
        "import json, os, sys",
        f"json.dump([sys.argv[1:], dict(os.environ)], open({str(said)!r}, 'w'))",
    ]
    python.write_text("\n".join([*lines, "print('printed')"]))
    python.chmod(0o755)
    prologue = ["# a comment", "if true  # and another", "then export NOTE=\"it's $(echo 'a\\\\b')\"; fi"]
    monkeypatch.chdir(tmp_path)
    text = script(tmp_path, kind, str(python), prologue=prologue, log_folder=str(logs))
    command = ["bash", "-c", text]
    if kind == "htcondor":
        (line,) = (line for line in text.splitlines() if line.startswith("arguments = "))
        assert "$(echo" not in line, "HTCondor would take it for a macro of its own"
        command = ["/bin/sh", *condor_arguments(line.removeprefix("arguments = "))]
    environment = {"PATH": os.environ["PATH"], "PBS_JOBID": "12.server"}
    subprocess.run(command, check=True, env=environment, timeout=900, cwd="/")
    arguments, variables = json.loads(said.read_text())
    assert arguments[:5] == ["-P", "-m", "pipeline", "submit", str(tmp_path / "it's my job.yaml")]
    assert arguments[-1] == "--attend"
    assert variables["NOTE"] in {"it's a\\b", "it's a\\\\b"}  # as the shell's echo has it
    assert variables["PWD"] == str(tmp_path)
    if kind == "pbs":
        assert [path.name.split("-driver-")[1] for path in logs.iterdir()] == ["12.server.log"]
