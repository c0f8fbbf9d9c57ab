"""Thumbnails of bad files: what can be decoded is shown, and nothing that a file does reaches the process that asks."""

from __future__ import annotations

import base64
import hashlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.report import sandbox as module
from pipeline.report.sandbox import encode, photographs, thumbnails
from pipeline.source.decoding import decode
from pipeline.source.fingerprints import fingerprint_of
from tests.conftest import make_images
from tests.support.hostile import png
from tests.support.stuck_disk import mount_stuck


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def ask(folder: Path, *names: str) -> list[tuple[int, int] | None]:
    images = [(name, fingerprint_of((folder / name).stat())) for name in names]
    return [found and (found.width, found.height) for found in thumbnails(str(folder), DecodeSpec(), images, 96)]


def photograph(folder: Path, *names: str, spec: DecodeSpec | None = None) -> list[np.ndarray | str]:
    images = [(n, (folder / n).stat().st_size, hashlib.sha256((folder / n).read_bytes()).hexdigest()) for n in names]
    found = photographs(str(folder), spec or DecodeSpec(), images)
    return [trouble if pixels is None else pixels for pixels, trouble in found]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Whole, cut, empty and huge files."""
    folder = make_images(tmp_path / "pictures", 2, [(300, 400)], suffix=".jpg")
    whole = (folder / "img00000.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png(30_000, 30_000, data=b""))
    (folder / "tiny.png").write_bytes(png(4, 5))
    return folder


def test_what_is_there_of_a_picture_is_shown(folder):
    found = ask(folder, "cut.jpg", "empty.png", "bomb.png", "tiny.png", "img00000.jpg")
    assert found == [(96, 72), None, None, (5, 4), (96, 72)]


def test_a_file_that_kills_its_process_costs_itself_only(folder, monkeypatch):
    """The decoder is made to crash by a file's name, as no file at hand crashes the decoders of today."""
    crash = "if path == 'img00001.jpg': import os; os.abort()"
    site = folder.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import pipeline.source.fetch as r\nbefore = r.read_bytes\n"
        f"def read_bytes(source, path, *rest):\n    {crash}\n    return before(source, path, *rest)\nr.read_bytes = read_bytes\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")
    assert ask(folder, "cut.jpg", "img00001.jpg", "img00000.jpg") == [(96, 72), None, (96, 72)]
    monkeypatch.setattr(module, "STARTS", 1)
    assert ask(folder, "img00001.jpg", "img00000.jpg") == [None, None]


