"""Bad images cost themselves only; a bad command is refused in one paragraph and touches nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pipeline import open_store
from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.store.schema import REJECTED, Status
from pipeline.store.store import Store
from tests.conftest import content, make_images

pytestmark = pytest.mark.cluster

IS_ROOT = os.getuid() == 0
NOBODY = 65534


def picture(height: int, width: int, suffix: str) -> bytes:
    """The bytes of a noisy picture."""
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, suffix)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header claims 50,000 x 50,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 100) + b"IDAT"


def float_tiff() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.ones((50, 60), np.float32)).save(file, "TIFF")
    return file.getvalue()


BAD = {
    "bomb.png": (bomb(), "too_many_pixels: the image has 50000 x 50000 pixels, the limit is 178956970"),
    "cut.jpg": (picture(50, 60, "JPEG")[:1500], "truncated: the file ends before the image does"),
    "cut.png": (picture(50, 60, "PNG")[:4000], "truncated: the file ends before the image does"),
    "cut header.jpg": (picture(50, 60, "JPEG")[:100], ""),
    "empty.png": (b"", "empty: the file has 0 bytes"),
    "float.tif": (float_tiff(), "unsupported_mode: TIFF with 32-bit floats"),
    "small.png": (picture(8, 60, "PNG"), "too_small: 8 x 60 pixels, smaller than the 9 x 9 that one output needs"),
    "text.jpg": (b"this is no image\n", "not_an_image: the content is none of"),
}
SOON_GONE = "zz gone.png"


@pytest.fixture
def zoo(tmp_path, twelve_sizes):
    """One of each bad kind among 24 good neighbours."""
    source = tmp_path / "zoo"
    shutil.copytree(twelve_sizes, source, ignore=lambda _, names: [n for n in names if n > "img00024"])
    for name, (data, _) in BAD.items():
        (source / name).write_bytes(data)
    (source / "dangling.png").symlink_to("nowhere.png")
    (source / "x.jpg").mkdir()
    shutil.copy(source / "img00000.png", source / "x.jpg" / "img00000.png")
    shutil.copy(source / "img00000.png", source / SOON_GONE)
    return source


def test_one_of_each_bad_kind_costs_itself_only(client, zoo, tmp_path, twelve_sizes, run):
    def lose(progress):
        if progress.stage == "starting workers":
            (zoo / SOON_GONE).unlink(missing_ok=True)

    job = make_job({"source": str(zoo), "store": str(tmp_path / "f.zarr")})
    n_files = sum(len(files) for _, _, files in os.walk(zoo))
    summary = run_job(job, client, on_progress=lose)
    assert summary.outcome == "complete"
    images = open_store(tmp_path / "f.zarr").images.set_index("path")
    assert (len(images), images.index.is_unique) == (n_files, True)
    assert summary.n_listed == n_files == summary.n_done + summary.n_quarantined + summary.n_rejected
    good = sorted(p.name for p in zoo.iterdir() if p.name.startswith("img"))
    done = images[images["status"] == "done"].index
    assert sorted(done) == sorted([*good, "x.jpg/img00000.png"])
    for name, (_, reason) in BAD.items():
        assert images.loc[name, "error"].startswith(reason), name
        assert images.loc[name, "status"] in {"rejected", "quarantined"}
    assert images.loc["cut header.jpg", "error"].split(":")[0] in {"truncated", "not_an_image", "corrupt"}
    assert images.loc["dangling.png", "error"] == "missing: No such file or directory"
    assert images.loc[SOON_GONE, "error"] == "missing: No such file or directory"
    run(twelve_sizes, tmp_path / "clean.zarr", limit=24)
    found, clean = content(tmp_path / "f.zarr"), content(tmp_path / "clean.zarr")
    assert {name: found[name] for name in good if name in clean} == clean
    assert found["x.jpg/img00000.png"] == clean["img00000.png"]


def test_bad_images_are_tried_again_when_asked_and_succeed_once_mended(command, zoo, tmp_path):
    store = tmp_path / "f.zarr"
    code, out, _ = command("run", zoo, store, "--json")
    first = json.loads(out)
    n_bad = len(BAD) + 1
    assert (code, first["n_bad_total"]) == (0, n_bad)
    assert command("run", zoo, store, "--max-quarantined", "0")[0] == 3
    assert command("run", zoo, store, "--max-quarantined", n_bad)[0] == 0
    before = content(store)

    code, out, _ = command("run", zoo, store, "--retry-quarantined", "--json")
    again = json.loads(out)
    assert (again["n_bad_total"], again["n_done"], again["n_unchanged"]) == (n_bad, 0, first["n_done"] + first["n_rejected"])
    assert content(store) == before

    for name in [*BAD, "dangling.png"]:
        (zoo / name).unlink()
        shutil.copy(zoo / "img00000.png", zoo / name)
    code, out, _ = command("run", zoo, store, "--retry-quarantined", "--max-quarantined", "0", "--json")
    mended = json.loads(out)
    assert (code, mended["n_bad_total"], mended["n_done"]) == (0, 0, n_bad)
    after = content(store)
    assert {name: after[name] for name in before if before[name][0] == "DONE"} == {
        name: row for name, row in before.items() if row[0] == "DONE"
    }
    assert {row[0] for row in after.values()} == {"DONE"}


def test_names_of_every_kind_go_through_the_whole_command(command, tmp_path):
    source = tmp_path / "source"
    names = [
        b"with space.png",
        b"two\nlines.png",
        b"50%.png",
        b"%FF.png",
        b"\xff\xfe.png",
        "\u00fcn\u00efc\u00f6d\u00e9 \u65e5\u672c.png".encode(),
        b"-o.png",
        b"'\"$(x)`;*.png",
    ]
    (source / "sub").mkdir(parents=True)
    data = picture(50, 60, "PNG")
    for name in names:
        for folder in (source, source / "sub"):
            (folder / os.fsdecode(name)).write_bytes(data)
        data += b"trailing bytes that no decoder reads"
    store = tmp_path / "f.zarr"
    code, out, err = command("run", source, store, "--json")
    assert (code, json.loads(out)["n_done"]) == (0, 2 * len(names)), err
    features = open_store(store)
    paths = set(features.images["path"])
    encoded = {
        "with space.png",
        "two\nlines.png",
        "50%25.png",
        "%25FF.png",
        "%FF%FE.png",
        "\u00fcn\u00efc\u00f6d\u00e9 \u65e5\u672c.png",
        "-o.png",
        "'\"$(x)`;*.png",
    }
    assert paths == encoded | {f"sub/{name}" for name in encoded}
    for path in paths:
        assert features.image(path)["conv1"].shape == (2, 42, 52)
    for i, path in enumerate(sorted(encoded - {"with space.png", "50%25.png", "%25FF.png"})):
        code, out, err = command("show", "-o", tmp_path / f"{i}.svg", "--", store, path)
        assert (code, out) == (0, f"wrote {tmp_path / f'{i}.svg'}\n"), err
    code, out, _ = command("status", store, "--json")
    assert json.loads(out)["counts"]["done"] == 2 * len(names)
    code, out, _ = command("run", source, store)
    assert out.startswith(f"complete: 0 images done, {2 * len(names)} unchanged")


def test_source_and_store_may_have_any_name_too(command, tmp_path):
    source = tmp_path / os.fsdecode(b"sour\xffce %")
    make_images(source, 2, [(50, 60)])
    store = tmp_path / os.fsdecode(b"st\xffore\n.zarr")
    assert command("run", source, store)[0] == 0
    assert command("run", source, store)[1].startswith("complete: 0 images done, 2 unchanged")
    for arguments in (("status", store), ("status", store, "--json"), ("plan", source, store)):
        assert command(*arguments)[0] == 0


def test_two_files_of_one_stem_are_two_images(run, tmp_path):
    source = tmp_path / "source"
    for i, name in enumerate(("a/same.png", "b/same.png", "a/same.jpg")):
        make_images(tmp_path / "made", 1, [(50, 60)], seed=i, suffix=Path(name).suffix)
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tmp_path / "made" / f"img00000{Path(name).suffix}", source / name)
    assert run(source).n_done == 3
    digests = {row[3] for row in content(tmp_path / "features.zarr").values()}
    assert len(digests) == 3


# -- without permission ----------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys, logging, dask
from pathlib import Path
from distributed import Client, LocalCluster
import pipeline.cli.commands, pipeline.analysis.feature_store, pipeline.report.draw_maps
import pipeline.extract.cpu, pipeline.run.driver, pipeline.checks.plan
from pipeline.config import make_job
from pipeline.api import run_job
from tests.conftest import make_images

folder = Path(sys.argv[1])
dask.config.set({"temporary-directory": str(folder)})
roles = {"read": 1, "extract": 1, "write": 1}
options = dict(processes=False, n_workers=1, threads_per_worker=1, resources=roles, dashboard_address=None, silence_logs=logging.ERROR)
with LocalCluster(**options) as cluster, Client(cluster) as client:
    make_images(folder / "warm", 1, [(40, 40)])  # imports what a run imports, while that may still be read
    run_job(make_job({"source": str(folder / "warm"), "store": str(folder / "warm.zarr")}), client)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    job = make_job({"source": str(folder / "source"), "store": str(folder / "out" / "f.zarr")})
    run_job(job, client)
    print("done", flush=True)
print("====", file=sys.stderr, flush=True)
for arguments in sys.argv[2:]:
    sys.argv = ["featuremaps", *arguments.split("|")]
    try:
        pipeline.cli.commands.main()
    except SystemExit as ended:
        print(f"\\nexit {ended.code}", file=sys.stderr, flush=True)
    print("====", file=sys.stderr, flush=True)
"""


