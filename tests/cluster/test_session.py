from __future__ import annotations

import gc
import ipaddress
import os
import re
import socket
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import distributed.utils
import psutil
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from distributed import Client, LocalCluster

from pipeline.api import run_job
from pipeline.cluster import local_workers as processes
from pipeline.cluster.batch_workers import lifetime
from pipeline.cluster.config import load_cluster
from pipeline.cluster.groups import Launch
from pipeline.cluster.kinds.address import AddressSpec
from pipeline.cluster.kinds.local import CudaSpec, LocalSpec
from pipeline.cluster.local import local_memory_bytes, local_workers
from pipeline.cluster.session import connect, with_client
from pipeline.cluster.spec import GroupSpec, TlsSpec
from pipeline.cluster.starting import needed
from pipeline.config import Job, make_job
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.run.slots import ROLES, worker_slots
from tests.conftest import content, make_images

REPOSITORY = Path(__file__).parents[2]


def test_every_cluster_of_the_repositorys_file_can_be_used():
    path = REPOSITORY / "cluster.yaml"
    assert load_cluster("local", path) == LocalSpec()
    assert load_cluster("two-workers", path) == LocalSpec(workers=2, memory=4 * 2**30)
    assert load_cluster("shared-machine", path) == LocalSpec(dashboard=None)
    assert load_cluster("running", path) == AddressSpec(kind="address", address="tcp://127.0.0.1:8786")
    kinds = {load_cluster(name, path).kind for name in yaml.safe_load(path.read_text())["clusters"]}
    assert kinds == {"local", "cuda", "address", "ssh", "slurm", "pbs", "sge", "htcondor", "kubernetes"}


