"""Kill real runs at random moments, run again, compare: ``python -m tests.system.kill.kill_rounds --cycles 200``.

One round is a store of its own and the real command in processes of its own. What the command leaves at the moment of the kill, and
what the runs after it make of that, is compared with one run that nothing interrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import psutil
import yaml
from distributed import Client

from pipeline.store.lock import current_holder
from pipeline.store.schema import RUNS, Status
from pipeline.store.store import Store
from tests.conftest import content, make_images

EMBEDDED = ("driver", "worker")
HAND_STARTED = ("cluster-driver", "cluster-worker", "nanny", "scheduler", "all")
VICTIMS = (*EMBEDDED, *HAND_STARTED)
SURVIVED = ("worker", "cluster-worker", "nanny")  # the run itself must go on and finish
SIZES = [(300 + 17 * k, 360 + 15 * k) for k in range(12)]

N_WORKERS = 2
MAX_RESUMES = 3
RUN_LIMIT_S = 900.0
LOST_LIMIT_S = 400.0  # a run whose scheduler is gone has ended by itself
ORPHAN_LIMIT_S = 100.0  # workers whose driver is gone have ended by themselves
_MARK = "FEATUREMAPS_KILL_ROUND"
COMMAND = """
import dask
dask.config.set({"logging": {"distributed": "critical", "distributed.client": "critical"}})  # as the command does, before this:
import pipeline.run.driver
from pipeline.cli.commands import main
pipeline.run.driver.COMMIT_S = 0.1
main()
"""
"""The command, with ten times as many commits, so that kills come between two of them."""


# -- processes -------------------------------------------------------------------------------------------------------------------


def script(name: str) -> str:
    """A console script of this environment."""
    return str(Path(sys.executable).with_name(name))


def marked(mark: str) -> list[psutil.Process]:
    """All living processes that descend from a command, also those that lost their parent."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_MARK) == mark:
                found.append(process)
    return found


def worker_processes(mark: str) -> list[psutil.Process]:
    """Dask's worker processes among them: what a nanny spawned."""
    found = []
    for process in marked(mark):
        with contextlib.suppress(psutil.Error):
            if any("spawn_main" in part for part in process.cmdline()):
                found.append(process)
    return found


def kill_all(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until(true: Callable[[], object], limit_s: float, every_s: float = 0.01) -> bool:
    deadline = time.monotonic() + limit_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(every_s)
    return True


class Process:
    """A command with a mark by which all that descends from it is found, and with its output in files."""

    def __init__(self, arguments: list[str], folder: Path, name: str) -> None:
        self.mark = uuid.uuid4().hex
        self.log = folder / f"{name}-{self.mark[:6]}.log"
        self.began = time.time()
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                arguments, cwd=folder, stdout=log, stderr=log, env={**os.environ, _MARK: self.mark}, start_new_session=True
            )

    @property
    def is_running(self) -> bool:
        return self.popen.poll() is None

    def wait(self, limit_s: float) -> int | None:
        """Exit code, or None if it had to be killed."""
        try:
            return self.popen.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def end(self) -> None:
        kill_all(marked(self.mark))
        self.popen.kill()
        self.popen.wait()


class Cluster:
    """``dask scheduler`` and ``dask worker`` as a person starts them."""

    def __init__(self, folder: Path, n_workers: int = N_WORKERS) -> None:
        self.folder, self.n_workers = folder, n_workers
        self.file = folder / f"scheduler-{uuid.uuid4().hex[:6]}.json"
        arguments = [
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--dashboard-address",
            "127.0.0.1:0",
            "--scheduler-file",
            str(self.file),
        ]
        self.scheduler = Process([script("dask"), "scheduler", *arguments], folder, "scheduler")
        self.workers: list[Process] = []
        self.start_workers()
        if not wait_until(lambda: self.file.exists() and self.file.read_text().rstrip().endswith("}"), RUN_LIMIT_S):
            self.end()
            raise TimeoutError(self.scheduler.output())
        self.address = json.loads(self.file.read_text())["address"]
        entry = {"clusters": {"running": {"kind": "address", "address": self.address}}}
        (folder / "cluster.yaml").write_text(yaml.safe_dump(entry))

    def start_workers(self) -> None:
        options = [
            "--nworkers",
            str(self.n_workers),
            "--nthreads",
            "1",
            "--resources",
            "read=1 extract=1 write=1",
            "--no-dashboard",
        ]
        place = ["--scheduler-file", str(self.file), "--local-directory", str(self.folder), "--memory-limit", "3GiB"]
        self.workers.append(Process([script("dask"), "worker", *options, *place], self.folder, "worker"))

    def wait_for_workers(self) -> None:
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(self.n_workers, timeout=900)

    @property
    def processes(self) -> list[Process]:
        return [self.scheduler, *self.workers]

    def end(self) -> None:
        for process in self.processes:
            process.end()


