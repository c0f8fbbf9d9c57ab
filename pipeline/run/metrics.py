"""Prometheus metrics of the current runs. They are computed when somebody asks, so a run pays nothing for them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from pipeline.errors import UsageError, needs_extra
from pipeline.run.summary import Run, at_work
from pipeline.text import printable

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

PREFIX = "featuremaps_"


class Value(NamedTuple):
    """One number of a run."""

    name: str
    """Without the prefix, and for a counter without ``_total``."""
    help: str
    of: Callable[[Run], float | None]
    """Returns None while the value is not known."""


COUNTERS = (
    Value("images_done", "Images whose maps this run has put into the store.", lambda run: run.summary.n_done),
    Value("images_quarantined", "Images that this run found bad when it decoded them.", lambda run: run.summary.n_quarantined),
    Value("images_rejected", "Images that this run found bad by their headers.", lambda run: run.summary.n_rejected),
    Value(
        "images_left",
        "Images that this run leaves to the next run, after passing faults or a stop.",
        lambda run: run.summary.n_pending,
    ),
    Value("images_checked", "Images that were compared with their digests.", lambda run: run.summary.n_checked),
    Value("pixels", "Input pixels of the images that were done.", lambda run: run.summary.pixels),
    Value("bytes_read", "Bytes of image files read.", lambda run: run.summary.bytes_read),
    Value("bytes_written", "Bytes of maps written, as they are stored.", lambda run: run.summary.bytes_written),
    Value(
        "slot_seconds", "Time available to the slots: seconds since the first task, times slots.", lambda run: run.summary.slot_s
    ),
)
GAUGES = (
    Value("images_listed", "Images of the source's listing.", lambda run: run.summary.n_listed),
    Value("images_unchanged", "Images that the store had already.", lambda run: run.summary.n_unchanged),
    Value("images_removed", "Images that have left the source since the last run.", lambda run: run.summary.n_removed),
    Value(
        "images_pending",
        "Images that are neither done nor known to be bad.",
        lambda run: run.progress.n_total - run.progress.n_finished if run.progress.n_total else None,
    ),
    Value("slots", "Batches that the workers extract at once.", lambda run: run.summary.slots),
    Value("workers", "Worker processes.", lambda run: run.summary.workers),
    Value(
        "last_commit_timestamp_seconds",
        "When outcomes were last written to the ledger.",
        lambda run: run.progress.last_commit_s or None,
    ),
)


class RunCollector:
    """Reads the runs of `at_work`, each under the label of its store: a store has one run at a time."""

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics to Prometheus."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415 (the extra metrics)

        runs = [(printable(run.store), run) for run in list(at_work.values())]
        yield GaugeMetricFamily(f"{PREFIX}runs_at_work", "Runs of this process that hold their store.", value=len(runs))
        info = GaugeMetricFamily(f"{PREFIX}run_info", "The run that holds a store.", labels=["store", "run_id", "version"])
        for store, run in runs:
            info.add_metric([store, run.summary.run_id, run.summary.versions.get("featuremaps", "")], 1)
        yield info
        for kind, values in ((CounterMetricFamily, COUNTERS), (GaugeMetricFamily, GAUGES)):
            for name, text, of in values:
                family = kind(PREFIX + name, text, labels=["store"])
                for store, run in runs:
                    value = of(run)
                    if value is not None:
                        family.add_metric([store], value)
                yield family
        stages = CounterMetricFamily(
            f"{PREFIX}stage_seconds",
            "Time that the slots spent in a stage: read, decode, extract, write.",
            labels=["store", "stage"],
        )
        for store, run in runs:
            for stage, seconds in list(run.summary.stage_s.items()):
                stages.add_metric([store, stage], seconds)
        yield stages


_collector = RunCollector()
_n_users = 0
_users = threading.Lock()


@contextlib.contextmanager
def beside_dask() -> Iterator[None]:
    """Add the metrics to ``/metrics`` of Dask's dashboard, if its scheduler is in this process.

    Without the extra ``metrics`` Dask has no metrics either.
    """
    try:
        from prometheus_client import REGISTRY  # noqa: PLC0415 (the extra metrics)
    except ImportError:
        yield
        return
    _count_user(REGISTRY, 1)
    try:
        yield
    finally:
        _count_user(REGISTRY, -1)


def _count_user(registry: CollectorRegistry, n: int) -> None:
    """Count the runs of this process: they share the collector, which comes with the first and goes with the last."""
    global _n_users  # noqa: PLW0603 (one registry per process)
    with _users:
        if not _n_users:
            registry.register(_collector)
        _n_users += n
        if not _n_users:
            registry.unregister(_collector)


@contextlib.contextmanager
def served(address: str) -> Iterator[str]:
    """Serve the metrics from this process until the block ends, for every kind of cluster; yield the URL.

    Parameters
    ----------
    address : str
        HOST:PORT to listen on; port 0 is any free one.

    Raises
    ------
    UsageError
        When prometheus-client is not installed, the address is malformed, or the port cannot be opened.
    """
    with needs_extra("metrics", f"--metrics {address}", "leave out --metrics"):
        from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server  # noqa: PLC0415 (the extra metrics)
    host, port = _split(address)
    registry = CollectorRegistry()
    registry.register(_collector)
    ProcessCollector(registry=registry)  # memory, CPU time and open files of the driver
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise UsageError(
            f"metrics cannot be served on {address} ({error}): nothing was started; give a HOST of this machine and a PORT that nobody "
            "listens on (0 is any free one)"
        ) from error
    try:
        yield f"http://{f'[{host}]' if ':' in host else host}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdecimal()) or int(port) > 65_535:
        raise UsageError(
            f"--metrics {address!r} is not of the form HOST:PORT, for instance 127.0.0.1:9464, or 127.0.0.1:0 for any free port: nothing "
            "was started; who may connect to HOST reads the numbers, without a password"
        )
    return host, int(port)
