"""Labelled images of 28 x 28 grey pixels: Fashion-MNIST's four files, or a folder with a sub-folder per class."""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from pipeline.config import DecodeSpec
from pipeline.errors import ImageError, UsageError
from pipeline.source.decoding import decode
from pipeline.source.listing import list_collection
from pipeline.source.names import absolute_path

Array: TypeAlias = np.ndarray[Any, Any]

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
SIZE = 28
N_TRAIN, N_TEST = 60_000, 10_000
DECODE = DecodeSpec(color="grey", resize=(SIZE, SIZE))
IMAGES_MAGIC, LABELS_MAGIC = 0x0803, 0x0801  # idx: type 8 is unsigned bytes; then the number of dimensions
SMALLEST_CLASS = 7  # of which 5 train, 1 validates and 1 tests

HOW_TO_GET = (
    "install Debian's package dataset-fashion-mnist, or download train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
    "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz from github.com/zalandoresearch/fashion-mnist (data/fashion) into one "
    "folder and name that with --data"
)


@dataclass(frozen=True, slots=True)
class Labelled:
    """Labelled images, and which of them train, validate and test."""

    folder: Path
    """What the pipeline lists: every image is a file below it."""
    paths: tuple[str, ...]
    """Of each image, relative to the folder, as a store spells it."""
    pixels: Array
    """(image, y, x) uint8, as the pipeline decodes the files."""
    labels: Array
    """(image,) int64: an index of ``classes``."""
    classes: tuple[str, ...]
    train: Array
    """Rows to learn from, (n,) int64."""
    validation: Array
    """Rows by which whatever there is to choose is chosen: when training stops, how strongly a probe is regularised."""
    test: Array
    """Rows that are looked at once, at the end."""

    @property
    def inputs(self) -> Array:
        """Pixels as the extractor sees them: (image, 1, y, x) float32, range [0, 1)."""
        return self.pixels[:, None].astype(np.float32) / 256

    def digest(self) -> str:
        """Of all that a result depends on: images, labels and split; 12 hex digits."""
        found = hashlib.sha256("\n".join([*self.classes, *self.paths]).encode())
        for values in (self.pixels, self.labels, self.train, self.validation, self.test):
            found.update(np.ascontiguousarray(values).data)
        return found.hexdigest()[:12]


# -- Fashion-MNIST ---------------------------------------------------------------------------------------------------------------


def fashion_mnist(data: Path, work: Path, seed: int, n_train: int = N_TRAIN, n_test: int = N_TEST) -> Labelled:
    """Read the four idx files and write every image as a PNG, in a folder per class.

    Parameters
    ----------
    data : Path
        Folder of the four files, compressed (.gz) or not.
    work : Path
        Where the folder of PNGs is made; one that is there already is kept.
    seed : int
        Of the choice of the images that validate: a sixth of the training images.
    n_train, n_test : int
        Only the first so many of the training and of the test images.

    Raises
    ------
    UsageError
        When a file is missing or is not what it should be.
    """
    parts = [_read_part(data, name, n) for name, n in (("train", n_train), ("t10k", n_test))]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    n_train = len(parts[0][1])
    paths = tuple(
        f"{'train' if row < n_train else 'test'}/{CLASSES[label]}/{row if row < n_train else row - n_train:05d}.png"
        for row, label in enumerate(labels)
    )
    folder = work / f"fashion-mnist-{n_train}-{len(labels) - n_train}-{zlib.crc32(pixels):08x}"
    _write_pngs(folder, paths, pixels)
    order = np.random.default_rng(seed).permutation(n_train)
    n_validation = n_train // 6
    return Labelled(
        folder,
        paths,
        pixels,
        labels,
        CLASSES,
        train=np.sort(order[n_validation:]),
        validation=np.sort(order[:n_validation]),
        test=np.arange(n_train, len(labels)),
    )


def _read_part(data: Path, name: str, n: int) -> tuple[Array, Array]:
    """The first n images (n, 28, 28) uint8 and their labels (n,) int64 of ``train`` or ``t10k``."""
    images_file, labels_file = _find(data, f"{name}-images-idx3-ubyte"), _find(data, f"{name}-labels-idx1-ubyte")
    images, labels = read_idx(images_file, IMAGES_MAGIC), read_idx(labels_file, LABELS_MAGIC)
    if images.shape[1:] != (SIZE, SIZE):
        raise UsageError(
            f"{images_file} holds images of {images.shape[1]} x {images.shape[2]} pixels, and this LeNet is built for {SIZE} x {SIZE}: "
            f"these are not the images that it learns from; {HOW_TO_GET}"
        )
    if len(images) != len(labels) or labels.max(initial=0) >= len(CLASSES):
        raise UsageError(
            f"{labels_file} holds {len(labels)} labels up to {labels.max(initial=0)}, and {images_file.name} {len(images)} images of "
            f"{len(CLASSES)} classes (0 to {len(CLASSES) - 1}): the two do not belong together; {HOW_TO_GET}"
        )
    return images[:n], labels[:n].astype(np.int64)


