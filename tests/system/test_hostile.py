"""Nothing in a file stops a run, exhausts a worker or writes outside the store."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

import pipeline
from pipeline import open_store
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import DecodeSpec, ExtractorSpec, load_job
from pipeline.errors import ImageError, UsageError
from pipeline.extract.weights import load_weights
from pipeline.source.decoding import decode, probe
from tests.conftest import make_images
from tests.support.fuzz import fuzz
from tests.support.hostile import SPEC, corpus, jpeg_of, png
from tests.support.needs import leave_out

pytestmark = pytest.mark.cluster

MEMORY_LIMIT_BYTES = 1536 * 2**20
CORPUS = corpus()


def look_at_process() -> tuple[int, int]:
    """Of a worker: its process, and the most memory it ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return os.getpid(), 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.fixture(scope="module")
def client():
    """Two workers with little memory."""
    with connect(LocalSpec(workers=2, memory=MEMORY_LIMIT_BYTES)) as connected:
        yield connected


@contextlib.contextmanager
def workers_survive(client):
    """The workers are the same processes afterwards, and were never near their limit."""
    before = {address: process for address, (process, _) in client.run(look_at_process).items()}
    yield
    after = client.run(look_at_process)
    assert {address: process for address, (process, _) in after.items()} == before
    assert max(peak_bytes for _, peak_bytes in after.values()) < 0.85 * MEMORY_LIMIT_BYTES


@pytest.fixture(scope="session")
def pillow_images(request, tmp_path_factory) -> Path:
    """Pillow's own test images, from the source distribution of the version that is installed; pip checks its sha256."""
    cache = request.config.cache.mkdir("pillow")
    name = f"pillow-{Image.__version__}.tar.gz"
    if not (cache / name).exists():
        partial = tmp_path_factory.mktemp("download")
        options = ["--quiet", "--no-deps", "--no-binary", "pillow", "--dest", partial]
        command = [sys.executable, "-m", "pip", "download", *options, f"pillow=={Image.__version__}"]
        if subprocess.run(command, check=False, timeout=240).returncode:
            leave_out("Pillow's source distribution (from a package index)")
        shutil.copy(partial / name, cache / f"{name}.partial")
        (cache / f"{name}.partial").rename(cache / name)
    folder = tmp_path_factory.mktemp("pillow")
    with tarfile.open(cache / name) as archive:
        wanted = [member for member in archive if "/Tests/images/" in member.name and member.isfile()]
        archive.extractall(folder, wanted, filter="data")
    return folder / f"pillow-{Image.__version__}" / "Tests" / "images"


def all_accounted_for(summary: dict, store: Path, n_files: int) -> None:
    assert summary["outcome"] == "complete"
    assert summary["n_listed"] == n_files == summary["n_done"] + summary["n_quarantined"] + summary["n_rejected"]
    images = open_store(store).images
    assert (len(images), images["path"].is_unique) == (n_files, True)
    assert set(images["status"]) <= {"done", "quarantined", "rejected"}
    assert not images["error"].str.startswith("crashed").any()


def test_all_test_images_of_pillow_run_to_the_end(client, command, pillow_images, tmp_path):
    files = [path for path in pillow_images.rglob("*") if path.is_file()]
    assert len(files) > 900
    listing, job, store = pillow_images / "list.txt", tmp_path / "job.yaml", tmp_path / "f.zarr"
    listing.write_bytes(b"".join(os.fsencode(path.relative_to(pillow_images)) + b"\n" for path in files))
    job.write_text(
        f"source: {json.dumps(str(listing))}\nstore: f.zarr\ndtype: uint8\ndecode: {{pixel_limit: {SPEC.pixel_limit}}}\n"
    )
    with workers_survive(client):
        code, out, err = command("run", job, "--json")
    assert code == 0, err
    summary = json.loads(out)
    all_accounted_for(summary, store, len(files))
    assert summary["n_done"] > 600
    assert command("verify", store, "--sample", "1")[0] == 0


def test_the_hostile_corpus_runs_to_the_end(client, command, tmp_path):
    source = make_images(tmp_path / "source", 10, [(40, 50)])
    for name, (data, _) in CORPUS.items():
        (source / name).write_bytes(data)
    job, store = tmp_path / "job.yaml", tmp_path / "f.zarr"
    job.write_text(f"source: source\nstore: f.zarr\ndtype: uint8\ndecode: {{pixel_limit: {SPEC.pixel_limit}}}\n")
    with workers_survive(client):
        code, out, err = command("run", job, "--json")
    assert code == 0, err
    all_accounted_for(json.loads(out), store, len(CORPUS) + 10)
    found = open_store(store).images.set_index("path")
    for name, (_, end) in CORPUS.items():
        if end != "done":
            assert found.loc[name, "error"].startswith(end), name
    assert command("verify", store, "--sample", "1")[0] == 0


