# ruff: noqa: T201 (print is what is tested)
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from pipeline.cli.commands import main
from pipeline.cli.output import lasting_output
from pipeline.store.schema import RUNS
from tests.store.test_store import make_store

COMMAND = [sys.executable, "-m", "pipeline"]


def closed_pipe() -> int:
    """The end to write to of a pipe that nobody reads, as behind ``| head -1``."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full_device() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize(("opened", "why"), [(closed_pipe, ""), (full_device, "(No space left on device); nothing else was")])
def test_what_cannot_be_written_is_lost_without_an_error_and_said_where_it_can_be(monkeypatch, capfd, opened, why):
    with os.fdopen(opened(), "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with lasting_output():
            print("text", flush=True)
            sys.stdout.buffer.write(b"bytes")
            print("more" * 100_000)
        assert sys.stdout is broken
    err = capfd.readouterr().err
    assert why in err
    assert bool(err) == bool(why)


def test_stderr_may_be_lost_too(monkeypatch):
    with os.fdopen(full_device(), "w") as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        with lasting_output():
            print("text", file=sys.stderr, flush=True)


def test_what_can_be_written_arrives_whole_and_names_go_out_as_they_came_in(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with lasting_output():
            sys.stdout.write("x" * 100_000 + "\udcff\n")
    assert (tmp_path / "out").read_bytes() == b"x" * 100_000 + b"\xff\n"


def test_a_slow_reader_of_a_pipe_that_does_not_block_loses_nothing(monkeypatch):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with subprocess.Popen(["wc", "-c"], stdin=reader, stdout=subprocess.PIPE) as counter:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            monkeypatch.setattr(sys, "stdout", pipe)
            with lasting_output():
                print("x" * 999_999)
        assert counter.communicate()[0].strip() == b"1000000"


@pytest.mark.parametrize("closing", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-", "2>&1 | head -c 1", "2>/dev/full"])
def test_the_exit_code_is_that_of_the_work_however_output_is_lost(tmp_path, closing):
    command = " ".join([*COMMAND, "status", str(tmp_path / "none.zarr")])
    shell = f"({command}; echo $? > {tmp_path / 'code'}) {closing}"
    subprocess.run(["sh", "-c", shell], check=False, capture_output=True)
    assert (tmp_path / "code").read_text() == "2\n"


def test_a_stream_that_was_closed_is_taken_by_no_other_file(tmp_path):
    code = (
        "import os, sys\nfrom pipeline.cli.output import lasting_output\n"
        "with lasting_output(), open(sys.argv[1], 'w') as file:\n"
        "    os.write(2, b'stray')\n    print('text', file=sys.stderr)\n    file.write(str(file.fileno()))\n"
    )
    written = tmp_path / "written"
    subprocess.run(["sh", "-c", '"$@" 2>&-', "sh", sys.executable, "-c", code, str(written)], check=True)
    assert int(written.read_text()) > 2


def test_a_signal_may_speak_in_the_middle_of_a_line(monkeypatch):
    """A buffer of bytes would refuse it: "reentrant call"."""
    reader, writer = os.pipe()

    def speak(*_: object) -> None:
        print("signalled", file=sys.stderr)

    before = signal.signal(signal.SIGUSR1, speak)
    try:
        with os.fdopen(writer, "w") as pipe:
            monkeypatch.setattr(sys, "stderr", pipe)
            with lasting_output():
                write = type(sys.stderr.buffer).write

                def interrupted(outlet, data):
                    monkeypatch.setattr(type(outlet), "write", write)
                    signal.raise_signal(signal.SIGUSR1)
                    return write(outlet, data)

                monkeypatch.setattr(type(sys.stderr.buffer), "write", interrupted)
                print("line", file=sys.stderr)
    finally:
        signal.signal(signal.SIGUSR1, before)
    with os.fdopen(reader) as shown:
        assert sorted(shown.read().split()) == ["line", "signalled"]


@pytest.mark.parametrize(
    ("command", "opened", "code"),
    [("status", full_device, 1), ("status", closed_pipe, 0), ("vacuum", full_device, 0), ("status", None, 0)],
)
def test_lost_output_is_a_failure_of_a_command_that_only_prints(monkeypatch, tmp_path, capfd, command, opened, code):
    make_store(tmp_path)
    (tmp_path / RUNS / "lock.json").unlink()
    monkeypatch.setattr(sys, "argv", ["featuremaps", command, str(tmp_path)])
    with open(opened(), "w") if opened else contextlib.nullcontext(sys.stdout) as out:  # noqa: PTH123 (a descriptor)
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as ended:
            main()
        monkeypatch.undo()
    assert ended.value.code == code


@pytest.mark.parametrize("arguments", ["--help", "--version", "run --help", "cluster show -h"])
@pytest.mark.parametrize(("opened", "code"), [(full_device, 1), (closed_pipe, 0)])
def test_lost_help_is_a_failure_said_in_one_line(monkeypatch, capfd, arguments, opened, code):
    monkeypatch.setattr(sys, "argv", ["featuremaps", *arguments.split()])
    with os.fdopen(opened(), "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        with pytest.raises(SystemExit) as ended:
            main()
    monkeypatch.undo()
    assert ended.value.code == code
    lost = "featuremaps: output was lost, as it could not be written (No space left on device); nothing else was affected\n"
    assert capfd.readouterr().err == (lost if code else "")