def test_a_file_that_hangs_costs_its_time_only(folder, monkeypatch):
    """Also the first one, whose time begins once the process has: what it says must not wait for the rest."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    monkeypatch.setattr(module, "IMAGE_S", 5.0)
    site = folder.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import time\nimport pipeline.source.fetch as r\nbefore = r.read_bytes\n"
        "def read_bytes(source, path, *rest):\n    if path == 'img00001.jpg': time.sleep(1000)\n"
        "    return before(source, path, *rest)\nr.read_bytes = read_bytes\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")
    assert ask(folder, "img00001.jpg", "cut.jpg") == [None, (96, 72)]


def test_without_time_there_are_none(folder, monkeypatch):
    monkeypatch.setattr(module, "TOTAL_S", 0.0)
    assert ask(folder, "cut.jpg") == [None]


def test_a_file_that_has_changed_or_is_too_large_has_none(folder, monkeypatch):
    assert (
        thumbnails(str(folder), DecodeSpec(), [("img00000.jpg", "12-34"), ("gone.jpg", "1-1"), ("cut.jpg", "")], 96) == [None] * 3
    )
    size = module.FILE_BYTES + 1
    (folder / "large.jpg").write_bytes((folder / "img00000.jpg").read_bytes().ljust(size, b"\0"))
    assert ask(folder, "large.jpg") == [None]


def test_pixels_are_made_smaller_and_kept_where_they_are_few():
    image = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    assert np.array_equal(pixels(encode(image, 96).uri), image)
    assert np.array_equal(pixels(encode(image[:, :, :1], 96).uri), image[:, :, 0])
    large = encode(np.full((1000, 10, 3), 7, np.uint8), 100)
    assert (large.width, large.height) == (1, 100)
    assert pixels(large.uri).mean() == 7
    assert encode(np.zeros((500, 400), np.uint8), 500).uri.startswith("data:image/jpeg;base64,")


def test_what_the_process_answers_one_picture_after_another(folder):
    order = {"kind": "thumbnails", "root": str(folder), "decode": DecodeSpec().model_dump(mode="json"), "longest": 50}
    images = [(name, fingerprint_of((folder / name).stat())) for name in ("img00000.jpg", "empty.png", "bomb.png")]
    found = list(module.answers({**order, "images": images}))
    assert [picture and picture.width for picture in found] == [50, None, None]


def test_programs_that_lie_in_the_current_folder_are_not_run(folder, monkeypatch, tmp_path):
    """As in a folder of notes with a json.py, or one named pipeline; the process is told to leave it alone."""
    poison = tmp_path / "poison"
    (poison / "pipeline" / "report").mkdir(parents=True)
    bad = f"open({str(tmp_path / 'was_run')!r}, 'w').close(); raise SystemExit\n"
    for name in ("json.py", "queue.py", "io.py", "numpy.py", "pipeline/__init__.py", "pipeline/report/sandbox.py"):
        (poison / name).write_text(bad)
    monkeypatch.chdir(poison)
    assert ask(folder, "cut.jpg") == [(96, 72)]
    assert not (tmp_path / "was_run").exists()


def test_photographs_are_what_the_extractor_saw(folder):
    spec = DecodeSpec(resize=(28, 30), color="grey")
    first, second, cut, bomb = photograph(folder, "img00000.jpg", "img00001.jpg", "cut.jpg", "bomb.png", spec=spec)
    assert np.array_equal(first, decode((folder / "img00000.jpg").read_bytes(), spec))
    assert np.array_equal(second, decode((folder / "img00001.jpg").read_bytes(), spec))
    assert cut == bomb == "the source image cannot be read any more"


def test_photographs_that_are_gone_or_others_are_said(folder, monkeypatch):
    known = [("img00000.jpg", (folder / "img00000.jpg").stat().st_size, "0" * 64), ("img00001.jpg", 7, ""), ("gone.jpg", 7, "")]
    found = [trouble for _, trouble in photographs(str(folder), DecodeSpec(), [*known, ("huge.jpg", module.FILE_BYTES + 1, "")])]
    changed = "the file has changed since its maps were computed, so it is not shown beside them"
    large = "the source image has more than 67,108,864 bytes, so it is not shown here"
    assert found == [changed, changed, "the source image cannot be read any more", large]


def test_the_memory_of_the_process_suffices_for_the_largest_pictures(folder, monkeypatch):
    """Of which WebP takes most, 32 bytes for a pixel."""
    monkeypatch.setattr(module, "IMAGE_S", 600.0)
    monkeypatch.setattr(module, "TOTAL_S", 600.0)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (500, 4, 3), np.uint8).repeat(9, 0).repeat(1100, 1)  # 19.8 megapixels
    Image.fromarray(pixels).save(folder / "large.webp", quality=1, method=0)
    Image.fromarray(pixels).save(folder / "large.png", compress_level=1)
    assert ask(folder, "large.webp", "large.png") == [(94, 96), (94, 96)]


def test_a_file_system_that_hangs_costs_its_time_only(folder, monkeypatch, tmp_path):
    """Those who read from it cannot even be killed."""
    images = [("a.jpg", 100, "0" * 64), ("b.jpg", 100, "0" * 64)]
    monkeypatch.setattr(module, "TOTAL_S", 8.0)
    monkeypatch.setattr(module, "IMAGE_S", 0.5)
    (tmp_path / "lost").mkdir()
    disk = mount_stuck(tmp_path / "lost")
    try:
        assert thumbnails(str(disk.folder), DecodeSpec(), [("a.jpg", "100-1")] * 2, 96) == [None, None]
        found = list(photographs(str(disk.folder), DecodeSpec(), images))
    finally:
        disk.release()
    assert [trouble for _, trouble in found] == [
        "the source image is out of reach: reading it took too long, or too much memory"
    ] * 2
