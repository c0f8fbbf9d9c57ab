"""What `benchmarks/gpu.sh` found, on one page of text and as plots; of a script that was cut off, what there is.

python -m benchmarks.gpu_report FOLDER
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load(folder: Path, part: str) -> Any:
    """The figures of a part; nothing where it did not come to any."""
    path = folder / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def save(folder: Path, part: str, found: Any) -> None:
    """Write what is known so far, whole or not at all."""
    path = folder / f"{part}.json"
    path.with_suffix(".new").write_text(json.dumps(found, indent=1) + "\n")
    path.with_suffix(".new").rename(path)


def lines(folder: Path) -> Iterator[str]:
    """The page."""
    found = load(folder, "machine")
    if found.get("is_rehearsal", True):
        yield "REHEARSAL without a GPU: the figures mean nothing"
    yield f"{found.get('gpu', '?')}, CUDA {found.get('cuda')}, cuDNN {found.get('cudnn')}; {found.get('machine', '?')}"
    yield from test_lines(folder)
    for name, values in load(folder, "accuracy").items():
        yield f"accuracy, {name}: " + ", ".join(
            f"{key} {value if isinstance(value, bool) else f'{value:.1e}'}" for key, value in values.items()
        )
    yield from kernel_lines(load(folder, "kernels"))
    limits = load(folder, "limit")
    for dtype, values in limits.items():
        yield f"limit of the processors' stages, {dtype}: {values['images_per_s']:.0f} images/s on {values['cores']} cores"
    for run in load(folder, "runs"):
        rate, most = rate_of(run), limits.get(run["dtype"], {}).get("images_per_s")
        share = "" if run["images_per_s"] else ", with the start"
        share += f" ({100 * rate / most:.0f} % of the limit)" if most else ""
        large = run["large"]
        yield f"run, {run['dtype']} {' '.join(run['options'])}: {rate:.0f} images/s{share}"
        yield (
            f"  GPU busy {large['gpu_busy_percent_of_command']} % of the command, at most {large['gpu_busy_percent_at_most']} %; "
            f"its memory {large['gpu_memory_mib']} MiB; largest worker {large['largest_worker_mib']} MiB"
        )
    shared = [run for run in load(folder, "runs") if "--processes-per-gpu" in run["options"]]
    if shared:
        best = max(shared, key=rate_of)
        yield f"best of the processes per GPU that were tried: {best['options'][-1]}"
    for height, width in sorted({(one["height"], one["width"]) for one in load(folder, "sweep")}):
        best = max(chosen(folder, height, width), key=lambda one: one["images_per_s"])
        words = f"{best['threads']} threads, batches of {best['batch']}: {best['images_per_s']:.0f} images/s in one process"
        yield f"best of {width} x {height}: {words}"
    if resumed := load(folder, "resume"):
        yield f"killed and resumed: {resumed}"


def rate_of(run: dict[str, Any]) -> float:
    """Images/s without the start; with it, if the large run was too short to tell."""
    return float(run["images_per_s"] or run["large"]["images_per_s"])


def chosen(folder: Path, height: int, width: int) -> list[dict[str, Any]]:
    return [one for one in load(folder, "sweep") if (one["height"], one["width"]) == (height, width)]


def test_lines(folder: Path) -> Iterator[str]:
    """Counts of the tests' outcomes, and the names of those that failed."""
    log = folder / "tests.log"
    outcomes = re.findall(r"^(tests/\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)", log.read_text(), re.M) if log.exists() else []
    counts = {word: sum(outcome == word for _, outcome in outcomes) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    failed = [name for name, outcome in outcomes if outcome in {"FAILED", "ERROR"}]
    (folder / "tests.json").write_text(json.dumps({"counts": counts, "failed": failed}, indent=1) + "\n")
    yield f"tests: {counts}"
    yield from (f"  FAILED {name}" for name in failed)


def kernel_lines(found: dict[str, Any]) -> Iterator[str]:
    """Microseconds an image beside the larger floor."""
    for name, values in found.items():
        if not isinstance(values, dict):
            yield f"{name}: {values:.1f}"
            continue
        floor = max(values["floor: arithmetic"], values["floor: bytes"])
        yield f"kernels, {name}, us an image (times the larger floor):"
        yield from (f"  {key:58s} {value:9.3f} {value / floor:7.2f}" for key, value in values.items())


def plot(folder: Path) -> None:
    """Three panels: kernels, whole runs, threads and batches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    kernels = {name: values for name, values in load(folder, "kernels").items() if isinstance(values, dict)}
    if kernels:
        name, values = next(iter(kernels.items()))
        colours = ["tab:gray" if key.startswith("floor") else "tab:blue" for key in values]
        left.barh([*values][::-1], [*values.values()][::-1], color=colours[::-1])
        left.set_title(f"kernels, {name}: us an image")
    runs, limits = load(folder, "runs"), load(folder, "limit")
    names = [f"{run['dtype']} {' '.join(run['options'])}".replace("--", "") for run in runs]
    names += [f"limit of the processors, {dtype}" for dtype in limits]
    rates = [rate_of(run) for run in runs] + [values["images_per_s"] for values in limits.values()]
    middle.barh(names[::-1], rates[::-1], color=(["tab:red"] * len(runs) + ["tab:gray"] * len(limits))[::-1])
    middle.set_title("whole runs: images/s")
    for height, width in sorted({(one["height"], one["width"]) for one in load(folder, "sweep")}):
        for threads in sorted({one["threads"] for one in chosen(folder, height, width)}):
            each = sorted(
                (one for one in chosen(folder, height, width) if one["threads"] == threads), key=lambda one: one["batch"]
            )
            right.plot(
                [one["batch"] for one in each],
                [one["images_per_s"] for one in each],
                "o-",
                label=f"{width} x {height}, {threads} threads",
            )
    right.set(title="one process: images/s", xlabel="images in a batch", xscale="log", yscale="log")
    if right.lines:
        right.legend(fontsize="small")
    figure.savefig(folder / "gpu.png", dpi=110)


def main() -> None:
    folder = Path(sys.argv[1])
    text = "\n".join(lines(folder))
    (folder / "report.txt").write_text(text + "\n")
    print(text)
    try:
        plot(folder)
    except ImportError as error:
        print(f"no plots here ({error}): python -m benchmarks.gpu_report {folder}, where matplotlib is installed")


if __name__ == "__main__":
    main()
