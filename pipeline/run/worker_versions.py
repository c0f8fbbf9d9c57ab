"""What decides about the result on a machine: versions, and whether a worker that joins has those of the driver."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from distributed import WorkerPlugin
from distributed.protocol.pickle import dumps

logger = logging.getLogger(__name__)

PACKAGES = ("featuremaps", "dask", "distributed", "numpy", "pillow", "torch", "zarr")
TOPIC = "featuremaps-refused"
"""Under which a worker that does not fit says so, with the id of the client that does not want it."""


def find_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of Python, its last number aside, and of packages; a build's own tag is left out. Travels as text, to where no featuremaps is."""
    import platform  # noqa: PLC0415 (as it travels)
    from importlib import metadata  # noqa: PLC0415 (as above)

    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in packages:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def own_versions() -> dict[str, str]:
    """Of Python and of the packages that decide about the result.

    Examples
    --------
    >>> sorted(own_versions())[:3]
    ['dask', 'distributed', 'featuremaps']
    """
    return find_versions(PACKAGES)


def asking_for_versions() -> Callable[[], dict[str, str]]:
    """A function that is sent whole, and not by its name, so that a worker without featuremaps can answer, too."""
    return partial(FunctionType(find_versions.__code__, {}, find_versions.__name__), PACKAGES)


def versions_script() -> str:
    """A program for another Python, which prints `own_versions` of there as JSON."""
    return f"import json\n{inspect.getsource(find_versions)}\nprint(json.dumps(find_versions({PACKAGES!r})))"


def differences(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """What differs, in words.

    Examples
    --------
    >>> differences({"zarr": "9.9", "torch": "2.0"}, {"zarr": "3.1", "torch": "2.0"})
    ['zarr 9.9 instead of 3.1']
    """
    return [f"{name} {theirs.get(name, 'missing')} instead of {ours[name]}" for name in ours if theirs.get(name) != ours[name]]


def n_gpus_there() -> int:
    """GPUs that torch sees in this process."""
    from pipeline.extract.gpu import n_gpus  # noqa: PLC0415 (torch only where there is a GPU)

    return n_gpus()


class VersionsPlugin(WorkerPlugin):  # type: ignore[misc]
    """Has a worker that joins leave before it works, if it would compute something else than its driver, or on something else.

    Dask lets a worker whose plugin fails go on, so it closes itself; what it was sent goes to others.

    Parameters
    ----------
    client : str
        Id of the driver's client; when it is gone, nobody is refused.
    """

    def __init__(self, client: str) -> None:
        self.client, self.versions = client, own_versions()
        self.name = f"featuremaps-versions-{client}"

    async def setup(self, worker: Any) -> None:
        """Look, and close where something differs."""
        reason = ", ".join(differences(own_versions(), self.versions))
        if not reason and worker.state.total_resources.get("gpu") and not n_gpus_there():
            reason = "it was to have a GPU, and torch sees none there"
        if not reason or not await self._is_wanted(worker):
            return
        logger.error("worker %s does not fit the run, and leaves before it works: %s", worker.name, reason)
        worker.log_event(TOPIC, {"client": self.client, "name": str(worker.name), "reason": reason})
        self._closing = asyncio.create_task(worker.close(reason="featuremaps-versions"))
        await asyncio.sleep(0)  # from here on it is closing, and begins no task; a nanny answers only when all has started

    async def _is_wanted(self, worker: Any) -> bool:
        """Whether the driver is still there: one that was killed leaves its plugin with the scheduler."""
        try:
            answer = await worker.scheduler.run_function(function=dumps(has_client), kwargs=dumps({"client": self.client}))
        except Exception as error:  # noqa: BLE001 (of a scheduler that may have any featuremaps, or none)
            logger.info("the scheduler does not say who is there: %s", error)
            return True
        return bool(answer.get("result", True))


def has_client(client: str, dask_scheduler: Any) -> bool:
    """On the scheduler: whether it knows a client."""
    return client in dask_scheduler.clients
