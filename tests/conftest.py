"""Images made once per session, a cluster shared by the tests that only need one, and what is compared after a run."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.api import run_job
from pipeline.cli import commands
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.store.schema import REJECTED, Status
from pipeline.store.store import Store
from tests.support import needs
from tests.support.kubernetes_stand_in import kubernetes_api
from tests.support.needs import pytest_runtest_makereport, pytest_terminal_summary  # noqa: F401 (pytest finds them here)

collect_ignore = ["support/gpu_stand_in"]  # whoever imports it takes the processor for a GPU


def pytest_configure() -> None:
    """Heed the signals of a terminal, also where a script started the tests with ``&`` or ``nohup``, which have them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items) -> None:
    """Mark what takes the shared cluster. With several processes, the longest files go first: else all others wait for one at the end."""
    for item in items:
        if "client" in item.fixturenames:
            item.add_marker("cluster")
    if getattr(config, "workerinput", None):
        system = Path(__file__).parent / "system"
        marked = {item.path for item in items if item.get_closest_marker("kill") or item.get_closest_marker("long")}
        long = marked | {item.path for item in items if system in item.path.parents}
        items.sort(key=lambda item: item.path not in long)


TWELVE_SIZES = [(40 + 7 * k, 60 + 5 * k) for k in range(12)]


def make_images(folder: Path, n: int, sizes, seed: int = 0, suffix: str = ".png") -> Path:
    """Smooth random pictures, so that JPEG and the maps have something to do."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        height, width = sizes[i % len(sizes)]
        coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"img{i:05d}{suffix}")
    return folder


def content(path: Path, layer: str = "conv1") -> dict[str, tuple]:
    """What a store holds of every image: status, error, digests, pooled values and the bytes of its valid maps."""
    store = Store(path)
    found: dict[str, tuple] = {}
    for shape_class in store.classes.values():
        columns = {name: store.column(shape_class.name, name) for name in ("path", "status", "error", "digest", "maps_digest")}
        sizes = [store.column(shape_class.name, name) for name in ("input_height", "input_width")]
        mean = store.column(shape_class.name, f"{layer}_mean")
        maps = store.array(shape_class.name, layer)
        for row in range(shape_class.length):
            status = Status(int(columns["status"][row]))
            if not status.is_live:
                continue
            assert columns["path"][row] not in found, "two live rows"
            lost = [shape_class.size[axis] - int(sizes[axis][row]) for axis in (0, 1)]
            valid = np.asarray(maps[row])[:, : maps.shape[2] - lost[0], : maps.shape[3] - lost[1]]
            data = valid.tobytes() if status is Status.DONE else b""
            values = tuple(columns[name][row] for name in ("error", "digest", "maps_digest"))
            found[columns["path"][row]] = (status.name, *values, mean[row].tobytes(), data)
    for path_, error, status in zip(*(store.column(REJECTED, name) for name in ("path", "error", "status")), strict=True):
        if status < Status.REMOVED:
            assert path_ not in found, "live and rejected"
            found[path_] = ("REJECTED", error)
    return found


@pytest.fixture(scope="session")
def client():
    """One local cluster of two workers."""
    with connect(LocalSpec(workers=2)) as connected:
        yield connected


@pytest.fixture(scope="session")
def twelve_sizes(tmp_path_factory) -> Path:
    """120 pictures of 12 sizes."""
    return make_images(tmp_path_factory.mktemp("source") / "twelve", 120, TWELVE_SIZES)


@pytest.fixture
def run(client, tmp_path):
    """Run a job on the shared cluster."""

    def call(source, store=None, **values):
        job = make_job({"source": str(source), "store": str(store or tmp_path / "features.zarr"), **values})
        return run_job(job, client)

    return call


@pytest.fixture
def command(client, monkeypatch, capfd):
    """Call the command as a shell would, but in this process and on the tests' own cluster: exit code, stdout, stderr."""

    @contextlib.contextmanager
    def connect(*_, **__):
        yield client

    monkeypatch.setattr("pipeline.cluster.session.connect", connect)

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["featuremaps", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture
def small_disk(tmp_path):
    """Mount a real file system, of a given size and number of files."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
        if done.returncode:
            needs.leave_out(needs.MOUNTS)
        return folder

    yield mount
    subprocess.run(["umount", "-l", folder], capture_output=True, check=False)


@pytest.fixture(scope="session")
def _kubernetes(tmp_path_factory):
    with kubernetes_api(tmp_path_factory.mktemp("kubernetes")) as found:
        yield found


@pytest.fixture
def kubernetes_operator(_kubernetes, monkeypatch):
    """What stands for Kubernetes; one for all tests, because kr8s keeps its first connection."""
    operator, config = _kubernetes
    monkeypatch.setenv("KUBECONFIG", str(config))
    yield operator
    operator.has_operator = operator.has_room = operator.is_allowed = True
    operator.lacks_operator_kinds = operator.is_stuck = False
    operator.objects["daskclusters"].clear()
