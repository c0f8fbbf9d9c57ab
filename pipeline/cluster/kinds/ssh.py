"""Workers on machines reached by ssh."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.cluster.finding import Finding, compare_versions
from pipeline.cluster.spec import GroupSpec, Name, RemoteSpec, Text
from pipeline.config import Positive
from pipeline.text import count
from pipeline.validation import WORDS

if TYPE_CHECKING:
    from pipeline.cluster.groups import Launch


class SshGroupSpec(GroupSpec):
    """Workers on machines reached by ssh."""

    hosts: Annotated[tuple[Text, ...], WORDS, Field(min_length=1)]
    """Host names, from ``~/.ssh/config`` or DNS."""
    port: Positive | None = None
    """None is as ssh has it."""
    user: str | None = None
    """None is as ssh has it."""
    key_file: str | None = None
    """Private key. None takes the keys of the agent and of ``~/.ssh``."""
    known_hosts_file: str | None = None
    """File of known hosts. None takes ``~/.ssh/known_hosts``. A host that is not in it is refused."""

    @property
    def n_workers(self) -> int:
        """Processes on all hosts."""
        return self.workers * len(self.hosts)

    def describe(self, where: str = "") -> str:
        """The group with its hosts."""
        return super().describe(where or f" on each of {count(len(self.hosts), 'host')}")


class SshSpec(RemoteSpec):
    """Workers on machines reached by ssh."""

    extra: ClassVar[tuple[str, str] | None] = ("asyncssh", "ssh")

    kind: Literal["ssh"]
    groups: Annotated[dict[Name, SshGroupSpec], Field(min_length=1)]

    def launches(self, name: str) -> dict[str, Launch]:  # noqa: ARG002 (for batch systems)
        """The wanted workers of every host."""
        from pipeline.cluster.ssh_workers import ssh_launches  # noqa: PLC0415 (imports Dask)

        return ssh_launches(self)

    def show(self, job_name: str) -> str:  # noqa: ARG002 (for batch systems)
        """A command for each worker."""
        from pipeline.cluster.ssh_workers import ssh_options  # noqa: PLC0415 (imports Dask)

        lines = ["# the driver connects by itself, as these commands would"]
        for name, (_, options) in ssh_options(self).items():
            remote = shlex.join([*options["command"], f"{self.protocol}DRIVER:PORT", "--name", name, *options["arguments"]])
            lines.append(shlex.join(["ssh", *_ssh_arguments(options["connection"]), options["host"], f"exec {remote}"]))
        return "\n".join(lines)

    def look_there(self) -> Iterator[Finding]:
        """Check that each host accepts this process, and has the same versions."""
        from pipeline.cluster.ssh_workers import ssh_options  # noqa: PLC0415 (imports Dask)

        hosts = {options["host"]: options for _, options in ssh_options(self).values()}

        async def ask_all() -> list[Finding]:
            return await asyncio.gather(*(_ask(host, options) for host, options in hosts.items()))

        yield from asyncio.run(ask_all())

    def located(self, beside: Callable[[str], str]) -> dict[str, Any]:
        """Make the groups' key files and files of known hosts absolute."""
        keys = ("key_file", "known_hosts_file")
        groups = {
            name: group.model_copy(update={key: beside(getattr(group, key)) for key in keys if getattr(group, key)})
            for name, group in self.groups.items()
        }
        return {"groups": groups}


def _ssh_arguments(connection: dict[str, Any]) -> list[str]:
    """Options of asyncssh as arguments of the command ``ssh``."""
    arguments = []
    for key, flag in (("port", "-p"), ("username", "-l")):
        if key in connection:
            arguments += [flag, str(connection[key])]
    if "known_hosts" in connection:
        arguments += ["-o", f"UserKnownHostsFile={connection['known_hosts']}"]
    for key_file in connection.get("client_keys", []):
        arguments += ["-i", key_file]
    return arguments


async def _ask(host: str, options: dict[str, Any]) -> Finding:
    import asyncssh  # noqa: PLC0415 (an extra)

    from pipeline.cluster.ssh_workers import SSH_TIMEOUT_S, ssh_reason, ssh_remedy  # noqa: PLC0415 (imports Dask)
    from pipeline.run.worker_versions import versions_script  # noqa: PLC0415 (as above)

    what = f"ssh {host}"
    python = options["command"][options["command"].index("-m") - 1]
    try:
        async with asyncio.timeout(SSH_TIMEOUT_S), asyncssh.connect(host, **options["connection"]) as connection:
            done = await connection.run(shlex.join([python, "-c", versions_script()]), errors="replace")
    except (OSError, asyncssh.Error) as error:
        return Finding("FAIL", what, ssh_reason(error), ssh_remedy(host))
    lines = str(done.stdout).strip().splitlines()
    # The output of the remote shell's start-up files comes first.
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):
        said = " ".join(str(done.stderr).split()[-30:])
        return Finding("FAIL", what, f"{python} does not run featuremaps there ({said})", "install it there, or set python")
    return compare_versions(what, json.loads(lines[-1]))
