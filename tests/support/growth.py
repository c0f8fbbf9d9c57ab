"""Collections that grow, change, shrink and come back, with runs that are killed in between.

A Hypothesis state machine acts on a folder of images and on a dictionary that says what the folder holds. Whatever it did, the live
content of the store must follow from that dictionary alone, and equal that of one run on the final collection.

A killed run is a process of its own that a real SIGKILL ends between two changes of the store, driver and workers together.
`tests.system.kill.kill_rounds` kills single processes of real clusters.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import dask
import numpy as np
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from PIL import Image

from pipeline.api import run_job
from pipeline.checks.verify import verify_store
from pipeline.config import make_job
from pipeline.errors import UsageError
from pipeline.run import driver, new_images
from pipeline.run.slots import ROLES
from pipeline.run.summary import Summary
from pipeline.source.listing import list_collection
from pipeline.store import layout
from pipeline.store.schema import REJECTED, Status
from pipeline.store.store import Store
from pipeline.store.vacuum import vacuum_store
from tests.conftest import content

SIZES = [(12, 12), (14, 20), (20, 12), (15, 19), (31, 11)]
FOLDERS = ["", "sub/", "sub/deep/", "a b%/"]
MAX_REMOVED = 0.10
START = 1_700_000_000_000_000_000  # nanoseconds; the clock of the collection, which goes on by itself
DONE, QUARANTINED, REJECT = Status.DONE.name, Status.QUARANTINED.name, "REJECTED"


class File(NamedTuple):
    """What the model knows of one file."""

    data: bytes
    mtime_ns: int
    outcome: str
    """What a run must make of it: DONE, or QUARANTINED or REJECTED and the code of the reason."""
    size: tuple[int, int] | None = None
    """Height and width of a good one."""


class Row(NamedTuple):
    """One live entry of a store; after a crash an image may have two."""

    path: str
    status: str
    digest: str
    maps_digest: str


# -- images ----------------------------------------------------------------------------------------------------------------------


def picture(size: tuple[int, int], number: int) -> bytes:
    """A BMP: all of one size have equally many bytes."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def bad_file(kind: str, number: int) -> tuple[bytes, str]:
    """Bytes that are no good image, and what becomes of them."""
    match kind:
        case "empty":
            return b"", "REJECTED empty"
        case "noise":
            return bytes([number % 256]) * 50, "REJECTED not_an_image"
        case "small":
            return picture((5, 7), number), "REJECTED too_small"
        case _:
            return picture((14, 20), number)[:-100], "QUARANTINED truncated"


def live_rows(path: Path) -> list[Row]:
    """The live entries of a store, also of one that a crash left."""
    if not (path / "zarr.json").exists():
        return []
    store, found = Store(path), []
    for group in [*(c.name for c in store.classes.values()), REJECTED]:
        names = ("path", "status", *(() if group == REJECTED else ("digest", "maps_digest")))
        for where, status, *digests in zip(*(store.column(group, name) for name in names), strict=True):
            if status < Status.REMOVED:
                name = REJECT if group == REJECTED else Status(int(status)).name
                found.append(Row(where, name, *(digests or ("", ""))))
    return found


# -- runs ------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_units() -> Iterator[None]:
    """Shards of 4 rows, blocks of 3 images, 3 exact classes: a dozen images meet the borders that millions do."""
    tiny = {"MAX_SHARD_ROWS": 4, "BATCH_S": 1e-4, "MIN_BATCH_S": 1e-4, "DRIVER_S": 1e-4}
    with (
        mock.patch.multiple(layout, **tiny),
        mock.patch.object(layout.assign_classes, "__defaults__", (3,)),
        mock.patch.multiple(new_images, PROBE_BLOCK=3, FIRST_APPEND=4, APPEND_GROWTH=1),
        mock.patch.multiple(driver, COMMIT_S=0.005, RECEIPT_S=0.02),
    ):
        yield