def _find(data: Path, name: str) -> Path:
    for path in (data / f"{name}.gz", data / name):
        if path.is_file():
            return path
    raise UsageError(f"there is no {name}.gz (nor {name}) in {data}, so there are no images to learn from: {HOW_TO_GET}")


def read_idx(path: Path, magic: int) -> Array:
    """Read one idx file of unsigned bytes: a magic number, a size per dimension (4 bytes each, big-endian), the values.

    Parameters
    ----------
    path : Path
        Compressed where it ends in .gz.
    magic : int
        What its first four bytes have to be: 0x0800 and the number of dimensions.

    Raises
    ------
    UsageError
        When it cannot be read, starts otherwise, or is shorter or longer than it says.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error}): it is damaged or was not downloaded whole; {HOW_TO_GET}") from error
    n_dimensions = magic & 0xFF
    header = np.frombuffer(content[: 4 * (1 + n_dimensions)].ljust(4 * (1 + n_dimensions), b"\0"), ">u4")
    if header[0] != magic:
        raise UsageError(
            f"{path} starts with the number {header[0]:#010x}, and an idx file of {n_dimensions}-dimensional bytes with {magic:#010x}: "
            f"it is another kind of file, or images and labels were mixed up; {HOW_TO_GET}"
        )
    shape = tuple(int(n) for n in header[1:])
    values = np.frombuffer(content, np.uint8, offset=4 * (1 + n_dimensions))
    if values.size != math.prod(shape):
        raise UsageError(
            f"{path} says that it holds {' x '.join(map(str, shape))} values, and holds {values.size}: it was cut off, or is not what "
            f"it says; {HOW_TO_GET}"
        )
    return values.reshape(shape)


def _write_pngs(folder: Path, paths: tuple[str, ...], pixels: Array) -> None:
    """Write all, then give the folder its name, so that one with that name is whole."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for parent in {(partial / path).parent for path in paths}:
        parent.mkdir(parents=True)
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(partial / path, compress_level=1)
    partial.rename(folder)


# -- any labelled folder ---------------------------------------------------------------------------------------------------------


def labelled_folder(folder: Path, seed: int) -> Labelled:
    """Read a folder that has a sub-folder per class; of each class 5/7 train, 1/7 validates and 1/7 tests.

    The images are read as the job files of this folder read them: grey, resized to 28 x 28. Those that cannot be decoded are left out,
    as the pipeline quarantines them.

    Raises
    ------
    UsageError
        When the folder cannot be listed, an image lies outside the sub-folders, or there are too few classes or images of one.
    """
    try:
        listing = list_collection(str(folder))
    except OSError as error:
        raise UsageError(
            f"folder {folder} cannot be listed ({error}): give one that you may read, with a sub-folder per class"
        ) from error
    unreadable = ", ".join(map(str, listing.unreadable[:3]))
    if unreadable:
        raise UsageError(
            f"folder {folder} holds folders that cannot be read ({unreadable}): a class would be missing, so nothing was started; "
            "give yourself the right to read them, or move them elsewhere"
        )
    outside = [path for path in listing.paths if "/" not in path]
    if outside:
        raise UsageError(
            f"folder {folder} holds {len(outside)} images beside its sub-folders (the first is {outside[0]!r}), and an image's class is "
            "the name of its sub-folder, so these have none; move them into the sub-folders of their classes"
        )
    found = {path: image for path in listing.paths if (image := _decoded(listing.root, path)) is not None}
    names = [path.partition("/")[0] for path in found]
    classes = tuple(sorted(set(names)))
    counts = {name: names.count(name) for name in classes}
    if len(classes) < 2:
        raise UsageError(
            f"folder {folder} holds images of {len(classes)} classes ({', '.join(classes) or 'none'}), and there is nothing to tell apart "
            "among fewer than 2; give a folder with a sub-folder per class"
        )
    scarce = [f"{name}: {n}" for name, n in counts.items() if n < SMALLEST_CLASS]
    if scarce:
        raise UsageError(
            f"folder {folder} holds too few images that can be read of some classes ({', '.join(scarce)}): at least {SMALLEST_CLASS} of "
            "each are needed, so that some train, some validate and some test; add images, or take those folders out"
        )
    labels = np.array([classes.index(name) for name in names])
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(np.flatnonzero(labels == label)) for label in range(len(classes))]
    cuts = [np.split(rows, [len(rows) * 5 // 7, len(rows) * 6 // 7]) for rows in shuffled]
    train, validation, test = (np.sort(np.concatenate(rows)) for rows in zip(*cuts, strict=True))
    return Labelled(Path(listing.root), tuple(found), np.stack(list(found.values())), labels, classes, train, validation, test)


def _decoded(root: str, path: str) -> Array | None:
    """One image (28, 28) uint8 as the pipeline decodes it, or None where it cannot."""
    try:
        return decode(Path(os.fsdecode(absolute_path(root, path))).read_bytes(), DECODE)[:, :, 0]
    except (ImageError, OSError):
        return None
