"""Workers that retire before they finish anything: the run ends, and says what it saw."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from distributed import WorkerPlugin

from pipeline.api import run_job
from pipeline.cluster.config import LocalSpec
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError
from pipeline.run.progress_watch import MAX_LOSSES, ProgressWatch
from pipeline.source import decoding
from pipeline.store.schema import RUNS
from tests.conftest import content, make_images

A, B = "process-RUN-0", "process-RUN-1"


def retire(watch: ProgressWatch, *keys: str, at_s: float = 0.0, life_s: float = 12.0, is_expected: bool = True) -> None:
    """One worker comes, is given these tasks, and goes."""
    watch.joined("w", at_s)
    watch.left("w", at_s + life_s, keys, is_expected=is_expected)


def test_a_run_is_in_vain_when_every_task_went_back_several_times_and_none_was_finished():
    watch = ProgressWatch("RUN")
    for i in range(MAX_LOSSES):
        assert not watch.is_in_vain([A])
        retire(watch, A, at_s=100.0 * i)
    assert watch.is_in_vain([A])
    assert not watch.is_in_vain([])


def test_a_finished_task_begins_the_count_anew():
    watch = ProgressWatch("RUN")
    for i in range(10 * MAX_LOSSES):
        retire(watch, A, B, at_s=100.0 * i)
        if i % MAX_LOSSES == MAX_LOSSES - 2:
            watch.finished()
            assert not watch.is_in_vain([A])
        assert not watch.is_in_vain([A, B])


def test_many_workers_that_are_taken_away_at_once_are_one_loss_for_each_task():
    watch = ProgressWatch("RUN")
    keys = [f"process-RUN-{i}" for i in range(200)]
    for i in range(100):
        watch.joined(f"w{i}", 0.0)
    for i in range(100):
        watch.left(f"w{i}", 5.0, keys[2 * i : 2 * i + 2], is_expected=True)
    assert not watch.is_in_vain(keys)


def test_a_task_that_a_lasting_worker_is_at_is_waited_for():
    watch = ProgressWatch("RUN")
    for i in range(100):
        retire(watch, A, at_s=100.0 * i)
    assert not watch.is_in_vain([A, B])


def test_deaths_are_not_counted_for_dask_counts_them():
    watch = ProgressWatch("RUN")
    for i in range(100):
        retire(watch, A, at_s=100.0 * i, is_expected=False)
    assert not watch.is_in_vain([A])


def test_other_runs_tasks_and_workers_without_any_are_not_counted():
    watch = ProgressWatch("RUN")
    for i in range(100):
        retire(watch, at_s=100.0 * i)
        retire(watch, "process-OTHER-0", at_s=100.0 * i + 50)
    assert not watch.is_in_vain([A])
    assert not watch.is_in_vain(["process-OTHER-0"])


def test_the_stages_of_a_task_are_one_task():
    watch = ProgressWatch("RUN")
    for key in ("read-RUN-0", "extract-RUN-0", "write-RUN-0"):
        retire(watch, key)
    assert watch.is_in_vain(["write-RUN-0"])


def test_it_says_how_long_workers_lived_and_what_batches_took():
    watch = ProgressWatch("RUN")
    retire(watch, A, at_s=0.0, life_s=1000.0)  # before the count began
    watch.took(14.0)
    watch.took(16.0)
    watch.finished()
    for i in range(3):
        retire(watch, A, at_s=2000.0 + 100 * i, life_s=10.0 + 2 * i)
    text = watch.describe()
    assert "3 times in a row every task went back with a retiring worker, and none was finished in between" in text
    assert "They lived 12 s on average, and no task was done within the 14 s that a worker had it at the longest." in text
    assert "The 2 batches that were done before took 15 s on average" in text
    assert "`walltime` in cluster.yaml; `--lifetime`" in text


def test_of_workers_whose_start_was_not_seen_no_life_is_said():
    watch = ProgressWatch("RUN")
    for i in range(MAX_LOSSES):
        watch.left(f"w{i}", 10.0, [A], is_expected=True)
    assert watch.is_in_vain([A])
    assert "lived" not in watch.describe()


# -- on a real cluster -------------------------------------------------------------------------------------------------------------


class Retiring(WorkerPlugin):
    """Every worker retires, as at the end of its lifetime, while it decodes its image number ``n``, and another process takes its place."""

    def __init__(self, n: int, sign: Path) -> None:
        self.n, self.sign = n, sign
        self.name = "retiring"

    def setup(self, worker) -> None:
        real, seen = decoding.decode, []

        def retire(*arguments):
            seen.append(1)
            if len(seen) == self.n and not self.sign.exists():
                worker.loop.add_callback(worker.close_gracefully, restart=True, reason="worker-lifetime-reached")
                while worker.status.name not in {"closing", "closed", "failed"}:
                    time.sleep(0.01)
            return real(*arguments)

        decoding.decode = retire


@pytest.mark.cluster
@pytest.mark.kill
def test_a_run_whose_workers_never_finish_a_batch_ends_and_the_next_one_goes_on(client, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.driver.COMMIT_S", 0.05)
    source = make_images(tmp_path / "source", 24, [(40, 50)])
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    with connect(LocalSpec(workers=1)) as own:
        own.register_plugin(Retiring(1, tmp_path / "sign"))
        with pytest.raises(
            FeaturemapsError, match=r"^workers retire before they finish anything: 3 times in a row .* lived \d+ s"
        ) as ended:
            run_job(job, own)
    assert ended.value.exit_code == 1
    assert not (Path(job.store) / RUNS / "lock.json").exists()
    assert run_job(job, client).n_done == 24
    run_job(job.model_copy(update={"store": str(tmp_path / "whole.zarr")}), client)
    assert content(Path(job.store)) == content(tmp_path / "whole.zarr")
