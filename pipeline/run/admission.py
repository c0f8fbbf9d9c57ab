"""Admits only workers that run what the driver runs, at the start of a run and as they join.

`worker_versions` says what is compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distributed import Client, WorkerPlugin
from distributed.protocol.pickle import dumps

from pipeline.errors import FeaturemapsError
from pipeline.run.slots import scheduler_workers
from pipeline.run.worker_versions import asking_for_versions, differences, has_kernel_there, n_gpus_there, own_versions

logger = logging.getLogger(__name__)

ANSWER_S = 30.0
"""How long to wait for workers to answer; Dask's own methods wait without limit for one that hangs."""
TOPIC = "featuremaps-refused"
"""Topic of the event in which a worker says that it does not fit, with the id of the client that refuses it."""


@contextlib.contextmanager
def only_like_this(client: Client) -> Iterator[None]:
    """Refuse to begin with workers that would compute something else, and send away those that join later and differ.

    Raises as `check_workers` does.
    """
    check_workers(client)
    plugin, said = VersionsPlugin(client.id), set[str]()

    def warn(event: Any) -> None:
        _, refused = event
        line = f"worker {refused['name']} joined and was sent away: {refused['reason']}"
        if refused["client"] == client.id and line not in said:
            said.add(line)
            logger.warning(
                "%s; the run goes on without it; install the same versions there (constraints.txt), or start it with this Python",
                line,
            )

    client.subscribe_topic(TOPIC, warn)
    # `Client.register_plugin` and `unregister_worker_plugin` have no timeout, so the scheduler's own calls are used here.
    # On a failure the scheduler has the plugin already, for workers that join. The others were checked above.
    with _ignoring_lost_workers():
        client.sync(
            client.scheduler.register_worker_plugin,
            plugin=dumps(plugin),
            name=plugin.name,
            idempotent=False,
            callback_timeout=ANSWER_S,
        )
    try:
        yield
    finally:
        if client.status == "running":
            with _ignoring_lost_workers():
                client.unsubscribe_topic(TOPIC)
                client.sync(client.scheduler.unregister_worker_plugin, name=plugin.name, callback_timeout=ANSWER_S)


@contextlib.contextmanager
def _ignoring_lost_workers() -> Iterator[None]:
    """Ignore workers that die or hang: they make a call to all workers fail, but the scheduler has done its part."""
    try:
        yield
    except (OSError, TimeoutError, ValueError) as error:
        logger.info("not all workers answered: %s", error)


def check_workers(client: Client) -> None:
    """Refuse workers that would compute something else, or on another kind of device.

    Raises
    ------
    FeaturemapsError
        Naming the workers and what differs.
    """
    workers = scheduler_workers(client)
    if not workers:
        return
    ours = own_versions()
    differing: dict[str, list[str]] = {}
    for address, theirs in ask(client, asking_for_versions(), workers).items():
        text = ", ".join(differences(theirs, ours))
        if text:
            differing.setdefault(text, []).append(str(workers[address]["name"]))
    if differing:
        listed = "; ".join(f"{text} on {_some(names)}" for text, names in differing.items())
        raise FeaturemapsError(
            f"workers do not run the versions of this process, and would not compute the same: {listed}. No batch was sent to them; "
            "install the same versions there (constraints.txt), or start the workers with this Python (the cluster's key python)"
        )
    blind = blind_workers(client, workers)
    if blind:
        raise FeaturemapsError(
            f"{_some([str(workers[address]['name']) for address in blind])} should have a GPU, but torch sees none there: no batch was "
            "sent to them; check the group's gpus and options in cluster.yaml, nvidia-smi on that machine and that torch was installed "
            "with CUDA, or set gpus to 0"
        )


def blind_workers(client: Client, workers: dict[str, Any]) -> list[str]:
    """Addresses of workers that claim a GPU but see none."""
    return [address for address, n in ask(client, n_gpus_there, having_gpus(workers)).items() if not n]


def having_gpus(workers: dict[str, Any]) -> list[str]:
    """Addresses of the workers that claim a GPU."""
    return [address for address, worker in workers.items() if worker["resources"].get("gpu")]


def all_have_kernel(client: Client) -> bool:
    """Whether every worker that extracts on processors has the compiled code; workers with a GPU do not count."""
    workers = scheduler_workers(client)
    on_cpu = [
        name for name, worker in workers.items() if worker["resources"].get("extract") and not worker["resources"].get("gpu")
    ]
    return all(ask(client, has_kernel_there, on_cpu).values())


def ask(client: Client, function: Callable[[], Any], workers: Iterable[str]) -> dict[str, Any]:
    """Return what a function returns on each worker that answers in time; a worker that hangs must not stop the run."""
    chosen = list(workers)
    if not chosen:
        return {}
    try:
        answers: dict[str, Any] = client.run(function, workers=chosen, on_error="ignore", callback_timeout=ANSWER_S)
    except TimeoutError:
        logger.warning("not all workers answered within %.0f s: the run uses them without checking what they have", ANSWER_S)
        return {}
    return answers


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class VersionsPlugin(WorkerPlugin):  # type: ignore[misc]
    """Closes a worker that joins, before its first task, if its versions or its device differ from the driver's.

    Dask keeps a worker whose plugin fails, so the worker closes itself. Its tasks go to others.

    Parameters
    ----------
    client : str
        Id of the driver's client; once it is gone, no worker is refused.
    """

    def __init__(self, client: str) -> None:
        self.client, self.versions = client, own_versions()
        self.name = f"featuremaps-versions-{client}"

    async def setup(self, worker: Any) -> None:
        """Compare, and close the worker if something differs."""
        reason = ", ".join(differences(own_versions(), self.versions))
        if not reason and worker.state.total_resources.get("gpu") and not n_gpus_there():
            reason = "it should have a GPU, but torch sees none there"
        if not reason or not await self._is_wanted(worker):
            return
        logger.error("worker %s does not fit the run, and leaves before it works: %s", worker.name, reason)
        worker.log_event(TOPIC, {"client": self.client, "name": str(worker.name), "reason": reason})
        self._closing = asyncio.create_task(worker.close(reason="featuremaps-versions"))
        # From here on the worker is closing and begins no task. A nanny answers only when all has started.
        await asyncio.sleep(0)

    async def _is_wanted(self, worker: Any) -> bool:
        """Whether the driver is still there: a driver that was killed leaves its plugin with the scheduler."""
        try:
            answer = await worker.scheduler.run_function(function=dumps(has_client), kwargs=dumps({"client": self.client}))
        except Exception as error:  # noqa: BLE001 (the scheduler may run any version of featuremaps, or none)
            logger.info("the scheduler did not say whether the driver is there: %s", error)
            return True
        return bool(answer.get("result", True))


def has_client(client: str, dask_scheduler: Any) -> bool:
    """Whether the scheduler knows a client; runs on the scheduler."""
    return client in dask_scheduler.clients
