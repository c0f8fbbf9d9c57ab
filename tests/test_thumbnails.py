"""Thumbnails of bad files: what can be decoded is shown, and nothing that a file does reaches the process that asks."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import thumbnails as module
from pipeline.config import DecodeSpec
from pipeline.listing import fingerprint_of
from pipeline.thumbnails import encode, thumbnails
from tests.conftest import make_images
from tests.hostile import png


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def ask(folder: Path, *names: str) -> list[tuple[int, int] | None]:
    images = [(name, fingerprint_of((folder / name).stat())) for name in names]
    return [found and (found.width, found.height) for found in thumbnails(str(folder), DecodeSpec(), images, 96)]


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
        "import pipeline.reading as r\nbefore = r.read_bytes\n"
        f"def read_bytes(source, path, *rest):\n    {crash}\n    return before(source, path, *rest)\nr.read_bytes = read_bytes\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{site}:{os.environ.get('PYTHONPATH', '')}")
    assert ask(folder, "cut.jpg", "img00001.jpg", "img00000.jpg") == [(96, 72), None, (96, 72)]
    monkeypatch.setattr(module, "STARTS", 1)
    assert ask(folder, "img00001.jpg", "img00000.jpg") == [None, None]


def test_a_file_that_hangs_costs_its_time_only(folder, monkeypatch):
    monkeypatch.setattr(module, "IMAGE_S", 0.5)
    site = folder.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import time\nimport pipeline.reading as r\nbefore = r.read_bytes\n"
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
    order = {"root": str(folder), "decode": DecodeSpec().model_dump(mode="json"), "longest": 50}
    images = [(name, fingerprint_of((folder / name).stat())) for name in ("img00000.jpg", "empty.png", "bomb.png")]
    found = list(module.answers({**order, "images": images}))
    assert [picture and picture.width for picture in found] == [50, None, None]
