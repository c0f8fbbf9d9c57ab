"""Read, extract and write as workers run them; the only place where decoder, extractor and store meet."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import signal
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from distributed import Worker, WorkerPlugin, get_worker

from pipeline.config import ExtractorSpec
from pipeline.errors import FeaturemapsError, ImageError, PassingFaultError
from pipeline.extract.choice import best_extractor
from pipeline.extract.layers import Array, layer_names, output_sizes
from pipeline.run import activity
from pipeline.source import current, decoding
from pipeline.source.fetch import Patience, Source, read_ahead
from pipeline.store import store
from pipeline.store.codecs import maps_digest
from pipeline.store.layout import ClassLayout, LayerLayout
from pipeline.store.objects import place
from pipeline.store.schema import STATISTICS, Status, StoredLayer

KEPT_BYTES = 16 * 1024**2
"""Maps of earlier runs that are read at once, about."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where maps go, for which run, and which extractor makes them."""

    path: str
    run_id: str
    extractor: str
    """Name of the `ExtractorPlugin`; runs of different stores may share a cluster."""
    durable: bool = False
    """Same as `Store.durable`."""


@dataclass(frozen=True, slots=True)
class WorkPiece:
    """One shard's pending rows with all that is needed to compute and write them."""

    layout: ClassLayout
    start: int
    stop: int
    rows: tuple[int, ...]
    paths: tuple[str, ...]
    fingerprints: tuple[str, ...]
    kept: tuple[int, ...] = ()
    """Other rows of the shard whose maps must not be lost; those of all others are kept if they can be read."""


@dataclass(slots=True)
class PieceResult:
    """What became of the rows of one piece, in their order."""

    layout: ClassLayout
    start: int
    stop: int
    rows: tuple[int, ...]
    status: Array
    """(n,) uint8; `Status.PENDING` where a passing fault prevented the work, or without an error where the run was to stop."""
    digest: list[str]
    maps_digest: list[str]
    error: list[str]
    pooled: dict[str, Array] = field(default_factory=dict)
    """Per layer (n, statistic, channel) float32, statistics in the order of `STATISTICS`; none where nothing was computed."""
    kept: tuple[int, ...] = ()
    """Same as `WorkPiece.kept`."""
    paths: tuple[str, ...] = ()
    """Same as `WorkPiece.paths`; the driver fills them in."""


@dataclass(slots=True)
class BatchResult:
    """What one batch did; a few kB."""

    pieces: list[PieceResult]
    host: str
    stage_s: dict[str, float]
    """Seconds of one core per stage: read, decode, extract, write."""
    bytes_read: int = 0
    bytes_written: int = 0
    pixels: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    """Images done, by what computed their layers."""


@dataclass(slots=True)
class Decoded:
    """A batch between read and extract: per piece the images, None where there is none."""

    images: list[list[Array | None]]
    result: BatchResult

    def __sizeof__(self) -> int:
        """Bytes, for Dask, which weighs what it moves and keeps by this."""
        return sum(image.nbytes for piece in self.images for image in piece if image is not None)


@dataclass(slots=True)
class Extracted:
    """A batch between extract and write: per piece and layer the block of its whole shard."""

    blocks: list[dict[str, Array]]
    result: BatchResult

    def __sizeof__(self) -> int:
        """Bytes of the arrays, as for `Decoded`."""
        return sum(block.nbytes for piece in self.blocks for block in piece.values())


