"""Real places to start workers in: a Slurm of one node, and an SSH server, each in a folder of its own, without systemd."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.support.needs import ROOT_RIGHTS, SBIN, debian_program, need
from tests.support.services import free_port

_WAIT_S = 900.0


def wait_for(what: str, is_so: Callable[[], object], limit_s: float = _WAIT_S, log: Callable[[], str] = str) -> None:
    """Wait for a condition, so long that only a failure takes longer; the message then ends with the log."""
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end, f"within {limit_s:.0f} s there was no {what}{log()}"
        time.sleep(0.2)  # a look at a queue is a process of its own


def _is_alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended may wait for ever for an init process that does not collect it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environment_of(pid: int) -> list[str]:
    """NAME=VALUE of a process; psutil shows nothing of one that has put its title there, as slurmstepd does."""
    with contextlib.suppress(OSError):
        return [os.fsdecode(word) for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]
    return []


def runs(processes: list[psutil.Process], text: str) -> bool:
    """Whether one of these processes, of which any may just have ended, has this in its command line."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if text in " ".join(process.cmdline()):
                return True
    return False


def _others() -> list[psutil.Process]:
    """All processes but this one and those that it runs in."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    return [process for process in psutil.process_iter() if process.pid not in own and _is_alive(process)]


def _kill_all(find: Callable[[], list[psutil.Process]]) -> None:
    """Kill what is found until nothing is, for a while: a process shows no environment in the moment when it becomes another program."""
    n_empty = 0
    while n_empty < 5:
        processes = find()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        n_empty = 0 if processes else n_empty + 1
        time.sleep(0.05)


# --- Slurm ---


@dataclass(frozen=True)
class BatchJob:
    """One line of ``squeue``."""

    id: str
    name: str
    state: str
    """PENDING, RUNNING, COMPLETING, ..."""
    reason: str
    """Why it does not run, such as Resources, BeginTime, JobHeldUser; None for one that runs."""
    restarts: int
    """How often it was requeued."""
    partition: str


@dataclass
class Slurm:
    """A running Slurm; commands and jobs find it by ``env``."""

    folder: Path
    env: dict[str, str]
    """The environment of this process with SLURM_CONF, and this Python's folder first in the path."""
    host: str
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def command(self, *arguments: object) -> str:
        """Call one of Slurm's commands; its standard output."""
        words = [debian_program(str(arguments[0]), "slurm-wlm"), *map(str, arguments[1:])]
        done = subprocess.run(words, env=self.env, cwd=self.folder, capture_output=True, text=True, check=False, timeout=_WAIT_S)
        assert done.returncode == 0, f"{' '.join(words)} ended with {done.returncode}: {done.stderr}{self.log()}"
        return done.stdout

    def squeue(self) -> list[BatchJob]:
        """The jobs that have not ended, or are ending."""
        widths = "JobID:|,Name:|,State:|,Reason:|,RestartCnt:|,Partition:|"
        lines = (line.split("|") for line in self.command("squeue", "--noheader", "--Format", widths).splitlines())
        return [BatchJob(*(word.strip() for word in w[:4]), int(w[4]), w[5].strip()) for w in lines]

    def job(self, job_id: object) -> BatchJob | None:
        """One job of the queue, or None once it has ended."""
        return next((job for job in self.squeue() if job.id == str(job_id)), None)

    def submit(self, *options: object, script: str = "") -> str:
        """Submit a job; its number. Its output is ``slurm-NUMBER.out`` in ``folder``, unless options say otherwise."""
        words = [*options, *(["--wrap", script] if script else [])]
        return self.command("sbatch", "--parsable", *words).strip().partition(";")[0]

    def output(self, job_id: object) -> str:
        """What a job has printed; nothing while Slurm calls it running and has not begun."""
        path = self.folder / f"slurm-{job_id}.out"
        return path.read_text() if path.exists() else ""

    def cancel(self, *job_ids: object) -> None:
        """Cancel jobs, as ``scancel`` does; all of them where none is named."""
        self.command("scancel", *(job_ids or ["--user", getpass.getuser()]))

    def requeue(self, job_id: object) -> None:
        """Put a running job back into the queue, as an administrator or a preemption does."""
        self.command("scontrol", "requeue", job_id)

    def wait_until(self, job_id: object, *states: str) -> None:
        """Wait until a job is in one of these states."""
        wait_for(f"job {job_id} that is {' or '.join(states)}", lambda: (job := self.job(job_id)) and job.state in states)

    def wait_until_idle(self) -> None:
        """Wait until no job is left and the node is idle again."""
        wait_for("empty queue", lambda: not self.squeue())
        wait_for("idle node", lambda: "idle" in self.command("sinfo", "--noheader", "-o", "%t").split())

    def processes(self) -> list[psutil.Process]:
        """Everything that runs under this Slurm: daemons, steps, jobs and what they started, and who was given ``env``."""
        mark = f"SLURM_CONF={self.env['SLURM_CONF']}"
        return [process for process in _others() if mark in _environment_of(process.pid)]

    def log(self) -> str:
        """The ends of the daemons' logs, for messages."""
        logs = sorted(self.folder.glob("*.log"))
        return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-2000:]}" for log in logs)

    def start(self, name: str, *arguments: object, package: str) -> None:
        """Start a daemon in the foreground, as a child of this process."""
        words = [debian_program(name, package), *map(str, arguments)]
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                words, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def stop(self) -> None:
        """Kill everything, jobs first; nothing is left of it but the files."""
        for name in ("slurmctld", "slurmd"):  # so that nothing is started, nor restarted, any more
            if name in self._daemons:
                self._daemons[name].kill()
                self._daemons[name].wait()
        _kill_all(self.processes)
        for daemon in self._daemons.values():
            daemon.wait()


