"""The page in a real browser, Debian's Chromium: at two widths, in the dark, by keyboard, without its script, and with hostile names."""

from __future__ import annotations

import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.report.page import write_report
from pipeline.store.schema import REJECTED
from pipeline.store.store import Store
from pipeline.text import printable
from tests.conftest import make_images
from tests.support.needs import debian_program

pytestmark = pytest.mark.cluster

HACK = "window.hacked=1"
HOSTILE = [
    f"<script>{HACK}</script>.png",
    f'"><img src=x onerror={HACK}>.png',
    "{{7*7}}{% include 'x' %}.png",
    "two\nlines\t\x1b[31m.png",
    "\u202egnp.esrever\u2066.png",
    f"javascript:{HACK}.png",
    "&lt;b&gt;&amp;.png",
    "日本 é.png",
    f"{'long' * 30}/{'name' * 45}.png",
]
NOT_UTF8 = b"\xff\xfe 50%.png"
WIDTHS = (400, 1600)


@pytest.fixture(scope="module")
def browser():
    """Start Chromium."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        found = playwright.chromium.launch(executable_path=debian_program("chromium", "chromium"), args=options)
        yield found
        found.close()


@pytest.fixture(scope="module")
def page_file(client, tmp_path_factory) -> Path:
    """A report on a store of images with hostile names, good and bad ones, with hostile errors and a run that said hostile things."""
    folder = tmp_path_factory.mktemp("page")
    plain = make_images(folder / "plain", 2, [(60, 90), (200, 300)], suffix=".jpg")
    source = folder / "source"
    for name in HOSTILE:
        for part, content in (("good", (plain / "img00000.jpg").read_bytes()), ("bad", b"no picture")):
            path = source / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    Path(os.fsdecode(os.fsencode(source / "good") + b"/" + NOT_UTF8)).write_bytes((plain / "img00000.jpg").read_bytes())
    whole = (plain / "img00001.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    shutil.copy(plain / "img00001.jpg", source / "large.jpg")
    where = folder / f"<b>{HACK}.zarr"
    run_job(make_job({"source": str(source), "store": str(where), "dtype": "uint8"}), client)
    store = Store(where)
    rows = np.arange(len(HOSTILE))
    store.commit(REJECTED, rows, {"error": np.array([f"corrupt: {text}" for text in HOSTILE], object)})
    receipt = store.last_receipt() | {"message": f"</script><script>{HACK}</script>", "hosts": {"<i>host": 3}, "run_id": "x"}
    store.write_receipt("20990101T000000.000Z-999999-00000000", receipt | {"outcome": "failed"})
    write_report(str(where), str(folder / "report.html"), n_samples=12)
    return folder / "report.html"


def opened(browser: Browser, file: Path, width: int = 1600, **options) -> tuple[Page, list[str]]:
    """The page in a window of its own, and everything that went wrong in it."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
    troubles: list[str] = []
    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: troubles.append(dialog.message))
    page.on("request", lambda request: request.url.startswith(("data:", file.as_uri())) or troubles.append(request.url))
    page.goto(file.as_uri())
    return page, troubles


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_clean_loads_nothing_fits_and_is_accessible(browser, page_file, width, scheme):
    page, troubles = opened(browser, page_file, width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    sizes = page.evaluate("[...document.images].map(image => [image.naturalWidth, image.width])")
    assert len(sizes) > 20
    assert min(map(min, sizes)) > 0
    assert all(page.evaluate("[...document.images].map(image => image.alt)"))
    found = Axe().run(page)
    assert len(found.response["passes"]) > 20
    assert not found.violations_count, found.generate_report()
    assert not troubles


def test_its_headings_are_in_order(browser, page_file):
    page, _ = opened(browser, page_file)
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1]))")
    assert levels.count(1) == 1
    assert all(level <= before + 1 for before, level in pairwise(levels))


