from __future__ import annotations

import sys
import threading
import urllib.request

import pytest
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.api import run_job
from pipeline.config import make_job
from pipeline.errors import UsageError
from pipeline.run.metrics import beside_dask, served
from pipeline.run.summary import Progress, Summary, at_work, working
from tests.conftest import make_images


def values(text: str, name: str, label: str = "store") -> dict[str, float]:
    """The samples of one metric, by one of their labels."""
    families = text_string_to_metric_families(text)
    found = [sample for family in families for sample in family.samples if sample.name == f"featuremaps_{name}"]
    return {sample.labels.get(label, ""): sample.value for sample in found}


def scraped(url: str) -> str:
    with urllib.request.urlopen(url, timeout=900) as response:
        return str(response.read().decode())


def test_a_run_is_seen_while_it_is_at_work_and_no_longer():
    summary, progress = Summary("r1", n_listed=10, n_done=3, stage_s={"read": 0.5, "write": 0.25}), Progress()
    with served("127.0.0.1:0") as url:
        assert values(scraped(url), "runs_at_work") == {"": 0}
        with working("/a.zarr", summary, progress):
            text = scraped(url)
            assert values(text, "images_done_total") == {"/a.zarr": 3}
            assert values(text, "run_info", "run_id") == {"r1": 1}
            assert values(text, "stage_seconds_total", "stage") == {"read": 0.5, "write": 0.25}
            assert values(text, "images_pending") == {}  # nobody has looked at the store yet
            assert values(text, "last_commit_timestamp_seconds") == {}
            progress.n_total, progress.n_finished, summary.n_done, progress.last_commit_s = 10, 4, 4, 1e9
            text = scraped(url)
            assert (values(text, "images_done_total"), values(text, "images_pending")) == ({"/a.zarr": 4}, {"/a.zarr": 6})
            assert values(text, "last_commit_timestamp_seconds") == {"/a.zarr": 1e9}
        text = scraped(url)
        assert (values(text, "runs_at_work"), values(text, "images_done_total")) == ({"": 0}, {})
        assert "process_resident_memory_bytes" in text


def test_a_store_whose_name_is_hostile_is_a_label_all_the_same():
    with served("127.0.0.1:0") as url, working('/a\n"b\\\udcff.zarr', Summary("r"), Progress()):
        assert values(scraped(url), "images_done_total") == {'/a\\n"b\\\\udcff.zarr': 0}


@pytest.mark.cluster
def test_two_runs_in_one_process_are_told_apart_by_their_store(client, tmp_path):
    source = make_images(tmp_path / "source", 3, [(50, 60)])
    both, seen, done = threading.Barrier(2, timeout=900), [], []

    def look(progress: Progress) -> None:
        if progress.stage == "starting workers":
            both.wait()
            seen.append(generate_latest(REGISTRY).decode())
            both.wait()

    def work(name: str) -> None:
        job = make_job({"source": str(source), "store": str(tmp_path / name)})
        with beside_dask():
            done.append(run_job(job, client, on_progress=look))

    threads = [threading.Thread(target=work, args=(name,)) for name in ("a.zarr", "b.zarr")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [summary.n_done for summary in done] == [3, 3]
    stores = {str(tmp_path / name) for name in ("a.zarr", "b.zarr")}
    for text in seen:
        assert values(text, "runs_at_work") == {"": 2}
        assert values(text, "images_pending") == dict.fromkeys(stores, 3)
        assert values(text, "run_info", "run_id").keys() == {summary.run_id for summary in done}
    assert "featuremaps_" not in generate_latest(REGISTRY).decode()
    assert at_work == {}


def test_dask_has_the_metrics_until_the_last_run_ends_however_it_ends():
    def is_there() -> bool:
        return "featuremaps_runs_at_work" in generate_latest(REGISTRY).decode()

    with beside_dask():
        with pytest.raises(KeyboardInterrupt), beside_dask():
            raise KeyboardInterrupt
        assert is_there()
    assert not is_there()


@pytest.mark.cluster
def test_without_prometheus_client_a_run_works_and_only_its_metrics_are_refused(run, command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)  # as if it were not installed: the tests need it
    source = make_images(tmp_path / "source", 3, [(50, 60)])
    assert run(source).n_done == 3
    code, out, err = command("run", source, tmp_path / "other.zarr", "--metrics", "127.0.0.1:0")
    assert (code, out) == (2, "")
    assert err.startswith("featuremaps: --metrics 127.0.0.1:0 needs prometheus-client, which is not installed (")
    assert err.endswith("nothing was done; pip install 'featuremaps[metrics]', or leave out --metrics\n")
    assert not (tmp_path / "other.zarr").exists()


@pytest.mark.parametrize("address", ["9464", ":9464", "localhost:", "localhost:http", "localhost:65536", "[]:80", "a:\u0665"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(UsageError, match=r"is not of the form HOST:PORT, .* nothing was started"), served(address):
        pass


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_one_is_refused(host):
    with pytest.raises(UsageError, match=rf"metrics cannot be served on {host}:0 \(.*\): nothing was started; give a HOST"):
        served(f"{host}:0").__enter__()


def test_a_port_that_is_taken_is_refused_and_free_again_afterwards():
    with served("127.0.0.1:0") as url:
        address = url.removeprefix("http://").removesuffix("/metrics")
        with pytest.raises(UsageError, match="Address already in use"):
            served(address).__enter__()
    with served(address) as again:
        assert again == url


def test_metrics_are_served_over_ipv6_too():
    with served("[::1]:0") as url:
        assert url.startswith("http://[::1]:")
        assert values(scraped(url), "runs_at_work") == {"": 0}
