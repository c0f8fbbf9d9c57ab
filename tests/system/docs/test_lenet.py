"""workflows/lenet on a small part of Fashion-MNIST: that its parts fit together, and what bad input is told.

How well it learns is for the full run to say.
"""

import dataclasses
import functools
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pipeline
from pipeline.api import run_job
from pipeline.errors import FeaturemapsError, UsageError
from tests.support.needs import need
from workflows.lenet import __main__ as command
from workflows.lenet import data, draw, end_to_end, probe, tell, train
from workflows.lenet.__main__ import main

ROOT = Path(__file__).parents[3]
SEED = 23455
N_TRAIN, N_TEST = 360, 100
EPOCHS = {"tanh": 1, "sigmoid": 1}

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> data.Labelled:
    need("dataset-fashion-mnist")
    return data.fashion_mnist(data.DEBIAN, tmp_path_factory.mktemp("lenet"), SEED, N_TRAIN, N_TEST)


@pytest.fixture(scope="module")
def work(images) -> Path:
    return end_to_end.work_folder(images.folder.parent, images, SEED, EPOCHS)


@pytest.fixture(scope="module")
def results(client, work, images) -> dict:
    """With a tenth of the iterations for each probe: how well it fits is for the full run to say."""
    with mock.patch.dict(probe.MAX_ITERATIONS, logistic=50, svm=6):
        return end_to_end.end_to_end(images, work, SEED, EPOCHS, client=client)


# -- the images ------------------------------------------------------------------------------------------------------------------


def test_fashion_mnist_is_written_as_files_that_decode_to_the_same_pixels(images):
    assert images.pixels.shape == (N_TRAIN + N_TEST, 28, 28)
    assert (images.inputs.shape, images.inputs.dtype) == ((N_TRAIN + N_TEST, 1, 28, 28), np.float32)
    assert 0 <= images.inputs.min() < images.inputs.max() < 1
    for row in (0, N_TRAIN - 1, N_TRAIN, -1):
        with Image.open(images.folder / images.paths[row]) as image:
            assert np.array_equal(np.asarray(image), images.pixels[row])
        assert images.paths[row].split("/")[1] == images.classes[images.labels[row]]


def test_no_image_is_in_two_parts(images):
    parts = [images.train, images.validation, images.test]
    assert [len(part) for part in parts] == [300, 60, 100]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(N_TRAIN + N_TEST))
    assert all(images.paths[row].startswith("test/") for row in images.test)


def labelled(folder: Path, counts: dict[str, int]) -> Path:
    rng = np.random.default_rng(0)
    for name, n in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_a_labelled_folder_is_split_class_by_class_and_what_cannot_be_read_is_left_out(tmp_path):
    folder = labelled(tmp_path, {"cat": 14, "dog": 21})
    (folder / "cat" / "broken.png").write_bytes(b"no image")
    found = data.labelled_folder(folder, SEED)
    assert found.classes == ("cat", "dog")
    assert "cat/broken.png" not in found.paths
    counts = [np.bincount(found.labels[rows]).tolist() for rows in (found.train, found.validation, found.test)]
    assert counts == [[10, 15], [2, 3], [2, 3]]
    assert found.pixels.shape == (35, 28, 28)
    assert np.array_equal(found.test, data.labelled_folder(folder, SEED).test)


# -- the network -----------------------------------------------------------------------------------------------------------------


def test_the_layers_have_the_shapes_of_the_tutorial():
    maps = train.LeNet("tanh", 10, SEED).maps(torch.zeros(3, 1, 28, 28))
    assert {name: tuple(values.shape) for name, values in maps.items()} == {
        "conv1": (3, 20, 12, 12),
        "conv2": (3, 50, 4, 4),
        "conv3": (3, 500, 1, 1),
    }


def test_training_again_gives_the_same_weights(images, work, results):
    few = dataclasses.replace(images, train=images.train[:200])
    first, again = (train.train(few, "tanh", SEED, 1)[0].state_dict() for _ in range(2))
    other = train.train(few, "tanh", SEED + 1, 1)[0].state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_weights_are_kept_in_a_file_that_the_pipeline_takes_as_it_is(work, results):
    for activation in train.ACTIVATIONS:
        file = load_file(work / f"{activation}.safetensors")
        assert {name: tuple(values.shape) for name, values in file.items()} == {
            "conv1.weight": (20, 1, 5, 5),
            "conv1.bias": (20,),
            "conv2.weight": (50, 20, 5, 5),
            "conv2.bias": (50,),
            "conv3.weight": (500, 50, 4, 4),
            "conv3.bias": (500,),
        }
        stored = pipeline.open_store(work / f"{activation}.zarr").weights
        for name, values in file.items():
            assert np.array_equal(stored[name.replace(".", "_")], values.numpy())