@pytest.fixture(scope="session")
def costs(tmp_path_factory) -> dict[str, dict]:
    """What `tests.support.hostile` measures of each file of the corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, (data, _) in CORPUS.items():
        (folder / name).write_bytes(data)
    done = subprocess.run([sys.executable, "-m", "tests.support.hostile", folder], stdout=subprocess.PIPE, check=True, text=True)
    return {found["name"]: found for found in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CORPUS)
def test_a_hostile_file_ends_soon_with_its_code_and_within_the_planned_memory(costs, name):
    data, end = CORPUS[name]
    found = costs[name]
    assert found["decode"].startswith(end)
    assert found["probe"] in {"done", found["decode"]}
    assert found["elapsed_s"] < 100  # a hang, not a slow machine
    assert found["taken_bytes"] <= max(found["decode_bytes"], 64 * 2**20 + 3 * len(data))


def test_a_side_that_pillow_cannot_handle_is_refused_though_its_pixels_are_few():
    for data in (png(1, 70_000_000, data=b""), png(70_000_000, 1, data=b"")):
        for function in (probe, decode):
            with pytest.raises(ImageError, match=r"^too_many_pixels: .* 70000000.* pixels, the limit of a side is 67108863$"):
                function(data, DecodeSpec())


def test_a_file_larger_than_any_image_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png(10, 10))
    os.truncate(path, 8 * SPEC.pixel_limit + 2**24)
    with path.open("rb") as file:
        assert probe(file, SPEC).source_height == 10
        os.truncate(path, 8 * SPEC.pixel_limit + 2**24 + 1)
        with pytest.raises(
            ImageError, match=r"^too_large: the file has 144777217 bytes, and the largest .* needs 144777216, unc"
        ):
            probe(file, SPEC)


def test_scans_are_counted_up_to_the_end_of_the_picture_only():
    film = b"\xff\xda" * 1000
    assert decode(jpeg_of(12, 20) + film, SPEC).shape == (12, 20, 3)
    thumbnail = b"\xff\xe1" + (len(film) + 2).to_bytes(2, "big") + film
    data = jpeg_of(12, 20)
    assert decode(data[:2] + thumbnail + data[2:], SPEC).shape == (12, 20, 3)


def test_an_image_for_which_there_is_no_memory_costs_itself_only(client, run, tmp_path):
    def break_decoder():
        from pipeline.source import decoding as module

        real = module.decode

        def short_of_memory(data, spec):
            if b"greedy" in data:
                raise MemoryError
            return real(data, spec)

        module.decode, module.real = short_of_memory, real

    def mend_decoder():
        from pipeline.source import decoding as module

        module.decode = module.real

    source = make_images(tmp_path / "source", 10, [(40, 50)])
    (source / "greedy.png").write_bytes((source / "img00000.png").read_bytes() + b"greedy")
    with workers_survive(client):
        client.run(break_decoder)
        try:
            summary = run(source)
        finally:
            client.run(mend_decoder)
    assert (summary.outcome, summary.n_done, summary.n_quarantined) == ("complete", 10, 1)
    found = open_store(tmp_path / "features.zarr").images.set_index("path")
    assert found.loc["greedy.png", "error"].startswith("crashed: its worker process died, or ran out of memory, every time")


# -- lists -----------------------------------------------------------------------------------------------------------------------


def tree(folder: Path, but: Path) -> dict[str, tuple]:
    """Every file, link and folder with what would show a change; folders' times too, which a new file would move."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path != but and but not in path.parents:
            status = path.lstat()
            found[str(path)] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


TRICKS = [
    "../outside.png",
    "../../../../../../../../../../../../etc/passwd",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "a" * 10_000,
    "a/" * 5_000,
    "../" * 3_000,
    "%00.png",
    "%2e%2e%2foutside.png",
    "-",
    "--help",
    "~/x.png",
    "$(touch hacked).png",
    "`touch hacked`.png",
    "loop",
    "loop/loop/a.png",
    "link to outside.png",
    "..",
    ".",
    "../f.zarr/zarr.json",
    "file:///etc/passwd",
    " img00000.png ",
]