def test_without_a_name_it_is_this_machine_and_no_file_is_read(tmp_path):
    assert load_cluster(None, tmp_path / "there is none.yaml") == LocalSpec()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "clusters: {a: {kind: local}, b: {kind: local}}",
            r"cluster\.yaml has no cluster 'x': nothing was started; it has a, b$",
        ),
        (
            "clusters: [",
            r"cluster 'x' is looked up in .*cluster\.yaml, which cannot be read \(line 1: .*\): nothing was started; correct the file, or",
        ),
        (
            "clusters:\n  x:\n\tkind: slurm",
            r"cannot be read \(line 3 is indented with a tab: YAML wants spaces\): nothing was started; correct the file, or leave out --c",
        ),
        ("", r"cluster\.yaml is not usable.*the whole: Input should be a valid dictionary"),
        ("cluster: {}", r"unknown key 'cluster': did you mean 'clusters'\?"),
        ("clusters: {x: {kind: local, worker: 2}}", r"unknown key 'clusters\.x\.worker': did you mean 'workers'\?"),
        (
            "clusters: {x: {kind: address, adress: y}, y: {kind: none}}",
            r"unknown key 'clusters\.x\.adress': did you mean 'address'\?",
        ),
        ("clusters: {x: {kind: address}}", r"key 'clusters\.x\.address' is missing: add it"),
        ("clusters: {x: {workers: 2}}", r"key 'clusters\.x\.kind' is missing: add it"),
        (
            "clusters: {x: {kind: slurmy}}",
            r"clusters\.x: kind 'slurmy' is none of local, cuda, slurm, .*: did you mean 'slurm'\?",
        ),
        (
            "clusters: {x: {kind: address, address: 'tcp://a:1', tls: {ca_file: a, cert: b, key: c}}}",
            r"clusters\.x: with tls, address 'tcp://a:1' has to begin with tls://, else nothing would be encrypted",
        ),
        (
            "clusters: {x: {kind: local, tls: {ca_file: a, cert: b, kay: c}}}",
            r"unknown key 'clusters\.x\.tls\.kay': did you mean 'key'",
        ),
        ("clusters: {x: {kind: local, tls: {ca_file: a, cert: b}}}", r"key 'clusters\.x\.tls\.key' is missing: add it"),
        ("clusters: {x: {kind: local, dashboard: everywhere}}", r"clusters\.x\.dashboard: String should match pattern"),
        ("clusters: {x: {kind: local, workers: 0}}", r"clusters\.x\.workers: Input should be greater than 0, not 0"),
        (
            "clusters: {x: {kind: local, memory: much}}",
            r"clusters\.x\.memory: 'much' is no size: write for instance 16 GiB or 4GB",
        ),
        (
            "clusters: {x: {kind: local, groups: {a: {roles: [read]}}}}",
            r"clusters\.x: no group has the role 'extract', so its tasks would wait for ever: add it to the roles of a group",
        ),
        (
            "clusters: {x: {kind: local, workers: 2, groups: {a: {}}}}",
            r"clusters\.x: workers, gpus, processes_per_gpu and memory belong to each group when there are groups: move them there",
        ),
        (
            "clusters: {x: {kind: local, groups: {a: {role: [read]}}}}",
            r"unknown key 'clusters\.x\.groups\.a\.role': did you mean 'roles'\?",
        ),
        ("clusters: {x: {kind: slurm, groups: {a: {}}}}", r"key 'clusters\.x\.groups\.a\.memory' is missing: add it"),
        (
            "clusters: {x: {kind: slurm, walltime: soon, groups: {a: {memory: 1GB}}}}",
            r"clusters\.x\.walltime: 'soon' is no time: write for instance 8h, 90min, 08:00:00 or 1-00:00:00",
        ),
        (
            "clusters: {x: {kind: slurm, walltime: 8, groups: {a: {memory: 1GB}}}}",
            r"clusters\.x\.walltime: 8 has no unit, and batch systems disagree on it: write 8s, 8min, 8h or HH:MM:SS",
        ),
        (
            "clusters: {x: {kind: slurm, walltime: 8:00, groups: {a: {memory: 1GB}}}}",
            r"clusters\.x\.walltime: '8:00' may be hours or minutes: write 8:00:00 or 8min",
        ),
        (
            "clusters: {x: {kind: slurm, walltime: '90:30', groups: {a: {memory: 1GB}}}}",
            r"clusters\.x\.walltime: '90:30' may be hours or minutes: write 90:30:00 or 90min 30s",
        ),
        (
            "clusters: {x: {kind: slurm, groups: {workers: 2, mem: 4 GiB}}}",
            r"key 'clusters\.x\.groups\.workers': did you mean '.*\.groups\.NAME\.workers'\?; .*\.mem': did .*\.NAME\.memory'\?$",
        ),
        (
            "clusters: {x: {kind: slurm, groups: {cpu: 2}}}",
            r"nothing was started: clusters\.x\.groups\.cpu: Input should be keys and values, not 2$",
        ),
        (
            "clusters: {x: {kind: slurm, groups: {all: {mem: 4 GiB}}}}",
            r"nothing was started: unknown key 'clusters\.x\.groups\.all\.mem': did you mean 'memory'\?$",
        ),
        ("cluster: {x: {kind: local}}", r"nothing was started: unknown key 'cluster': did you mean 'clusters'\?$"),
        (
            "x: {kind: local}\nmy-cluster: {kind: local}",
            r"nothing was started: unknown key 'x': put it below 'clusters:'; unknown key 'my-cluster': put it below 'clusters:'$",
        ),
        (
            "clusters: {x: {kind: slurm, cpu: {memory: 4 GiB}}}",
            r"nothing was started: unknown key 'clusters\.x\.cpu': put it below 'groups:'$",
        ),
        (
            "clusters: {x: {kind: slurm, groups: {a: {memory: 4096}}}}",
            r"clusters\.x\.groups\.a\.memory: 4096 has no unit: write 4096 MiB, 4096 GiB or 4096 B, whichever is meant",
        ),
        ("clusters: {x: {kind: slurm, groups: {a: {memory: '4096'}}}}", r"clusters\.x\.groups\.a\.memory: 4096 has no unit"),
        ("clusters: {x: {kind: SLURM, groups: {}}}", r"clusters\.x: kind 'SLURM' is none of .*: did you mean 'slurm'\?"),
        ("clusters: {x: {kind: k8s, groups: {}}}", r"clusters\.x: kind 'k8s' is none of .*: did you mean 'kubernetes'\?"),
        (
            "clusters: {x: {kind: slurm, partition: gpu, groups: {a: {memory: 1GB, gres: 1}}}}",
            r"'clusters\.x\.groups\.a\.gres': did you mean 'gpus'\?; unknown key 'clusters\.x\.partition': did you mean 'queue'\?",
        ),
        (
            "clusters: {x: {kind: slurm, groups: {a: {memory: 1GB, qos: high}}}}",
            r"unknown key 'clusters\.x\.groups\.a\.qos': did you mean a line of 'options', --qos=\.\.\.\?",
        ),
        (
            "clusters: {x: {kind: slurm, memory: 1GB, groups: {a: {memory: 1GB, walltime: 8h}}}}",
            r"\.a\.walltime': did you mean 'clusters\.x\.walltime' or .*'clusters\.x\.memory': did you mean 'clusters\.x\.groups\.NAME\.m",
        ),
        (
            "clusters: {x: {kind: local, groups: {a: {environment: {PI: 3.10}}}}}",
            r"clusters\.x\.groups\.a\.environment\.PI: 3\.1 is what YAML makes of a text without quotes: put it in quotes",
        ),
        ("clusters: {x: {kind: slurm, groups: {driver: {memory: 1GB}}}}", r"clusters\.x: a group cannot be called 'driver'"),
        ("clusters: {x: {kind: ssh, groups: {a: {memory: 1GB}}}}", r"key 'clusters\.x\.groups\.a\.hosts' is missing: add it"),
        (
            "clusters: {x: {kind: address, address: '${NO_SUCH_VARIABLE}'}}",
            r"cluster 'x' of .*cluster\.yaml uses \$\{NO_SUCH_VARIABLE\}, and the environment has no 'NO_SUCH_VARIABLE'",
        ),
    ],
)
def test_a_cluster_that_cannot_be_used_is_refused(tmp_path, text, expected):
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(UsageError, match=expected):
        load_cluster("x", tmp_path / "cluster.yaml")