@contextlib.contextmanager
def slurm(folder: Path, *, cpus: int = 8, grace_s: int = 0, kill_wait_s: int = 5) -> Iterator[Slurm]:
    """
    Run a Slurm of one node in a folder, as root.

    It has two fake GPUs, and two partitions: jobs of ``preempting`` push those of ``debug``, the default, back into the queue.

    Parameters
    ----------
    folder
        Where configuration, state, logs and the output of jobs go.
    cpus
        That Slurm believes to have.
    grace_s
        Between the warning of a job that is to be preempted and its end. The warning is the signal that the job has asked for with
        ``--signal=B:NAME@SECONDS``; without one, the batch script itself is not warned. The end may come 15 s later than said.
    kill_wait_s
        Between SIGTERM and SIGKILL of a job that is preempted, requeued or cancelled, or has used up its time.
    """
    need("slurm-wlm", "munge", rights=[ROOT_RIGHTS])  # it runs its jobs without a change of user, which only root's Slurm does
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    values = {"grace_s": grace_s, "kill_wait_s": kill_wait_s, "cpus": cpus}
    template = Path(__file__).with_name("slurm.conf").read_text()
    ports = {"controller_port": free_port(), "node_port": free_port()}
    (folder / "slurm.conf").write_text(template.format(host=host, folder=folder, **ports, **values))
    (folder / "gres.conf").write_text("".join(f"NodeName={host} Name=gpu File=/dev/{device}\n" for device in ("null", "zero")))
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
    env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:{SBIN}"}
    service = Slurm(folder, env, host)
    try:
        _start_slurm(service)
        yield service
    finally:
        service.stop()


def _start_slurm(service: Slurm) -> None:
    folder = service.folder
    socket_path = folder / "munge.socket"
    assert len(str(socket_path)) < 108, f"{socket_path} is too long a name for a socket; choose a shorter folder"
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    files = {"key-file": key, "socket": socket_path, "pid-file": folder / "munged.pid", "seed-file": folder / "munge.seed"}
    options = [f"--{name}={path}" for name, path in files.items()]
    # forced, as a scratch folder is not one that munged takes for a safe place
    service.start("munged", "--foreground", "--force", *options, package="munge")
    wait_for("socket of munged", socket_path.exists, log=service.log)
    service.start("slurmctld", "-D", "-i", package="slurm-wlm")
    service.start("slurmd", "-D", package="slurm-wlm")
    ping = [debian_program("sinfo", "slurm-wlm"), "--noheader", "-o", "%t"]

    def is_idle() -> bool:
        for name, daemon in service._daemons.items():
            assert daemon.poll() is None, f"{name} ended as it started{service.log()}"
        answer = subprocess.run(ping, env=service.env, capture_output=True, text=True, check=False)
        return "idle" in answer.stdout.split()

    wait_for("idle node", is_idle, log=service.log)


