"""Whether workers run what the driver runs: the same versions, and on a GPU where one was asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from distributed import Client

from pipeline.cluster import scheduler_workers
from pipeline.errors import FeaturemapsError

logger = logging.getLogger(__name__)

ANSWER_S = 30.0
PACKAGES = ("featuremaps", "dask", "distributed", "numpy", "pillow", "torch", "zarr")


def own_versions() -> dict[str, str]:
    """Of Python, its last number aside, and of the packages that decide about the result; a build's own tag is left out.

    Examples
    --------
    >>> sorted(own_versions())[:3]
    ['dask', 'distributed', 'featuremaps']
    """
    found: dict[str, str] = _look(PACKAGES)()
    return found


def check_workers(client: Client, addresses: Iterable[str] | None = None) -> None:
    """Refuse workers that would compute something else, or on something else.

    Parameters
    ----------
    client : distributed.Client
    addresses : iterable of str, optional
        The workers to look at; None is all.

    Raises
    ------
    FeaturemapsError
        Naming the workers and what differs.
    """
    workers = scheduler_workers(client)
    chosen = list(workers if addresses is None else set(addresses) & set(workers))
    if not chosen:
        return
    ours = own_versions()
    differing: dict[str, list[str]] = {}
    for address, theirs in _ask(client, _look(PACKAGES), chosen).items():
        lines = [f"{name} {theirs[name]} instead of {ours[name]}" for name in ours if theirs[name] != ours[name]]
        if lines:
            differing.setdefault(", ".join(lines), []).append(str(workers[address]["name"]))
    if differing:
        listed = "; ".join(f"{text} on {_some(names)}" for text, names in differing.items())
        raise FeaturemapsError(
            f"workers do not run the versions of this process, and would not compute the same: {listed}. No batch was sent to them; "
            "install the same versions there (constraints.txt), or start the workers with this Python (the cluster's key python)"
        )
    gpus = [address for address in chosen if workers[address]["resources"].get("gpu")]
    blind = [address for address, n in _ask(client, _n_gpus, gpus).items() if not n] if gpus else []
    if blind:
        raise FeaturemapsError(
            f"{_some([str(workers[address]['name']) for address in blind])} were to have a GPU, and torch sees none there: no batch was "
            "sent to them; check the group's gpus and options in cluster.yaml, nvidia-smi on that machine and that torch was installed "
            "with CUDA, or set gpus to 0"
        )


def _ask(client: Client, function: Callable[[], Any], workers: list[str]) -> dict[str, Any]:
    """What a function returns on each worker that answers; one that hangs must not keep the run from its work."""
    try:
        answers: dict[str, Any] = client.sync(
            client._run, function, workers=workers, on_error="ignore", callback_timeout=ANSWER_S
        )
    except TimeoutError:
        logger.warning("the workers did not say within %.0f s what versions they have: they are taken as they are", ANSWER_S)
        return {}
    return answers


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _look(packages: tuple[str, ...]) -> Any:
    """A function that is sent whole, so that a worker without featuremaps can answer, too."""

    def look() -> dict[str, str]:
        import platform as here  # noqa: PLC0415 (as above)
        from importlib import metadata  # noqa: PLC0415 (runs elsewhere)

        found = {"python": ".".join(here.python_version_tuple()[:2])}
        for name in packages:
            try:
                found[name] = metadata.version(name).partition("+")[0]
            except metadata.PackageNotFoundError:
                found[name] = "missing"
        return found

    return look


def _n_gpus() -> int:
    from pipeline.device import n_gpus  # noqa: PLC0415 (torch only where there is a GPU)

    return n_gpus()
