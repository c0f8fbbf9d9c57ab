from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import Mock

import click.testing
import pytest
from pydantic import BaseModel, Field

from pipeline import __version__
from pipeline.api import run_job
from pipeline.cli import commands, job_options, terminal
from pipeline.cli.groups import GroupedCommands
from pipeline.cli.job_options import job_fields
from pipeline.config import LayerSpec, make_job
from pipeline.errors import FeaturemapsError, StoreBusyError
from pipeline.run.summary import Progress, Summary
from pipeline.run.summary_text import describe
from pipeline.store.lock import StoreLock
from pipeline.store.schema import RUNS
from pipeline.store.store import Store
from tests.conftest import make_images

pytestmark = pytest.mark.cluster

COMMAND = [sys.executable, "-c", "from pipeline.cli.commands import main; main()"]


@pytest.fixture
def jobs(monkeypatch, command):
    """The job that a command line makes; none is run."""

    def call(*arguments):
        made = []
        monkeypatch.setattr("pipeline.api.run_job", lambda job, **_: made.append(job) or Summary("id", outcome="complete"))
        code, _, err = command("run", *arguments)
        assert code == 0, err
        return made[0]

    return call


@pytest.fixture(scope="module")
def folder(client, tmp_path_factory):
    """A source of seven images, two of them bad, and its store."""
    folder = tmp_path_factory.mktemp("cli")
    source = make_images(folder / "source", 5, [(50, 60), (40, 40)])
    (source / "bad.png").touch()
    (source / "worse.jpg").write_text("no image")
    run_job(make_job({"source": str(source), "store": str(folder / "f.zarr")}), client)
    return folder


# -- options and job files -------------------------------------------------------------------------------------------------------


def test_without_options_a_job_is_what_it_is_without_a_command(jobs):
    assert jobs("a", "b") == make_job({"source": "a", "store": "b"})


def test_every_option_finds_its_place_in_the_job(jobs):
    job = jobs(
        *("a", "b", "--dtype", "uint8", "--resize", 30, 40, "--color", "grey", "--limit", 5, "--pixel-limit", 1000),
        *("--layers", "4x5x5:tanh:pool2", "--layers", "2x3x3", "--seed", 7, "--workers", 3, "--memory-limit", 512),
        *("--check", "digest", "--cluster", "big", "--retry-quarantined", "--max-quarantined", 0, "--max-removed", 0.5),
    )
    layers = [LayerSpec(filters=4, kernel=5, pool=2, activation="tanh"), LayerSpec(filters=2, kernel=3)]
    decode = {"resize": (30, 40), "color": "grey", "pixel_limit": 1000}
    extractor = {"layers": layers, "seed": 7}
    rest = {"workers": 3, "memory_limit_bytes": 512 * 2**20, "cluster": "big", "retry_quarantined": True, "max_quarantined": 0}
    assert job == make_job(
        {
            "source": "a",
            "store": "b",
            "dtype": "uint8",
            "limit": 5,
            "max_removed": 0.5,
            "check": "digest",
            "decode": decode,
            "extractor": extractor,
            **rest,
        }
    )
    assert jobs("a", "b", "--weights", "w.safetensors").extractor.weights == "w.safetensors"
    job = jobs(
        "a", "b", "--no-exif-orientation", "--background", 1, 2, 3, "--formats", "PNG", "--formats", "JPEG", "--deadline", 7
    )
    assert (job.decode.exif_orientation, job.decode.background, job.decode.formats) == (False, (1, 2, 3), ("PNG", "JPEG"))
    assert job.deadline_s == 7.0


@pytest.mark.parametrize(("name", "target"), [("run", "pipeline.api.run_job"), ("plan", "pipeline.checks.plan.plan_job")])
def test_clusters_may_be_named_in_another_file(command, monkeypatch, tmp_path, name, target):
    given = []

    def fail(_job, *files, cluster_file=None, **_):
        given.extend([*files, cluster_file])
        raise StoreBusyError("enough")

    monkeypatch.setattr(target, fail)
    assert command(name, "a", "b", "--cluster-file", tmp_path / "mine.yaml")[0] == 75
    assert tmp_path / "mine.yaml" in given


