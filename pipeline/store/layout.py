"""Pure planning: sizes and rows in, shape classes, layouts and batches out. No I/O, no clock, no randomness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import FeaturemapsError

MAX_EXACT_CLASSES = 256
MIN_CHUNK_BYTES = 256 * 1024
SHARD_BYTES = 64 * 1024**2
MAX_MAP_BYTES = 256 * 1024**2
MAX_SHARD_ROWS = 2048
MAX_SHARD_INPUT_BYTES = 128 * 1024**2
BATCH_BYTES = 256 * 1024**2

# Rough costs on one core, for balancing only: results never depend on them.
IMAGE_S = 0.3e-3
DECODE_S_PER_PIXEL = 5e-9
S_PER_MULTIPLY_ADD = 2e-11
S_PER_TORCH_VALUE = 4e-9
S_PER_STORED_BYTE = 1e-9
BATCH_S = 1.0
MIN_BATCH_S = 0.2
DRIVER_S = 0.03  # the driver's and the scheduler's time allowed per batch: twice what it takes
BATCHES_PER_SLOT = 4
BATCHES_IN_FLIGHT_PER_SLOT = 2


Size = tuple[int, int]


def ladder_step(side: int) -> int:
    """Smallest step of the ladder ``ceil(2 ** (k / 4))`` (about 19 % apart) that is not below ``side``.

    Examples
    --------
    >>> [ladder_step(n) for n in (1, 100, 128, 129, 512, 513)]
    [1, 108, 128, 153, 512, 609]
    """
    k = max(0, math.floor(4 * math.log2(side)) - 1)
    while math.ceil(2 ** (k / 4)) < side:
        k += 1
    return math.ceil(2 ** (k / 4))


def class_name(size: Size) -> str:
    """Name of the group of a shape class: ``heightxwidth``."""
    return f"{size[0]}x{size[1]}"


def assign_classes(sizes: Iterable[Size], existing: Iterable[Size], max_exact: int = MAX_EXACT_CLASSES) -> list[Size]:
    """Shape class of each image, given the classes that exist, in the order of the images.

    A size that has a class joins it. While there are fewer than ``max_exact`` classes, a new size gets its own class. After that it
    joins the class whose sides are its own sides, rounded up on the ladder (`ladder_step`).

    Parameters
    ----------
    sizes : iterable of (int, int)
        Input height and width of each image, pixels.
    existing : iterable of (int, int)
        Height and width of the classes of the store.
    max_exact : int
        Number of classes up to which every size has its own.

    Returns
    -------
    list of (int, int)
        Class height and width of each image; never smaller than the image.

    Examples
    --------
    >>> assign_classes([(10, 10), (20, 20), (10, 10)], [(10, 10)], max_exact=1)
    [(10, 10), (20, 20), (10, 10)]
    >>> assign_classes([(21, 30)], [(10, 10)], max_exact=1)
    [(23, 32)]
    """
    known = set(existing)
    assigned: list[Size] = []
    for size in sizes:
        exact = size in known or len(known) < max_exact
        chosen = size if exact else (ladder_step(size[0]), ladder_step(size[1]))
        known.add(chosen)
        assigned.append(chosen)
    return assigned


@dataclass(frozen=True, slots=True)
class LayerLayout:
    """How the maps of one stored layer are laid out in one class's array."""

    name: str
    """Name of the layer and of its array."""
    channels: int
    height: int
    """Map height for an image of the class's full size."""
    width: int
    itemsize: int
    """Bytes per stored value."""
    chunk_rows: int
    """Images in an inner chunk."""
    chunk_height: int
    chunk_width: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's maps, uncompressed."""
        return self.channels * self.height * self.width * self.itemsize