# --- SSH ---


@dataclass
class SshServer:
    """An OpenSSH server on 127.0.0.1, and what a client needs to get in and to know that it is the right one."""

    folder: Path
    port: int
    user: str
    client_key: Path
    known_hosts: Path
    _daemon: subprocess.Popen[bytes] | None = None

    def options(self) -> list[str]:
        """Options of ``ssh``: this key only, no questions, and a host that must be the one of ``known_hosts``."""
        own = {"IdentityFile": self.client_key, "UserKnownHostsFile": self.known_hosts, "GlobalKnownHostsFile": "/dev/null"}
        rules = {
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "Port": self.port,
            "User": self.user,
        }
        return ["-F", "/dev/null", *(word for key, value in (own | rules).items() for word in ("-o", f"{key}={value}"))]

    def ssh(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command on the server."""
        command = [debian_program("ssh", "openssh-client"), *self.options(), "127.0.0.1", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_WAIT_S)

    def start(self) -> None:
        """Start the server, or start it again."""
        if os.geteuid() == 0:  # root's server separates privileges, and wants this folder whatever the configuration
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        command = [debian_program("sshd", "openssh-server"), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        with (self.folder / "sshd.log").open("ab") as log:
            self._daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        wait_for("SSH server", self._answers)

    def _answers(self) -> bool:
        log = (self.folder / "sshd.log").read_text()[-2000:]
        assert self._daemon is not None
        assert self._daemon.poll() is None, f"sshd ended as it started: {log}"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            return connection.recv(4) == b"SSH-"
        return False

    def processes(self) -> list[psutil.Process]:
        """The server, its sessions, and all that they have started, also what has since left its parent."""
        ours = set()
        if self._daemon is not None and self._daemon.poll() is None:
            daemon = psutil.Process(self._daemon.pid)
            ours = {daemon.pid, *(child.pid for child in daemon.children(recursive=True))}
        end = f" 127.0.0.1 {self.port}"  # of what sshd puts into the sessions' environment

        def is_ours(process: psutil.Process) -> bool:
            return process.pid in ours or any(
                word.startswith("SSH_CONNECTION=") and word.endswith(end) for word in _environment_of(process.pid)
            )

        return [process for process in _others() if is_ours(process)]

    def kill(self) -> None:
        """Kill the server, its sessions and what runs in them, as when a host loses its power."""
        if self._daemon is not None:
            self._daemon.send_signal(signal.SIGSTOP)  # so that no session begins meanwhile
        _kill_all(self.processes)
        if self._daemon is not None:
            self._daemon.wait()
            self._daemon = None


@contextlib.contextmanager
def sshd(folder: Path, port: int = 0) -> Iterator[SshServer]:
    """
    Run an OpenSSH server in a folder, for this user.

    Parameters
    ----------
    folder
        Where its keys, configuration and log go.
    port
        On 127.0.0.1; 0 takes a free one.
    """
    need("openssh-server", "openssh-client")
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    for name in ("host_key", "client_key"):
        command = [debian_program("ssh-keygen", "openssh-client"), "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", name]
        subprocess.run(command, cwd=folder, check=True)
    shutil.copy(folder / "client_key.pub", folder / "authorized_keys")
    public = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {public}\n[localhost]:{port} {public}\n")
    settings = {
        "Port": port,
        "ListenAddress": "127.0.0.1",
        "HostKey": folder / "host_key",
        "AuthorizedKeysFile": folder / "authorized_keys",
        "PidFile": folder / "sshd.pid",
        "UsePAM": "no",
        "StrictModes": "no",  # a scratch folder is not one that sshd takes for a safe place
        "PasswordAuthentication": "no",
        "KbdInteractiveAuthentication": "no",
        "PermitRootLogin": "prohibit-password",
        "AcceptEnv": "*",
        "PrintMotd": "no",
        "MaxStartups": "100",
    }
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    server = SshServer(folder, port, getpass.getuser(), folder / "client_key", folder / "known_hosts")
    try:
        server.start()
        yield server
    finally:
        server.kill()