def test_variables_of_the_environment_stand_in_every_text(tmp_path, monkeypatch):
    monkeypatch.setenv("WHERE", "there")
    monkeypatch.setenv("N_MACHINES", "3")
    (tmp_path / "cluster.yaml").write_text(
        "clusters: {x: {kind: ssh, interface: '${WHERE}0', groups: {a: {hosts: ['${WHERE}-1', b], workers: '${N_MACHINES}'}}}}"
    )
    spec = load_cluster("x", tmp_path / "cluster.yaml")
    assert (spec.interface, spec.groups["a"].hosts, spec.groups["a"].workers) == ("there0", ("there-1", "b"), 3)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("8:00:00", 28_800),
        ("'08:00:00'", 28_800),
        ("1-00:30:00", 88_200),
        ("1-00:00:00", 86_400),
        ("1-12", 129_600),
        ("8h", 28_800),
        ("1 h 30 min", 5400),
        ("90s", 90),
    ],
)
def test_a_walltime_is_read_as_people_and_batch_systems_write_it(tmp_path, text, seconds):
    (tmp_path / "cluster.yaml").write_text(
        f"clusters: {{x: {{kind: slurm, walltime: {text}, groups: {{a: {{memory: 1.5 GiB, threads: 2}}}}}}}}"
    )
    spec = load_cluster("x", tmp_path / "cluster.yaml")
    assert spec.walltime == seconds
    assert spec.groups["a"].memory == 1.5 * 2**30
    assert spec.groups["a"].resources == {"read": 2, "extract": 2, "write": 2}
    assert spec.log_folder == str(tmp_path / "featuremaps-logs")


@pytest.mark.parametrize(("text", "n_bytes"), [("4GB", 4 * 10**9), ("4 GiB", 4 * 2**30), ("4G", 4 * 10**9), ("512 MiB", 2**29)])
def test_a_memory_is_read_with_its_unit(tmp_path, text, n_bytes):
    (tmp_path / "cluster.yaml").write_text(f"clusters: {{x: {{kind: slurm, groups: {{a: {{memory: {text}}}}}}}}}")
    assert load_cluster("x", tmp_path / "cluster.yaml").groups["a"].memory == n_bytes


def test_a_key_that_names_its_unit_takes_a_plain_number(tmp_path):
    (tmp_path / "cluster.yaml").write_text("clusters: {x: {kind: ssh, start_timeout_s: 90, groups: {a: {hosts: node1}}}}")
    spec = load_cluster("x", tmp_path / "cluster.yaml")
    assert (spec.start_timeout_s, spec.groups["a"].hosts) == (90, ("node1",))