def test_tab_goes_through_every_control_in_the_order_of_the_page(browser, page_file):
    page, _ = opened(browser, page_file)
    wanted = page.evaluate(
        """[...document.querySelectorAll('a[href], button, input, [tabindex="0"]')].filter(e => e.checkVisibility())
           .map((e, i) => e.dataset.turn = String(i)).length"""
    )
    turns = []
    for _ in range(wanted):
        page.keyboard.press("Tab")
        turns.append(page.evaluate("Number(document.activeElement.dataset.turn ?? -1)"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert turns == list(range(wanted))
    assert wanted > 50


def test_enter_skips_sorts_enlarges_and_copies(browser, page_file):
    page, troubles = opened(browser, page_file)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"

    paths = "[...document.querySelectorAll('#t-bad-rows th')].map(e => e.textContent)"
    page.locator(".badtable thead button", has_text="Path").focus()
    page.keyboard.press("Enter")
    up = page.evaluate(paths)
    page.keyboard.press("Enter")
    assert page.evaluate(paths) == up[::-1] != up
    assert page.locator(".badtable th[aria-sort]").get_attribute("aria-sort") == "descending"

    zoom = page.locator(".sample button.zoomable").first
    zoom.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.locator("img").get_attribute("alt").startswith("The image ")
    assert dialog.evaluate("e => e.contains(document.activeElement)")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert zoom.evaluate("e => e === document.activeElement")

    page.locator("[data-copies=c-python]").focus()
    page.keyboard.press("Enter")
    expect(page.locator("[data-copies=c-python]")).to_have_text(re.compile("^(Copied|Selected)"))
    assert not troubles


def test_a_reason_has_the_whole_width_and_moves_with_its_run(browser, page_file):
    page, troubles = opened(browser, page_file, 1200)
    table = page.locator("table:has(#t-runs)")
    assert table.evaluate("e => e.scrollWidth <= e.parentElement.clientWidth")
    assert table.locator(".reason td").bounding_box()["width"] == table.bounding_box()["width"]
    rows = "e => [...e.tBodies[0].rows].map(row => row.className)"
    assert table.evaluate(rows) == ["explained", "reason", ""]
    table.locator("button", has_text="Began").click()
    table.locator("button", has_text="State").click()
    assert table.evaluate(rows) == ["", "explained", "reason"], "complete, failed"
    assert not troubles


def test_the_mouse_enlarges_a_picture_and_closes_it_beside_it(browser, page_file):
    page, troubles = opened(browser, page_file)
    page.locator("img.zoom").nth(3).click()
    page.get_by_role("button", name="Close").click()
    page.locator("img.zoom").nth(3).click()
    page.mouse.click(3, 3)
    assert not page.get_by_role("dialog").is_visible()
    assert not troubles


def test_rows_are_filtered_and_counted(browser, page_file):
    page, _ = opened(browser, page_file)
    page.get_by_label("Show only rows with").fill("CUT.JPG")
    expect(page.locator("output")).to_have_text("1 of 10")
    assert page.locator("#t-bad-rows tr:visible").count() == 1


@pytest.mark.parametrize("width", WIDTHS)
def test_without_its_script_nothing_is_lost(browser, page_file, width):
    page, troubles = opened(browser, page_file, width, java_script_enabled=False)
    text = page.locator("main").inner_text()
    assert "pipeline.open_store(" in text
    assert "cut.jpg" in text
    assert page.locator("img.zoom:visible").count() > 20
    assert not page.locator("button:visible, input:visible").count()
    assert not troubles


def test_hostile_names_and_texts_are_text_and_run_nothing(browser, page_file):
    page, troubles = opened(browser, page_file)
    text = page.locator("main").text_content()
    for name in HOSTILE:
        assert printable(name).replace("%", "%25") in text
        assert f"{printable(name)[:400]}" in text, "of an error"
    assert "%FF%FE 50%25.png" in text
    assert f"</script><script>{HACK}</script>" in text
    assert page.title().startswith(f"<b>{HACK}.zarr")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert not page.locator("main script, main b, main i, img[onerror], a[href^=javascript]").count()
    assert not any(c in page.content() for c in "\u202e\u2066\x1b")
    assert not troubles


def test_what_gets_in_all_the_same_is_not_obeyed(browser, page_file, tmp_path):
    """The policy, should escaping ever fail."""
    content = page_file.read_text().replace(
        "<main", f'<script>{HACK}</script><img src=x onerror="{HACK}"><img src="https://example.invalid/x"><main'
    )
    (tmp_path / "changed.html").write_text(content)
    page, troubles = opened(browser, tmp_path / "changed.html")
    assert page.evaluate("typeof window.hacked") == "undefined"
    assert sum("Content Security Policy" in text for text in troubles) >= 2


def test_on_paper_no_control_is_left_and_nothing_is_cut_off(browser, page_file):
    page, _ = opened(browser, page_file)
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 720, "height": 1000})  # of A4 with its margins
    assert page.evaluate("document.documentElement.scrollWidth") == 720
    assert not page.locator("nav:visible, .copy:visible, .filter:visible, .skip:visible").count()
    assert page.pdf().startswith(b"%PDF")
