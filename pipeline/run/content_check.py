"""Compares done images with the ledger by content, and finds those that changed while size and time stayed the same."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import CancelledError
from typing import NamedTuple

import numpy as np
from distributed import Client, Future, KilledWorker, wait
from distributed.client import ClosedClientError

from pipeline.errors import FeaturemapsError
from pipeline.extract.layers import Array
from pipeline.run.activity import ActivityPlugin
from pipeline.run.context import Context
from pipeline.run.failures import scheduler_lost, why
from pipeline.run.hangs import find_stalls, replace_worker
from pipeline.run.plan.changes import Entry
from pipeline.run.slots import needs
from pipeline.run.timer import Every
from pipeline.run.workers import Fleet
from pipeline.source.fetch import Digested, digest_block
from pipeline.source.health import SourceWatch
from pipeline.store.schema import stack

BLOCK_IMAGES = 256
BLOCK_BYTES = 256 * 1024**2
COMMIT_S = 1.0


class Block(NamedTuple):
    """What one task reads: some images of one class."""

    group: str
    rows: tuple[int, ...]
    images: tuple[int, ...]
    """Positions in the listing."""
    digests: tuple[str, ...]
    """As the ledger has them."""


def check_digests(context: Context, client: Client) -> bool:
    """Read the images of ``context.found.to_check`` in parallel, and correct ``found`` by their bytes.

    An image has changed if its bytes do not match the ledger's digest. An image whose bytes match but whose fingerprint differs
    has not changed: its maps stand, and its row gets the current fingerprint. An unreadable image is judged by its fingerprint.

    Returns
    -------
    bool
        Whether every image was compared, except those out of reach; False after faults that may pass, or after a drain.

    Raises
    ------
    FeaturemapsError
        When the source, the store or the cluster failed; nothing was superseded.
    """
    found, listing, summary, stop = context.found, context.listing, context.summary, context.stop
    if not found.to_check:
        return True
    work = _Comparison(context)
    blocks = work.blocks()
    in_flight: dict[Future, Block] = {}
    n_sent, commit = 0, Every(COMMIT_S)
    try:
        fleet = Fleet(client)
        fleet.register(ActivityPlugin())
        while True:
            while len(in_flight) < fleet.window and not stop.is_set() and (block := next(blocks, None)):
                images = list(zip((listing.paths[i] for i in block.images), listing.fingerprints(block.images), strict=True))
                key, n_sent = f"digest-{summary.run_id}-{n_sent}", n_sent + 1
                asked = needs("read", is_plain=fleet.is_plain)
                future = client.submit(digest_block, listing.root, images, key=key, resources=asked, pure=False)
                in_flight[future] = block
            if not in_flight or stop.is_set():
                break  # the bytes that these tasks read are of no use
            _wait(in_flight, client, fleet)
            _check_stalls(client, summary.run_id, context.job.deadline_s)
            for future in [future for future in in_flight if future.done()]:
                work.take(in_flight.pop(future), _result(future))
            if commit.is_due:
                work.commit()
                context.progress.stage = f"comparing digests, {summary.n_checked + summary.n_unchecked} of {found.n_to_check}"
                context.notify(context.progress)
                commit.done()
        work.commit()
    except (OSError, RuntimeError, ValueError, CancelledError, ClosedClientError) as error:
        raise why(error, (), context.store.path, is_connected=client.status == "running") from error
    finally:
        for future in in_flight:
            future.release()
    found.settle_checked(work.changed, work.touched)
    return not work.n_faults and summary.n_checked + summary.n_unchecked == found.n_to_check


def _wait(in_flight: dict[Future, Block], client: Client, fleet: Fleet) -> None:
    """Wait for the first task that ends, at most `COMMIT_S` seconds."""
    try:
        with client.as_current():
            wait(list(in_flight), timeout=COMMIT_S, return_when="FIRST_COMPLETED")
    except TimeoutError:
        fleet.check()
    if client.status != "running":
        raise scheduler_lost(None)


def _check_stalls(client: Client, run_id: str, deadline_s: float) -> None:
    """Stop the run when the storage does not answer; nothing has been superseded."""
    stalls = find_stalls(client, run_id, deadline_s)
    for stall in stalls:
        replace_worker(client, stall.worker)
    if stalls:
        raise FeaturemapsError(
            f"{stalls[0].what}: the storage did not answer for {stalls[0].since_s:.0f} s while images were compared by their bytes: the "
            "run stopped; it changed nothing but the fingerprints of unchanged images; look at the storage, and run again"
        )


def _result(future: Future) -> tuple[Digested, ...] | None:
    """What a task found; None if its worker died every time."""
    try:
        result: tuple[Digested, ...] = future.result()
    except KilledWorker:
        return None
    return result


class _Comparison:
    """The outcome of the comparison so far."""

    def __init__(self, context: Context) -> None:
        self.store, self.listing, self.found, self.summary = context.store, context.listing, context.found, context.summary
        self.watch = SourceWatch(self.listing.root)
        self.changed: dict[int, Entry] = {}
        """Images whose bytes differ from the ledger's, although the fingerprint matches."""
        self.touched: set[int] = set()
        """Images whose bytes match the ledger's, although the fingerprint differs."""
        self.n_faults = 0
        self._to_commit: dict[str, list[tuple[int, int]]] = {}

    def blocks(self) -> Iterator[Block]:
        """The tasks, class after class; only one class's digests are in memory at a time."""
        for group, pairs in self.found.to_check.items():
            digests = self.store.column(group, "digest")
            members: list[tuple[int, int]] = []
            n_bytes = 0
            for row, i in sorted(pairs):
                if members and (len(members) == BLOCK_IMAGES or n_bytes + self.listing.size_bytes[i] > BLOCK_BYTES):
                    yield _block(group, members, digests)
                    members, n_bytes = [], 0
                members.append((row, i))
                n_bytes += self.listing.size_bytes[i]
            yield _block(group, members, digests)

    def take(self, block: Block, results: tuple[Digested, ...] | None) -> None:
        """Compare one block; raise if the source, not the images, is at fault."""
        if results is None:
            text = "its worker died whenever it was read with its neighbours"
            results = tuple(Digested(fault=f"{self.listing.paths[i]}: {text}") for i in block.images)
        for row, i, expected, result in zip(block.rows, block.images, block.digests, results, strict=True):
            self.watch.note(result.error, is_fault=bool(result.fault))
            if result.digest:
                self._compare(Entry(block.group, row), i, is_same=result.digest == expected)
                continue
            self.summary.n_unchecked += 1
            if result.fault:
                self.n_faults += 1
                self.summary.faults = [*self.summary.faults, result.fault][:20]
        self.watch.check()

    def _compare(self, entry: Entry, i: int, *, is_same: bool) -> None:
        self.summary.n_checked += 1
        is_replaced = i in self.found.replaces
        if is_same and is_replaced:
            self.touched.add(i)
            self.summary.n_touched += 1
            self._to_commit.setdefault(entry.group, []).append((entry.row, i))
        elif not is_same and not is_replaced:
            self.changed[i] = entry

    def commit(self) -> None:
        """Give touched rows the current fingerprint. After a kill before this, the next run compares them again."""
        for group, pairs in self._to_commit.items():
            rows = np.array([row for row, _ in pairs])
            self.store.commit(group, rows, {"fingerprint": stack(self.listing.fingerprints(i for _, i in pairs))})
        self._to_commit = {}


def _block(group: str, members: list[tuple[int, int]], digests: Array) -> Block:
    rows, images = zip(*members, strict=True)
    return Block(group, rows, images, tuple(digests[list(rows)]))
