"""What a cluster would launch, in words, scripts, commands or manifests; nothing is launched."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from pipeline.cluster import batch_commands
from pipeline.cluster.batch_workers import job_script
from pipeline.cluster.config import (
    AddressSpec,
    BatchSpec,
    ClusterSpec,
    CudaSpec,
    GroupSpec,
    KubernetesSpec,
    LocalSpec,
    SshSpec,
    load_cluster,
)
from pipeline.cluster.groups import local_launches, resources_text
from pipeline.cluster.kubernetes_manifests import manifests
from pipeline.cluster.local import local_groups
from pipeline.cluster.ssh_workers import ssh_options
from pipeline.config import read_yaml
from pipeline.errors import UsageError
from pipeline.text import count

JOB_NAME = "featuremaps-12345678"
"""As an example: the digits follow from the store."""
EXTRAS = {
    "slurm": ("dask_jobqueue", "batch"),
    "pbs": ("dask_jobqueue", "batch"),
    "sge": ("dask_jobqueue", "batch"),
    "htcondor": ("dask_jobqueue", "batch"),
    "ssh": ("asyncssh", "ssh"),
    "kubernetes": ("dask_kubernetes", "kubernetes"),
}
"""Of each kind that needs one: the module and the extra that brings it."""
_SECRET = re.compile(r"(?i)secret|token|passw|credential|_key\b|apikey")


def show_cluster(name: str, path: Path = Path("cluster.yaml")) -> str:
    """What a run with ``--cluster NAME`` would launch; variables of the groups whose name sounds like a secret are left out.

    Raises
    ------
    UsageError
        When there is no such cluster, or its entry cannot be used.
    """
    spec = _without_secrets(load_cluster(name, path))
    if isinstance(spec, LocalSpec | CudaSpec):
        return "\n".join(["# processes of this machine", *_local_lines(spec)])
    if isinstance(spec, AddressSpec):
        return f"# a scheduler that runs already{', over TLS' if spec.tls else ''}; nothing is launched\n{spec.address}"
    if isinstance(spec, KubernetesSpec):
        return yaml.safe_dump_all(manifests(spec, JOB_NAME), sort_keys=False).rstrip()
    if isinstance(spec, SshSpec):
        return "\n".join(["# the driver connects by itself, as these commands would", *_ssh_lines(spec)])
    command = batch_commands.SYSTEMS[spec.kind].submit
    scripts = (
        f"# group {group_name}: {group.workers} of these are handed in with {command}\n{job_script(spec, group_name, JOB_NAME)}"
        for group_name, group in spec.groups.items()
    )
    return "\n".join(scripts).rstrip()


def _local_lines(spec: LocalSpec | CudaSpec) -> list[str]:
    groups = local_groups(spec)
    lines = []
    for name, launch in local_launches(groups, security=None).items():
        options = launch.options
        gpus = options["env"]["CUDA_VISIBLE_DEVICES"]
        lines.append(
            f"{name}: {count(options['nthreads'], 'thread')}, {options['memory_limit'] / 2**30:.1f} GiB of memory, "
            f"{f'GPU {gpus}' if gpus else 'no GPU'}, resources {resources_text(groups[launch.group])}"
        )
    return lines


def _ssh_lines(spec: SshSpec) -> list[str]:
    scheduler = "tls://DRIVER:PORT" if spec.tls else "tcp://DRIVER:PORT"
    lines = []
    for name, (_, options) in ssh_options(spec).items():
        remote = shlex.join([*options["command"], scheduler, "--name", name, *options["arguments"]])
        lines.append(shlex.join(["ssh", *_ssh_arguments(options["connection"]), options["host"], f"exec {remote}"]))
    return lines


def _ssh_arguments(connection: dict[str, Any]) -> list[str]:
    """Options of asyncssh as the command ``ssh`` has them."""
    arguments = []
    for key, flag in (("port", "-p"), ("username", "-l")):
        if key in connection:
            arguments += [flag, str(connection[key])]
    if "known_hosts" in connection:
        arguments += ["-o", f"UserKnownHostsFile={connection['known_hosts']}"]
    for key_file in connection.get("client_keys", []):
        arguments += ["-i", key_file]
    return arguments


def _without_secrets(spec: ClusterSpec) -> ClusterSpec:
    if isinstance(spec, AddressSpec | CudaSpec):
        return spec
    groups = {name: group.model_copy(update={"environment": _hidden(group.environment)}) for name, group in spec.groups.items()}
    return spec.model_copy(update={"groups": groups})


def _hidden(environment: dict[str, str]) -> dict[str, str]:
    return {key: "HIDDEN" if _SECRET.search(key) else value for key, value in environment.items()}


# -- all of them -----------------------------------------------------------------------------------------------------------------


def list_clusters(path: Path = Path("cluster.yaml")) -> str:
    """A table of the clusters of a file, with the reason where one cannot be used from here.

    Raises
    ------
    UsageError
        When the file is there and cannot be read.
    """
    if not path.exists():
        return f"local  local  this machine, without a cluster.yaml (there is no {path})"
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise UsageError(
            f"{path} cannot be read ({error}): nothing is known of its clusters; correct it, docs/clusters.md has the form"
        ) from error
    entries = values.get("clusters") if isinstance(values, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise UsageError(
            f"{path} names no clusters: it needs the key 'clusters' with an entry for each, as docs/clusters.md has them"
        )
    rows = [_row(str(name), entry, path) for name, entry in entries.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{name:{widths[0]}}  {kind:{widths[1]}}  {rest}" for name, kind, rest in rows)


def _row(name: str, entry: Any, path: Path) -> tuple[str, str, str]:
    """Name, kind, and groups or what is wrong."""
    kind = str(entry.get("kind", "?")) if isinstance(entry, dict) else "?"
    try:
        spec = load_cluster(name, path)
    except UsageError as error:
        return name, kind, f"NOT USABLE: {error}"
    reason = unusable(spec)
    return name, kind, "; ".join(filter(None, [groups_text(spec), f"NOT USABLE HERE: {reason}" if reason else ""]))


def unusable(spec: ClusterSpec) -> str:
    """Why such a cluster cannot be started from this machine, as far as can be seen without trying; empty if it can."""
    module, extra = EXTRAS.get(spec.kind, ("", ""))
    if module and find_spec(module) is None:
        return f"{module} is not installed (pip install 'featuremaps[{extra}]')"
    try:
        if isinstance(spec, BatchSpec):
            batch_commands.require_commands(spec.kind, "it")
        if isinstance(spec, LocalSpec | CudaSpec):
            local_groups(spec)
    except UsageError as error:
        return str(error)
    return ""


def groups_text(spec: ClusterSpec) -> str:
    """Groups of a cluster on one line."""
    if isinstance(spec, AddressSpec):
        return spec.address
    groups = local_groups(spec) if isinstance(spec, LocalSpec | CudaSpec) and not unusable(spec) else getattr(spec, "groups", {})
    return "; ".join(f"{name}: {_group_text(group)}" for name, group in groups.items())


def _group_text(group: GroupSpec) -> str:
    where = f" on each of {count(len(group.hosts), 'host')}" if hasattr(group, "hosts") else ""
    gpus = f", {count(group.gpus, 'GPU')} each" if group.gpus else ""
    return f"{count(group.workers, 'worker')}{where}, {count(group.threads, 'thread')} each{gpus}, {' and '.join(group.roles)}"
