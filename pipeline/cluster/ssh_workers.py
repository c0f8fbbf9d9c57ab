"""Workers that ssh starts on other machines."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sys
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any

from distributed.deploy.spec import ProcessInterface

from pipeline.cluster.dask_settings import group_environment
from pipeline.cluster.groups import DEATH_TIMEOUT_S, Launch
from pipeline.cluster.kinds.ssh import SshGroupSpec, SshSpec
from pipeline.errors import FeaturemapsError, needs_extra

SSH_TIMEOUT_S = 20.0
LOG_LINES = 5


def ssh_reason(error: Exception) -> str:
    """Why a host let nobody in."""
    return f"no answer within {SSH_TIMEOUT_S:.0f} s" if isinstance(error, TimeoutError) else str(error)


def ssh_remedy(host: str) -> str:
    """What to do about it."""
    return f"make `ssh {host}` work without a password, and check host, port, user, key_file and known_hosts_file in cluster.yaml"


class SshWorker(ProcessInterface):  # type: ignore[misc]
    """A worker started by ssh; the last lines of its output are kept.

    Parameters
    ----------
    scheduler : str
        Address that the worker connects to.
    name, host : str
    command : list of str
        Command to run there, without the address and the name.
    arguments : list of str
        Arguments after address and name.
    connection : dict
        Options of ``asyncssh.connect``.
    """

    def __init__(
        self, scheduler: str, name: str, host: str, command: list[str], arguments: list[str], connection: dict[str, Any]
    ) -> None:
        super().__init__()
        self.host, self.options = host, connection
        self.command = shlex.join([*command, scheduler, "--name", name, *arguments])
        self.connection: Any = None
        self.process: Any = None
        self.lines: deque[str] = deque(maxlen=LOG_LINES)

    async def start(self) -> None:
        """Connect and start the command; the scheduler sees whether the worker comes up."""
        import asyncssh  # noqa: PLC0415 (an extra)

        try:
            async with asyncio.timeout(SSH_TIMEOUT_S):
                self.connection = await asyncssh.connect(self.host, **self.options)
                self.process = await self.connection.create_process(
                    f"exec {self.command}", stderr=asyncssh.STDOUT, errors="replace"
                )
        except (OSError, asyncssh.Error) as error:  # TimeoutError is an OSError
            raise FeaturemapsError(
                f"ssh to {self.host} failed ({ssh_reason(error)}), so no worker was started there; {ssh_remedy(self.host)}"
            ) from error
        self.lost = asyncssh.Error
        self._reading = asyncio.create_task(self._read())
        await super().start()

    async def _read(self) -> None:
        with contextlib.suppress(OSError, self.lost):
            async for line in self.process.stdout:
                self.lines.append(line.strip())

    async def close(self) -> None:
        """End the worker and the connection."""
        if self.process is not None and self.process.exit_status is None:
            with contextlib.suppress(OSError):
                self.process.terminate()
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                await asyncio.wait_for(self.process.wait_closed(), 5.0)
            with contextlib.suppress(OSError):
                self.process.kill()
        if self.connection is not None:
            self.connection.close()
        await super().close()

    @staticmethod
    async def find_gone(workers: Mapping[str, Any]) -> dict[str, str]:
        """Those of some workers that have ended, each with its last output."""
        gone = {}
        for name, worker in workers.items():
            if worker.process.exit_status is not None or worker.connection.is_closed():
                said = f"; it said: {' / '.join(filter(None, worker.lines))}" if any(worker.lines) else ""
                gone[name] = f"the worker on {worker.host} ended{said}"
        return gone

    @staticmethod
    def explain(error: Exception) -> str:
        """Why one was not started."""
        return str(error)


def ssh_launches(spec: SshSpec) -> dict[str, Launch]:
    """The wanted workers of every host, by name.

    Raises
    ------
    UsageError
        When asyncssh is not installed.
    """
    with needs_extra("ssh", "a cluster of kind ssh"):
        import asyncssh  # noqa: F401, PLC0415 (an extra)
    return {name: Launch(group, SshWorker, options) for name, (group, options) in ssh_options(spec).items()}


def ssh_options(spec: SshSpec) -> dict[str, tuple[str, dict[str, Any]]]:
    """Group and options of every wanted worker, by its name."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    n_given: Counter[tuple[str, int | None]] = Counter()  # GPUs assigned so far on each machine, which several groups may share
    for group_name, group in spec.groups.items():
        for number, host in enumerate(host for host in group.hosts for _ in range(group.workers)):
            machine = host, group.port
            gpus = range(n_given[machine], n_given[machine] + group.gpus)
            n_given[machine] += group.gpus
            options = {"host": host, "connection": _connection(group)} | ssh_command(spec, group, gpus)
            found[f"{group_name}-{number}"] = group_name, options
    return found


def _connection(group: SshGroupSpec) -> dict[str, Any]:
    given = {"port": group.port, "username": group.user, "known_hosts": group.known_hosts_file}
    options = {key: value for key, value in given.items() if value is not None}
    return options | ({"client_keys": [group.key_file]} if group.key_file else {}) | {"keepalive_interval": 15}


def ssh_command(spec: SshSpec, group: SshGroupSpec, gpus: Iterable[int]) -> dict[str, list[str]]:
    """The command for a host's worker that gets these of the host's GPUs."""
    command = ["env", *(f"{key}={value}" for key, value in group_environment(group, gpus).items())]
    arguments = [
        "--nthreads",
        str(group.threads),
        "--memory-limit",
        str(int(group.memory)) if group.memory else "auto",
        "--nanny",
    ]
    arguments += ["--death-timeout", str(DEATH_TIMEOUT_S), "--resources", group.resources_text, "--no-dashboard"]
    arguments += ["--interface", spec.interface] if spec.interface else []
    if spec.tls:
        arguments += [
            "--protocol",
            "tls",
            "--tls-ca-file",
            spec.tls.ca_file,
            "--tls-cert",
            spec.tls.cert,
            "--tls-key",
            spec.tls.key,
        ]
    return {"command": [*command, spec.python or sys.executable, "-m", "distributed.cli.dask_worker"], "arguments": arguments}