def write_list(path: Path, names: list[str]) -> None:
    if path.suffix == ".txt":
        path.write_text("\n".join(names))
    elif path.suffix == ".csv":
        path.write_text("path\n" + "\n".join('"' + name.replace('"', '""') + '"' for name in names))
    else:
        parquet.write_table(pa.table({"path": names}), path)


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_tricks_in_a_list_cost_themselves_only_and_write_nothing_outside_the_store(
    client, command, tmp_path, monkeypatch, suffix
):
    home = tmp_path / "home"
    source = make_images(home / "source", 3, [(40, 50)])
    make_images(home, 1, [(40, 50)], seed=9)
    (home / "img00000.png").rename(home / "outside.png")
    (source / "loop").symlink_to("loop")
    (source / "link to outside.png").symlink_to("../outside.png")
    names = [*TRICKS, *(f"img{i:05d}.png" for i in range(3))]
    names += [] if suffix == ".txt" else ["two\nlines.png", "new\r\nline.png"]
    write_list(source / f"list{suffix}", names)
    monkeypatch.chdir(home)
    store = home / "f.zarr"
    before = tree(home, store)
    with workers_survive(client):
        code, out, err = command("run", source / f"list{suffix}", store, "--json")
    assert code == 0, err
    assert tree(home, store) == before
    summary = json.loads(out)
    assert summary["n_done"] == 5  # three images, the one outside and the link to it
    all_accounted_for(summary, store, summary["n_listed"])
    left_out = {"/dev/zero", "./", "..", "."}
    assert len(names) - len(left_out) <= summary["n_listed"] <= len(names)
    assert command("verify", store, "--workers", 1)[0] == 0


@pytest.mark.parametrize("suffix", [".txt", ".csv", ".parquet"])
def test_a_nul_byte_in_a_list_is_refused_before_anything_is_touched(command, tmp_path, suffix):
    source = make_images(tmp_path / "source", 1, [(40, 50)])
    write_list(source / f"list{suffix}", ["img00000.png", "a\0b.png"])
    code, _, err = command("run", source / f"list{suffix}", tmp_path / "f.zarr")
    assert (code, "NUL byte" in err, (tmp_path / "f.zarr").exists()) == (2, True, False)


# -- fuzz and loaders ------------------------------------------------------------------------------------------------------------


def test_damaged_files_of_every_kind_end_as_they_should(tmp_path):
    ends = fuzz(60, 7, tmp_path)
    assert all(counts.total() == 60 for counts in ends.values())
    assert ends["job"].keys() == {"job", "refused"}


@pytest.mark.parametrize(
    "text",
    [
        "!!bool maybe",
        "!!timestamp never",
        "!!int ''",
        "!!int x",
        "!!float x",
        "!!binary \u00fc",
        "!!python/object/apply:os.system [touch hacked]",
        "!!python/name:os.system",
        "2001-13-41",
        "0x" + "f" * 100_000,
        "1" * 10_000,
        "1:" * 5_000 + "1",
        "&a [*a]",
        "[" * 1_000,  # as deep as Python goes
        '"\\ud800"',
        '"\\0"',
        "{? [1] : 2}",
        "{<<: 3}",
    ],
)
@pytest.mark.parametrize("key", ["source", "store", "limit", "decode", "extractor"])
def test_a_job_file_is_a_job_or_refused(tmp_path, monkeypatch, key, text):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "job.yaml"
    path.write_text(f"source: a\nstore: b\n{key}: {text}\n" if key not in {"source", "store"} else f"{key}: {text}\n")
    with pytest.raises(UsageError):
        load_job(path)
    assert not (tmp_path / "hacked").exists()


def test_a_few_lines_that_hold_billions_of_values_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "job.yaml").write_text("\n".join([*lines, "source: *a29", "store: *a29"]))
    with pytest.raises(UsageError, match="is not usable"):
        load_job(tmp_path / "job.yaml")


@pytest.mark.parametrize("name", ["a\0b", "x" * 10_000, "."])
def test_a_weights_file_that_cannot_be_named_is_refused(name):
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        load_weights(ExtractorSpec(weights=name), 3)


def test_pickles_are_refused_as_weights(tmp_path):
    path = tmp_path / "weights.safetensors"
    np.save(path.open("wb"), np.array([{}], object), allow_pickle=True)
    with pytest.raises(UsageError, match="cannot be read as safetensors"):
        load_weights(ExtractorSpec(weights=str(path)), 3)


UNSAFE = {
    "pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal",
    "torch.load", "torch.hub", "numpy.load", "np.load", "pandas.read_pickle", "pd.read_pickle",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader",
    "eval", "exec", "os.system", "allow_pickle",
}  # fmt: skip


def named(tree: ast.AST) -> set[str]:
    """Names that a module imports, calls, reads or passes as a keyword, with what they are attributes of."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in (alias.name, alias.name.split(".")[0])}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, node.module.split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute | ast.Name):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    return found


@pytest.mark.parametrize(
    "path", sorted(Path(pipeline.__file__).parent.rglob("*.py")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_no_module_reads_what_could_run_code(path):
    # one writes a pickle for a nanny, and reads none; the other has a safe loader of its own, as looked at below
    allowed = {"hangs.py": {"pickle"}, "config.py": {"yaml.load"}}.get(path.name, set())
    assert not named(ast.parse(path.read_text())) & UNSAFE - allowed


def test_a_yaml_file_makes_plain_values_only(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("source: !!python/object/apply:os.mkdir [made]\n")
    with pytest.raises(UsageError, match="could not determine a constructor"):
        load_job(path)
    assert not Path("made").exists()