@dataclass(frozen=True, slots=True)
class ClassLayout:
    """Layout of one shape class: all its layers share the rows that one task owns."""

    size: Size
    """Input height and width, pixels."""
    shard_rows: int
    """Rows whose maps one task owns: every object of every layer holds all of these rows or a part of them."""
    layers: tuple[LayerLayout, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one image's maps over all stored layers, uncompressed."""
        return sum(layer.row_bytes for layer in self.layers)

    def is_sharded(self, layer: LayerLayout) -> bool:
        """Whether a layer's objects are shards of several inner chunks, not plain chunks."""
        return layer.chunk_rows < self.shard_rows


def class_layout(size: Size, layers: Sequence[tuple[str, int, Size]], itemsize: int, channels: int = 3) -> ClassLayout:
    """Choose chunks and shards of a class.

    An inner chunk holds a power of two of whole images, at least 256 KiB if the shard is large enough. A shard holds about
    64 MiB of maps, at most 2,048 rows and at most 128 MiB of decoded input. A map above 256 MiB is cut in y and x instead, and has
    its row to itself.

    Parameters
    ----------
    size : (int, int)
        Input height and width of the class, pixels.
    layers : sequence of (name, channels, (height, width))
        The stored layers (there may be none), with the size of their maps for an image of the class's full size.
    itemsize : int
        Bytes per stored value.
    channels : int
        Channels of the decoded image.

    Raises
    ------
    FeaturemapsError
        When a layer has no map at this size.
    """
    for name, _, (height, width) in layers:
        if height < 1 or width < 1:
            raise FeaturemapsError(
                f"class {class_name(size)} leaves no {name} map ({height} x {width}): images of this size are smaller than the "
                "receptive field and must be rejected before a class is planned"
            )
    row_bytes = [c * h * w * itemsize for _, c, (h, w) in layers]
    chunk_rows = [1 << max(0, math.ceil(math.log2(MIN_CHUNK_BYTES / b))) for b in row_bytes]
    cut = any(b > MAX_MAP_BYTES for b in row_bytes)
    by_input = MAX_SHARD_INPUT_BYTES // (size[0] * size[1] * channels)
    by_maps = SHARD_BYTES // max(1, sum(row_bytes))
    wanted = max(1, min(by_maps, by_input, MAX_SHARD_ROWS))
    chunk_rows = [1 if cut else min(c, 1 << (wanted.bit_length() - 1)) for c in chunk_rows]
    step = max(chunk_rows, default=1)
    shard_rows = 1 if cut else wanted // step * step
    return ClassLayout(
        size,
        shard_rows,
        tuple(
            LayerLayout(name, c, h, w, itemsize, rows, *_spatial_chunk(c, h, w, itemsize))
            for (name, c, (h, w)), rows in zip(layers, chunk_rows, strict=True)
        ),
    )


def _spatial_chunk(channels: int, height: int, width: int, itemsize: int) -> Size:
    """Shape of a spatial chunk: the whole map, or for maps above 256 MiB the largest cut below 64 MiB: bands first, then columns."""
    if channels * height * width * itemsize <= MAX_MAP_BYTES:
        return height, width
    rows = max(1, SHARD_BYTES // (channels * width * itemsize))
    columns = width if rows > 1 else max(1, min(width, SHARD_BYTES // (channels * itemsize)))
    return rows, columns


@dataclass(frozen=True, slots=True)
class Piece:
    """The pending rows of one shard; exactly one task may write them."""

    size: Size
    """The shape class."""
    start: int
    """First row of the shard; a multiple of the class's ``shard_rows``."""
    stop: int
    """One past the last row: the shard's end or the class's length."""
    rows: tuple[int, ...]
    """Rows in ``[start, stop)`` to compute, ascending."""
    cost_s: float
    """Estimated work on one core."""
    memory_bytes: int
    """Bytes of decoded input and stored maps, uncompressed."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one task processes, or one read, one extract and one write task together."""

    pieces: tuple[Piece, ...]

    @property
    def n_images(self) -> int:
        """Number of images to compute."""
        return sum(len(piece.rows) for piece in self.pieces)

    @property
    def cost_s(self) -> float:
        """Estimated work on one core."""
        return sum(piece.cost_s for piece in self.pieces)

    @property
    def memory_bytes(self) -> int:
        """Bytes of decoded input and stored maps, uncompressed."""
        return sum(piece.memory_bytes for piece in self.pieces)


def image_cost_s(layout: ClassLayout, multiply_adds: int, torch_values: int) -> float:
    """Estimated seconds for one image on one core; used only to balance work, and accurate to a factor of about two.

    Parameters
    ----------
    layout : ClassLayout
    multiply_adds : int
        Of the convolutions.
    torch_values : int
        Values, before pooling, of the layers that are not compiled.
    """
    height, width = layout.size
    compute_s = multiply_adds * S_PER_MULTIPLY_ADD + torch_values * S_PER_TORCH_VALUE + height * width * DECODE_S_PER_PIXEL
    return IMAGE_S + compute_s + layout.row_bytes * S_PER_STORED_BYTE


def cut_pieces(
    layout: ClassLayout, rows: Sequence[int], n_rows: int, cost_s: float, channels: int = 3, *, complete: bool = True
) -> tuple[list[Piece], list[int]]:
    """Cut the pending rows of a class at the borders of its shards.

    Parameters
    ----------
    layout : ClassLayout
    rows : sequence of int
        Pending rows, ascending.
    n_rows : int
        Length of the class.
    cost_s : float
        Estimated seconds per image.
    channels : int
        Channels of the decoded image.
    complete : bool
        False while the class may grow: then rows of an incomplete last shard are held back, so that no second task
        ever owns that shard.

    Returns
    -------
    pieces : list of Piece
    held : list of int
        Rows that wait for their shard to fill.

    Examples
    --------
    >>> layout = class_layout((516, 639), [("conv1", 2, (508, 631))], itemsize=4)
    >>> layout.shard_rows
    26
    >>> pieces, held = cut_pieces(layout, range(30), 30, 0.01, complete=False)
    >>> [(p.start, p.stop) for p in pieces], held
    ([(0, 26)], [26, 27, 28, 29])
    """
    height, width = layout.size
    pieces: list[Piece] = []
    held: list[int] = []
    for shard, members in group_by_shard(rows, layout.shard_rows):
        start, stop = shard * layout.shard_rows, min((shard + 1) * layout.shard_rows, n_rows)
        if not complete and stop - start < layout.shard_rows:
            held.extend(members)
            continue
        memory = len(members) * height * width * channels + (stop - start) * layout.row_bytes
        pieces.append(Piece(layout.size, start, stop, tuple(members), len(members) * cost_s, memory))
    return pieces, held


def group_by_shard(rows: Iterable[int], shard_rows: int) -> Iterator[tuple[int, list[int]]]:
    """Number and rows of each shard that holds some of ``rows``; ``rows`` must ascend."""
    members: list[int] = []
    for row in rows:
        if members and row // shard_rows != members[0] // shard_rows:
            yield members[0] // shard_rows, members
            members = []
        members.append(row)
    if members:
        yield members[0] // shard_rows, members


def pack_batches(pieces: Sequence[Piece], slots: int, *, is_whole: bool = True, complete: bool = True) -> list[Batch]:
    """Join pieces, in order, into batches of about a second, but enough batches to keep every slot busy.

    From about 30 slots on, batches are longer, so that one driver keeps up with any number of slots. The last batches become shorter
    and shorter, so that all slots end at about the same time.

    Parameters
    ----------
    pieces : sequence of Piece
    slots : int
        Number of extract tasks that the cluster runs at once.
    is_whole : bool
        Whether one task does all stages of a batch, shard by shard. Otherwise no batch of several pieces exceeds `BATCH_BYTES`,
        because all its images are in memory together.
    complete : bool
        False while more pieces may follow.

    Returns
    -------
    list of Batch
        Every piece is in exactly one batch.
    """
    left_s = total_s = sum(piece.cost_s for piece in pieces)
    longest_s = max(BATCH_S, slots * DRIVER_S)
    batches: list[Batch] = []
    members: list[Piece] = []
    cost_s, memory_bytes = 0.0, 0  # totals of the members
    for piece in pieces:
        if members and not is_whole and memory_bytes + piece.memory_bytes > BATCH_BYTES:
            batches.append(Batch(tuple(members)))
            left_s -= cost_s
            members, cost_s, memory_bytes = [], 0.0, 0
        members.append(piece)
        cost_s += piece.cost_s
        memory_bytes += piece.memory_bytes
        shared_s = (left_s if complete else total_s) / (BATCHES_PER_SLOT * max(1, slots))
        if cost_s >= max(MIN_BATCH_S, min(longest_s, shared_s)):
            batches.append(Batch(tuple(members)))
            left_s -= cost_s
            members, cost_s, memory_bytes = [], 0.0, 0
    if members:
        batches.append(Batch(tuple(members)))
    return batches