def test_lists_and_texts_are_read_as_people_write_them(tmp_path):
    (tmp_path / "cluster.yaml").write_text(
        "clusters: {x: {kind: slurm, account: 0123, queue: [short, long], prologue: module load cuda, start_timeout_s: 10min, groups: {"
        "a: {memory: 1GB, roles: read, options: --constraint=a100 --x, environment: {N: 1}}, "
        "b: {memory: 1GB, roles: 'read, extract', environment: [A=1, B=x=2]}}}}"
    )
    spec = load_cluster("x", tmp_path / "cluster.yaml")
    assert (spec.account, spec.queue, spec.prologue, spec.start_timeout_s) == ("0123", "short,long", ("module load cuda",), 600)
    a, b = spec.groups["a"], spec.groups["b"]
    assert (a.roles, a.options, a.environment) == (("read",), ("--constraint=a100 --x",), {"N": "1"})
    assert (b.roles, b.environment) == (("read", "extract"), {"A": "1", "B": "x=2"})


@pytest.mark.parametrize("walltime_s", [8, 30, 60, 3600, 86_400])
def test_a_worker_lives_and_retires_before_its_walltime(walltime_s):
    _, life, _, stagger = lifetime(walltime_s)
    assert 0 < float(life[:-1]) - float(stagger[:-1]) < float(life[:-1]) < walltime_s


def test_a_job_gives_no_workers_to_a_cluster_whose_groups_have_their_own(tmp_path):
    (tmp_path / "cluster.yaml").write_text("clusters: {x: {kind: local, groups: {a: {}}}}")
    job = make_job({"source": "a", "store": "b", "cluster": "x", "workers": 3, "gpus": 0})
    with (
        pytest.raises(
            UsageError, match=r"cluster 'x' has groups .* and workers, gpus were given for the run: nothing was started"
        ),
        with_client(job, None, tmp_path / "cluster.yaml"),
    ):
        pass


def test_a_cluster_of_gpus_without_any_is_refused(monkeypatch):
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 0)
    with (
        pytest.raises(UsageError, match="1 GPUs were asked for, and this installation of torch sees 0"),
        connect(CudaSpec(kind="cuda")),
    ):
        pass


def test_a_missing_file_is_refused_with_the_place_to_run_from(tmp_path):
    with pytest.raises(
        UsageError, match=r"cluster 'x' is looked up in .*No such file.*run from the folder that holds cluster\.yaml"
    ):
        load_cluster("x", tmp_path / "cluster.yaml")


def test_this_machines_cores_and_memory_are_shared_among_the_workers():
    assert local_workers(None) == len(os.sched_getaffinity(0))
    assert local_workers(3) == 3
    assert local_memory_bytes(2, 123) == 123
    assert 2 * local_memory_bytes(2, None) <= 0.9 * psutil.virtual_memory().total


def test_an_unreachable_scheduler_is_named(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.kinds.address.CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but nobody listens
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        expected = (
            rf"no Dask scheduler answers at {address} \(.*\): nothing was started; check the address, that `dask scheduler`"
        )
        with pytest.raises(FeaturemapsError, match=expected), connect(AddressSpec(kind="address", address=address)):
            pass


def test_an_address_of_no_known_form_is_named(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.kinds.address.CONNECT_TIMEOUT_S", 0.2)
    with (
        pytest.raises(FeaturemapsError, match="no Dask scheduler answers at quic://here"),
        connect(AddressSpec(kind="address", address="quic://here")),
    ):
        pass


@pytest.mark.parametrize("address", ["tls://127.0.0.1:1", "tcp://127.0.0.1:1", "quic://here"])
def test_a_client_that_could_not_connect_leaves_no_thread_and_does_not_keep_the_next_from_starting(address, monkeypatch):
    """Left to the garbage collector, it may be closed in the thread of the next one, and both wait for each other."""
    monkeypatch.setattr("pipeline.cluster.kinds.address.CONNECT_TIMEOUT_S", 0.2)
    before = set(threading.enumerate())
    with (
        pytest.raises(FeaturemapsError, match="no Dask scheduler answers"),
        connect(AddressSpec(kind="address", address=address)),
    ):
        pass
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "IO loop"]
    collected = []
    real = distributed.utils.asyncio_run

    def collect_first(*arguments, **options):
        collected.append(gc.collect())
        return real(*arguments, **options)

    monkeypatch.setattr("distributed.utils.asyncio_run", collect_first)
    with pytest.raises(FeaturemapsError) as failure, connect(AddressSpec(kind="address", address="tcp://127.0.0.1:1")):
        pass
    assert not isinstance(failure.value.__cause__, AssertionError)  # Dask's, of a thread that did not start within 10 s
    assert collected


@pytest.fixture
def threads_only():
    """A cluster inside this process whose worker offers what a test asks for."""
    clusters = []

    def start(**resources):
        local = LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None, resources=resources, protocol="tcp"
        )
        clusters.append(local)
        return local

    yield start
    for local in clusters:
        local.close()


