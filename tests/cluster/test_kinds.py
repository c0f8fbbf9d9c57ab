from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from pipeline.cluster.kinds import spec_types

MADE_UP = """
import asyncio
import sys
from typing import Literal

from pipeline.cluster.dask_settings import group_environment
from pipeline.cluster.spec import GroupsSpec, StartedSpec


class PlainSpec(GroupsSpec, StartedSpec):
    kind: Literal["plain"]

    @property
    def patience_s(self):
        return 600.0

    def launches(self, name):
        from pipeline.cluster.groups import Launch

        return {
            f"{group_name}-{i}": Launch(group_name, worker_class(), {"group": group})
            for group_name, group in self.groups.items()
            for i in range(group.workers)
        }

    def show(self, job_name):
        return " ".join(command(group) for group in self.groups.values())


def command(group):
    return f"{sys.executable} -m distributed.cli.dask_worker --no-nanny --no-dashboard --nthreads {group.threads}"


def worker_class():
    from distributed.deploy.spec import ProcessInterface

    class Plain(ProcessInterface):
        def __init__(self, scheduler, name, group):
            super().__init__()
            resources = group.resources_text
            self.words = [*command(group).split(), "--resources", resources, "--name", name, scheduler]
            self.env = group_environment(group)

        async def start(self):
            self.process = await asyncio.create_subprocess_exec(*self.words, env=self.env)
            await super().start()

        async def close(self):
            if self.process.returncode is None:
                self.process.terminate()
            await self.process.wait()
            await super().close()

        @staticmethod
        async def find_gone(workers):
            return {name: "it ended" for name, worker in workers.items() if worker.process.returncode is not None}

        @staticmethod
        def explain(error):
            return str(error)

    return Plain
"""

USE = """
from pipeline.cluster import kinds

kinds.KINDS += ("plain.PlainSpec",)
kinds.__path__.append(".")

from pathlib import Path

from pipeline.checks.cluster import can_be_reached, entry
from pipeline.cluster.config import load_cluster
from pipeline.cluster.session import connect
from pipeline.cluster.show import list_clusters, show_cluster
from pipeline.cluster.slots import planned_slots

if __name__ == "__main__":
    spec = load_cluster("mine")
    print(list_clusters())
    print(*entry("mine", spec), *can_be_reached(spec), sep="\\n")
    print(len(planned_slots(spec)), spec.n_connections(None), show_cluster("mine").count("dask_worker"))
    with connect(spec) as client:
        print(client.submit(sum, [1, 2], resources={"read": 1}).result(), client.cluster.counts())
"""


def python(text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = folder / "use.py"
    script.write_text(textwrap.dedent(text))
    return subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.cluster
def test_a_new_kind_is_one_file_and_one_line(tmp_path):
    (tmp_path / "plain.py").write_text(MADE_UP)
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"mine": {"kind": "plain", "groups": {"all": {}}}}}))
    done = python(USE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "mine  plain  all: 1 worker, 1 thread each, read and extract",
        "ok    cluster mine: kind plain: all: 1 worker, 1 thread each, read and extract",
        "1 1 1",
        "3 {'all': (1, 1)}",
    ]


def test_reading_clusters_imports_no_dask(tmp_path):
    """Of all kinds, of which each has what it needs of Dask imported when it starts, shows or checks something."""
    (tmp_path / "cluster.yaml").write_text(
        yaml.safe_dump({"clusters": {"x": {"kind": "slurm", "groups": {"all": {"memory": "1 GiB"}}}}})
    )
    done = python(
        """
        import sys
        from pipeline.cluster.config import load_cluster
        print(load_cluster("x").kind, {"dask", "distributed", "torch", "zarr"} & set(sys.modules))
        """,
        tmp_path,
    )
    assert done.stdout == "slurm set()\n", done.stderr


def test_every_kind_says_what_it_is():
    for spec_type in spec_types():
        assert not spec_type.__abstractmethods__, spec_type
        assert spec_type.__doc__