@contextlib.contextmanager
def thread_cluster() -> Iterator[Client]:
    """Two worker threads in this process: a run takes a tenth of a second."""
    options = {
        "processes": False,
        "n_workers": 1,
        "threads_per_worker": 2,
        "resources": dict.fromkeys(ROLES, 2),
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
    }
    endless = {"distributed.scheduler.worker-ttl": None}  # a machine that sleeps for minutes must not cost the only worker
    with dask.config.set(endless), LocalCluster(**options) as cluster, Client(cluster, set_as_default=False) as client:
        yield client


def die_before(change: int, store: str) -> None:
    """Have this process kill itself before the given change of a file below ``store``."""
    left = change

    def look(name: str, arguments: tuple) -> None:
        nonlocal left
        if name not in {"open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.rmdir", "os.truncate", "os.utime"}:
            return
        if name == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            return
        in_a_tree = name in {"os.remove", "os.rmdir"} and arguments[1] != -1  # `shutil.rmtree`, by names relative to a folder
        if in_a_tree or (not isinstance(arguments[0], int) and os.fsdecode(arguments[0]).startswith(store)):
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)

    sys.addaudithook(look)


def run_and_die(values: dict, change: int) -> None:
    """One run with a cluster of its own, dead before its n-th change of the store; run in a process of its own."""
    logging.disable(logging.CRITICAL)
    with small_units(), thread_cluster() as client, contextlib.suppress(UsageError):
        die_before(change, values["store"])
        run_job(make_job(values), client)
    os._exit(0)


def vacuum_and_die(store: str, change: int) -> None:
    """`run_and_die` for a vacuum."""
    logging.disable(logging.CRITICAL)
    die_before(change, store)
    vacuum_store(Path(store))
    os._exit(0)


# -- the machine -----------------------------------------------------------------------------------------------------------------


