"""Make the README's terminal.svg and report.png from a real run: ``python docs/make_pictures.py``; needs the extra `demo` and chromium."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import skimage
from PIL import Image
from rich.console import Console
from rich.text import Text

DOCS = Path(__file__).parent
COLUMNS = 118
ENVIRONMENT = {**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONPATH": str(DOCS.parent)}
COMMANDS = ("run photos features.zarr", "run photos features.zarr")  # the second finds nothing to do
# Rich's own format loads a font from the network.
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg" role="img">
<title>A terminal: featuremaps run makes a store of 29 photographs; run again, it finds nothing to do</title>
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }}
.{unique_id}-title {{ font: bold 18px system-ui, "DejaVu Sans", Arial, sans-serif }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""
CHROMIUM = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1000,7000",
]
TOP_PX, SAMPLES_PX = 760, 1010  # how much of the page's beginning and of its samples is shown


def in_terminal(words: str, folder: Path) -> str:
    """What a terminal of `COLUMNS` columns gets from a command, progress bar included."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "pipeline", *words.split()]
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, stdout=slave, stderr=slave) as process:
        os.close(slave)
        text = bytearray()
        while chunk := _read(master):
            text += chunk
    os.close(master)
    if process.returncode:
        raise SystemExit(f"`featuremaps {words}` ended with {process.returncode}:\n{text.decode()}")
    return text.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux ends a terminal that nobody writes to any more
        return b""


def lines(raw: str) -> list[str]:
    """Text that stays on the screen; of a bar that redraws itself, the fullest one."""
    stays, bars = [], []
    for line in re.sub(r"\x1b\[\?25[lh]|\x1b\[\d*[AK]|\x1b\[2K", "\r", raw).split("\n"):
        *redrawn, last = [piece for piece in line.split("\r") if piece.strip()] or [""]
        for piece in [*redrawn, last]:
            (bars if "━" in piece else stays).append(piece)
    best = max(bars, key=lambda bar: int((re.findall(r"(\d+)/\d+", re.sub(r"\x1b\[[\d;]*m", "", bar)) or ["0"])[-1]), default="")
    return [best, *stays] if best else stays


def record(folder: Path) -> None:
    """Run the commands in ``folder`` and draw them."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for words in COMMANDS:
        console.print(Text.from_markup(f"[bold green]$[/] [bold]featuremaps {words}[/]"))
        for line in lines(in_terminal(words, folder)):
            if line.strip():
                console.print(Text.from_ansi(line))
        console.print()
    (DOCS / "terminal.svg").write_text(console.export_svg(title="featuremaps", code_format=SVG, unique_id="t"), encoding="utf-8")


def photograph(folder: Path) -> None:
    """Draw how the report begins and its samples, side by side."""
    subprocess.run([sys.executable, "-m", "pipeline", "report", "features.zarr"], cwd=folder, env=ENVIRONMENT, check=True)
    page, of_samples = folder / "report.html", folder / "samples.html"
    text = page.read_text(encoding="utf-8")
    others = r"<header.*?</header>|<nav.*?</nav>|<section(?! aria-labelledby=\"samples\").*?</section>"
    of_samples.write_text(re.sub(others, "", text, flags=re.DOTALL), encoding="utf-8")
    left = _screenshot(page).crop((0, 0, 1000, TOP_PX))
    right = _screenshot(of_samples).crop((0, 0, 1000, SAMPLES_PX))
    right = right.resize((1000 * TOP_PX // SAMPLES_PX, TOP_PX), Image.Resampling.LANCZOS)
    both = Image.new("RGB", (left.width + right.width, TOP_PX), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    colours = both.quantize(256, method=Image.Quantize.MAXCOVERAGE)  # the default loses the few coloured pixels
    colours.save(DOCS / "report.png", optimize=True)


def _screenshot(html: Path) -> Image.Image:
    shot = html.with_suffix(".png")
    options = [*CHROMIUM, f"--user-data-dir={html.with_suffix('')}", f"--screenshot={shot}", html.as_uri()]
    subprocess.run([shutil.which("chromium") or "chromium", *options], check=True, stderr=subprocess.DEVNULL)
    return Image.open(shot).convert("RGB")


def main() -> None:
    """Make both in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        folder = Path(name)
        shutil.copytree(
            Path(skimage.__file__).parent / "data", folder / "photos", ignore=shutil.ignore_patterns("__pycache__", "*.py*")
        )
        record(folder)
        photograph(folder)


if __name__ == "__main__":
    main()
