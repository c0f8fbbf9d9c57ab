"""The files of workflows/, used as their page says; workflows/nightly has tests of its own, and .ci/run runs workflows/demo.sh.

There is no Kubernetes here, nor anything that builds an image: its files are held against Kubernetes' schemas and our own readers.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import kubernetes_validate
import pytest
import skimage
import yaml

from pipeline.cluster.batch_workers import job_script
from pipeline.cluster.config import load_cluster
from pipeline.cluster.kinds.batch import BatchSpec
from pipeline.cluster.kinds.kubernetes import KubernetesSpec
from pipeline.cluster.kubernetes_manifests import manifests
from pipeline.config import load_job, make_job
from tests.cluster.test_kubernetes import check
from tests.support.batch_services import slurm, wait_for

ROOT = Path(__file__).parents[3]
WORKFLOWS = ROOT / "workflows"
PAGE = (WORKFLOWS / "README.md").read_text()
PHOTOGRAPHS = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png")


def commands(heading: str) -> list[str]:
    """The lines that the page says to type, below one of its headings."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(r"^    (.+)$", section, re.MULTILINE)


def uncommented(text: str) -> str:
    """With the keys that stand there as comments."""
    return re.sub(r"^(\s*)# (\w+: )", r"\1\2", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for name in PHOTOGRAPHS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    return folder


def sh(command: str, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """What a user types, with this featuremaps on the PATH."""
    env = env or {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(["sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=900)


# -- the page --------------------------------------------------------------------------------------------------------------------


def test_every_file_is_on_the_page():
    linked = {(WORKFLOWS / target).resolve() for target in re.findall(r"\]\(([^)#]+)\)", PAGE)}
    with_page = {path.parent for path in WORKFLOWS.rglob("README.md")} - {WORKFLOWS}  # which speaks of the files beside it
    files = {path for path in WORKFLOWS.rglob("*") if path.is_file() and not with_page & {*path.parents}} - {
        WORKFLOWS / "README.md"
    }
    assert not (files | {folder / "README.md" for folder in with_page}) - linked


# -- one machine -----------------------------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_the_job_file_for_one_machine_is_run_as_the_page_says(tmp_path, photographs):
    (tmp_path / "photos").symlink_to(photographs)
    first, *others = commands("One machine")
    assert [shlex.split(line, comments=True)[-1] for line in others] == ["local.yaml"] * 3
    copied = sh(first.replace("/where/your/images/are", str(tmp_path)), ROOT)
    assert copied.returncode == 0, copied.stderr
    planned, done, status = (sh(line, tmp_path) for line in others)
    assert "5 images listed: 5 to compute" in planned.stdout
    assert done.stdout.startswith("complete: 5 images done"), done.stderr
    assert "0 pending, 5 done" in status.stdout


def test_its_values_are_the_defaults_and_its_comments_are_keys(tmp_path):
    text = (WORKFLOWS / "local.yaml").read_text()
    (tmp_path / "local.yaml").write_text(text)
    job = load_job(tmp_path / "local.yaml")
    assert job == make_job({"source": str(tmp_path / "photos"), "store": str(tmp_path / "features.zarr")})
    (tmp_path / "local.yaml").write_text(uncommented(text))
    job = load_job(tmp_path / "local.yaml")
    assert (job.limit, job.workers, job.gpus, job.max_quarantined) == (100, 6, 0, 0)
    assert (job.decode.resize, job.extractor.weights) == ((512, 512), str(tmp_path / "lenet.safetensors"))


# -- Python and Snakemake --------------------------------------------------------------------------------------------------------


def snakemake_rules() -> dict[str, dict[str, str]]:
    """Rules of the Snakefile, each with what its keys say in quotes."""
    found = {}
    for rule in (WORKFLOWS / "python/Snakefile").read_text().split("\nrule ")[1:]:
        found[rule.partition(":")[0]] = dict(re.findall(r"^    (\w+):\n\s+(?:touch\()?\"(.+?)\"\)?,?$", rule, re.MULTILINE))
    return found


@pytest.mark.cluster
def test_the_script_and_the_commands_of_the_snakefile_run_as_their_page_says(tmp_path, photographs):
    """Of Snakemake only its rules' commands run here: it would bring 55 packages. Snakemake 9.27.1 ran the file by hand."""
    (tmp_path / "photos").symlink_to(photographs)
    page = (WORKFLOWS / "python/README.md").read_text()
    copy_job, copy_files, run_script = re.findall(r"^    (.+)$", page.partition("## Snakemake")[0], re.MULTILINE)
    for line in (copy_job, copy_files):
        copied = sh(line.replace("/where/your/images/are", str(tmp_path)), ROOT)
        assert copied.returncode == 0, copied.stderr
    done = sh(run_script, tmp_path)
    assert (done.returncode, done.stdout) == (0, "complete: 5 images done, 0 unchanged, 0 bad\n"), done.stderr

    rules = snakemake_rules()
    assert (rules["maps"]["input"], rules["maps"]["output"]) == ("job.yaml", rules["report"]["input"])
    again = sh(rules["maps"]["shell"].format(input=rules["maps"]["input"], threads=2), tmp_path)
    assert again.returncode == 0, again.stderr
    assert "0 images done, 5 unchanged" in again.stdout
    written = sh(rules["report"]["shell"].format(output=rules["report"]["output"]), tmp_path)
    assert written.returncode == 0, written.stderr
    assert (tmp_path / "report.html").exists()


# -- Slurm -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm") / "s", kill_wait_s=2) as running:
        yield running


@pytest.mark.cluster
def test_the_example_for_slurm_is_run_as_the_page_says_until_it_is_complete(service, tmp_path, photographs):
    install, copy, submit = commands("Slurm")
    assert install.startswith("python3 -m venv .venv && ")
    folder = tmp_path / "maps"
    copied = sh(copy.replace("/shared/maps", str(folder)).replace("/where/your/images/are", str(photographs)), ROOT)
    assert copied.returncode == 0, copied.stderr
    handed_in = sh(submit, folder, service.env)
    assert handed_in.returncode == 0, handed_in.stdout + handed_in.stderr
    assert "ok    source: 5 images listed, 5 to compute" in handed_in.stdout
    again = sh(f"SKIP_CHECKS=1 {submit}", folder, service.env)
    assert again.returncode == 75
    assert "two runs on one store never mix, so nothing was submitted" in again.stderr

    followed = dict(re.findall(r"^(\w[^:\n]+): +(.+)$", handed_in.stdout.rpartition("\n\n")[2], re.MULTILINE))
    log_file = shlex.split(followed["what the driver says"])[-1]
    assert "-driver" in sh(followed["the queue"], folder, service.env).stdout
    wait_for("end of the run", lambda: not service.squeue(), 240, lambda: sh(f"cat {log_file}", folder).stdout)
    log = sh(f"cat {log_file}", folder).stdout
    assert "complete: 5 images done" in log, log
    assert "nothing is wrong" in log, log
    status = sh(followed["how far it is, and its jobs"], folder, service.env).stdout
    assert "0 pending, 5 done" in status
    assert "not in the queue any more" in status


@pytest.mark.cluster
def test_what_doctor_finds_wrong_is_not_handed_in(service, tmp_path, photographs):
    shutil.copytree(WORKFLOWS / "slurm", tmp_path / "maps")
    (tmp_path / "maps/photos").symlink_to(photographs)
    entry = tmp_path / "maps/cluster.yaml"
    entry.write_text(uncommented(entry.read_text()))
    done = sh("sh submit.sh", tmp_path / "maps", service.env)
    assert done.returncode == 1
    assert "FAIL  queue: Slurm has no partition gpu -> set queue to one of debug, preempting" in done.stdout
    assert "what is marked FAIL has to be corrected first: nothing was submitted" in done.stderr
    assert not service.squeue()


def test_its_comments_are_keys_that_ask_for_gpus(tmp_path):
    (tmp_path / "cluster.yaml").write_text(uncommented((WORKFLOWS / "slurm/cluster.yaml").read_text()))
    spec = load_cluster("slurm", tmp_path / "cluster.yaml")
    assert isinstance(spec, BatchSpec)
    assert (spec.queue, spec.interface, spec.prologue) == ("gpu", "ib0", ("module load cuda",))
    script = job_script(spec.model_copy(update={"interface": None}), "extract", "x")
    assert "#SBATCH --gres=gpu:1\n#SBATCH --constraint=a100\n" in script
    assert "gres" not in job_script(spec.model_copy(update={"interface": None}), "read", "x")


# -- Kubernetes ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> dict[str, dict]:
    return {d["kind"]: d for d in yaml.safe_load_all((WORKFLOWS / "kubernetes/featuremaps.yaml").read_text())}


def test_what_kubectl_is_given_is_valid(documents):
    assert list(documents) == ["ConfigMap", "ServiceAccount", "Role", "RoleBinding", "CronJob"]
    for document in documents.values():
        for version in ("1.27", "1.33"):
            kubernetes_validate.validate(document, version, strict=True)


@pytest.mark.parametrize("change", [str, uncommented])
def test_its_settings_are_ours_and_make_valid_manifests(tmp_path, documents, change):
    for name, text in documents["ConfigMap"]["data"].items():
        (tmp_path / name).write_text(change(text))
    job = load_job(tmp_path / "job.yaml")
    spec = load_cluster(job.cluster, tmp_path / "cluster.yaml")
    assert isinstance(spec, KubernetesSpec)
    assert [group.gpus for group in spec.groups.values()] == [0, int(change is uncommented)]
    for manifest in manifests(spec, "featuremaps-12345678"):
        check(manifest)
    pod = documents["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    (driver,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in driver["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert driver["image"] == spec.image
    assert {"name": "data", "mountPath": mounts["data"]} in spec.volume_mounts
    assert volumes["data"] in spec.volumes
    assert job.source.startswith(mounts["data"])
    assert job.store.startswith(mounts["data"])
    assert mounts["settings"] == driver["workingDir"], "where job.yaml and cluster.yaml are looked up"
    assert volumes["settings"]["configMap"]["name"] == documents["ConfigMap"]["metadata"]["name"]
    assert pod["serviceAccountName"] == documents["ServiceAccount"]["metadata"]["name"]
    assert spec.service_account in {None, documents["ServiceAccount"]["metadata"]["name"]}


def test_the_files_of_the_image_are_there():
    lines = (WORKFLOWS / "kubernetes/Dockerfile").read_text().splitlines()
    sources = list(chain.from_iterable(line.split()[1:-1] for line in lines if line.startswith("COPY ")))
    assert "constraints.txt" in sources
    assert all((ROOT / source).exists() for source in sources)