def test_a_scheduler_that_runs_already_is_used_and_left_running(threads_only):
    local = threads_only(read=1, extract=3, write=1)
    with connect(AddressSpec(kind="address", address=local.scheduler_address)) as client:
        (slots,) = worker_slots(client).values()
        assert slots == (1, 3, slots.memory_limit_bytes, False, False, False)  # it extracts more than it reads at once
    with Client(local.scheduler_address) as client:
        assert client.submit(lambda: 5).result() == 5


@pytest.mark.parametrize("missing", ROLES)
def test_workers_without_a_role_are_refused_with_the_option_that_gives_it(threads_only, missing):
    local = threads_only(**{role: 1 for role in ROLES if role != missing})
    expected = re.escape(
        f"none of the 1 worker offers the resource {missing!r}, so its tasks would wait for ever: "
        'start workers with --resources "read=1 extract=1 write=1", '
        'or in Python Client(threads_per_worker=1, resources={"read": 1, "extract": 1, "write": 1}); '
        "run_job without a client starts its own"
    )
    with Client(local) as client, pytest.raises(FeaturemapsError, match=expected):
        worker_slots(client)


@pytest.mark.parametrize(("hosts", "is_usable"), [("aa", True), ("ab", False)])
def test_workers_that_name_no_role_may_do_all_if_they_are_on_one_machine(monkeypatch, hosts, is_usable):
    worker = {"resources": {}, "memory_limit": 2**30, "nthreads": 3}
    known = {f"tcp://{i}": worker | {"host": host} for i, host in enumerate(hosts)}
    monkeypatch.setattr("pipeline.run.slots.scheduler_workers", lambda _: known)
    if is_usable:
        assert set(worker_slots(None).values()) == {(3, 3, 2**30, False, True, True)}
    else:
        with pytest.raises(FeaturemapsError, match="none of the 2 workers offers the resource 'read'"):
            worker_slots(None)


@pytest.mark.cluster
def test_every_worker_of_the_local_cluster_offers_one_slot_and_a_memory_limit(client):
    slots = worker_slots(client)
    assert [(worker.extract, worker.is_whole) for worker in slots.values()] == [(1, True), (1, True)]
    assert all(worker.memory_limit_bytes > 2**28 for worker in slots.values())


def listening() -> list:
    """Addresses on which this process and its children listen."""
    me = psutil.Process()
    return [
        connection.laddr
        for process in (me, *me.children(recursive=True))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]


@pytest.mark.cluster
def test_the_local_cluster_listens_on_loopback_only(client):
    found = listening()
    assert len(found) >= 8  # scheduler and dashboard; of two workers each itself, its nanny and its server of metrics
    assert not [address for address in found if not ipaddress.ip_address(address.ip).is_loopback]
    assert client.dashboard_link.startswith("http://127.0.0.1:")


@pytest.mark.cluster
def test_the_dashboard_is_where_it_was_asked_for_or_nowhere():
    with socket.socket() as free:
        free.bind(("127.0.0.2", 0))
        port = free.getsockname()[1]
    with connect(LocalSpec(workers=1, dashboard=f"127.0.0.2:{port}")):
        assert ("127.0.0.2", port) in listening()
    before = set(listening())
    with connect(LocalSpec(workers=1, dashboard=None)) as client:
        new = set(listening()) - before
        assert len(new) == 5
        assert not [address for address in new if not ipaddress.ip_address(address.ip).is_loopback]
        assert 8787 not in {address.port for address in new}
        port = client.scheduler_info()["services"]["dashboard"]  # which tells of nothing but that it is there
        for page in ("status", "info/main/workers.html", "json/counts.json"):
            with pytest.raises(HTTPError, match="404"):
                urlopen(f"http://127.0.0.1:{port}/{page}")