# -- what is worked on, and what must come out -----------------------------------------------------------------------------------


def make_source(folder: Path, n_images: int, sizes: list[tuple[int, int]] = SIZES) -> Path:
    """Good images of twelve sizes, and a few of each kind of bad ones."""
    make_images(folder, n_images, sizes, suffix=".jpg")
    good = sorted(folder.iterdir())
    for i in range(3):
        (folder / f"bad_empty{i}.jpg").write_bytes(b"")
        (folder / f"bad_noise{i}.png").write_bytes(bytes(range(100)))
        data = good[5 * i].read_bytes()
        (folder / f"img_truncated{i}.jpg").write_bytes(data[: len(data) // 2])
    make_images(folder / "small", 3, [(5, 7)])
    return folder


def hashed_content(store: Path) -> dict[str, str]:
    """`content` with a hash in place of each image's maps and values."""
    return {path: f"{found[0]} {hashlib.sha256(repr(found).encode()).hexdigest()}" for path, found in content(store).items()}


def done_rows(store: Path) -> dict[str, str]:
    """Path and digest of the maps of every row that the ledger calls done."""
    opened, found = Store(store), {}
    for shape_class in opened.classes.values():
        columns = (opened.column(shape_class.name, name) for name in ("path", "status", "maps_digest"))
        found |= {path: digest for path, status, digest in zip(*columns, strict=True) if status == Status.DONE}
    return found


def litter(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*.partial"))


def last_touch(store: Path) -> float:
    """When an object of a class was last changed, Unix time; 0 before the first."""
    times = [0.0]
    for folder, _, names in os.walk(store):  # passes over what a repair clears away meanwhile
        for name in names if Path(folder).parent.parent == store else ():
            with contextlib.suppress(OSError):
                times.append((Path(folder) / name).stat().st_mtime)
    return max(times)


@dataclass
class Place:
    """What all rounds share: the source, what an undisturbed run makes of it and how long that takes."""

    folder: Path
    source: Path
    n_images: int
    """Good images of the source."""
    expected: dict[str, str]
    whole_s: float
    """From the lock to the last object of an undisturbed run."""
    work_s: float
    """From the first row to the last object of an undisturbed run."""

    @property
    def n_good(self) -> int:
        """Images that end as done."""
        return sum(found.startswith("DONE") for found in self.expected.values())

    @property
    def half(self) -> Path:
        """A store with the first half of the images, finished; made when it is first asked for."""
        store = self.folder / "half.zarr"
        if not store.exists():
            command = self.command(store, "--workers", str(N_WORKERS), "--limit", str(self.n_images // 2))
            assert command.wait(RUN_LIMIT_S) == 0, command.output()
        return store

    def command(self, store: Path, *options: str) -> Process:
        """A run whose workers do without torch, which takes seconds to import."""
        work = ["--dtype", "uint8", "--layers", "4x21x21"]  # enough of it for kills to come in time
        return Process([sys.executable, "-c", COMMAND, "run", str(self.source), str(store), *work, *options], store.parent, "run")


def prepare(folder: Path, n_images: int) -> Place:
    """Make the source and the store that nothing interrupts, and measure."""
    place = Place(folder, make_source(folder / "source", n_images), n_images, {}, 0.0, 0.0)
    store = folder / "whole.zarr"
    command = place.command(store, "--workers", str(N_WORKERS))
    wait_until((store / RUNS / "lock.json").exists, RUN_LIMIT_S)
    locked = time.time()
    wait_until(lambda: last_touch(store), RUN_LIMIT_S)
    began = time.time()
    assert command.wait(RUN_LIMIT_S) == 0, command.output()
    place.whole_s, place.work_s = last_touch(store) - locked, last_touch(store) - began
    place.expected = hashed_content(store)
    kinds = {found.split()[0] for found in place.expected.values()}
    assert kinds == {"DONE", "QUARANTINED", "REJECTED"}, kinds
    return place


# -- one round -------------------------------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """One SIGKILL (or one volley of them) and what the store said right after it."""

    after_s: float
    n_killed: int
    n_done: int
    is_live: bool
    """Whether the run still had images to do."""


@dataclass
class Round:
    """What happened in one round; it is good if `faults` is empty."""

    number: int
    victim: str
    store_before: str
    kills: list[Kill] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    """Seconds from a kill to the end of its run."""
    n_missed: int = 0
    """Kills whose run had ended before."""
    n_resumes: int = 0
    faults: list[str] = field(default_factory=list)
    elapsed_s: float = 0.0

    def describe(self) -> str:
        kills = ", ".join(
            f"{k.n_killed} at {k.after_s:.2f} s with {k.n_done} done{'' if k.is_live else ' (late)'}" for k in self.kills
        )
        verdict = "equal" if not self.faults else "FAULTS: " + "; ".join(self.faults)
        return (
            f"{self.number:4d} {self.victim:14s} {self.store_before:5s} killed {kills or 'nothing'}; exit {self.codes}; "
            f"{self.n_resumes} resumes; {self.elapsed_s:.0f} s; {verdict}"
        )


class _Round:
    """One round in the making."""

    def __init__(self, place: Place, victim: str, seed: int, folder: Path, number: int = 0, *, at_commit: bool = False) -> None:
        self.place, self.victim, self.folder, self.at_commit = place, victim, folder, at_commit
        self.random = random.Random(seed)
        self.store = folder / "features.zarr"
        self.result = Round(number, victim, self.random.choice(["fresh", "fresh", "half"]))
        self.committed: dict[str, str] = {}
        self.clusters: list[Cluster] = []
        self.commands: list[tuple[Process, float]] = []  # with the time of their death

    def run(self) -> Round:
        began = time.monotonic()
        if self.result.store_before == "half":
            shutil.copytree(self.place.half, self.store)
        runs_killed = 1 if self.victim in SURVIVED else self.random.choice([1, 1, 2])
        try:
            for attempt in range(runs_killed + MAX_RESUMES):
                code = self._one_run(is_victim=attempt < runs_killed)
                if code == 0:
                    break
                self.result.n_resumes += 1
            else:
                self._fault(f"still not complete after {MAX_RESUMES} resumes")
            self._compare()
            self._check_orphans()
        finally:
            for started in (*(command for command, _ in self.commands), *self.clusters):
                started.end()
        self.result.elapsed_s = time.monotonic() - began
        return self.result

    def _fault(self, text: str) -> None:
        self.result.faults.append(text)

    def _one_run(self, *, is_victim: bool) -> int | None:
        share = self._open_share()
        command = self._start()
        killed = False
        strikes = self.random.choice([1, 2]) if self.victim in SURVIVED else 1
        for _ in range(strikes if is_victim else 0):
            killed = self._strike(command, share / strikes) or killed
        since = time.monotonic()
        limit_s = LOST_LIMIT_S if killed and self.victim == "scheduler" else RUN_LIMIT_S
        code = command.wait(limit_s)
        if killed:
            self.result.end_s.append(time.monotonic() - since)
        self.result.codes.append(code)
        self._judge(command, code, limit_s, killed=killed)
        self.commands.append((command, time.monotonic()))
        return code

    def _start(self) -> Process:
        if self.victim in EMBEDDED:
            return self.place.command(self.store, "--workers", str(N_WORKERS))
        if not self.clusters or self.victim in ("scheduler", "all"):
            self.clusters.append(Cluster(self.folder))
        self.clusters[-1].wait_for_workers()
        return self.place.command(self.store, "--cluster", "running")

    def _judge(self, command: Process, code: int | None, limit_s: float, *, killed: bool) -> None:
        if code is None:
            self._fault(f"a run did not end within {limit_s:.0f} s: {_tail(command)}")
            command.end()
        elif killed and self.victim in ("driver", "cluster-driver", "all"):
            if code != -9 and self.result.kills[-1].is_live:
                self._fault(f"a killed run ended with {code}")
        elif killed and self.victim == "scheduler":
            if code not in (0, 1) or (code == 1 and "featuremaps: " not in command.output()):
                self._fault(f"a run without scheduler ended with {code} and says {_tail(command)}")
        elif code != 0:
            self._fault(f"a run that should finish ended with {code} and says {_tail(command)}")
        if "Traceback" in command.output():
            self._fault(f"a traceback: {_tail(command)}")

    # -- the kill --------------------------------------------------------------------------------------------------------------

    def _strike(self, command: Process, share: float) -> bool:
        """Wait for the moment and kill; False if there was nothing left to kill."""
        self._wait_for_the_moment(command, share)
        victims = self._victims(command) if command.is_running else []
        if not victims:
            self.result.n_missed += 1
            return False
        kill_all(victims)
        after_s = time.time() - command.began
        done = self._look()
        self.result.kills.append(Kill(after_s, len(victims), len(done), is_live=len(done) < self.place.n_good))
        if self.victim == "nanny":
            self.clusters[-1].start_workers()
        return True

    def _wait_for_the_moment(self, command: Process, share: float) -> None:
        """Mostly between the first row and the last object, now and then as early as the lock; or as soon as a commit is seen."""
        if self.at_commit:
            n_before = self._n_done()
            wait_until(lambda: self._n_done() > n_before or not command.is_running, RUN_LIMIT_S)
            return
        is_early = self.random.random() < 0.15
        duration_s = share * (self.place.whole_s if is_early else self.place.work_s)

        def has_begun() -> bool:
            sign = (self.store / RUNS / "lock.json").exists() if is_early else last_touch(self.store) >= command.began
            return sign or not command.is_running

        wait_until(has_begun, RUN_LIMIT_S)
        until = time.monotonic() + self.random.uniform(0, 0.85 * duration_s)  # the kill itself takes its time
        wait_until(lambda: time.monotonic() > until or not command.is_running, RUN_LIMIT_S)

    def _victims(self, command: Process) -> list[psutil.Process]:
        if self.victim in ("driver", "cluster-driver"):
            return _of(command)
        if self.victim in ("worker", "cluster-worker"):
            marks = [command.mark] if self.victim == "worker" else [p.mark for p in self.clusters[-1].workers]
            found: list[psutil.Process] = []
            wait_until(
                lambda: found.extend(p for m in marks for p in worker_processes(m)) or found or not command.is_running,
                RUN_LIMIT_S,
            )
            return [self.random.choice(found)] if found else []
        cluster = self.clusters[-1]
        if self.victim == "nanny":
            return _of(cluster.workers[-1])
        if self.victim == "scheduler":
            return _of(cluster.scheduler)
        return [p for process in (command, *cluster.processes) for p in marked(process.mark)]

    def _look(self) -> dict[str, str]:
        """Read the store at this moment: it must open, and what it calls done must be right already."""
        if not (self.store / "zarr.json").exists():
            return {}
        done = done_rows(self.store)
        self.committed |= done
        now = hashed_content(self.store)
        wrong = [path for path in done if now[path] != self.place.expected[path]]
        if wrong:
            self._fault(f"{len(wrong)} rows were called done at the kill and are wrong, first {wrong[0]}")
        return done

    def _n_done(self) -> int:
        return len(done_rows(self.store)) if (self.store / "zarr.json").exists() else 0

    def _open_share(self) -> float:
        """Share of the good images that the ledger does not call done."""
        return 1 - self._n_done() / self.place.n_good

    # -- afterwards ------------------------------------------------------------------------------------------------------------

    def _compare(self) -> None:
        found, done = hashed_content(self.store), done_rows(self.store)
        differ = sorted(p for p in found.keys() | self.place.expected.keys() if found.get(p) != self.place.expected.get(p))
        if differ:
            kinds = f"{self.place.expected.get(differ[0])} and is {found.get(differ[0])}"
            self._fault(f"{len(differ)} images differ, first {differ[0]}, which should be {kinds}")
        lost = [path for path, digest in self.committed.items() if done.get(path) != digest]
        if lost:
            self._fault(f"{len(lost)} committed rows were lost, first {lost[0]}")
        if litter(self.store):
            self._fault(f"litter: {litter(self.store)[:3]}")
        if current_holder(self.store) or (self.store / RUNS / "lock.json").exists():
            self._fault("the lock is still held")

    def _check_orphans(self) -> None:
        for command, ended in self.commands:
            if not wait_until(
                lambda mark=command.mark: not marked(mark), max(0.0, ended + ORPHAN_LIMIT_S - time.monotonic()), 0.1
            ):
                self._fault(f"{len(marked(command.mark))} processes outlived their run by {ORPHAN_LIMIT_S:.0f} s")


def _of(process: Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(process.popen.pid)]
    return []


def _tail(command: Process) -> str:
    return repr(command.output()[-1500:])


def run_round(place: Place, victim: str, seed: int, folder: Path, number: int = 0, *, at_commit: bool = False) -> Round:
    """Kill ``victim`` in a run in ``folder``, at random or ``at_commit``, run again until complete, compare."""
    folder.mkdir()
    return _Round(place, victim, seed, folder, number, at_commit=at_commit).run()


# -- the command -----------------------------------------------------------------------------------------------------------------


def table(rounds: list[Round]) -> Iterator[str]:
    yield f"{'victim':14s} {'rounds':>6s} {'kills':>6s} {'live':>6s} {'resumes':>8s} {'to the end s':>13s}  all equal"
    for victim in VICTIMS:
        mine = [r for r in rounds if r.victim == victim]
        if mine:
            kills = [kill for r in mine for kill in r.kills]
            longest = max((s for r in mine for s in r.end_s), default=0.0)
            yield (
                f"{victim:14s} {len(mine):6d} {len(kills):6d} {sum(k.is_live for k in kills):6d} {sum(r.n_resumes for r in mine):8d} "
                f"{longest:13.1f}  {'no' if any(r.faults for r in mine) else 'yes'}"
            )
    n_kills, n_faults = sum(len(r.kills) + r.n_missed for r in rounds), sum(bool(r.faults) for r in rounds)
    late = f"{n_kills - n_cycles(rounds)} came late, when nothing was left to do"
    yield f"{n_cycles(rounds)} cycles of kill and resume in {len(rounds)} rounds: {n_kills} kills, of which {late}"
    yield f"{n_faults} rounds with faults"


def n_cycles(rounds: list[Round]) -> int:
    """Kills that hit a run with work left, and after which it was done."""
    return sum(kill.is_live for r in rounds for kill in r.kills)


@click.command()
@click.option("--cycles", default=200, show_default=True, help="Kills in time, each with the run that goes on from there.")
@click.option("--seed", default=0, show_default=True)
@click.option("--images", default=200, show_default=True)
@click.option("--victim", "victims", multiple=True, type=click.Choice(VICTIMS), help="Only these; default: all in turn.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Write every round as JSON.")
def main(cycles: int, seed: int, images: int, victims: tuple[str, ...], file: Path | None) -> None:
    """Kill, run again and compare; the folder of a round that failed is kept."""
    folder = Path(tempfile.mkdtemp(prefix="kill_rounds-"))
    place = prepare(folder, images)
    click.echo(
        f"{len(place.expected)} images; undisturbed: {place.whole_s:.1f} s under the lock, {place.work_s:.1f} s of work; in {folder}"
    )
    done: list[Round] = []
    while n_cycles(done) < cycles:
        number = len(done)
        victim = (victims or VICTIMS)[number % len(victims or VICTIMS)]
        result = run_round(place, victim, seed + number, folder / str(number), number)
        done.append(result)
        click.echo(result.describe())
        if not result.faults:
            shutil.rmtree(folder / str(number))
        if file:
            file.write_text(json.dumps([asdict(r) for r in done], indent=1))
    click.echo("\n".join(table(done)))
    failed = any(r.faults for r in done)
    if not failed:
        shutil.rmtree(folder)
    sys.exit(failed)


if __name__ == "__main__":
    main()