# -- on every worker -------------------------------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Keep glibc from giving memory back to the system between batches: fresh pages cost as much as the arithmetic."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
        libc.mallopt(m_arena_max, 1)
        libc.mallopt(m_mmap_threshold, 1 << 30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


class ExtractorPlugin(WorkerPlugin):  # type: ignore[misc]
    """Loads the extractor once per worker, also on those that join later.

    Parameters
    ----------
    name : str
        Tells extractors apart on a cluster that several runs share.
    spec : ExtractorSpec
    weights : dict of str to (...) float32
    layers : tuple of StoredLayer
    """

    is_plain = False
    """Whether workers name no roles, and extract in each of their threads."""

    def __init__(self, name: str, spec: ExtractorSpec, weights: dict[str, Array], layers: tuple[StoredLayer, ...]) -> None:
        self.name = name
        self.spec = spec
        self.weights = weights
        self.layers = layers
        self.map_layers = tuple(layer for layer in layers if layer.has_maps)

    def setup(self, worker: Worker) -> None:
        """Prepare the process; a Ctrl-C at the terminal is for the driver alone, which drains."""
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        keep_memory()
        n_threads = int(worker.state.nthreads if self.is_plain else worker.state.total_resources.get("extract", 0))
        if n_threads:
            last = str(worker.name).rpartition("-")[2]
            number = int(last) if last.isdecimal() else os.getpid()
            gpus = worker.state.total_resources.get("gpu") or 1
            self.extractor = best_extractor(self.spec, self.weights, self.layers, number, n_threads, min(1, gpus))


def _plugin(target: Target) -> ExtractorPlugin:
    plugin: ExtractorPlugin = get_worker().plugins[target.extractor]
    return plugin


def process(source: Source, target: Target, pieces: Sequence[WorkPiece]) -> BatchResult:
    """Read, extract and write a batch where one worker does it all: image by image, holding the maps of one shard at a time.

    Returns
    -------
    BatchResult
        What the driver commits: only after this returns are the maps in the store.
    """
    result, patience = _no_result(), Patience()
    for piece in pieces:
        outcome = _pending(piece)
        images = _images(source, target.run_id, piece, outcome, result, patience)
        blocks = _extract_piece(_plugin(target), images, outcome, result)
        result.pieces.append(outcome)
        _write_piece(target, outcome, blocks, result)
        del blocks  # before the next shard's are made
    return result


def _no_result() -> BatchResult:
    return BatchResult([], socket.gethostname(), dict.fromkeys(("read", "decode", "extract", "write"), 0.0))


def _pending(piece: WorkPiece) -> PieceResult:
    n = len(piece.rows)
    status, texts = np.zeros(n, np.uint8), [""] * n
    return PieceResult(piece.layout, piece.start, piece.stop, piece.rows, status, texts, [*texts], [*texts], kept=piece.kept)


# -- read ------------------------------------------------------------------------------------------------------------------------


def read(source: Source, run_id: str, pieces: Sequence[WorkPiece]) -> Decoded:
    """Read and decode the images of a batch.

    Returns
    -------
    Decoded
        Images (height, width, channel) uint8. A bad one is None, its reason on record.
    """
    result, patience = _no_result(), Patience()
    result.pieces = [_pending(piece) for piece in pieces]
    images = [
        list(_images(source, run_id, piece, outcome, result, patience))
        for piece, outcome in zip(pieces, result.pieces, strict=True)
    ]
    return Decoded(images, result)


def _images(
    source: Source, run_id: str, piece: WorkPiece, outcome: PieceResult, result: BatchResult, patience: Patience
) -> Iterator[Array | None]:
    """One image after another, as `read` gives them; None, and no error, for those that were not begun when the run was to stop."""
    files, worker = read_ahead(source, piece.paths, piece.fingerprints, patience), get_worker()
    is_over = False  # for good: files come in turn, and one that is left out would give the next row its pixels
    for i in range(len(piece.rows)):
        image = None
        if is_over := is_over or activity.is_draining(worker, run_id):
            yield image
            continue
        try:
            image = _read_image(source, piece, i, outcome, result, files)
        except ImageError as error:
            outcome.status[i] = Status.QUARANTINED
            outcome.error[i] = str(error)
        except PassingFaultError as fault:
            outcome.error[i] = str(fault)
        yield image


def _read_image(
    source: Source, piece: WorkPiece, i: int, outcome: PieceResult, result: BatchResult, files: Iterator[Callable[[], bytes]]
) -> Array:
    with _timed(result, "read"):
        data = next(files)()
        outcome.digest[i] = hashlib.sha256(data).hexdigest()
    with _timed(result, "decode"):
        image = decoding.decode(data, source.decode)
    height, width = image.shape[:2]
    if height > piece.layout.size[0] or width > piece.layout.size[1]:
        raise ImageError("changed", f"decoded to {height} x {width} pixels, more than its header said")
    result.bytes_read += len(data)
    result.pixels += height * width
    return image


@contextlib.contextmanager
def _timed(result: BatchResult, stage: str) -> Iterator[None]:
    """Add the time of a block to a stage, also where it fails."""
    started = time.perf_counter()
    try:
        yield
    finally:
        result.stage_s[stage] += time.perf_counter() - started


# -- extract ---------------------------------------------------------------------------------------------------------------------


def extract(target: Target, decoded: Decoded) -> Extracted:
    """Compute the maps of a batch straight into the blocks that are written."""
    plugin, result = _plugin(target), decoded.result
    each = zip(decoded.images, result.pieces, strict=True)
    return Extracted([_extract_piece(plugin, images, outcome, result) for images, outcome in each], result)


def _extract_piece(
    plugin: ExtractorPlugin, images: Iterable[Array | None], outcome: PieceResult, result: BatchResult
) -> dict[str, Array]:
    """Take images as they come; what reading them takes meanwhile is not counted as extraction."""
    started, elsewhere_s = time.perf_counter(), result.stage_s["read"] + result.stage_s["decode"]
    layout, n = outcome.layout, len(outcome.rows)
    fills = {layer.name: layer.fill_value for layer in plugin.layers}
    blocks: dict[str, Array] = {}
    for layer, stored in zip(layout.layers, plugin.map_layers, strict=True):
        shape = (outcome.stop - outcome.start, layer.channels, layer.height, layer.width)
        blocks[layer.name] = plugin.extractor.block(shape, stored.dtype)
    for stored in plugin.layers:
        outcome.pooled[stored.name] = np.full((n, len(STATISTICS), stored.channels), np.nan, np.float32)
    missing = np.ones(outcome.stop - outcome.start, bool)
    sent: deque[tuple[int, tuple[int, ...], dict[str, Array]]] = deque()
    sizes: Counter[tuple[int, ...]] = Counter()

    def items() -> Iterator[tuple[Array, dict[str, Array]]]:
        for i, (row, image) in enumerate(zip(outcome.rows, images, strict=True)):
            if image is not None:
                missing[row - outcome.start] = False
                whole = {name: block[row - outcome.start] for name, block in blocks.items()}
                valid = whole if image.shape[:2] == layout.size else _valid_views(plugin, image, whole, fills)
                sent.append((i, image.shape[:2], valid))
                yield image, valid

    for pooled in plugin.extractor.extract_each(layout.size, items()):  # a GPU's come some images later than they are asked for
        i, size, valid = sent.popleft()
        sizes[size] += 1
        for name, statistics in pooled.items():
            outcome.pooled[name][i] = statistics
        outcome.maps_digest[i] = maps_digest(valid.get(layer.name, outcome.pooled[layer.name][i]) for layer in plugin.layers)
        outcome.status[i] = Status.DONE
    for name, block in blocks.items():
        block[missing] = fills[name]
    elsewhere_s = result.stage_s["read"] + result.stage_s["decode"] - elsewhere_s
    result.stage_s["extract"] += time.perf_counter() - started - elsewhere_s
    for size, n_done in sizes.items():
        result.kernels[plugin.extractor.version(size, layout.size)] += n_done
    return blocks


def _valid_views(plugin: ExtractorPlugin, image: Array, rows: dict[str, Array], fills: dict[str, float]) -> dict[str, Array]:
    """The part of each row that this image's maps take; the rest is filled."""
    sizes = dict(zip(layer_names(plugin.spec.layers), output_sizes(plugin.spec.layers, *image.shape[:2]), strict=True))
    views: dict[str, Array] = {}
    for name, row in rows.items():
        height, width = sizes[name]
        row[:, height:, :] = fills[name]
        row[:, :height, width:] = fills[name]
        views[name] = row[:, :height, :width]
    return views


def attempt(target: Target, decoded: Decoded) -> None:
    """Extract and keep nothing: whether the process survives it is what counts."""
    extract(target, decoded)


# -- write -----------------------------------------------------------------------------------------------------------------------


def write(target: Target, extracted: Extracted) -> BatchResult:
    """Write the whole shards of a batch; what they hold of earlier runs is kept.

    Returns
    -------
    BatchResult
        As `process`.
    """
    for outcome, blocks in zip(extracted.result.pieces, extracted.blocks, strict=True):
        _write_piece(target, outcome, blocks, extracted.result)
    return extracted.result


def _write_piece(target: Target, outcome: PieceResult, blocks: dict[str, Array], result: BatchResult) -> None:
    if not (outcome.status == Status.DONE).any():
        return
    started, layout = time.perf_counter(), outcome.layout
    for layer, stored in zip(layout.layers, _plugin(target).map_layers, strict=True):
        block = blocks[layer.name]
        current.note(current.STORE)
        _keep_others(target, outcome, layer, block, stored.fill_value)
        activity.require_lease(get_worker())
        result.bytes_written += store.write_maps(
            place(target.path), target.run_id, layout, layer, outcome.start, block, stored.fill_value, durable=target.durable
        )
    result.stage_s["write"] += time.perf_counter() - started


def _keep_others(target: Target, outcome: PieceResult, layer: LayerLayout, block: Array, fill: float) -> None:
    """Take the shard's other rows over from the store."""
    others = np.ones(len(block), bool)
    others[np.asarray(outcome.rows) - outcome.start] = False
    indices = np.flatnonzero(others)
    at_once = layer.chunk_rows * max(1, KEPT_BYTES // (layer.chunk_rows * layer.row_bytes))  # not a whole shard once more
    cuts = (np.diff(indices) > 1) | (indices[1:] % at_once == 0)
    for run in np.split(indices, np.flatnonzero(cuts) + 1) if len(indices) else []:
        first, stop = int(run[0]) + outcome.start, int(run[-1]) + 1 + outcome.start
        try:
            block[run[0] : run[-1] + 1] = store.read_maps(place(target.path), outcome.layout, layer.name, first, stop)
        except FeaturemapsError:
            for row in range(first, stop):
                block[row - outcome.start] = _keep(target, outcome, layer, row, fill)


def _keep(target: Target, outcome: PieceResult, layer: LayerLayout, row: int, fill: float) -> Array | float:
    """One row of a damaged shard; nothing where nobody needs it."""
    try:
        maps: Array = store.read_maps(place(target.path), outcome.layout, layer.name, row, row + 1)[0]
    except FeaturemapsError:
        if row in outcome.kept:
            raise
        return fill
    return maps