@pytest.mark.cluster
def test_a_job_says_how_many_workers_the_local_cluster_has(monkeypatch, tmp_path):
    asked = []

    class Connection:
        def __init__(self, spec, **_):
            asked.append(spec)

        def __enter__(self):
            return "client"

        def __exit__(self, *_):
            pass

    monkeypatch.setattr("pipeline.cluster.session.connect", Connection)
    job = make_job({"source": "a", "store": "b", "workers": 3, "memory_limit_bytes": 10})
    with with_client(job, None, tmp_path) as connected:
        assert connected == "client"
    (tmp_path / "cluster.yaml").write_text("clusters: {big: {kind: local, workers: 9, memory: 99 B}}")
    with with_client(make_job({"source": "a", "store": "b", "cluster": "big", "workers": 4}), None, tmp_path / "cluster.yaml"):
        pass
    assert asked == [LocalSpec(workers=3, memory=10), LocalSpec(workers=4, memory=99)]


# -- TLS -------------------------------------------------------------------------------------------------------------------------


def make_certificates(folder: Path) -> dict[str, str]:
    """An authority, and a certificate that it signed: the files as ``tls`` takes them."""
    folder.mkdir()
    now = datetime.now(UTC)

    def certify(name, issuer, key, signer, is_authority):
        builder = x509.CertificateBuilder().subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        builder = builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1))
        builder = builder.not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        return builder.sign(signer, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    authority, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    (folder / "ca.pem").write_bytes(certify(f"ca {folder}"[-60:], f"ca {folder}"[-60:], authority, authority, True))
    (folder / "cert.pem").write_bytes(certify("featuremaps", f"ca {folder}"[-60:], key, authority, False))
    form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(*form, serialization.NoEncryption()))
    (folder / "locked.pem").write_bytes(key.private_bytes(*form, serialization.BestAvailableEncryption(b"secret")))
    return {"ca_file": "ca.pem", "cert": "cert.pem", "key": "key.pem"}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls") / "ours"
    return {key: str(folder / name) for key, name in make_certificates(folder).items()}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Just as good, but of another authority."""
    folder = tmp_path_factory.mktemp("tls") / "theirs"
    return {key: str(folder / name) for key, name in make_certificates(folder).items()}


@pytest.mark.cluster
def test_a_run_over_tls_makes_the_same_store_and_nobody_without_the_certificate_gets_in(run, ours, theirs, tmp_path, monkeypatch):
    source = make_images(tmp_path / "source", 12, [(40, 50), (30, 60)])
    run(source, tmp_path / "plain.zarr")
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr")})
    with connect(LocalSpec(workers=1, tls=TlsSpec(**ours))) as client:
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert not [place for place in listening() if not ipaddress.ip_address(place.ip).is_loopback]
        assert all(worker.startswith("tls://127.0.0.1:") for worker in worker_slots(client))
        monkeypatch.setattr("pipeline.cluster.kinds.address.CONNECT_TIMEOUT_S", 1.0)
        strangers = [
            AddressSpec(kind="address", address=address),
            AddressSpec(kind="address", address=address.replace("tls", "tcp")),
            AddressSpec(kind="address", address=address, tls=TlsSpec(**theirs)),
        ]
        for spec in strangers:
            with pytest.raises(FeaturemapsError, match=r"no Dask scheduler answers at .* certificates under tls"), connect(spec):
                pass
        monkeypatch.setattr("pipeline.cluster.kinds.address.CONNECT_TIMEOUT_S", 200.0)
        with connect(AddressSpec(kind="address", address=address, tls=TlsSpec(**ours))) as known:
            assert run_job(job, known).n_done == 12
    assert content(tmp_path / "f.zarr") == content(tmp_path / "plain.zarr")


def test_certificates_are_beside_the_file_that_names_them(tmp_path, ours):
    folder = Path(ours["ca_file"]).parent
    path = folder / "cluster.yaml"
    path.write_text("clusters: {x: {kind: local, tls: {ca_file: ca.pem, cert: cert.pem, key: key.pem}}}")
    assert load_cluster("x", path) == LocalSpec(tls=TlsSpec(**ours))
    security = load_cluster("x", path).tls.security()
    assert security.require_encryption
    assert {security.tls_client_key, security.tls_scheduler_key, security.tls_worker_key} == {ours["key"]}


@pytest.mark.parametrize("key", ["ca_file", "cert", "key"])
def test_a_missing_certificate_is_named(tmp_path, ours, key):
    entry = {"kind": "local", "tls": ours | {key: "none.pem"}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"x": entry}}))
    expected = (
        rf"cluster 'x' of .*cluster\.yaml names the {key} {tmp_path}/none\.pem, which cannot be read \(No such file or directory\): "
        "nothing was started; correct the path"
    )
    with pytest.raises(UsageError, match=expected):
        load_cluster("x", tmp_path / "cluster.yaml")


@pytest.mark.parametrize(
    "change",
    [{"key": "theirs"}, {"ca_file": "noise"}, {"cert": "noise"}, {"key": "locked"}],
    ids=["key of another", "no authority", "no certificate", "password"],
)
def test_certificates_that_cannot_be_used_are_refused_before_anything_starts(tmp_path, ours, theirs, change):
    (tmp_path / "noise.pem").write_text("no certificate")
    files = {
        "theirs": theirs["key"],
        "noise": "noise.pem",
        "locked": str(Path(ours["key"]).with_name("locked.pem")),
    }
    entry = {"kind": "address", "address": "tls://127.0.0.1:1", "tls": ours | {key: files[name] for key, name in change.items()}}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"x": entry}}))
    with pytest.raises(UsageError, match=r"cluster 'x' of .* names certificates that cannot be used \(.*\): nothing was started"):
        load_cluster("x", tmp_path / "cluster.yaml")


# -- starting --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dying(monkeypatch):
    """Have worker processes die while they start, which no test can time; the first so many of them."""

    def die(n: int) -> None:
        real, left = processes.LocalWorker.start_unsafe, iter(range(n))

        async def start(self):
            if next(left, None) is None:
                return await real(self)
            raise RuntimeError("Nanny failed to start.") from OSError("gone")

        monkeypatch.setattr(processes.LocalWorker, "start_unsafe", start)

    return die


def test_a_worker_that_dies_while_it_starts_does_not_end_the_run(dying):
    dying(2)
    with connect(LocalSpec(workers=1)) as client:
        assert client.submit(sum, [1, 2]).result() == 3


def test_workers_that_never_start_are_said_so(dying):
    dying(99)
    with (
        pytest.raises(
            FeaturemapsError,
            match=r"workers could not be started, in 3 tries each \(local-0: .*Nanny failed to start.*what was started was stopped",
        ),
        connect(LocalSpec(workers=1)),
    ):
        pass


def test_a_connection_that_is_gone_is_no_lack_of_workers(threads_only, monkeypatch):
    with Client(threads_only().scheduler_address) as client, monkeypatch.context() as patch:
        patch.setattr(client, "status", "connecting")  # as it is from the loss of a scheduler on
        with pytest.raises(ConnectionError, match=r"connection to .* is connecting"):
            worker_slots(client)


def test_gpus_that_are_not_there_are_refused_with_what_to_check(monkeypatch):
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 0)
    with pytest.raises(
        UsageError, match=r"2 GPUs were asked for, and this installation of torch sees 0: nothing was started; .*nvidia-smi"
    ):
        LocalSpec(gpus=2).group()
    assert shape(LocalSpec(workers=3, gpus=0)) == (3, 1, 0)


def shape(spec):
    """Processes, threads of each, and GPUs in all."""
    group = spec.group()
    return group.workers, group.threads, group.n_gpus


def test_with_gpus_the_cores_are_the_threads_of_some_processes_for_each(monkeypatch):
    monkeypatch.setattr("pipeline.cluster.local.local_gpus", lambda wanted: 2 if wanted is None else wanted)
    assert shape(LocalSpec(workers=9)) == (2, 4, 2)
    assert shape(LocalSpec(workers=1)) == (2, 1, 2)
    assert shape(LocalSpec(workers=16, gpus=1)) == (4, 4, 1)
    assert shape(LocalSpec(workers=32)) == (8, 4, 2)
    assert shape(LocalSpec(workers=128, gpus=1)) == (8, 16, 1)
    assert shape(LocalSpec(workers=16, gpus=1, processes_per_gpu=1)) == (1, 16, 1)
    assert shape(LocalSpec(workers=2, gpus=1, processes_per_gpu=3)) == (3, 1, 1)
    assert shape(LocalSpec(workers=9, gpus=0)) == (9, 1, 0)
    assert LocalSpec(workers=16, gpus=1).group().resources["gpu"] == 1 / 4


def test_what_a_job_says_of_workers_counts_for_every_kind_of_this_machine():
    values = {"source": "a", "store": "b", "cluster": "gpus"}
    job = Job(**values, workers=3, gpus=1, memory_limit_bytes=2**30, processes_per_gpu=2)
    for spec in (LocalSpec(workers=9), CudaSpec(kind="cuda", workers=9)):
        found = spec.for_job(job)
        assert (type(found), found.workers, found.gpus, found.memory) == (type(spec), 3, 1, 2**30)
        assert found.processes_per_gpu == 2
        assert spec.for_job(Job(**values)) == spec
    with pytest.raises(
        UsageError, match=r"cluster 'gpus' with {'gpus': 0} is not usable, .*: gpus: Input should be greater than 0"
    ):
        CudaSpec(kind="cuda").for_job(Job(**values, gpus=0))
    shared = AddressSpec(kind="address", address="tcp://there:8786")
    assert shared.for_job(Job(**values)) == shared
    with pytest.raises(
        UsageError,
        match=r"^workers, memory, gpus, processes_per_gpu were given for the run, and cluster 'gpus' of kind address has",
    ):
        shared.for_job(job)


def test_a_machine_with_a_driver_asks_torch_how_many_gpus_there_are(monkeypatch):
    """Stands for torch on a machine with two GPUs."""
    monkeypatch.setattr("pipeline.extract.devices.may_have_gpus", lambda: True)
    monkeypatch.setattr("pipeline.extract.gpu.n_cuda_gpus", lambda: 2)
    assert shape(LocalSpec(workers=8)) == (2, 4, 2)


def test_the_workers_are_those_that_the_scheduler_names_just_now_whatever_the_client_asks_for_itself(client):
    """Dask's client asks every two seconds for no workers at all, and gives that answer to whoever asks meanwhile."""
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            client.sync(client._update_scheduler_info, n_workers=0)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert {len(worker_slots(client)) for _ in range(300)} == {2}
    finally:
        stop.set()
        thread.join()


