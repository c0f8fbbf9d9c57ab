"""Draw docs/layout.svg, the folders of the package and one image's way through them: ``python docs/extensions/layout_picture.py``.

The layers are those of the import contract in pyproject.toml; a test compares the file with what this draws.
"""

from __future__ import annotations

import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docs" / "layout.svg"

SAYS = {
    "cli": ("the command featuremaps", "main, options, terminal, log format"),
    "api": ("what a program calls", "run_job"),
    "report": ("figures and the page", "page, figures, charts, maps"),
    "checks": ("look, change nothing", "plan, status, verify, doctor"),
    "cluster": ("where workers come from", "local, batch, ssh, Kubernetes; submit"),
    "run": ("the driver and its tasks", "lifecycle, driver, tasks; plan/ is pure"),
    "analysis": ("notebooks", "feature store, tables, neighbours"),
    "store": ("maps and ledger in Zarr", "layout, codecs, lock, objects"),
    "source": ("images to pixels", "listing, fetch, decoding"),
    "extract": ("pixels to maps", "layers, weights, cpu, gpu, kernel"),
    "config": ("typed settings", "job file"),
    "patterns": ("glob patterns", ""),
    "text": ("words", ""),
    "validation": ("values in YAML", ""),
    "errors": ("the few exceptions", ""),
}
WAY = {  # what happens to one image, by the folder that does it
    "source": ("1 listed, 3 read and decoded", "#0b6e4f"),
    "run": ("2 planned, 6 committed", "#0b6e4f"),
    "extract": ("4 turned into maps", "#0b6e4f"),
    "store": ("5 written, one shard at a time", "#0b6e4f"),
    "analysis": ("7 looked at", "#0b6e4f"),
}
WIDTH, LEFT, TOP, GAP = 940, 20, 20, 14
FOLDER_HEIGHT, MODULE_HEIGHT = 66, 34


def layers() -> list[list[str]]:
    """The contract's layers, from the top."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    found = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    return [[name.strip().removeprefix("pipeline.") for name in layer.split("|")] for layer in found]


def draw() -> str:
    """The picture."""
    y, parts = TOP, []
    for names in layers():
        is_folder = any((ROOT / "pipeline" / name).is_dir() for name in names)
        height = FOLDER_HEIGHT if is_folder else MODULE_HEIGHT
        width = (WIDTH - 2 * LEFT - GAP * (len(names) - 1)) / len(names)
        for i, name in enumerate(names):
            parts.append(_box(LEFT + i * (width + GAP), y, width, height, name, is_folder=is_folder))
        y += height + GAP
    title = "The folders of featuremaps: each imports only from those below it"
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 30}" role="img" '
        'font-family="system-ui, \'DejaVu Sans\', Arial, sans-serif" font-size="15">\n'
        f"  <title>{title}</title>\n"
        f'  <rect width="{WIDTH}" height="{y + 30}" fill="#fff"/>\n'
    )
    foot = (
        f'  <text x="{LEFT}" y="{y + 14}" fill="#444">Each imports only from those below it. '
        'Folders are blue, single modules grey; <tspan fill="#0b6e4f" font-weight="bold">green: one image\'s way.</tspan></text>\n'
        "</svg>\n"
    )
    return head + "".join(parts) + foot


def _box(x: float, y: float, width: float, height: float, name: str, *, is_folder: bool) -> str:
    says, modules = SAYS[name]
    fill, edge = ("#e8f0fb", "#2a5599") if is_folder else ("#f2f2f2", "#888888")
    lines = [f'  <rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{height}" rx="6" fill="{fill}" stroke="{edge}"/>\n']
    label = f"{name}/" if is_folder else name
    lines.append(
        f'  <text x="{x + 12:.1f}" y="{y + 22}"><tspan font-weight="bold">{label}</tspan>'
        f'<tspan dx="10" fill="#444">{escape(says)}</tspan></text>\n'
    )
    if is_folder:
        lines.append(f'  <text x="{x + 12:.1f}" y="{y + 40}" font-size="13" fill="#666">{escape(modules)}</text>\n')
    if name in WAY:
        text, colour = WAY[name]
        lines.append(f'  <text x="{x + 12:.1f}" y="{y + 58}" font-size="13" font-weight="bold" fill="{colour}">{text}</text>\n')
    return "".join(lines)


if __name__ == "__main__":
    FILE.write_text(draw())
