"""One real run, held in its middle by a web server that does not send one image, and all that can be seen of it from outside."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.store.store import Store
from tests.conftest import make_images
from tests.support.needs import debian_program
from tests.support.services import free_port, serving

pytestmark = pytest.mark.cluster

N_IMAGES = 200
DOCS = Path(__file__).parents[3] / "docs"
HELD = "img00199.jpg"
COMMAND = [
    sys.executable,
    "-c",
    "import pipeline.run.driver as d; d.RECEIPT_S = 0.3; from pipeline.cli.commands import main; main()",
]
COUNTED = {
    "images_done_total": "n_done",
    "images_quarantined_total": "n_quarantined",
    "images_rejected_total": "n_rejected",
    "images_left_total": "n_pending",
    "images_checked_total": "n_checked",
    "pixels_total": "pixels",
    "bytes_read_total": "bytes_read",
    "bytes_written_total": "bytes_written",
    "images_listed": "n_listed",
    "images_unchanged": "n_unchanged",
    "images_removed": "n_removed",
    "slots": "slots",
    "workers": "workers",
}


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=900) as response:
        return str(response.read().decode())


def samples(url: str) -> dict[str, float]:
    """What a page of metrics says, by name and labels."""
    lines = [line for line in get(url).splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def until(look: Any, process: Any = None) -> Any:
    """What ``look`` finds, once it finds something, while a process is there."""
    for _ in range(9000):
        assert process is None or process.poll() is None, "it ended"
        with contextlib.suppress(OSError):
            found = look()
            if found:
                return found
        time.sleep(0.1)
    raise AssertionError("not seen within 15 minutes")


@pytest.fixture(scope="module")
def prometheus():
    """Start the real server."""
    found = debian_program("prometheus", "prometheus")

    @contextlib.contextmanager
    def start(folder: Path, *targets: str):
        jobs = [{"job_name": t, "static_configs": [{"targets": [t]}], "scrape_interval": "250ms"} for t in targets]
        (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": jobs}))  # which is YAML, too
        port = free_port()
        options = [f"--storage.tsdb.path={folder / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen([found, f"--config.file={folder / 'prometheus.yml'}", *options], stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()

    return start


def asked(server: str, query: str) -> dict[str, float]:
    """What Prometheus answers, by the target that it scraped (of several series, the last)."""
    answer = json.loads(get(f"{server}/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
    return {found["metric"]["instance"]: float(found["value"][1]) for found in answer["data"]["result"]}


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """A run of a real command that is at work and cannot end: its stderr, store, metrics, and how to let it go."""
    folder = tmp_path_factory.mktemp("held")
    images = make_images(folder / "images", N_IMAGES, [(300, 400)], suffix=".jpg")
    (images / "text.jpg").write_bytes(b"no image")
    cut = (images / "img00000.jpg").read_bytes()
    (images / "img00000.jpg").write_bytes(cut[: len(cut) // 2])
    is_held, may_go = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = (images / self.path[1:]).read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if (
                not wanted and self.command == "GET" and self.path == f"/{HELD}"
            ):  # of headers, which come first, a range is asked for
                is_held.set()
                may_go.wait(900)
            self.send_response(206 if wanted else 200)
            if wanted:
                start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(data))
                self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}")
                data = data[start:stop]
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET  # noqa: N815 (the name that the base class looks for)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as web:
        paths = [f"{web}/{path.name}" for path in sorted(images.iterdir())]
        (folder / "list.txt").write_text("\n".join(paths))
        store, err = folder / "f.zarr", folder / "err"
        options = ["--workers", "2", "--metrics", "127.0.0.1:0", "--log-format", "json", "-v"]
        arguments = [*COMMAND, "run", str(folder / "list.txt"), str(store), *options]
        with err.open("w") as log, (folder / "out").open("w") as out:
            environment = {**os.environ, "SLURM_JOB_ID": "4711"}
            process = subprocess.Popen(arguments, stdout=out, stderr=log, env=environment)
        try:
            metrics, dashboard = (
                until(lambda p=pattern: re.search(p, err.read_text()), process)[1]
                for pattern in (r'"url": "(http://[^"]+)"', r"dashboard: (http://[^\"]+)/status")
            )
            assert is_held.wait(900)
            yield SimpleNamespace(
                folder=folder,
                process=process,
                store=store,
                err=err,
                metrics=metrics,
                dashboard=f"{dashboard}/metrics",
                go=may_go.set,
            )
        finally:
            may_go.set()
            process.kill()
            process.wait()


def settled(held: Any, see: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """The receipt and what was seen when both agree: the run is held, so it comes to rest."""

    def look() -> Any:
        receipt = Store(held.store).last_receipt()
        found = see()
        names = [name for name in COUNTED if name in found]
        return (
            receipt["n_done"]
            and {name: found[name] for name in names} == {n: receipt[COUNTED[n]] for n in names}
            and (receipt, found)
        )

    found: tuple[dict[str, Any], dict[str, float]] = until(look)
    return found


def short(found: dict[str, float], store: Path) -> dict[str, float]:
    """The samples of one store without prefix and label."""
    ours = {name.removeprefix("featuremaps_"): value for name, value in found.items() if name.startswith("featuremaps_")}
    label = f'store="{store}"'
    return {name.replace(f"{{{label}}}", "").replace(f",{label}", ""): value for name, value in ours.items()}


@pytest.mark.parametrize("where", ["metrics", "dashboard"])
def test_while_it_works_a_run_is_counted_on_its_own_port_and_beside_dask(held, where):
    receipt, found = settled(held, lambda: short(samples(getattr(held, where)), held.store))
    assert COUNTED.keys() <= found.keys()
    assert 0 < found["images_done_total"] < N_IMAGES
    assert (found["images_listed"], found["images_rejected_total"], found["slots"]) == (N_IMAGES + 1, 1, 2)
    assert found["images_pending"] == N_IMAGES - receipt["n_done"] - receipt["n_quarantined"]
    for stage, seconds in receipt["stage_s"].items():
        assert found[f'stage_seconds_total{{stage="{stage}"}}'] == pytest.approx(seconds)
    assert found["slot_seconds_total"] >= receipt["slot_s"] > 0
    assert abs(found["last_commit_timestamp_seconds"] - time.time()) < 600
    assert found["runs_at_work"] == 1
    everything = get(getattr(held, where))
    assert f'featuremaps_run_info{{run_id="{receipt["run_id"]}",store="{held.store}",version="' in everything
    assert ("dask_scheduler_workers" in everything) == (where == "dashboard")


def test_prometheus_scrapes_both_and_answers_what_the_receipt_says(held, prometheus, tmp_path):
    targets = [urllib.parse.urlsplit(url).netloc for url in (held.metrics, held.dashboard)]
    with prometheus(tmp_path, *targets) as server:
        until(lambda: set(asked(server, "featuremaps_images_done_total > 0")) == set(targets))
        for target in targets:
            label = f'{{instance="{target}",store="{held.store}"}}'
            receipt, found = settled(
                held,
                lambda at=label: {
                    name: sum(asked(server, f"featuremaps_{name}{at}").values())
                    for name in ("images_done_total", "bytes_written_total")
                },
            )
            assert found["bytes_written_total"] == receipt["bytes_written"] > 0
        (pending,) = set(asked(server, "featuremaps_images_pending").values())
        assert pending == N_IMAGES - receipt["n_done"] - receipt["n_quarantined"]
        assert set(asked(server, 'up{job!=""}').values()) == {1.0}
        documented = re.findall(r"^    (.*featuremaps_.*?)  +#", (DOCS / "observability.md").read_text(), re.MULTILINE)
        assert len(documented) == 4
        for query in documented:
            asked(server, query)  # an error is an HTTP error


def test_the_status_of_a_run_at_work_says_where_it_stands(held):
    settled(held, lambda: short(samples(held.metrics), held.store))
    out = subprocess.run([*COMMAND, "status", str(held.store), "--json"], capture_output=True, text=True, check=True).stdout
    status = json.loads(out)
    run = status["last_run"]
    assert status["is_at_work"]
    holder = status["holder"]
    assert (holder["pid"], holder["host"], holder["job_id"]) == (held.process.pid, socket.gethostname(), "4711")
    assert holder["run_id"] == run["run_id"]
    assert 0 <= holder["silent_s"] < 120
    assert status["counts"]["done"] == run["n_done"] > 0
    assert status["left_s"] > 0
    assert run["bottleneck"] in run["shares"]
    assert sum(run["shares"].values()) == pytest.approx(1)
    assert (run["slots"], run["workers"], run["outcome"]) == (2, 2, "running")
    assert run["elapsed_s"] >= 0
    assert run["updated"] >= run["started"]
    text = subprocess.run([*COMMAND, "status", str(held.store)], capture_output=True, text=True, check=True).stdout
    assert re.search(rf"process {held.process.pid} on \S+ \(job 4711\), last heard \d+ s ago, about \d+ s left\n", text)
    assert re.search(
        r"running, \d+ done at [\d.]+ images/s on 2 slots(, \d+ found bad)?, (most of the workers' time|the workers were idle)",
        text,
    )


def test_a_port_that_is_taken_is_refused_before_anything_is_started(held, tmp_path):
    taken = urllib.parse.urlsplit(held.metrics).netloc
    source = make_images(tmp_path / "source", 1, [(50, 60)])
    arguments = [*COMMAND, "run", str(source), str(tmp_path / "f.zarr"), "--metrics", taken]
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(
        rf"featuremaps: metrics cannot be served on {taken} \(.*\): nothing was started; give a HOST .*\n", ended.stderr
    )
    assert not (tmp_path / "f.zarr").exists()


def test_at_its_end_every_line_was_json_and_nobody_listens_any_more(held):
    held.go()
    assert held.process.wait(timeout=900) == 0
    for url in (held.metrics, held.dashboard):
        with pytest.raises(urllib.error.URLError, match="refused"):
            get(url)
    lines = [json.loads(line) for line in held.err.read_text().splitlines()]
    receipt = Store(held.store).last_receipt()
    for line in lines:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert {"level", "logger", "message"} <= line.keys()
        assert line["store"] == str(held.store)
    begun = [line for line in lines if line["message"].startswith("starting workers")]
    assert [line["run_id"] for line in begun] == [receipt["run_id"]]
    batches = [line for line in lines if "batch" in line]
    assert sum(line["n_done"] for line in batches) == receipt["n_done"] == N_IMAGES - 1
    assert {line["host"] for line in batches} == {socket.gethostname()}
    assert sum(line["stage_s"]["extract"] for line in batches) == pytest.approx(receipt["stage_s"]["extract"], abs=0.01)
    bad = {line["path"].rpartition("/")[2]: line["error"].partition(":")[0] for line in lines if line["level"] == "WARNING"}
    assert bad == {"text.jpg": "not_an_image", "img00000.jpg": "truncated"}
    assert (lines[-1]["outcome"], lines[-1]["receipt"], lines[-1]["run_id"]) == ("complete", receipt, receipt["run_id"])
    assert (held.folder / "out").read_text().startswith(f"complete: {N_IMAGES - 1} images done")


def test_a_drain_ends_the_metrics_too_and_says_so_in_json(tmp_path):
    source = make_images(tmp_path / "source", 5, [(50, 60)])
    options = ["--workers", "1", "--metrics", "127.0.0.1:0", "--log-format", "json"]
    arguments = [*COMMAND, "run", str(source), str(tmp_path / "f.zarr"), *options]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        lines = []
        for line in process.stderr:
            lines.append(json.loads(line))
            if lines[-1].get("stage") == "starting workers":
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=900) == 75
        assert process.stdout.read().startswith("stopped: 0 images done, ")
    assert [line["signal"] for line in lines if "signal" in line] == ["SIGTERM"]
    assert (lines[-1]["outcome"], lines[-1]["level"], lines[-1]["receipt"]["n_pending"]) == ("stopped", "WARNING", 5)
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(lines[0]["url"])