def test_names_to_leave_out_may_be_given(jobs):
    job = jobs("a", "b", "--exclude", "raw/", "--exclude", "*_thumb.jpg", "--no-default-exclude")
    assert (job.exclude, job.default_exclude) == (("raw/", "*_thumb.jpg"), False)


def test_a_job_file_is_relative_to_itself_and_options_replace_what_it_says(jobs, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "job.yml").write_text(
        "source: photos\nstore: /maps.zarr\ndtype: uint8\nretry_quarantined: true\ndecode: {color: grey, pixel_limit: 9}\n"
    )
    monkeypatch.chdir(tmp_path)
    job = jobs("sub/job.yml")
    assert (job.source, job.store, job.dtype) == (str(tmp_path / "sub" / "photos"), "/maps.zarr", "uint8")
    job = jobs("sub/job.yml", "--dtype", "float16", "--resize", 30, 40, "--layers", "1x3x3")
    assert (job.dtype, job.decode.color, job.decode.pixel_limit, job.decode.resize) == ("float16", "grey", 9, (30, 40))
    assert (job.retry_quarantined, job.extractor.layers) == (True, (LayerSpec(filters=1, kernel=3),))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["run", "photos"], "featuremaps: SOURCE and STORE, or one JOB.yaml, are needed, but this was given: photos"),
        (
            ["run", "a", "b", "c"],
            "are needed, but these 3 were given: a b c; nothing was started. Name both, and quote a pattern",
        ),
        (["run"], "Missing argument 'SOURCE STORE | JOB.yaml'"),
        (["run", "a", "b", "--dtype", "int4"], "'int4' is not one of 'float32', 'float16', 'uint16', 'uint8'"),
        (["run", "a", "b", "--resize", "5"], "Option '--resize' requires 2 arguments"),
        (
            ["run", "a", "b", "--limit", "0"],
            "featuremaps: the command is not usable, so nothing was started: limit: Input should be",
        ),
        (["run", "a", "b", "--layers", "2x9"], "featuremaps: layer '2x9' is not of the form FILTERSxHEIGHTxWIDTH"),
        (["run", "a", "b", "--dtpye", "uint8"], "No such option"),
        (["plan", "none.yaml"], "featuremaps: job file none.yaml cannot be read"),
        (["nonsense"], "No such command 'nonsense'"),
        (["show", "a", "b"], "Missing option '-o' / '--output'"),
        (["status"], "Missing argument 'STORE | JOB.yaml'"),
    ],
)
def test_a_command_line_that_makes_no_sense_ends_with_2_and_says_why(command, arguments, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert expected in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_the_version_and_the_help_are_there(command):
    assert command("--version") == (0, f"featuremaps, version {__version__}\n", "")
    code, out, _ = command("-h")
    assert (code, [name for name in ("run", "plan", "status", "show") if f"\n  {name} " not in out]) == (0, [])
    code, out, _ = command("run", "-h")
    assert code == 0
    assert out == command("run", "--help")[1]
    assert [field.path for field in job_fields() if not field.help] == [], "a field of a job without a description"


def test_the_help_groups_commands_by_what_people_want(command):
    _, out, _ = command("--help")
    lines = [line for line in out.partition("Run:")[2].splitlines() if line.strip()]
    listed = [line.split()[0] for line in lines]
    assert " ".join(listed) == "run submit Look: plan status show report Check verify vacuum doctor Clusters: cluster"


def test_a_command_that_no_heading_names_is_listed_all_the_same():
    group = GroupedCommands("it", commands={"new": click.Command("new"), "run": click.Command("run")})
    out = click.testing.CliRunner().invoke(group, ["--help"]).output
    assert "Run:\n  run\n\nMore:\n  new\n" in out


def test_a_new_field_of_a_model_is_an_option_at_once(monkeypatch):
    class Inner(BaseModel):
        mode: Literal["a", "b"] = Field("a", description="A choice.")
        is_on: bool = Field(True, description="A switch.")
        pair: tuple[int, int] | None = None

    class Outer(BaseModel):
        needed: str
        inner: Inner = Inner()
        size_bytes: Annotated[int, Field(gt=0)] | None = None
        share: float = 0.5
        names: tuple[str, ...] = ()

    fields = [*job_fields(Outer)]
    monkeypatch.setattr(job_options, "job_fields", lambda: fields)
    found = {}
    it = click.command()(job_options.job_options(lambda **options: found.update(job_options.job_values(options))))
    line = "--mode b --no-is-on --pair 3 4 --size 2 --share 0.25 --names x --names y"
    assert click.testing.CliRunner().invoke(it, line.split()).exit_code == 0
    inner = {"mode": "b", "is_on": False, "pair": (3, 4)}
    assert found == {"inner": inner, "size_bytes": 2 * 2**20, "share": 0.25, "names": ("x", "y")}
    assert "--mode [a|b]" in (help_ := click.testing.CliRunner().invoke(it, ["--help"]).output)
    assert ("A choice." in help_, "--size MIB" in help_, "--needed" in help_) == (True, True, False)
    assert click.testing.CliRunner().invoke(it, ["--mode", "c"]).exit_code == 2
    found.clear()
    assert click.testing.CliRunner().invoke(it, []).exit_code == 0
    assert found == {}, "what a job file says stands where no option says otherwise"


def test_no_two_fields_of_a_job_have_one_option():
    names = [field.path[-1] for field in job_fields()]
    assert len(set(names)) == len(names)


# -- results ---------------------------------------------------------------------------------------------------------------------


def test_the_json_of_a_run_is_its_receipt(command, tmp_path):
    source = make_images(tmp_path / "source", 3, [(50, 60)])
    code, out, _ = command("run", source, tmp_path / "f.zarr", "--json")
    assert code == 0
    assert [json.loads(out)] == Store(tmp_path / "f.zarr").receipts()


def test_a_run_ends_with_a_summary_and_logs_to_stderr_only(command, folder, tmp_path):
    code, out, err = command("run", folder / "source", tmp_path / "f.zarr")
    assert code == 0
    first, changes, reasons, empty, not_image, speed, shares, bad, last = out.splitlines()
    counts = "5 images done, 0 unchanged, 0 quarantined, 2 rejected, 0 pending, 0 removed of 7 listed"
    assert re.fullmatch(rf"complete: {counts}, in \d+\.\d s(, of which \d+\.\d s to start workers)?", first)
    assert changes == "since the last run: 7 new"
    assert reasons == "found bad by this run: 1 empty, 1 not_an_image"
    assert empty == "  bad.png  empty: the file has 0 bytes"
    assert not_image.startswith("  worse.jpg  not_an_image: ")
    rate = r"[\d.]+ images/s, [\d.]+ megapixels/s on 2 slots( once the workers had started)?"
    assert re.fullmatch(rf"{rate}; read [\d.]+ kB, wrote [\d.]+ [kM]B", speed)
    assert re.fullmatch(
        r"time of the workers: .*; (most of the workers' time went into \w+ing \(\d+%\)|the workers were idle \d+% of the time: .*)",
        shares,
    )
    assert bad == f"2 bad images in all: featuremaps status {tmp_path / 'f.zarr'} lists them with their reasons"
    (receipt,) = Store(tmp_path / "f.zarr").receipts()
    assert last == f"store {tmp_path / 'f.zarr'}, receipt runs/{receipt['run_id']}.json"
    assert err.startswith("listing\n")


def test_a_summary_names_faults_and_unreadable_folders_on_one_line_each():
    summary = Summary("id", outcome="incomplete", faults=["a\nb.png: EIO"] * 5, unreadable_folders=["x\ny"], n_pending=5)
    lines = describe(summary, "b").splitlines()
    assert lines[1] == "faults that may pass: " + "; ".join([r"a\nb.png: EIO"] * 3) + "; run again to try these images again"
    assert lines[2] == r"folders that could not be read, whose images keep what they have: x\ny"


def test_a_summary_says_what_was_passed_over_and_that_nothing_came_of_it():
    summary = Summary("id", outcome="complete", ignored={".heic": 20, "": 1, ".x\ny": 1}, n_bad_total=3, n_unreachable=2)
    lines = describe(summary, "b").splitlines()
    assert lines[1] == "2 images could not be accessed and keep what they have: check links and permissions"
    assert lines[2] == r"Skipped 22 files without an image suffix (.heic, none, .x\ny)."
    assert lines[3].startswith("the store holds no maps at all")


@pytest.mark.parametrize(
    ("summary", "options", "code"),
    [
        (Summary("id", outcome="complete"), [], 0),
        (Summary("id", outcome="complete", n_bad_total=3, n_done_total=1), [], 0),
        (Summary("id", outcome="complete", n_bad_total=3, n_done_total=1), ["--max-quarantined", 3], 0),
        (Summary("id", outcome="complete", n_bad_total=3), ["--max-quarantined", 2], 3),
        (Summary("id", outcome="complete", n_bad_total=1), ["--max-quarantined", 0], 3),
        (Summary("id", outcome="complete", n_bad_total=3), [], 3),  # and nothing is done
        (Summary("id", outcome="stopped", n_bad_total=1), ["--max-quarantined", 0], 75),
        (Summary("id", outcome="incomplete"), [], 1),
    ],
)
def test_the_outcome_of_a_run_is_its_exit_code(command, monkeypatch, summary, options, code):
    monkeypatch.setattr("pipeline.api.run_job", lambda *_, **__: summary)
    assert command("run", "a", "b", *options)[0] == code


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (FeaturemapsError("it stopped"), 1, "featuremaps: it stopped\n"),
        (FeaturemapsError("two\n   lines"), 1, "featuremaps: two lines\n"),
        (StoreBusyError("somebody works"), 75, "featuremaps: somebody works\n"),
        (KeyboardInterrupt(), 75, "featuremaps: interrupted; what was committed stands, run again to go on\n"),
        (
            OSError(28, "No space left on device", "/x"),
            1,
            "featuremaps: the file system failed ([Errno 28] No space left on device: '/x')",
        ),
    ],
)
def test_an_error_is_a_paragraph_and_an_exit_code(command, monkeypatch, error, code, expected):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("pipeline.api.run_job", fail)
    found, out, err = command("run", "a", "b")
    assert (found, out) == (code, "")
    paragraph = err.removeprefix("\n")  # click ends the line on which ^C stands
    assert paragraph.startswith(expected)
    assert paragraph.count("\n") == 1