# -- end to end ------------------------------------------------------------------------------------------------------------------


def test_all_images_have_maps_of_every_layer(work, results):
    assert {run["job"]: run["n_done"] for run in results["runs"]} == dict.fromkeys(
        ("job-random.yaml", "job-random-lenet.yaml", "job-tanh.yaml", "job-sigmoid.yaml"), N_TRAIN + N_TEST
    )
    assert pipeline.open_store(work / "tanh.zarr").map_layers == ("conv1", "conv2", "conv3")


def test_stored_maps_are_the_networks_own(results):
    for layers in results["largest_differences"].values():
        assert set(layers) == {"conv1", "conv2", "conv3"}
        assert 0 <= max(layers.values()) <= end_to_end.LARGEST_DIFFERENCE
    holds = [criterion["holds"] for criterion in results["criteria"] if "own" in criterion["what"]]
    assert holds == [True, True]


def test_stored_maps_of_other_weights_are_found_to_differ(images, work, results):
    found = end_to_end.compare(train.LeNet("tanh", 10, SEED + 1), "tanh", images, work)
    assert min(found.values()) > end_to_end.LARGEST_DIFFERENCE


def test_a_probe_sees_the_maps_in_the_order_of_the_labels(images, work, results):
    store = pipeline.open_store(work / "tanh.zarr")
    values = probe.features(store, "conv2", images)
    assert values.shape == (N_TRAIN + N_TEST, 50 * 4 * 4)
    for row in (0, 200, N_TRAIN + 3):
        assert np.array_equal(values[row], store.image(images.paths[row])["conv2"].values.ravel())


def test_every_probe_counts_every_test_image_once_and_does_better_than_guessing(results):
    assert [found["name"] for found in results["probes"]] == [", ".join(what) for what in end_to_end.PROBES]
    for found in results["probes"]:
        confusion = np.array(found["confusion"])
        assert confusion.sum() == N_TEST
        assert found["accuracy"] == pytest.approx(np.trace(confusion) / N_TEST)
        assert found["strength"] in probe.STRENGTHS
        assert found["accuracy"] > 0.3