class Growth(RuleBasedStateMachine):
    """What people and cron jobs do to a collection and its store; rules for other commands that write belong here."""

    client: Client  # of `thread_cluster`, for all examples
    folder: Path
    n_runs = n_kills = n_late_kills = 0  # over all examples

    @initialize(n=st.integers(1, 6))
    def begin(self, n: int) -> None:
        self.place = Path(tempfile.mkdtemp(dir=self.folder))
        self.source, self.store = self.place / "source", self.place / "features.zarr"
        self.source.mkdir()
        self.files: dict[str, File] = {}
        self.history: list[tuple[str, File]] = []  # what was once there
        self.now = START
        for i in range(n):
            self._put(f"{i}.png", self._good(SIZES[i % 3], i))

    # -- the collection --------------------------------------------------------------------------------------------------------

    def _good(self, size: tuple[int, int], number: int) -> File:
        self.now += 1_000_000
        return File(picture(size, number), self.now, DONE, size)

    def _put(self, path: str, file: File) -> None:
        if path in self.files:
            self.history.append((path, self.files[path]))
        self.files[path] = file
        where = self.source / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(file.data)
        os.utime(where, ns=(file.mtime_ns, file.mtime_ns))

    def _take(self, path: str) -> File:
        (self.source / path).unlink()
        file = self.files.pop(path)
        self.history.append((path, file))
        return file

    def _choose(self, which: int) -> str:
        return sorted(self.files)[which % len(self.files)]

    has_files = precondition(lambda self: self.files)

    @rule(folder=st.sampled_from(FOLDERS), first=st.integers(0, 6), n=st.integers(1, 6), size=st.sampled_from(SIZES))
    def add(self, folder: str, first: int, n: int, size: tuple[int, int]) -> None:
        for i in range(first, first + n):
            self._put(f"{folder}{i}.png", self._good(size, self.now % 1000))

    @rule(folder=st.sampled_from(FOLDERS), i=st.integers(0, 9), kind=st.sampled_from(["empty", "noise", "small", "truncated"]))
    def add_bad(self, folder: str, i: int, kind: str) -> None:
        self.now += 1_000_000
        data, outcome = bad_file(kind, i)
        self._put(f"{folder}{i}.png", File(data, self.now, outcome))

    @has_files
    @rule(which=st.integers(0, 99), number=st.integers(0, 999), same_size=st.booleans())
    def change(self, which: int, number: int, same_size: bool) -> None:
        path = self._choose(which)
        self._put(path, self._good((same_size and self.files[path].size) or SIZES[number % len(SIZES)], number))

    @has_files
    @rule(which=st.integers(0, 99))
    def touch(self, which: int) -> None:
        path = self._choose(which)
        self.now += 1_000_000
        self._put(path, self.files[path]._replace(mtime_ns=self.now))

    @has_files
    @rule(which=st.lists(st.integers(0, 99), min_size=1, max_size=4))
    def delete(self, which: list[int]) -> None:
        for i in which:
            if len(self.files) > 1:
                self._take(self._choose(i))

    @has_files
    @rule(which=st.integers(0, 99), folder=st.sampled_from(FOLDERS), i=st.integers(0, 9))
    def rename(self, which: int, folder: str, i: int) -> None:
        path, to = self._choose(which), f"{folder}{i}.png"
        if path != to:
            self._put(to, self._take(path))

    @precondition(lambda self: self.history)
    @rule(which=st.integers(0, 99))
    def bring_back(self, which: int) -> None:
        """A file of earlier bytes and time, whether something else is there now or nothing."""
        self._put(*self.history[which % len(self.history)])

    # -- the store -------------------------------------------------------------------------------------------------------------

    @rule(
        max_removed=st.sampled_from([MAX_REMOVED, 1.0, 1.0]),
        retry=st.booleans(),
        check=st.sampled_from(["fingerprint", "digest"]),
    )
    def run(self, max_removed: float, retry: bool, check: str) -> None:
        before = live_rows(self.store)
        n_gone = sum(encoded(row.path) not in self.files for row in before)
        if n_gone > max_removed * len(before):
            try:
                self._run(max_removed=max_removed)
            except UsageError as refusal:
                assert f"{n_gone} of the store's {len(before)} images are not in the source" in str(refusal)  # noqa: PT017
            else:
                raise AssertionError("the removal of many images was not refused")
            assert live_rows(self.store) == before
            return
        summary = self._run(max_removed=max_removed, retry_quarantined=retry, check=check)
        assert summary.n_removed == n_gone
        self._check_whole()

    @precondition(lambda self: len(self.files) > 1)
    @rule(limit=st.integers(1, 8), retry=st.booleans())
    def run_with_a_limit(self, limit: int, retry: bool) -> None:
        limit = min(limit, len(self.files) - 1)  # else it is none
        first = set(list_collection(str(self.source)).limit(limit).paths)
        others = sorted(row for row in live_rows(self.store) if row.path not in first)
        self._run(limit=limit, retry_quarantined=retry)
        now = live_rows(self.store)
        assert sorted(row for row in now if row.path not in first) == others
        self._check_rows([row for row in now if row.path in first], {encoded(path) for path in first})

    @has_files
    @rule(which=st.integers(0, 99), number=st.integers(0, 999))
    def run_that_compares_bytes(self, which: int, number: int) -> None:
        """Other bytes under the same size and time, which no other check could see; nothing of that time is left for later."""
        path = self._choose(which)
        file = self.files[path]
        if file.outcome != DONE or sum(other.mtime_ns == file.mtime_ns for other in self.files.values()) > 1:
            return
        self._put(path, file._replace(data=picture(file.size, number)))
        self._run(max_removed=1.0, check="digest")
        self._check_whole()
        self.now += 1_000_000
        self._put(path, self.files[path]._replace(mtime_ns=self.now))
        self.history = [(name, old) for name, old in self.history if old.mtime_ns != file.mtime_ns]

    @precondition(lambda self: (self.store / "zarr.json").exists())
    @rule()
    def vacuum(self) -> None:
        before = live_rows(self.store)
        vacuum_store(self.store)
        assert live_rows(self.store) == before
        assert not vacuum_store(self.store, dry_run=True).freed_bytes

    @precondition(lambda self: (self.store / "zarr.json").exists())
    @rule(change=st.integers(1, 60))
    def vacuum_that_is_killed(self, change: int) -> None:
        before = live_rows(self.store)
        self._kill(vacuum_and_die, str(self.store), change)
        assert live_rows(self.store) == before

    @rule(change=st.integers(1, 50), max_removed=st.sampled_from([MAX_REMOVED, 1.0]))
    def run_that_is_killed_early(self, change: int, max_removed: float) -> None:
        self._killed_run(change, max_removed)

    @rule(change=st.integers(20, 200))
    def run_that_is_killed(self, change: int) -> None:
        self._killed_run(change, 1.0)

    def _killed_run(self, change: int, max_removed: float) -> None:
        values = {"source": str(self.source), "store": str(self.store), "max_removed": max_removed}
        self._kill(run_and_die, values, change)
        for row in live_rows(self.store):  # what is called done is right at any moment
            file = self.files.get(encoded(row.path))
            known = [file, *(old for path, old in self.history if path == encoded(row.path))]
            assert row.status != DONE or row.digest in {digest(f) for f in known if f}, row

    @staticmethod
    def _kill(action: Callable[..., None], *arguments: object) -> None:
        process = _context().Process(target=action, args=arguments)
        process.start()
        process.join(60)
        assert process.exitcode in {0, -signal.SIGKILL}, process.exitcode
        Growth.n_kills += 1
        Growth.n_late_kills += process.exitcode == 0

    def _run(self, **options: object) -> Summary:
        Growth.n_runs += 1
        summary = run_job(make_job({"source": str(self.source), "store": str(self.store), **options}), self.client)
        assert summary.outcome == "complete"
        assert not summary.faults
        return summary

    def _check_whole(self) -> None:
        self._check_rows(live_rows(self.store), set(self.files))

    def _check_rows(self, rows: list[Row], files: set[str]) -> None:
        """Exactly one live entry for each file, and it says what is in the file."""
        assert sorted(encoded(row.path) for row in rows) == sorted(files)
        for row in rows:
            file = self.files[encoded(row.path)]
            status, _, _ = file.outcome.partition(" ")
            assert row.status == status, (row, file.outcome)
            assert row.digest == ("" if status == REJECT else digest(file)), row

    @invariant()
    def no_litter_is_read(self) -> None:
        """A store opens at any moment."""
        live_rows(self.store)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        try:
            self._compare()
        finally:
            shutil.rmtree(self.place)

    def _compare(self) -> None:
        """The end of every example: the store equals one that was made of the final collection, and verify agrees."""
        self._run(max_removed=1.0)
        self._check_whole()
        found = content(self.store)
        fresh = self.place / "fresh.zarr"
        run_job(make_job({"source": str(self.source), "store": str(fresh)}), self.client)
        assert found == content(fresh)
        for row in live_rows(self.store):
            code = self.files[encoded(row.path)].outcome.partition(" ")[2]
            assert found[row.path][1].partition(":")[0] == code
        audit = verify_store(self.store, n_sample=3, seed=0, workers=1)
        assert audit.is_sound, audit.describe()
        litter = [path.name for path in self.store.rglob("*.partial")]
        assert all(name.startswith("lock.json") for name in litter), litter  # which may be of a run that waits, and go later
        again = self._run(max_removed=1.0)
        assert (again.n_done, again.n_unchanged, again.n_new) == (0, len(self.files), 0)


def encoded(path: str) -> str:
    """The file of a path as stored, which encodes only the percent sign of `FOLDERS`."""
    return path.replace("%25", "%")


def digest(file: File) -> str:
    return hashlib.sha256(file.data).hexdigest()


def _context() -> multiprocessing.context.ForkServerContext:
    """Processes that begin with everything imported: without this, each would take three seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.growth", "pipeline.extract.cpu"])
    return context


def grow(folder: Path, examples: int, steps: int = 30, number: int | None = None) -> None:
    """Try many sequences; the same ones each time, or with a seed others."""
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        derandomize=number is None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    with small_units(), thread_cluster() as client:
        Growth.client, Growth.folder = client, folder
        Growth.n_runs = Growth.n_kills = Growth.n_late_kills = 0
        machine = Growth if number is None else seed(number)(Growth)
        run_state_machine_as_test(machine, settings=chosen)
