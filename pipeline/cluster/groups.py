"""Worker groups: a scheduler in this process and workers anywhere. Lost workers are started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from distributed import Scheduler
from distributed.core import Status
from distributed.deploy.spec import SpecCluster
from tornado.ioloop import PeriodicCallback

from pipeline.cluster.spec import GroupSpec
from pipeline.run.slots import WorkerSlots, slots_of
from pipeline.text import count

logger = logging.getLogger(__name__)

LOOK_S = 5.0
"""How often to look for lost workers."""
DEATH_TIMEOUT_S = 60
"""A worker that has lost its scheduler ends after this time, so that no job outlives its run for long."""
MAX_PAUSE_S = 300.0
"""The longest pause between two attempts to start a worker."""
MAX_FALSE_STARTS = 3
LAUNCH_S = 60.0
"""The longest time to submit a job, connect, or start a process."""


class Launch(NamedTuple):
    """How one worker is started."""

    group: str
    cls: Any
    """A `distributed.deploy.spec.ProcessInterface`. It is called with the scheduler's address, ``name`` and the options, then awaited.

    It has two more functions. ``async find_gone(workers)`` takes workers by name and returns why each of the ended ones ended.
    ``explain(error)`` says why a worker was not started.
    """
    options: dict[str, Any]


class GroupCluster(SpecCluster):  # type: ignore[misc]
    """A scheduler in this process, and the workers of several groups; lost workers are started again.

    Parameters
    ----------
    launches : mapping of str to Launch
        The wanted workers by name.
    groups : mapping of str to GroupSpec
    scheduler : dict
        Options of the scheduler.
    patience_s : float
        How long a worker may take to start.
    security : distributed.Security, optional
    """

    def __init__(
        self,
        launches: Mapping[str, Launch],
        groups: Mapping[str, GroupSpec],
        scheduler: dict[str, Any],
        patience_s: float,
        security: Any = None,
    ) -> None:
        self.launches, self.groups, self.patience_s = launches, groups, patience_s
        self.dashboard = ""
        """Its address, if it is reachable from outside."""
        self.troubles: dict[str, str] = {}
        """Why workers did not start, by name; only those whose last attempt failed."""
        self._tending = asyncio.Lock()
        self._n_tries: dict[str, int] = {}  # attempts since a worker of this name was last there
        self._next_try: dict[str, float] = {}
        super().__init__(scheduler={"cls": Scheduler, "options": scheduler}, workers={}, security=security, silence_logs=False)
        callback = PeriodicCallback(self._tend_again, LOOK_S * 1000)
        self.periodic_callbacks["featuremaps-tend"] = callback
        self.loop.add_callback(callback.start)

    # -- the present state -----------------------------------------------------------------------------------------------------------

    @property
    def present(self) -> set[str]:
        """Names of the workers that have connected."""
        return {str(worker.name) for worker in list(self.scheduler.workers.values())}

    def counts(self) -> dict[str, tuple[int, int]]:
        """Per group, the number of workers that are there and the number wanted."""
        present = self.present
        names = {group: [name for name, launch in self.launches.items() if launch.group == group] for group in self.groups}
        return {group: (len(present.intersection(known)), len(known)) for group, known in names.items()}

    def is_hopeless(self, n_tries: int, *, everybody: bool) -> bool:
        """Whether starting failed ``n_tries`` times for all workers of a group, or (``everybody``) for any worker."""
        failed = {name for name in self.troubles if self._n_tries.get(name, 0) >= n_tries}
        for group, (n, _) in self.counts().items():
            names = {name for name, launch in self.launches.items() if launch.group == group}
            if names & failed if everybody else not n and names <= failed:
                return True
        return False

    def wanted(self) -> list[WorkerSlots]:
        """What each wanted worker offers, started or not."""
        groups = [self.groups[launch.group] for launch in self.launches.values()]
        return [slots_of(group.resources, group.memory) for group in groups]

    def describe_troubles(self) -> str:
        """Why workers could not be started, each reason once."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in sorted(self.troubles.items()):
            by_reason.setdefault(reason, []).append(name)
        return "; ".join(f"{', '.join(names[:4])}{', ...' if names[4:] else ''}: {reason}" for reason, names in by_reason.items())

    def describe(self) -> str:
        """Per group, how many workers are there, and what is known about the missing ones."""
        lines = [f"{group}: {n} of {count(wanted, 'worker')}" for group, (n, wanted) in self.counts().items()]
        absent = sorted(set(self.launches) - self.present)
        known = [self._describe_worker(name) for name in absent]
        return "; ".join([*lines, *dict.fromkeys(filter(None, known[:8])), *(["..."] if len(known) > 8 else [])])

    def _describe_worker(self, name: str) -> str:
        worker = self.workers.get(name)
        state = getattr(worker, "state", "")
        return f"{name}: {state or self.troubles.get(name, '')}" if state or name in self.troubles else ""

    # -- starting and stopping -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to start the missing workers; `troubles` tells what goes wrong."""
        self.loop.add_callback(self._tend_again)

    async def _tend_again(self) -> None:
        if self._tending.locked():
            return
        try:
            await self._tend()
        except Exception:
            logger.exception("looking after the workers")

    async def _tend(self) -> None:
        """Note lost workers and start the missing ones."""
        async with self._tending:
            if self.status != Status.running:
                return
            present = self.present
            for name in present:
                self.troubles.pop(name, None)
                self._n_tries.pop(name, None)
            await self._forget_lost({name: worker for name, worker in self.workers.items() if name not in present})
            now = time.monotonic()
            missing = [n for n in self.launches if n not in self.workers and self._next_try.get(n, 0.0) <= now]
            await asyncio.gather(*(self._launch(name) for name in missing))

    async def _close(self) -> None:
        """Close all workers once no start is in progress: the base class does not know of workers that start meanwhile."""
        if self.status == Status.running:
            self.periodic_callbacks["featuremaps-tend"].stop()
        async with self._tending:
            await super()._close()

    async def _forget_lost(self, absent: dict[str, Any]) -> None:
        classes = {type(worker) for worker in absent.values()}
        gone: dict[str, str] = {}
        for cls in classes:
            gone |= await cls.find_gone({name: worker for name, worker in absent.items() if type(worker) is cls})
        for name, reason in gone.items():
            logger.info("worker %s is lost: %s", name, reason)
            self.troubles[name] = reason
            with contextlib.suppress(OSError, RuntimeError):
                await self.workers[name].close()
            del self.workers[name], self.worker_spec[name]

    async def _launch(self, name: str) -> None:
        launch = self.launches[name]
        n_tries = self._n_tries[name] = self._n_tries.get(name, 0) + 1
        pause_s = min(MAX_PAUSE_S, LOOK_S * 2.0 ** min(10, n_tries - MAX_FALSE_STARTS)) if n_tries >= MAX_FALSE_STARTS else 0.0
        self._next_try[name] = time.monotonic() + pause_s
        self.troubles.pop(name, None)
        worker = None
        try:
            worker = launch.cls(self.scheduler.contact_address or self.scheduler.address, name=name, **launch.options)
            await asyncio.wait_for(worker, LAUNCH_S)
        except Exception as error:  # noqa: BLE001 (any library may start it)
            slow = f"it was not started within {LAUNCH_S:.0f} s"
            self.troubles[name] = slow if isinstance(error, TimeoutError) else launch.cls.explain(error)
            logger.info("worker %s was not started: %s", name, self.troubles[name])
            if worker is not None:
                with contextlib.suppress(Exception):
                    await worker.close()
        else:
            self.workers[name] = worker
            self.worker_spec[name] = {"cls": launch.cls, "options": launch.options}