def test_a_store_that_is_held_ends_with_75_and_the_status_says_who_works_on_it(command, folder):
    with StoreLock(folder / "f.zarr" / RUNS, "20990101T000000Z-other"):
        code, _, err = command("run", folder / "source", folder / "f.zarr")
        assert (code, "is held by run 20990101T000000Z-other" in err) == (75, True)
        code, out, _ = command("status", folder / "f.zarr")
        assert code == 0
        assert f"run 20990101T000000Z-other works on it: process {os.getpid()} on " in out
        assert json.loads(command("status", folder / "f.zarr", "--json")[1])["holder"]["pid"] == os.getpid()
    assert "works on it" not in command("status", folder / "f.zarr")[1]


def test_the_status_lists_bad_images_with_their_reasons(command, folder):
    code, out, err = command("status", folder / "f.zarr")
    assert (code, err) == (0, "")
    assert "  bad.png  empty: the file has 0 bytes\n" in out
    assert "  worse.jpg  not_an_image: the content is none of" in out
    assert "5 done, 0 quarantined, 0 removed, 0 superseded, 2 rejected" in out
    code, out, _ = command("status", folder / "f.zarr", "--quarantined", 1)
    assert ("bad.png" in out, "worse.jpg" in out, "and 1 more bad image:" in out) == (True, False, True)
    (folder / "job.yaml").write_text("{source: source, store: f.zarr}")
    assert command("status", folder / "job.yaml")[1] == command("status", folder / "f.zarr")[1]
    status = json.loads(command("status", folder / "f.zarr", "--json")[1])
    assert [item["path"] for item in status["bad"]] == ["bad.png", "worse.jpg"]
    assert status["last_run"]["outcome"] == "complete"