def test_results_are_written_as_tables_and_figures(work, images, results, tmp_path):
    tell.write(results, images, work, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    text = (tmp_path / "results.md").read_text()
    (tmp_path / "README.md").write_text("# Before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    tell.write(results, images, work, tmp_path)
    assert (tmp_path / "README.md").read_text() == f"# Before\n<!-- results -->\n{text}<!-- end of results -->\nafter\n"
    for found in results["probes"]:
        assert tell.percent(found["accuracy"]) in text
    for name in ("accuracies", "filters", "layers", "confusion"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 5
            assert (tmp_path / f"{name}.png").stat().st_size < 100_000


def test_the_picture_of_accuracies_has_a_bar_per_probe_and_a_line_per_network(results):
    axes = draw.accuracies(results).axes[0]
    heights = [round(bar.get_height(), 6) for bar in axes.patches if bar.get_height()]
    assert heights == [round(100 * found["accuracy"], 6) for found in results["probes"]]
    assert len(axes.lines) == 2


# -- what has to hold ------------------------------------------------------------------------------------------------------------


def made_up(network: float, conv3: float, raw: float, difference: float) -> dict:
    return {
        "networks": [{"activation": "tanh", "accuracy": network}],
        "probes": [{"name": "raw, logistic", "accuracy": raw}, {"name": "tanh, conv3", "accuracy": conv3}],
        "largest_differences": {"tanh": {"conv1": 0.0, "conv3": difference}},
    }


@pytest.mark.parametrize(
    ("values", "holds"),
    [
        ((0.90, 0.90, 0.84, 1e-6), [True, True, True]),
        ((0.90, 0.895, 0.85, 1e-6), [True, True, True]),
        ((0.90, 0.88, 0.83, 1e-6), [False, True, True]),
        ((0.90, 0.90, 0.87, 1e-6), [True, False, True]),
        ((0.90, 0.90, 0.84, 1e-4), [True, True, False]),
        ((0.90, 0.90, 0.84, float("nan")), [True, True, False]),
    ],
)
def test_each_criterion_fails_when_it_must(values, holds):
    assert [criterion["holds"] for criterion in end_to_end.criteria(made_up(*values))] == holds


@pytest.mark.parametrize(("margin", "code", "pool"), [(2.0, 1, ProcessPoolExecutor), (-1.0, 0, ThreadPoolExecutor)])
def test_the_command_ends_with_1_unless_all_holds_and_leaves_what_is_done(
    margin, code, pool, work, results, client, monkeypatch, capsys, tmp_path
):
    def state() -> dict[Path, int]:
        kept = (*work.glob("*.safetensors"), *work.glob("probe-*.json"), *work.glob("*.zarr/*/conv*/c/**/*"))
        return {file: file.stat().st_mtime_ns for file in kept if file.is_file()}

    before = state()
    monkeypatch.setattr(end_to_end, "MARGIN", margin)
    monkeypatch.setattr(end_to_end, "REACHED_WITHIN", 1.0)
    if pool is ThreadPoolExecutor:  # its own kind of pool once is enough: each process imports for seconds
        monkeypatch.setattr(command, "ProcessPoolExecutor", lambda n, _: pool(n))
    monkeypatch.setattr(end_to_end, "run_job", lambda job, _: run_job(job, client))  # not a cluster for each of four jobs
    options = ("--epochs", 1, "--n-train", N_TRAIN, "--n-test", N_TEST, "--work", work.parent, "--output", tmp_path)
    assert main([*map(str, options)]) == code
    out = capsys.readouterr().out
    assert "460 images of 10 classes: 300 train, 60 validate, 100 test" in out
    assert ("**does not hold**" in out) == bool(code)
    assert json.loads((tmp_path / "results.json").read_text())["probes"] == json.loads(json.dumps(results["probes"]))
    assert state() == before != {}


def test_what_is_done_is_taken_for_nothing_else(images, tmp_path):
    def folder(images=images, seed=SEED, epochs=EPOCHS) -> Path:
        return end_to_end.work_folder(tmp_path, images, seed, epochs)

    split = {"train": images.train[1:], "validation": np.append(images.validation, images.train[0])}
    pixels = images.pixels.copy()
    pixels[7, 3, 3] ^= 1
    others = [
        folder(replace(images, **split)),
        folder(replace(images, pixels=pixels)),
        folder(replace(images, labels=images.labels[::-1].copy())),
        folder(seed=7),
        folder(epochs={"tanh": 1, "sigmoid": 2}),
    ]
    assert len({folder(), *others}) == 6
    assert folder() == folder()


# -- what goes wrong -------------------------------------------------------------------------------------------------------------


def idx(path: Path, values: np.ndarray, magic: int | None = None, shape: tuple[int, ...] | None = None) -> Path:
    header = np.array([magic or 0x0800 + values.ndim, *(shape or values.shape)], ">u4").tobytes()
    content = header + values.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def four_files(folder: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for name in ("train", "t10k"):
        idx(folder / f"{name}-images-idx3-ubyte.gz", images)
        idx(folder / f"{name}-labels-idx1-ubyte", labels)
    return folder


def test_idx_files_are_read_compressed_or_not(tmp_path):
    pixels = np.arange(7 * 784).reshape(7, 28, 28) % 256
    found = data.fashion_mnist(four_files(tmp_path, pixels, np.arange(7)), tmp_path / "work", SEED)
    assert np.array_equal(found.pixels, np.concatenate([pixels, pixels]))
    assert found.labels.tolist() == [*range(7), *range(7)]


def test_missing_files_say_how_to_get_them(tmp_path, capsys):
    assert main(["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "output")]) == 2
    said = capsys.readouterr().err
    assert "there is no train-images-idx3-ubyte.gz (nor train-images-idx3-ubyte)" in said
    assert "install Debian's package dataset-fashion-mnist, or download" in said


def test_a_work_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--work", str(tmp_path / "file" / "work")]) == 2
    assert "check the folders --work and --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], r"cannot be read \(.*\): it is damaged or was not downloaded whole"),
        (lambda content: b"<html>not found</html>", r"cannot be read \(Not a gzipped file"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-9]), r"says that it holds 5 x 28 x 28 values, and holds 3911"),
        (
            lambda content: gzip.compress(b""),
            r"starts with the number 0x00000000, and an idx file of 3-dimensional bytes with 0x00000803",
        ),
    ],
)
def test_a_damaged_file_is_named(damage, message, tmp_path):
    four_files(tmp_path, np.ones((5, 28, 28)), np.ones(5))
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UsageError, match=f"train-images-idx3-ubyte.gz {message}"):
        data.fashion_mnist(tmp_path, tmp_path / "work", SEED)


def test_files_that_were_mixed_up(tmp_path):
    with pytest.raises(UsageError, match=r"starts with the number 0x00000801, .* images and labels were mixed up"):
        data.read_idx(idx(tmp_path / "labels", np.ones(5)), data.IMAGES_MAGIC)
    with pytest.raises(UsageError, match="holds images of 20 x 28 pixels, and this LeNet is built for 28 x 28"):
        data.fashion_mnist(four_files(tmp_path, np.ones((5, 20, 28)), np.ones(5)), tmp_path / "work", SEED)
    with pytest.raises(
        UsageError, match=r"holds 4 labels up to 1, and .* 5 images of 10 classes \(0 to 9\): the two do not belong"
    ):
        data.fashion_mnist(four_files(tmp_path, np.ones((5, 28, 28)), np.ones(4)), tmp_path / "work", SEED)
    with pytest.raises(UsageError, match="holds 5 labels up to 10"):
        data.fashion_mnist(four_files(tmp_path, np.ones((5, 28, 28)), np.full(5, 10)), tmp_path / "work", SEED)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"cat": 9}, r"holds images of 1 classes \(cat\), and there is nothing to tell apart among fewer than 2"),
        ({"cat": 9, "dog": 6}, r"too few images that can be read of some classes \(dog: 6\): at least 7 of each"),
    ],
)
def test_a_folder_of_too_little(counts, message, tmp_path, capsys):
    labelled(tmp_path / "images", counts)
    with pytest.raises(UsageError, match=message):
        data.labelled_folder(tmp_path / "images", SEED)


