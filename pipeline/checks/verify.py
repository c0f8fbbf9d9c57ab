"""The audit of a store: whether it holds what its ledger claims, and whether the extractor computes the same."""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import chain
from multiprocessing import get_context
from typing import Any, TypeVar

import numpy as np

from pipeline.checks.audit import (
    Finding,
    Originals,
    SampledRow,
    Shard,
    check_documents,
    check_ledger,
    check_originals,
    check_root,
    check_shard,
    originals,
    read_columns,
    recompute,
    shards,
)
from pipeline.checks.user_script import require_guard
from pipeline.cluster.local import local_workers
from pipeline.extract.layers import Array
from pipeline.source.health import SourceWatch
from pipeline.store.lock import StoreLock, require_lock
from pipeline.store.named import named_store
from pipeline.store.objects import Place
from pipeline.store.run_ids import new_run_id
from pipeline.store.schema import (
    EXTRACTOR,
    LEDGER_COLUMNS,
    REJECTED,
    RUNS,
    Status,
)
from pipeline.store.store import Store
from pipeline.text import count, printable

MAX_FINDINGS = 1000
AHEAD = 4
"""Jobs per process that may wait or be done ahead of the next result."""
REASONS = {
    "changed": "changed since they were listed",
    "missing": "gone",
    "permission_denied": "without permission",
    "not_a_file": "no files any more",
    "storage_fault": "because the storage failed",
}
T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True)
class Audit:
    """What was checked, and what was found."""

    store: str
    n_rows: int = 0
    n_done: int = 0
    n_pending: int = 0
    n_not_checked: int = 0
    """Rows of classes whose metadata or columns are damaged."""
    n_maps_checked: int = 0
    """Number of rows, including removed rows that may come back."""
    n_compared: int = 0
    """Done images whose bytes at the source were compared with the ledger's digest."""
    not_compared: dict[str, int] = field(default_factory=dict)
    """Done images that could not be compared: number per reason."""
    is_source_read: bool = True
    """Whether the source was to be read at all."""
    n_recomputed: int = 0
    n_not_reachable: int = 0
    """Images to recompute that are gone, changed or unreadable at the source."""
    n_repaired: int = 0
    n_findings: int = 0
    findings: list[Finding] = field(default_factory=list)
    """The first of them."""
    largest_difference: float | None = None
    """Between stored and recomputed values, beyond rounding for storage; None if nothing was recomputed."""

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not self.n_findings

    def add(self, findings: Iterable[Finding]) -> None:
        """Take findings down."""
        for finding in findings:
            self.n_findings += 1
            if len(self.findings) < MAX_FINDINGS:
                self.findings.append(finding)

    def describe(self) -> str:
        """For a person."""
        what = (
            f"{self.store}: {count(self.n_rows, 'row')}, {self.n_done} of them done, {self.n_pending} pending; "
            f"the maps of {self.n_maps_checked} were compared with their digests"
        )
        lines = [what, self._describe_source()]
        if self.largest_difference is not None:
            lines.append(
                f"{count(self.n_recomputed, 'image was', 'images were')} recomputed from the source with the stored weights; "
                f"beyond rounding for storage, the largest difference is {self.largest_difference:.1e}"
            )
        else:
            lines.append("no image was recomputed")
        if self.n_not_checked:
            lines.append(
                f"{count(self.n_not_checked, 'row')} could not be checked, because metadata or columns of their class are damaged"
            )
        if self.n_not_reachable:
            lines.append(f"{self.n_not_reachable} more could not be recomputed, because their images are gone or changed")
        lines += [
            f"  {f.kind}: {printable(f.path)}" + (f" ({f.group}, row {f.row})" if f.row >= 0 else "") + f": {printable(f.text)}"
            for f in self.findings[:50]
        ]
        if self.n_findings > 50:
            lines.append(f"  and {self.n_findings - 50} more; --json lists {MAX_FINDINGS}")
        if self.n_repaired:
            lines.append(
                f"{count(self.n_repaired, 'row was', 'rows were')} set to pending: the command that made the store "
                "computes these maps again"
            )
        verdict = "nothing is wrong" if self.is_sound else f"{self.n_findings} things are wrong"
        if any(finding.kind in {"maps", "recomputation"} for finding in self.findings) and not self.n_repaired:
            verdict += "; --repair sets rows with bad maps to pending, and the next run computes them"
        if any(finding.kind == "source" for finding in self.findings):
            verdict += "; a run with --check digest recomputes images whose content changed"
        if any(finding.kind not in {"maps", "recomputation", "source"} for finding in self.findings):
            verdict += "; restore damaged metadata and columns from a copy"
        return "\n".join([*lines, verdict])

    def _describe_source(self) -> str:
        if not self.is_source_read:
            return "the source was not read"
        reasons = ", ".join(f"{n} {REASONS.get(reason, reason)}" for reason, n in self.not_compared.items())
        return f"the bytes of {count(self.n_compared, 'image')} at the source were compared with their digests" + (
            f"; {sum(self.not_compared.values())} could not be: {reasons}" if reasons else ""
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"is_sound": self.is_sound, "findings": [finding._asdict() for finding in self.findings]}


