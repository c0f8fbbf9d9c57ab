from __future__ import annotations

import time

import pytest

from pipeline.config import DecodeSpec
from pipeline.run.activity import is_draining
from pipeline.run.in_flight import Flight, ProbeTask
from pipeline.run.tasks import Target
from pipeline.source.fetch import Source

pytestmark = pytest.mark.cluster


def test_what_is_taken_back_waits_for_no_headers_and_every_worker_hears_of_it(client, tmp_path):
    flight = Flight(client, Source(str(tmp_path), DecodeSpec()), Target(str(tmp_path), "stopped", "none"), (9, 9))
    flight.send(ProbeTask(0, ["none.png"]))
    flight.take_back()
    assert len(flight) == 0
    deadline = time.monotonic() + 900
    while not all(client.run(lambda dask_worker: is_draining(dask_worker, "stopped")).values()):
        assert time.monotonic() < deadline
    assert not any(client.run(lambda dask_worker: is_draining(dask_worker, "another")).values())
    flight.cancel()
    client.unregister_worker_plugin("featuremaps-drain-stopped")