def test_images_beside_the_class_folders(tmp_path):
    labelled(tmp_path, {"cat": 9, "dog": 9})
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "stray.png")
    with pytest.raises(UsageError, match=r"holds 1 images beside its sub-folders \(the first is 'stray.png'\)"):
        data.labelled_folder(tmp_path, SEED)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="nowhere"):
        data.labelled_folder(tmp_path / "nowhere", SEED)


AS_NOBODY = """
import os, sys
from pathlib import Path
import pipeline.source.path_lists, pipeline.source.header_limits, PIL.PngImagePlugin
from pipeline.errors import UsageError
from workflows.lenet import data

if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for folder in sys.argv[1:]:
    try:
        data.labelled_folder(Path(folder), 0)
    except UsageError as error:
        print(error)
"""


def test_folders_that_may_not_be_read():
    with tempfile.TemporaryDirectory(prefix="featuremaps-test-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        labelled(folder / "classes", {"cat": 9, "dog": 9, "locked": 9})
        labelled(folder / "closed", {"cat": 9})
        (folder / "classes" / "locked").chmod(0o000)
        (folder / "closed").chmod(0o000)
        try:
            arguments = [sys.executable, "-c", AS_NOBODY, str(folder / "classes"), str(folder / "closed")]
            found = subprocess.run(arguments, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=900, check=False)
        finally:
            (folder / "classes" / "locked").chmod(0o755)
            (folder / "closed").chmod(0o755)
    locked, closed = found.stdout.splitlines()
    assert "holds folders that cannot be read (locked): a class would be missing, so nothing was started" in locked, found.stderr
    assert "closed" in closed


def test_a_run_that_was_stopped_is_no_store_to_learn_from(images, client, tmp_path, monkeypatch):
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(end_to_end, "run_job", functools.partial(run_job, stop=stop))
    with pytest.raises(FeaturemapsError, match=r"the run of job-random.yaml ended as stopped .* run the command again"):
        end_to_end.run("random", images, tmp_path, client, lambda _: None)


def test_a_store_of_fewer_images_is_refused(images, work, results):
    more = dataclasses.replace(images, paths=("train/bag/99999.png", *images.paths[1:]))
    with pytest.raises(FeaturemapsError, match=r"has no maps of 1 of 460 images \(train/bag/99999.png, ...\)"):
        probe.features(pipeline.open_store(work / "tanh.zarr"), "conv1", more)