def test_workers_that_would_get_no_image_are_not_started():
    groups = {"read": GroupSpec(roles=("read",), workers=3, threads=2), "all": GroupSpec(workers=4)}
    launches = {f"{name}-{i}": Launch(name, None, {}) for name, group in groups.items() for i in range(group.workers)}
    found = {n: [*needed(launches, groups, n)] for n in (None, 0, 1, 3, 9)}
    assert found[None] == found[9] == [*launches]
    assert found[0] == found[1] == ["read-0", "all-0"]
    assert found[3] == ["read-0", "read-1", "all-0", "all-1", "all-2"]
    with connect(LocalSpec(workers=2), n_images=1) as client:
        assert len(client.scheduler_info()["workers"]) == 1


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ("{kind: slurm, walltime: 1h, groups: {all: {workers: 1, memory: 1GB}}}", "needs dask-jobqueue, which is not installed"),
        ("{kind: cuda, gpus: 1}", "GPU"),
    ],
)
def test_a_run_that_cannot_start_its_cluster_creates_no_store(tmp_path, monkeypatch, entry, text):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    monkeypatch.setattr("pipeline.extract.devices.n_gpus", lambda: 0)
    (tmp_path / "cluster.yaml").write_text(f"clusters: {{x: {entry}}}\n")
    source = make_images(tmp_path / "in", 1, [(30, 40)])
    job = make_job({"source": str(source), "store": str(tmp_path / "f.zarr"), "cluster": "x"})
    with pytest.raises(UsageError, match=text):
        run_job(job, cluster_file=tmp_path / "cluster.yaml")
    assert not (tmp_path / "f.zarr").exists()
