"""The files of workflows/nightly, each with the program that it is for: the script, cron, systemd's checks, and Slurm.

Two things are stood in for: who delivers mail (a program that stores it), and systemd itself, which can only be process 1: its own
`systemd-analyze` reads the units, and the signal that it would send is sent here. Debian's Slurm comes without the command `scrontab`, so
the options of its lines are given to `sbatch` (with a scrontab built from Debian's source of Slurm 22.05 they were tried by hand).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import make_images
from tests.support.batch_services import slurm, wait_for
from tests.support.needs import MOUNTS, ROOT_RIGHTS, debian_program, need

pytestmark = pytest.mark.cluster

WORKFLOWS = Path(__file__).parents[3] / "workflows"
NIGHTLY = WORKFLOWS / "nightly"
FOLDER = "/srv/featuremaps"


class Site:
    """What the files expect below /srv/featuremaps, in another folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".venv").symlink_to(sys.prefix)
        (folder / "workflows").symlink_to(WORKFLOWS)
        make_images(folder / "photos", 6, [(40, 60)])
        self.write_job()

    def write_job(self, **values: object) -> None:
        """The job file that is shown to people, for one worker, with other values where given."""
        text = (NIGHTLY / "job.yaml").read_text().replace("# workers: 8", "workers: 1  #")
        for key, value in values.items():
            text, n = re.subn(rf"^{key}: \S+", f"{key}: {value}", text, flags=re.MULTILINE)
            assert n == 1
        self.job.write_text(text)

    @property
    def job(self) -> Path:
        return self.folder / "job.yaml"

    def file(self, name: str) -> str:
        """One of the files, for this folder."""
        return (NIGHTLY / name).read_text().replace(FOLDER, str(self.folder))

    def start(self, *before: str, **environment: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PATH": f"{self.folder}/.venv/bin:/usr/bin:/bin", **environment}
        words = [*before, str(self.folder / "workflows/nightly/nightly.sh"), str(self.job)]
        return subprocess.Popen(words, env=env, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def night(self, **environment: str) -> tuple[int, str]:
        """A whole night: exit code, and what it said."""
        process = self.start(**environment)
        said, _ = process.communicate()
        return process.returncode, said


@pytest.fixture
def site(tmp_path) -> Site:
    (tmp_path / "site").mkdir()
    return Site(tmp_path / "site")


def test_of_two_nights_at_once_one_works_and_is_drained_and_the_next_night_ends_it(site):
    first = site.start("timeout", "--foreground", "--preserve-status", "1h")  # as in the scrontab
    wait_for("lock", (site.folder / "features.zarr/runs/lock.json").exists)
    [script] = psutil.Process(first.pid).children()
    [run] = script.children()
    run.suspend()  # so that it holds the store for as long as this takes

    code, said = site.night()
    assert code == 75
    assert "NOT FINISHED, and nothing is lost" in said
    assert f"process {run.pid} on" in said

    first.send_signal(signal.SIGTERM)  # to the first process alone, as with KillMode=mixed
    run.resume()
    said, _ = first.communicate()
    assert first.returncode == 75
    assert "stopped: 0 images done" in said

    code, said = site.night()
    assert code == 0
    assert said.startswith(f"featuremaps, {site.job} on ")
    assert ": complete\n" in said
    assert "6 images done" in said
    assert len(list((site.folder / "logs").iterdir())) == 3, "one log per night, and nothing else"


def test_the_mail_says_what_happened_and_what_to_do(site):
    today = time.strftime("%a")  # in the C locale, which Python has unless told otherwise
    code, said = site.night(VERIFY_ON=today, REPORT=str(site.folder / "report.html"))
    assert (code, "Tonight the store was audited" in said, "no page" in said) == (0, True, False), said
    assert "Complete: all 6 images are done." in (site.folder / "report.html").read_text()
    assert site.night(QUIET="1") == (0, "")
    assert all("complete: " in log.read_text() for log in (site.folder / "logs").iterdir()), "also of a quiet night"
    (site.folder / "photos" / "empty.png").touch()
    assert "1 rejected" in site.night(QUIET="1", NEW_BAD="1")[1], "news of a bad image"
    assert site.night(QUIET="1", NEW_BAD="1") == (0, ""), "which is news but once"

    [chunk] = (site.folder / "features.zarr/40x60/conv1").glob("c.*")
    chunk.write_bytes(chunk.read_bytes()[:-20])
    code, said = site.night(QUIET="1", VERIFY_ON=today, VERIFY_SAMPLE="0")
    assert code == 1
    assert "--repair, and another run" in said

    for path in sorted((site.folder / "photos").iterdir())[1:]:
        path.unlink()
    code, said = site.night(QUIET="1")  # as when one of the disks below is not mounted
    assert code == 2
    assert "REFUSED, no image was changed" in said
    assert "featuremaps: " in said
    assert "--max-removed" in said

    site.job.unlink()
    code, said = site.night()
    assert code == 2
    assert "one JOB.yaml that exists is needed, and this was given" in said


def test_cron_runs_its_line_and_mails_what_was_said(site, tmp_path):
    need("cron", rights=[ROOT_RIGHTS, MOUNTS])
    (site.folder / "photos/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n of no use")
    site.write_job(max_quarantined=0)
    table = site.file("crontab")
    assert subprocess.run([debian_program("crontab", "cron"), "-n", "-"], input=table, text=True, check=False).returncode == 0
    # at once, instead of at 1:30; cron, its folders and the program that delivers its mail are seen by nobody else
    table, n = re.subn(r"^30 1 \* \* \*", "@reboot", table, flags=re.MULTILINE)
    assert n == 1
    folders = {"sbin": "/usr/sbin", "run": "/run", "cron": "/var/spool/cron", "cron.d": "/etc/cron.d"}
    for name in (*folders, "cron/crontabs"):
        (tmp_path / name).mkdir()
    (tmp_path / "cron/crontabs/root").write_text(table)
    (tmp_path / "cron/crontabs/root").chmod(0o600)
    (tmp_path / "crontab").touch()
    shutil.copy(debian_program("cron", "cron"), tmp_path / "sbin")
    mail = tmp_path / "mail"
    (tmp_path / "sbin/sendmail").write_text(f"#!/bin/sh\ncat >{mail}.part && mv {mail}.part {mail}\n")
    (tmp_path / "sbin/sendmail").chmod(0o755)
    mounts = [f"mount --bind {name} {target}" for name, target in (folders | {"crontab": "/etc/crontab"}).items()]
    script = " && ".join([*mounts, "exec /usr/sbin/cron -f"])
    words = [debian_program("unshare", "util-linux"), "--mount", "sh", "-c", script]
    daemon = subprocess.Popen(words, cwd=tmp_path, start_new_session=True)
    try:
        wait_for("mail", lambda: mail.exists() or daemon.poll() is not None)
        assert daemon.poll() is None, "cron ended: it may not mount here, or found its table wrong"
        text = mail.read_text()
    finally:
        daemon.kill()
        daemon.wait()
    assert "To: you@example.org" in text
    assert "complete, but TOO MANY BAD IMAGES" in text
    assert "6 images done" in text
    assert "since the last run: 7 new\n" in text
    assert re.search(r"^found bad by this run: 1 \w+$", text, re.MULTILINE), text
    assert re.search(r"^  broken\.png  \w+: ", text, re.MULTILINE), text
    assert "--retry-quarantined" in text
    assert "starting workers" not in text, "progress is for the log"


def test_systemd_understands_the_units(site, tmp_path):
    units = ["featuremaps.service", "featuremaps.timer", "featuremaps-trouble.service"]
    for name in units:
        (tmp_path / name).write_text(site.file(name))

    def analyze(*words: str) -> subprocess.CompletedProcess[str]:
        command = [debian_program("systemd-analyze", "systemd"), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    done = analyze("verify", "--man=no", *(f"./{name}" for name in units))
    assert (done.returncode, done.stderr) == (0, "")
    when = re.search(r"^OnCalendar=(.*)$", site.file(units[1]), re.MULTILINE)
    assert when
    assert "Next elapse: " in analyze("calendar", when[1]).stdout

    (tmp_path / units[0]).write_text(site.file(units[0]).replace("SuccessExitStatus", "SuccesExitStatus"))
    assert "'SuccesExitStatus' in section [Service]" in analyze("verify", "--man=no", f"./{units[0]}").stderr, "it looks at keys"


def test_the_trouble_unit_mails_what_the_night_has_said(site, tmp_path):
    line = next(line for line in site.file("featuremaps-trouble.service").splitlines() if line.startswith("ExecStart="))
    sendmail, journalctl = tmp_path / "sendmail", tmp_path / "journalctl"
    words = shlex.split(line.partition("=")[2].replace("%%", "%").replace("/usr/sbin/sendmail", str(sendmail)))
    sendmail.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/mail; cat >>{tmp_path}/mail\n')
    journalctl.write_text('#!/bin/sh\necho "FAILED, said $2"\n')
    for program in (sendmail, journalctl):
        program.chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MAIL_TO": "root", "MONITOR_INVOCATION_ID": "7f"}
    subprocess.run(words, env=env, check=True)
    expected = (
        rf"-t\nTo: root\nSubject: featuremaps: trouble on {os.uname().nodename}\n\nFAILED, said _SYSTEMD_INVOCATION_ID=7f\n"
    )
    assert re.fullmatch(expected, (tmp_path / "mail").read_text())


def test_slurm_runs_the_line_of_the_scrontab_as_a_job(site, tmp_path):
    lines = site.file("scrontab").splitlines()
    options = [line.removeprefix("#SCRON ") for line in lines if line.startswith("#SCRON ")]
    [line] = [line for line in lines if not line.startswith("#")]
    assert line.startswith("30 1 * * * ")
    (site.folder / "logs").mkdir()
    with slurm(tmp_path / "slurm") as batch:
        job = batch.submit(*options, script=line.removeprefix("30 1 * * * "))
        batch.wait_until_idle()
    said = (site.folder / f"logs/slurm-{job}.out").read_text()
    assert ": complete\n" in said
    assert "6 images done" in said