def verify_store(
    store: str | Place,
    *,
    n_sample: int = 20,
    seed: int | None = None,
    repair: bool = False,
    read_source: bool = True,
    workers: int | None = None,
    sole_writer: bool = False,
) -> Audit:
    """Check a store: metadata, columns, every map and every image against its digest; recompute some rows.

    Parameters
    ----------
    store : str, Path or Url
        A folder, or a bucket's URL.
    n_sample : int
        Number of done images, chosen at random, to read from the source and recompute in float64.
    seed : int, optional
        Seed of the random choice.
    repair : bool
        Set rows whose maps are bad to pending, so that the next run computes them.
    read_source : bool
        Read every done image with an unchanged fingerprint and compare its digest; without this nothing is recomputed.
    workers : int, optional
        Number of processes; None means one per core.
    sole_writer : bool
        With ``repair``: vouch that nobody else writes to a store in a bucket; see `StoreLock`.

    Raises
    ------
    UsageError
        When there is no store of this format.
    FeaturemapsError
        When its metadata cannot be parsed at all.
    StoreBusyError
        When ``repair`` is set while a run holds the store.
    """
    path = named_store(store)
    opened = Store(path, durable=True)
    audit = Audit(str(path), is_source_read=read_source)
    columns, damaged = _check_ledger(opened, audit)
    jobs, done = _jobs(opened, columns, damaged, audit)
    samples: list[SampledRow] = []
    if read_source and not damaged & {"", EXTRACTOR}:  # else there are no weights to compute with
        for group, row in _choose(done, n_sample, seed):
            samples.append(SampledRow(group, row, str(columns[group]["path"][row]), str(columns[group]["digest"][row])))
    bad: list[Finding] = []
    with _processes(local_workers(workers)) as processes:
        for findings in processes.map(check_shard, jobs):
            bad += findings
        if read_source:
            parts = (originals(opened.spec.source_root, group, rows, columns[group]) for group, rows in done.items())
            audit.add(_compare_originals(chain.from_iterable(parts), audit, processes))
        bad += _recompute(path, samples, audit, processes)
    audit.add(bad)
    if repair and bad:
        audit.n_repaired = _repair(opened, bad, sole_writer)
    return audit


def _check_ledger(store: Store, audit: Audit) -> tuple[dict[str, dict[str, Array]], set[str]]:
    """Check metadata and columns; return the readable columns, and the groups with damaged metadata."""
    documents = [*check_root(store), *check_documents(store)]
    audit.add(documents)
    unreadable: list[Finding] = []
    columns = {group: read_columns(store, group, unreadable) for group in [*(c.name for c in store.classes.values()), REJECTED]}
    audit.add(unreadable)
    audit.add(check_ledger(store, columns))
    return columns, {finding.group for finding in documents}


def _jobs(
    store: Store, columns: dict[str, dict[str, Array]], damaged: set[str], audit: Audit
) -> tuple[list[Shard], dict[str, Array]]:
    """Shards whose maps are compared with their digests, and the done rows of each class."""
    jobs: list[Shard] = []
    done: dict[str, Array] = {}
    for shape_class in store.classes.values():
        found = columns[shape_class.name]
        audit.n_rows += shape_class.length
        if damaged & {"", shape_class.name} or not LEDGER_COLUMNS.keys() <= found.keys():
            audit.n_not_checked += shape_class.length  # unknown what its maps should be
            continue
        is_done = found["status"] == Status.DONE
        done[shape_class.name] = np.flatnonzero(is_done)
        audit.n_done += len(done[shape_class.name])
        audit.n_pending += int((found["status"] == Status.PENDING).sum())
        returnable = (found["status"] == Status.REMOVED) & (found["maps_digest"] != "")  # done if their image comes back
        claims = np.where(is_done & (found["maps_digest"] == ""), "none", found["maps_digest"])
        digests = np.where(is_done | returnable, claims, "")
        audit.n_maps_checked += int((digests != "").sum())
        shard = np.arange(shape_class.length) // shape_class.layout.shard_rows
        is_written_anew = np.isin(shard, shard[found["status"] == Status.PENDING])  # by the next run
        jobs += shards(store, shape_class, np.flatnonzero(is_done | returnable | ~is_written_anew), digests, found)
    return jobs, done


