"""Checks of a cluster from here, without starting it."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.checks.finding import Finding
from pipeline.cluster import batch_commands
from pipeline.cluster.config import BatchSpec, ClusterSpec, KubernetesSpec, SshSpec
from pipeline.cluster.show import groups_text, unusable
from pipeline.cluster.ssh_workers import SSH_TIMEOUT_S, ssh_options, ssh_reason, ssh_remedy
from pipeline.run.worker_versions import differences, own_versions, versions_script
from pipeline.store.objects import nearest_folder

QUERIES = {
    "slurm": ["squeue", "--noheader", "--me"],
    "pbs": ["qstat"],
    "sge": ["qstat"],
    "htcondor": ["condor_q", "-totals"],
}
"""What only a batch system that works answers."""


def entry(name: str | None, spec: ClusterSpec) -> Iterator[Finding]:
    """Whether this machine has what such a cluster needs."""
    what = f"cluster {name or 'local'}"
    reason = unusable(spec)
    if reason:
        yield Finding("FAIL", what, f"kind {spec.kind}: {reason}", "install what is missing, or use another cluster")
    else:
        yield Finding("ok", what, f"kind {spec.kind}: {groups_text(spec)}")
    if isinstance(spec, BatchSpec | SshSpec):
        yield from _interface(spec.interface)
        if spec.tls is None:
            found = "no tls: whoever reaches the driver's port can run code as you"
            yield Finding("note", "encryption", found, "give tls, or use a network that you trust (docs/clusters.md)")
    if isinstance(spec, BatchSpec):
        yield _log_folder(Path(spec.log_folder))


def _interface(name: str | None) -> Iterator[Finding]:
    if name is None:
        return
    addresses = psutil.net_if_addrs()
    found = [address.address for address in addresses.get(name, []) if address.family == socket.AF_INET]
    if found:
        yield Finding("ok", "interface", f"{name} has {found[0]} here")
    else:
        reason = "has no IPv4 address" if name in addresses else "does not exist"
        remedy = f"set interface to one of {', '.join(sorted(addresses))}, or leave it away"
        yield Finding("FAIL", "interface", f"{name} {reason} on this machine, where the scheduler would be", remedy)


def _log_folder(folder: Path) -> Finding:
    nearest = nearest_folder(folder)
    if os.access(nearest, os.W_OK):
        return Finding("ok", "log_folder", str(folder))
    remedy = "set log_folder to a folder that you may write to, on all machines"
    return Finding("FAIL", "log_folder", f"{folder} cannot be written, in {nearest}", remedy)


def batch_system(spec: BatchSpec) -> Iterator[Finding]:
    """Whether the batch system answers, and for Slurm whether it has the queue."""
    system = batch_commands.SYSTEMS[spec.kind]
    for command in (system.submit, system.cancel):
        if shutil.which(command) is None:
            yield Finding("FAIL", system.name, f"there is no {command} on the PATH", "run on a login node, or extend PATH")
            return
    said = _said(QUERIES[spec.kind])
    if said is not None:
        remedy = "check that this machine is a login node, and whether the batch system is down"
        yield Finding("FAIL", system.name, f"{QUERIES[spec.kind][0]}: {said}", remedy)
        return
    yield Finding("ok", system.name, f"{QUERIES[spec.kind][0]} answers")
    if spec.kind == "slurm" and spec.queue is not None:
        done = _run(["sinfo", "--noheader", "--format=%R"])
        known = sorted(set(done.stdout.split()))
        unknown = [
            queue for queue in spec.queue.split(",") if queue not in known
        ]  # of several Slurm takes the first that is free
        if unknown and not done.returncode:
            yield Finding(
                "FAIL", "queue", f"Slurm has no partition {', '.join(unknown)}", f"set queue to one of {', '.join(known)}"
            )


def _said(command: list[str]) -> str | None:
    """What a command said as it failed; None if it did not."""
    try:
        done = _run(command)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return None if done.returncode == 0 else " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=batch_commands.COMMAND_TIMEOUT_S, check=False)  # noqa: S603


def ssh_hosts(spec: SshSpec) -> Iterator[Finding]:
    """Whether each host lets this process in, and has the same versions there."""
    hosts = {options["host"]: options for _, options in ssh_options(spec).values()}

    async def ask_all() -> list[Finding]:
        return await asyncio.gather(*(_ask(host, options) for host, options in hosts.items()))

    yield from asyncio.run(ask_all())


async def _ask(host: str, options: dict[str, Any]) -> Finding:
    import asyncssh  # noqa: PLC0415 (an extra)

    what = f"ssh {host}"
    python = options["command"][options["command"].index("-m") - 1]
    try:
        async with asyncio.timeout(SSH_TIMEOUT_S), asyncssh.connect(host, **options["connection"]) as connection:
            done = await connection.run(shlex.join([python, "-c", versions_script()]), errors="replace")
    except (OSError, asyncssh.Error) as error:
        return Finding("FAIL", what, ssh_reason(error), ssh_remedy(host))
    lines = str(done.stdout).strip().splitlines()
    if done.returncode != 0 or not lines or not lines[-1].startswith("{"):  # what the shell there prints at its start comes first
        said = " ".join(str(done.stderr).split()[-30:])
        return Finding("FAIL", what, f"{python} does not run featuremaps there ({said})", "install it there, or set python")
    return compare_versions(what, json.loads(lines[-1]))


def compare_versions(what: str, theirs: Mapping[str, str]) -> Finding:
    """Versions of somebody else, as `own_versions` has them, with those of this process: as a run does."""
    differing = differences(theirs, own_versions())
    if not differing:
        return Finding("ok", what, ", ".join(f"{name} {found}" for name, found in theirs.items()))
    return Finding("FAIL", what, ", ".join(differing), "install the same versions (constraints.txt) on both sides")


def kubernetes_api(spec: KubernetesSpec) -> Iterator[Finding]:
    """Whether Kubernetes answers, and knows what a DaskCluster is."""
    import kr8s  # noqa: PLC0415 (comes with the extra)

    from pipeline.cluster.kubernetes import cluster_kind  # noqa: PLC0415 (as above)

    try:
        found = kr8s.api().version()
    except Exception as error:  # noqa: BLE001 (of two libraries)
        remedy = "make `kubectl version` work: KUBECONFIG, its context, and the network"
        yield Finding("FAIL", "Kubernetes", f"it does not answer ({type(error).__name__}: {error})", remedy)
        return
    yield Finding("ok", "Kubernetes", str(found.get("gitVersion", found)))
    try:
        n = len(list(cluster_kind().list(namespace=spec.namespace)))
    except Exception as error:  # noqa: BLE001 (as above)
        remedy = "install the operator (helm install dask-kubernetes-operator), and get the right to create DaskClusters"
        yield Finding("FAIL", "DaskClusters", f"they cannot be listed in namespace {spec.namespace} ({error})", remedy)
        return
    yield Finding("ok", "DaskClusters", f"{n} in namespace {spec.namespace}")


def can_be_reached(spec: ClusterSpec) -> Iterator[Finding]:
    """What of a cluster can be asked without starting anything."""
    if isinstance(spec, BatchSpec):
        yield from batch_system(spec)
    elif isinstance(spec, SshSpec):
        yield from ssh_hosts(spec)
    elif isinstance(spec, KubernetesSpec):
        yield from kubernetes_api(spec)