@pytest.fixture
def public():
    """A folder that everybody may enter, as pytest's are not; all in it may be deleted by its owner."""
    folder = Path(tempfile.mkdtemp(prefix="featuremaps-test-"))
    folder.chmod(0o755)
    yield folder
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder, ignore_errors=True)


def test_what_may_not_be_read_is_said_and_costs_itself_only(public):
    source = make_images(public / "source", 4, [(50, 60)])
    (public / "out").mkdir()
    (source / "secret.png").write_bytes((source / "img00000.png").read_bytes())
    (source / "secret.png").chmod(0o000)
    (source / "locked").mkdir()
    shutil.copy(source / "img00000.png", source / "locked" / "img00000.png")
    (source / "locked").chmod(0o000)
    if IS_ROOT:
        os.chown(public / "out", NOBODY, NOBODY)
    closed = public / "closed"
    shutil.copytree(source, closed / "f.zarr", ignore=lambda *_: ["secret.png", "locked"])
    closed.chmod(0o000)
    make_images(public / "readonly", 1, [(50, 60)])
    (public / "readonly").chmod(0o555)
    commands = [
        f"run|{source}|{closed}/f.zarr",
        f"status|{closed}/f.zarr",
        f"plan|{source}|{closed}/f.zarr",
        f"run|{source}|{public}/readonly/deep/f.zarr",
        f"run|{closed}|{public}/out/g.zarr",
        f"show|{public}/out/f.zarr|secret.png|-o|{public}/out/fig.png",
    ]
    code = f"NOBODY = {NOBODY}\n" + AS_NOBODY
    found = subprocess.run(
        [sys.executable, "-c", code, str(public), *commands],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert found.stdout.startswith("done\n"), found.stderr
    assert "Traceback" not in found.stderr
    images = open_store(public / "out" / "f.zarr").images.set_index("path")
    assert images.loc["secret.png", ["status", "error"]].tolist() == ["rejected", "permission_denied: Permission denied"]
    assert images["status"].tolist().count("done") == 4
    assert not [path for path in images.index if path.startswith("locked")]
    receipt = Store(public / "out" / "f.zarr").receipts()[0]
    assert receipt["unreadable_folders"] == ["locked"]
    messages = found.stderr.split("====\n")[1:]
    for message, text in zip(
        messages,
        (
            "check its permissions; nothing was started",
            "cannot be accessed",
            "cannot be accessed",
            "cannot be written (Permission denied): nothing was started; check its permissions",
            "cannot be read (Permission denied), so nothing was listed and nothing was marked as removed",
            "'secret.png' has no maps in",
        ),
        strict=False,
    ):
        assert text in message, message
        assert "\nexit 2\n" in message


# -- refusals --------------------------------------------------------------------------------------------------------------------


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of everything below a folder but what a refused run leaves: a receipt, and the lock that it took."""
    found = (p for p in folder.rglob("*") if "runs" not in p.relative_to(folder).parts)
    return {str(p): (p.lstat().st_ino, p.lstat().st_mtime_ns) for p in found}


@pytest.fixture(scope="module")
def made(client, tmp_path_factory):
    """A source and its store, to be left as they are."""
    folder = tmp_path_factory.mktemp("made")
    make_images(folder / "source", 3, [(50, 60)])
    run_job(make_job({"source": str(folder / "source"), "store": str(folder / "f.zarr")}), client)
    (folder / "empty" / "nested").mkdir(parents=True)
    (folder / "texts").mkdir()
    (folder / "texts" / "notes.md").write_text("no images here")
    make_images(folder / "other", 2, [(50, 60)])
    (folder / "job.yaml").write_text("source: source\nstore: f.zarr\ndecode: {colour: grey}\n")
    save_file(
        {"conv1.weight": np.zeros((2, 3, 7, 7), np.float32), "conv1.bias": np.zeros(2, np.float32)}, folder / "w.safetensors"
    )
    (folder / "text.safetensors").write_text("no weights")
    for name, change in (("later.zarr", {"format": 2}), ("alien.zarr", None)):
        shutil.copytree(folder / "f.zarr", folder / name)
        document = json.loads((folder / name / "zarr.json").read_text())
        if change:
            document["attributes"]["featuremaps"] |= change
        else:
            document["attributes"] = {}
        (folder / name / "zarr.json").write_text(json.dumps(document))
    (folder / "broken.zarr" / "runs").mkdir(parents=True)
    (folder / "broken.zarr" / "runs" / "zarr.json").write_text("{}")
    (folder / "broken.zarr" / "zarr.json").write_text('{"zarr_format": 3, ')
    (folder / "file.zarr").write_text("a file")
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        ("run none new.zarr", 2, "source 'none' does not exist or cannot be reached .*check that its disk is mounted"),
        ("run none f.zarr", 2, "source 'none' does not exist or cannot be reached .*nothing was marked as removed"),
        ("run empty new.zarr", 2, "folder '.*/empty' is empty .*its disk may not be mounted. Nothing was marked as removed"),
        ("run texts new.zarr", 2, r"folder '.*/texts' holds no images but 1 other files \(suffixes: '.md'\)"),
        ("run source/*.gif new.zarr", 2, r"pattern 'source/\*.gif' matches no file"),
        ("run source/img00000.png new.zarr", 2, "is a single image.*give its folder"),
        ("run ftp://host/images new.zarr", 2, "is of an unknown kind"),
        (
            "run other f.zarr",
            2,
            'made with other settings.*no image was touched.*source_root: the store has ".*source", this run asks for',
        ),
        (
            "run source f.zarr --seed 7",
            2,
            r"made with other settings.*extractor.weights_sha256: the store has \".*this run asks for",
        ),
        ("run source f.zarr --layers 3x5x5", 2, "made with other settings.*extractor.layers: the store has .*this run asks for"),
        ("run source f.zarr --dtype uint8", 2, 'dtype: the store has "float32", this run asks for "uint8"'),
        ("run source f.zarr --color grey", 2, 'decode.color: the store has "rgb", this run asks for "grey"'),
        (
            "run source later.zarr",
            2,
            "is a store of format 2, and this version reads and writes format 1 only: nothing was touched",
        ),
        ("run source alien.zarr", 2, "is a Zarr group but no featuremaps store.*nothing was touched"),
        ("run source broken.zarr", 1, "metadata .*broken.zarr/zarr.json cannot be read .*restore that file from a copy"),
        ("run source file.zarr", 2, "store .*file.zarr cannot be written"),
        ("run source source", 2, "store .*source lies inside the source .*nothing was started; put the store beside the source"),
        ("run source source/deep/f.zarr", 2, "store .*f.zarr lies inside the source"),
        ("run source texts", 2, "texts holds 'notes.md' but is not a store.*give a folder that does not exist yet"),
        (
            "run job.yaml",
            2,
            r"job file job.yaml is not usable, so nothing was started: unknown key 'decode.colour': did you mean 'color'\?",
        ),
        (
            "run source new.zarr --weights w.safetensors",
            2,
            r"'conv1.weight' of .* has shape \(2, 3, 7, 7\), but the layers need \(2, 3, 9, 9\)",
        ),
        ("run source new.zarr --weights text.safetensors", 2, "weights file text.safetensors cannot be read as safetensors"),
        (
            "run source new.zarr --weights none.safetensors",
            2,
            "weights file none.safetensors cannot be read as safetensors .*No such file",
        ),
        ("plan none new.zarr", 2, "source 'none' does not exist"),
        ("plan other f.zarr", 2, "made with other settings"),
        ("status none.zarr", 2, "there is no store at .*none.zarr: check the path"),
        ("status later.zarr", 2, "is a store of format 2"),
        ("status broken.zarr", 1, "metadata broken.zarr/zarr.json cannot be read"),
        ("show f.zarr img0000.png -o fig.png", 2, "'img0000.png' is not an image of .*f.zarr: .*did you mean 'img0000"),
        ("show none.zarr a.png -o fig.png", 2, "there is no store at .*none.zarr"),
        ("show f.zarr img00000.png -o fig.gif", 2, "figure fig.gif would be of an unknown kind '.gif'"),
    ],
)
def test_what_cannot_work_is_refused_in_one_paragraph_and_nothing_is_touched(
    command, made, monkeypatch, arguments, code, expected
):
    monkeypatch.chdir(made)
    before = state(made)
    found, out, err = command(*arguments.split(" "))
    assert found == code
    assert out == ""
    assert state(made) == before
    paragraph = err.removeprefix("listing\n")
    assert paragraph.startswith("featuremaps: ")
    assert paragraph.count("\n") == 1
    assert paragraph.endswith("\n")
    assert "Traceback" not in paragraph
    assert re.search(expected, paragraph), paragraph


def test_an_unmounted_source_is_refused_and_nothing_is_marked_as_removed(command, tmp_path):
    source = make_images(tmp_path / "source", 20, [(50, 60)])
    assert command("run", source, tmp_path / "f.zarr")[0] == 0
    before = content(tmp_path / "f.zarr")
    source.rename(tmp_path / "elsewhere")
    assert command("run", source, tmp_path / "f.zarr")[0] == 2
    source.mkdir()
    code, _, err = command("run", source, tmp_path / "f.zarr")
    assert (code, "its disk may not be mounted" in err) == (2, True)
    shutil.copy(tmp_path / "elsewhere" / "img00000.png", source)
    code, _, err = command("run", source, tmp_path / "f.zarr")
    assert (code, "above the allowed 10%" in err) == (2, True)
    assert content(tmp_path / "f.zarr") == before
    assert {int(status) for status in Store(tmp_path / "f.zarr").column("50x60", "status")} == {Status.DONE}


def test_a_zarr_group_of_somebody_else_gets_no_file_of_ours(command, made, tmp_path):
    (tmp_path / "theirs.zarr").mkdir()
    (tmp_path / "theirs.zarr" / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    code, _, err = command("run", made / "source", tmp_path / "theirs.zarr")
    assert (code, "nothing was touched" in err) == (2, True)
    assert [p.name for p in (tmp_path / "theirs.zarr").iterdir()] == ["zarr.json"]


def test_an_unknown_cluster_leaves_no_store_behind(command, made, tmp_path):
    code, _, err = command("run", made / "source", tmp_path / "new.zarr", "--cluster", "unknown")
    assert (code, "nothing was started" in err) == (2, True)
    assert not (tmp_path / "new.zarr").exists()


# -- a full disk -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.6, 0.9, 0.95, 0.98, 0.99])
def test_a_disk_that_runs_full_at_any_point_is_said_and_the_next_run_finishes(command, small_disk, tmp_path, twelve_sizes, share):
    source = tmp_path / "source"
    shutil.copytree(twelve_sizes, source, ignore=lambda _, names: [n for n in names if int(n[3:8]) % 12 > 1])
    assert command("run", source, tmp_path / "whole.zarr")[0] == 0
    n_files = sum(1 for _ in (tmp_path / "whole.zarr").rglob("*")) + 2
    disk = small_disk(f"size=64m,nr_inodes={int(share * n_files)}")
    code, _, err = command("run", source, disk / "f.zarr")
    assert code in {1, 2}, err
    assert "Traceback" not in err
    assert "No space left on device" in err
    assert err.removeprefix("listing\n").count("\n") <= 3, err
    subprocess.run(["mount", "-o", "remount,nr_inodes=10000", disk], check=True)
    assert command("run", source, disk / "f.zarr")[0] == 0
    assert content(disk / "f.zarr") == content(tmp_path / "whole.zarr")
    assert not list((disk / "f.zarr").rglob("*.partial"))


def test_a_disk_that_is_too_small_is_refused_with_the_number_that_is_missing(command, small_disk, twelve_sizes):
    disk = small_disk("size=2m")
    code, _, err = command("run", twelve_sizes, disk / "f.zarr")
    assert code == 1
    assert "GB free: they were not started, so that the disk does not run full in the middle" in err
    assert "use --limit, or a new store with --dtype uint8 or --resize" in err
    assert content(disk / "f.zarr") == {}


def test_a_full_disk_is_one_paragraph_where_no_file_system_can_be_mounted_too(command, tmp_path, monkeypatch):
    source = make_images(tmp_path / "source", 3, [(50, 60)])
    real = Path.open

    def open_(path, *arguments, **options):
        if "zarr.json" in path.name and path.parent.name == REJECTED and arguments == ("wb",):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_)
    code, _, err = command("run", source, tmp_path / "f.zarr")
    assert code == 1
    assert "No space left on device" in err
    assert err.count("featuremaps: ") == 1
