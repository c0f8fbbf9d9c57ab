from __future__ import annotations

import errno
import io
import os
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError, PassingFaultError
from pipeline.source import fetch
from pipeline.source.fetch import Patience, Source, probe_block, read_bytes, read_current
from pipeline.source.fingerprints import fingerprint_of
from tests.conftest import make_images


@pytest.fixture
def source(tmp_path):
    return Source(str(make_images(tmp_path / "source", 3, [(40, 50)])), DecodeSpec())


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made, which take no time."""
    made = []
    monkeypatch.setattr("pipeline.source.fetch.time.sleep", made.append)
    return made


@pytest.fixture
def storage(monkeypatch):
    """Make files fail to open with an error number, some times or always."""
    faults: dict[str, list[int]] = {}
    real = os.open

    def fail(path, flags, *args, **kwargs):
        waiting = faults.get(os.fsdecode(path).rsplit("/", 1)[-1])
        if waiting:
            number = waiting.pop(0)
            raise OSError(number, os.strerror(number))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr("pipeline.source.fetch.os.open", fail)
    return faults


def fingerprint(source, name):
    return fingerprint_of((Path(source.root) / name).stat())


def n_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def soon():
    started = time.monotonic()
    yield
    assert time.monotonic() - started < 100  # a hang, not a slow machine


# -- probing ---------------------------------------------------------------------------------------------------------------------


def test_a_header_gives_the_sizes(source):
    make_images(Path(source.root), 1, [(33, 44)], suffix=".jpg")
    found = probe_block(Source(source.root, DecodeSpec(resize=(20, 30))), ["img00000.jpg", "img00000.png"], (9, 9))
    assert [tuple(p)[:6] for p in found] == [(33, 44, 20, 30, "", ""), (40, 50, 20, 30, "", "")]
    for p, name in zip(found, ("img00000.jpg", "img00000.png"), strict=True):
        resized_bytes = 30 * (4 * p.source_height + 7 * 20)
        file_bytes = Path(source.root, name).stat().st_size
        band_bytes = 6 * max(p.source_width, 30) * 64
        assert p.decode_bytes == 2**25 + 3 * file_bytes + 7 * p.source_height * p.source_width + resized_bytes + band_bytes


@pytest.mark.parametrize(("needed", "fits"), [((40, 50), True), ((41, 50), False), ((40, 51), False)])
def test_an_image_must_leave_one_output_in_every_layer(source, needed, fits):
    (found,) = probe_block(source, ["img00000.png"], needed)
    text = f"too_small: 40 x 50 pixels, smaller than the {needed[0]} x {needed[1]} that one output needs"
    assert found.error == ("" if fits else text)


def test_bad_images_cost_themselves_only(source):
    (Path(source.root) / "empty.png").touch()
    found = probe_block(source, ["img00000.png", "empty.png", "none.png", "img00001.png"], (9, 9))
    assert [p.error.split(":")[0] for p in found] == ["", "empty", "missing", ""]


def test_what_is_no_file_is_refused_without_blocking(source, monkeypatch):
    folder = Path(source.root)
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere")
    monkeypatch.chdir(folder)  # the path of a socket may have 107 bytes only
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.png")
        with soon():
            found = probe_block(source, [f"{n}.png" for n in ("fifo", "folder", "device", "socket", "loop", "dangling")], (9, 9))
    assert [p.error.split(":")[0] for p in found] == ["not_a_file"] * 4 + ["missing"] * 2
    assert found[0].error == "not_a_file: a folder, pipe, socket or device"


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOENT, "missing"),
        (errno.ENOTDIR, "missing"),
        (errno.ELOOP, "missing"),
        (errno.ENAMETOOLONG, "missing"),
        (errno.EACCES, "permission_denied"),
        (errno.EPERM, "permission_denied"),
        (errno.EISDIR, "not_a_file"),
        (errno.ENXIO, "not_a_file"),
        (errno.EINVAL, "not_a_file"),
    ],
)
def test_errors_that_an_image_is_to_blame_for_have_stable_codes_and_are_not_retried(source, storage, pauses, number, code):
    storage["img00000.png"] = [number] * 99
    (found,) = probe_block(source, ["img00000.png"], (9, 9))
    assert found.error == f"{code}: {os.strerror(number)}"
    assert pauses == []


def test_a_name_that_is_too_long_is_missing(source):
    (found,) = probe_block(source, ["x" * 300 + ".png"], (9, 9))
    assert found.error == "missing: File name too long"


# -- faults that may pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM])
def test_a_fault_that_passes_costs_pauses_only(source, storage, pauses, number):
    storage["img00000.png"] = [number, number]
    (found,) = probe_block(source, ["img00000.png"], (9, 9))
    assert (found.error, found.fault, found.input_height) == ("", "", 40)
    assert pauses == [0.1, 0.5]


def test_a_fault_that_stays_is_reported_and_blames_no_image(source, storage, pauses):
    storage["img00000.png"] = [errno.EIO] * 99
    (found,) = probe_block(source, ["img00000.png"], (9, 9))
    assert (found.error, found.fault) == ("", "img00000.png: [Errno 5] Input/output error")
    assert pauses == list(fetch.RETRY_PAUSES_S)


def test_storage_is_waited_for_once_per_batch_not_for_every_image(source, storage, pauses):
    for name in ("img00000.png", "img00001.png"):
        storage[name] = [errno.EIO] * 99
    found = probe_block(source, [f"img0000{i}.png" for i in (0, 1, 2)], (9, 9))
    assert [bool(p.fault) for p in found] == [True, True, False]
    assert pauses == list(fetch.RETRY_PAUSES_S)
    patience = Patience()
    for _ in range(2):
        with pytest.raises(PassingFaultError, match=r"img00000\.png: .*Input/output error"):
            read_bytes(source, "img00000.png", "", patience)
    assert pauses == 2 * list(fetch.RETRY_PAUSES_S)


def test_a_fault_in_the_middle_of_a_header_is_the_storages_not_the_images(source, monkeypatch, pauses):
    class Failing:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def read(self, size=-1):
            if self.file.tell() >= 8:
                raise OSError(errno.EIO, "Input/output error")
            return self.file.read(8)

    monkeypatch.setattr("pipeline.source.fetch.os.fdopen", lambda descriptor, mode: Failing(open(descriptor, mode)))  # noqa: PTH123, SIM115
    (found,) = probe_block(source, ["img00000.png"], (9, 9))
    assert found.error == ""
    assert "Input/output error" in found.fault


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_when_the_source_itself_is_gone_no_image_is_to_blame(source, pauses, tmp_path, how):
    Path(source.root).rename(tmp_path / "elsewhere")
    if how == "empty":
        Path(source.root).mkdir()
    (found,) = probe_block(source, ["img00000.png"], (9, 9))
    assert (found.error, found.fault[:14]) == ("", "img00000.png: ")
    with pytest.raises(PassingFaultError, match=r"img00000\.png: .*No such file"):
        read_bytes(source, "img00000.png", "", Patience())


# -- reading ---------------------------------------------------------------------------------------------------------------------


def test_bytes_are_read_if_the_file_is_the_one_that_was_listed(source):
    data = read_bytes(source, "img00000.png", fingerprint(source, "img00000.png"), Patience())
    assert data == (Path(source.root) / "img00000.png").read_bytes()


def test_a_file_that_changed_after_it_was_listed_is_told_from_a_bad_one(source, pauses):
    listed = fingerprint(source, "img00000.png")
    make_images(Path(source.root), 1, [(60, 70)], seed=3)
    now = fingerprint(source, "img00000.png")
    with pytest.raises(
        ImageError, match=f"changed: the file changed after it was listed \\(from {listed} to {now}\\); run again"
    ):
        read_bytes(source, "img00000.png", listed, Patience())
    assert pauses == []


def test_a_missing_file_is_the_images_fault(source):
    with pytest.raises(ImageError, match="missing: No such file or directory") as caught:
        read_bytes(source, "none.png", "", Patience())
    assert caught.value.code == "missing"


def test_an_image_is_read_as_it_is_now_for_a_figure(source):
    assert Image.open(io.BytesIO(read_current(source, "img00000.png"))).size == (50, 40)
    with pytest.raises(FileNotFoundError):
        read_current(source, "none.png")
    (Path(source.root) / "folder.png").mkdir()
    with pytest.raises(ImageError, match="not_a_file: a folder, pipe, socket or device"):
        read_current(source, "folder.png")


def test_no_descriptor_is_left_open(source):
    (Path(source.root) / "folder.png").mkdir()
    (Path(source.root) / "bad.png").write_bytes(b"no image")
    before = n_descriptors()
    probe_block(source, ["img00000.png", "bad.png", "folder.png", "none.png"] * 10, (9, 9))
    assert n_descriptors() < before + 10  # of forty; the cluster of other tests opens some meanwhile