def test_a_plan_is_printed_for_people_and_as_json(command, folder, tmp_path):
    code, out, _ = command("plan", folder / "source", tmp_path / "new.zarr")
    assert code == 0
    assert out.startswith("7 images listed: 5 to compute, 0 unchanged, 2 to reject, 0 to mark removed\n2 shape classes (2 new): ")
    assert "\nto reject: 1 empty, 1 not_an_image\n  bad.png  empty: the file has 0 bytes\n  worse.jpg  not_an_image: " in out
    assert out.endswith("\na run would end with exit code 0: complete, if the images decode as their headers promise\n")
    code, out, _ = command("plan", folder / "source", tmp_path / "new.zarr", "--json", "--limit", 3, "--workers", 1)
    found = json.loads(out)
    assert (found["n_listed"], found["workers"]) == (3, 1)
    assert not (tmp_path / "new.zarr").exists()


def test_show_says_what_it_wrote(command, folder, tmp_path):
    assert command("show", folder / "f.zarr", "img00000.png", "-o", tmp_path / "fig.png") == (
        0,
        f"wrote {tmp_path / 'fig.png'}\n",
        "",
    )
    assert (tmp_path / "fig.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = command("show", folder / "f.zarr", "bad.png", "-o", tmp_path / "none.png")
    assert (code, "it is rejected (empty: the file has 0 bytes)" in err) == (2, True)


# -- progress --------------------------------------------------------------------------------------------------------------------


def test_without_a_terminal_a_line_at_intervals_says_how_far_it_is_and_how_long_it_takes(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    update = terminal.log_lines()
    update(Progress())
    for n_finished, after_s in ((100, 1), (100, 14), (150, 5), (200, 5), (1000, 10)):
        clock[0] += after_s
        update(Progress(1100, n_finished, 100, n_quarantined=3 if n_finished > 100 else 0, stage="running"))
    update(Progress(1100, 1010, 100, stage="stopping (up to 20 images in flight)"))
    assert capsys.readouterr().err.splitlines() == [
        "listing",
        "running: 100 of 1100 images",
        "running: 200 of 1100 images, 3 bad, about 216 s left",
        "running: 1000 of 1100 images, 3 bad, about 4 s left",
        "stopping (up to 20 images in flight): 1010 of 1100 images",
    ]


def test_the_lines_of_a_real_run_go_to_stderr(command, monkeypatch, tmp_path):
    monkeypatch.setattr(terminal, "LOG_LINE_S", 0.0)
    monkeypatch.setattr("pipeline.run.driver.COMMIT_S", 0.05)
    source = make_images(tmp_path / "source", 60, [(300, 400)], suffix=".jpg")
    code, out, err = command("run", source, tmp_path / "f.zarr", "--json")
    assert code == 0
    json.loads(out)
    lines = err.splitlines()
    assert lines[0] == "listing"
    assert lines[1] == "starting workers: 0 of 60 images"
    assert lines[-1] == "running: 60 of 60 images"
    assert any(re.fullmatch(r"running: \d+ of 60 images(, about \d+ s left)?", line) for line in lines)


def on_terminal(arguments: list[str], until: bytes = b"", signals: int = 0) -> tuple[int, str]:
    """Run the command on a pseudo-terminal of 120 columns; send SIGINT once ``until`` shows up."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    code = "import pipeline.run.driver; pipeline.run.driver.COMMIT_S = 0.1; from pipeline.cli.commands import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
    )
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 900
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 0.5)[0]:
            if process.poll() is not None:
                break
        else:
            try:
                shown += os.read(master, 65536)
            except OSError:  # the other side is closed
                break
        if signals and until in shown:
            process.send_signal(signal.SIGINT)
            signals -= 1
    os.close(master)
    return process.wait(timeout=900), shown.decode(errors="replace")


def plain(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Enough images to be looked at while they are worked on."""
    return make_images(tmp_path_factory.mktemp("many") / "source", 240, [(300, 400)], suffix=".jpg")


def test_on_a_terminal_a_bar_shows_the_images_and_the_time_left(many, tmp_path):
    options = ["--workers", "1", "--layers", "6x9x9", "--dtype", "uint8"]  # seconds of work: the time left is drawn twice in one
    code, shown = on_terminal(["run", str(many), str(tmp_path / "f.zarr"), *options])
    text = plain(shown)
    assert code == 0, text
    assert "starting workers" in text
    steps = {int(n) for n in re.findall(r"running\s+\S*[\u2501\u2578\u257a\s]+(\d+)/240", text)}
    assert len(steps) >= 2, text[-2000:]
    assert re.search(r"\d:\d\d:\d\d left", text), text[-2000:]
    assert re.search(r"complete: 240 images done", text)
    assert "Traceback" not in text


def test_an_interrupt_drains_and_ends_with_75(many, tmp_path):
    store = tmp_path / "f.zarr"
    code, shown = on_terminal(["run", str(many), str(store), "--workers", "1"], b"running", signals=1)
    text = plain(shown)
    assert code == 75, text
    assert "SIGINT: finishing what is in flight; nothing is lost, run again to go on" in text
    assert "stopped: " in text
    assert "Traceback" not in text
    (receipt,) = Store(store).receipts()
    assert receipt["outcome"] == "stopped"
    assert receipt["n_pending"] + receipt["n_done"] == 240
    assert receipt["n_pending"] > 0


def test_a_second_interrupt_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with terminal.stop_on_signal() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(900)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may send it again: still a drain
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_every_stop_signal_asks_for_a_drain_and_ends_other_commands_as_a_ctrl_c_does(number):
    with terminal.stop_on_signal() as stop:
        os.kill(os.getpid(), number)
        assert stop.wait(60)
    with terminal.interrupt_on_signal(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)


def test_a_signal_in_the_middle_of_another_waits_for_no_lock_of_the_first(monkeypatch):
    with terminal.stop_on_signal() as stop:
        stop.signalled.set()
        stop.set()
        for event in (stop, stop.signalled):
            monkeypatch.setattr(event, "set", lambda: pytest.fail("`set` is not reentrant"))
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_changes_nothing_of_how_an_interrupted_command_ends(monkeypatch):
    monkeypatch.setattr(commands.cli, "main", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(commands, "complain", lambda *given: signal.raise_signal(signal.SIGHUP) or given[2])
    before = signal.getsignal(signal.SIGHUP)
    with pytest.raises(SystemExit) as ended:
        commands.main()
    assert ended.value.code == 75
    assert signal.getsignal(signal.SIGHUP) is before


def test_what_nohup_has_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminal.stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_ctrl_c_that_a_script_ignores_drains_a_run_and_interrupts_no_other_command():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with terminal.interrupt_on_signal():
            signal.raise_signal(signal.SIGINT)
            with terminal.stop_on_signal() as stop:
                signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_names_that_are_not_utf8_go_out_as_they_came_in(tmp_path):
    store = os.fsencode(tmp_path) + b"/st\xffore.zarr"
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    found = subprocess.run([*COMMAND, "status", store], capture_output=True, env=environment, check=False)
    assert found.returncode == 2
    assert b"there is no store at " + store in found.stderr


def test_the_command_starts_fast_and_without_torch():
    code = "import sys, pipeline.cli.commands\n"
    code += "print(sorted({'torch', 'distributed', 'zarr', 'xarray', 'matplotlib', 'rich'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_command_is_installed_under_its_name():
    scripts = Path(sys.executable).parent
    found = subprocess.run([scripts / "featuremaps", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"featuremaps, version {__version__}\n"