def _recompute(path: Place, samples: Sequence[SampledRow], audit: Audit, processes: _Processes) -> Iterator[Finding]:
    """Compute some rows again."""
    parts = [(path, samples[start : start + 8]) for start in range(0, len(samples), 8)]
    for recomputed in processes.map(recompute, parts):
        audit.n_recomputed += recomputed.n_done
        audit.n_not_reachable += recomputed.n_not_reachable
        if recomputed.n_done:
            audit.largest_difference = max(audit.largest_difference or 0.0, recomputed.largest_difference)
        yield from recomputed.findings


def _compare_originals(parts: Iterable[Originals], audit: Audit, processes: _Processes) -> Iterator[Finding]:
    """Read the source until everything is compared, or until most of it cannot be read."""
    watch, reasons, n_done = SourceWatch(""), Counter[str](), audit.n_done
    for compared in processes.map(check_originals, parts):
        audit.n_compared += compared.n_compared
        reasons.update(compared.reasons)
        yield from compared.findings
        for i in range(compared.n_compared + len(compared.reasons)):
            watch.note("", is_fault=i < compared.n_faults)
        if watch.failed:
            reasons["storage_fault"] += n_done - audit.n_compared - reasons.total()
            break
    audit.not_compared = dict(reasons)


def _choose(rows: dict[str, Array], n: int, seed: int | None) -> Iterator[tuple[str, int]]:
    """Group and row of ``n`` rows, chosen at random."""
    total = sum(map(len, rows.values()))
    chosen = np.array(sorted(random.Random(seed).sample(range(total), min(n, total))), int)  # noqa: S311 (which rows, not a secret)
    for group, members in rows.items():
        yield from ((group, row) for row in members[chosen[(chosen >= 0) & (chosen < len(members))]].tolist())
        chosen = chosen - len(members)


class _Processes:
    """Processes for all steps of an audit, because each takes seconds for its imports; without a pool, the current process."""

    def __init__(self, pool: ProcessPoolExecutor | None, n: int) -> None:
        self.pool, self.n = pool, n

    def map(self, function: Callable[[T], R], jobs: Iterable[T]) -> Iterator[R]:
        """`map` in the processes, or in this one; only few jobs run ahead of the results."""
        if self.pool is None:
            yield from map(function, jobs)
            return
        waiting: deque[Future[R]] = deque()
        for job in jobs:
            waiting.append(self.pool.submit(function, job))
            if len(waiting) > AHEAD * self.n:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


@contextlib.contextmanager
def _processes(n: int) -> Iterator[_Processes]:
    if n == 1:
        yield _Processes(None, 1)
        return
    require_guard("verify_store")
    environment = dict(os.environ)  # the present one: the server that forks keeps the environment of its own start
    with ProcessPoolExecutor(n, get_context("forkserver"), _take_environment, (environment,)) as pool:
        try:
            yield _Processes(pool, n)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # a stop does not wait for jobs that have not begun
            raise


def _take_environment(environment: dict[str, str]) -> None:
    os.environ.update(environment)


# -- repair ----------------------------------------------------------------------------------------------------------------------


def _repair(store: Store, findings: Sequence[Finding], sole_writer: bool) -> int:
    """Set bad rows to pending, under the lock; return their number."""
    run_id = new_run_id()
    with StoreLock(store.path / RUNS, run_id, sole_writer=sole_writer):
        store.reload()
        store.fence = lambda: require_lock(store.path / RUNS, run_id)
        rows: dict[str, set[int]] = {}
        for finding in findings:
            rows.setdefault(finding.group, set()).add(finding.row)
        n_repaired = 0
        for group, members in rows.items():
            chosen = np.array(sorted(members))
            status = store.column(group, "status")[chosen]
            # A run may have changed some rows meanwhile. Removed rows are computed if their image comes back.
            done, removed = (chosen[status == wanted] for wanted in (Status.DONE, Status.REMOVED))
            store.commit(group, done, {"status": np.full(len(done), Status.PENDING, np.uint8)})
            store.commit(group, removed, {"maps_digest": np.full(len(removed), "", object)})
            n_repaired += len(done) + len(removed)
        return n_repaired
