"""A worker without a cluster, so that a benchmark calls the tasks as functions."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any

from distributed.core import Status

from pipeline.config import ExtractorSpec
from pipeline.extract.weights import Weights
from pipeline.run import tasks
from pipeline.store.schema import StoredLayer

NAME = "bare"


def bare_worker() -> Any:
    """What tasks ask of their worker."""
    state = SimpleNamespace(total_resources={"extract": 1})
    return SimpleNamespace(name=0, address=NAME, status=Status.running, state=state, plugins={})


def work_alone(spec: ExtractorSpec, weights: Weights, layers: tuple[StoredLayer, ...]) -> tasks.ExtractorPlugin:
    """Let tasks of this process run here, with the extractor `NAME`; Ctrl-C stays as it is."""
    worker, on_ctrl_c = bare_worker(), signal.getsignal(signal.SIGINT)
    plugin = tasks.ExtractorPlugin(NAME, spec, weights, layers)
    plugin.setup(worker)
    signal.signal(signal.SIGINT, on_ctrl_c)
    worker.plugins[NAME] = plugin
    tasks.get_worker = lambda: worker
    return plugin
