"""What can be seen of Kubernetes without one: manifests against its schemas, and everything else against a stand-in for its API."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import kubernetes_validate
import pytest
import yaml
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT7

from pipeline.api import run_job
from pipeline.cluster import kubernetes
from pipeline.cluster.config import load_cluster
from pipeline.cluster.kinds.kubernetes import KubernetesSpec
from pipeline.cluster.kubernetes import PodCluster, kubernetes_cluster, pod_reasons
from pipeline.cluster.kubernetes_manifests import manifests
from pipeline.cluster.session import connect
from pipeline.config import make_job
from pipeline.errors import FeaturemapsError, UsageError
from pipeline.run.slots import worker_slots
from pipeline.run.workers import Fleet
from tests.conftest import content, make_images

GOLDEN = Path(__file__).parents[1] / "golden" / "manifests"
GROUPS = {
    "gpus": {
        "roles": ["extract"],
        "workers": 2,
        "threads": 4,
        "gpus": 1,
        "memory": "16 GiB",
        "node_selector": {"gpu": "a100"},
        "options": {"tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]},
    },
    "readers": {"roles": ["read"], "workers": 3, "threads": 2, "memory": 2_000_000_000, "environment": {"PRICE": "$5 (or $(6))"}},
}
SPEC = KubernetesSpec(
    kind="kubernetes",
    image="registry.example/featuremaps:0.1.0",
    namespace="maps",
    service_account="featuremaps",
    volumes=({"name": "data", "persistentVolumeClaim": {"claimName": "data"}},),
    volume_mounts=({"name": "data", "mountPath": "/data"},),
    groups=GROUPS,
)


# -- manifests -------------------------------------------------------------------------------------------------------------------


def schema(kind: str) -> tuple[dict, Registry]:
    """The schema of a custom resource as dask-kubernetes ships it; the parts that are Kubernetes' own are looked at below."""
    folder = files("dask_kubernetes") / "operator" / "customresources"
    found = yaml.safe_load((folder / f"{kind}.yaml").read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    templates = yaml.safe_load((folder / "templates.yaml").read_text())
    own = {f"io.k8s.api.core.v1.{name}": {"type": "object"} for name in ("PodSpec", "ServiceSpec", "PodTemplateSpec")}
    registry = Registry().with_resources(
        [
            (uri, Resource.from_contents(document, default_specification=DRAFT7))
            for uri, document in (
                ("python://dask_kubernetes/operator/customresources/templates.yaml", templates),
                ("python://k8s_crd_resolver/schemata/k8s-1.21.1.json", {"definitions": own}),
            )
        ]
    )
    return found, registry


def check(manifest: dict) -> None:
    """Against the custom resource, and every pod and service in it against Kubernetes' own schemas, strictly."""
    found, registry = schema(manifest["kind"].lower())
    jsonschema.Draft7Validator(found, registry=registry).validate(manifest)
    assert not set(manifest) - {"apiVersion", "kind", "metadata", "spec"}
    assert not set(manifest["spec"]) - {"cluster", "idleTimeout", "scheduler", "worker"}  # its schema lets unknown keys pass
    assert not set(manifest["spec"]["worker"]) - {"replicas", "spec"}
    parts = [("Pod", manifest["spec"]["worker"]["spec"])]
    if "scheduler" in manifest["spec"]:
        scheduler = manifest["spec"]["scheduler"]
        parts += [("Pod", scheduler["spec"]), ("Service", scheduler["service"])]
    for kind, spec in parts:
        for version in ("1.27", "1.33"):
            document = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "x"}, "spec": spec}
            kubernetes_validate.validate(document, version, strict=True)


def test_manifests_are_valid_and_those_that_were_looked_at():
    made = manifests(SPEC, "featuremaps-12345678")
    for manifest in made:
        check(manifest)
    text = yaml.safe_dump_all(made, sort_keys=False)
    assert text == (GOLDEN / "kubernetes.yaml").read_text()


def test_the_schemas_find_what_is_wrong():
    first, _ = manifests(SPEC, "x")
    with pytest.raises(jsonschema.ValidationError, match="'worker' is a required property"):
        check(first | {"spec": {key: value for key, value in first["spec"].items() if key != "worker"}})
    first["spec"]["worker"]["replicas"] = "two"
    with pytest.raises(jsonschema.ValidationError, match="'two' is not of type 'integer'"):
        check(first)
    first, _ = manifests(SPEC, "x")
    first["spec"]["worker"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="'resource' was unexpected"):
        check(first)


def test_a_group_that_is_called_default_comes_with_the_cluster():
    spec = KubernetesSpec(kind="kubernetes", image="i", groups={"a": {"memory": 1}, "default": {"memory": 2**30}})
    first, second = manifests(spec, "x")
    assert first["spec"]["worker"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "1024Mi"
    assert second["metadata"]["name"] == "x-a"


def test_a_group_whose_name_is_too_long_is_refused():
    spec = KubernetesSpec(kind="kubernetes", image="i", groups={"a" * 44: {"memory": 1}})
    with pytest.raises(
        UsageError, match=r"a name of 44 characters, and Kubernetes takes 63 .*nothing was started; .* at most 42"
    ):
        manifests(spec, "featuremaps-12345678")


def test_options_do_not_replace_what_other_keys_make(tmp_path):
    entry = {
        "kind": "kubernetes",
        "image": "i",
        "groups": {"a": {"memory": "1 GiB", "options": {"volumes": [], "hostNetwork": True}}},
    }
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump({"clusters": {"x": entry}}))
    with pytest.raises(UsageError, match="options has volumes, which would replace what the other keys make: use image"):
        load_cluster("x", tmp_path / "cluster.yaml")


def test_without_the_extra_the_command_that_brings_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_kubernetes.operator", None)
    with (
        pytest.raises(
            UsageError, match=r"needs dask-kubernetes, which is not installed .*pip install 'featuremaps\[kubernetes\]'"
        ),
        connect(SPEC),
    ):
        pass


def test_a_pod_that_runs_gives_no_reasons():
    assert list(pod_reasons({"metadata": {}, "status": {"containerStatuses": [{"state": {"running": {}}}]}})) == []
    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    pod = {
        "metadata": {"labels": {"dask.org/component": "worker"}},
        "status": {"containerStatuses": [{"state": {"waiting": waiting}}]},
    }
    assert list(pod_reasons(pod)) == ["worker: ImagePullBackOff: no such image"]


# -- the stand-in ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def operator(kubernetes_operator, monkeypatch):
    monkeypatch.setattr(kubernetes, "DELETE_TIMEOUT_S", 30.0)
    yield kubernetes_operator
    assert not kubernetes_operator.processes, "everything was deleted"
    kubernetes_operator.posted.clear()


def spec(**changes):
    groups = {
        "extract": {"roles": ["extract"], "threads": 2, "memory": "2 GiB"},
        "read": {"roles": ["read"], "memory": "2 GiB"},
    }
    return KubernetesSpec(**{"kind": "kubernetes", "image": "i", "groups": groups, "start_timeout_s": 60.0} | changes)


@pytest.mark.cluster
def test_a_run_on_pods_makes_the_same_store(operator, run, tmp_path):
    source = make_images(tmp_path / "source", 12, [(40, 50), (30, 60)])
    run(source, tmp_path / "here.zarr")
    with connect(spec(), name="featuremaps-1") as client:
        assert isinstance(client.cluster, PodCluster)
        assert client.cluster.counts() == {"extract": (1, 1), "read": (1, 1)}
        assert client.cluster.describe() == "extract: 1 of 1 worker; read: 1 of 1 worker"
        assert client.dashboard_link.startswith("http://127.0.0.1:")
        slots = sorted(worker_slots(client).values())
        assert slots == [(0, 2, 2 * 2**30, False, False, False), (1, 0, 2 * 2**30, False, True, False)]
        fleet = Fleet(client)
        assert (fleet.is_whole, fleet.slots) == (False, 2)
        fleet.check()
        job = make_job({"source": str(source), "store": str(tmp_path / "pods.zarr")})
        assert run_job(job, client).n_done == 12
    assert content(tmp_path / "pods.zarr") == content(tmp_path / "here.zarr")
    assert [document["kind"] for document in operator.posted] == ["DaskCluster", "DaskWorkerGroup"]
    for document in operator.posted:
        document.pop("status", None)
        check(document)


@pytest.mark.cluster
def test_what_a_dead_run_left_is_deleted_first_and_an_error_deletes_too(operator):
    operator.objects["daskclusters"]["x"] = {"metadata": {"name": "x", "namespace": "default"}}
    n_deleted = operator.n_deleted
    only = {"all": {"memory": "1 GiB"}}
    with pytest.raises(KeyError), kubernetes_cluster(spec(groups=only), name="x"):
        raise KeyError(operator.n_deleted)
    assert operator.n_deleted == n_deleted + 2
    assert [document["metadata"]["name"] for document in operator.posted] == ["x"]


def test_a_cluster_without_the_operator_is_said_so(operator, monkeypatch):
    operator.has_operator = False
    expected = r"did not start the Dask cluster x in namespace default \(TimeoutError: .*: nothing was computed, .*helm install"
    with pytest.raises(FeaturemapsError, match=expected), connect(spec(start_timeout_s=1.0), name="x"):
        pass
    assert not operator.objects["daskclusters"]


def test_pods_that_find_no_room_are_explained_by_kubernetes_itself(operator):
    operator.has_room = False
    expected = r"scheduler was not there within 10 s; scheduler: Unschedulable: 0/3 nodes are available"
    with pytest.raises(FeaturemapsError, match=expected), connect(spec(start_timeout_s=10.0), name="x"):
        pass


def test_who_may_not_create_clusters_is_told_what_to_check(operator):
    operator.is_allowed = False
    with (
        pytest.raises(FeaturemapsError, match=r"ServerError: daskclusters is forbidden.*that you may create DaskClusters"),
        connect(spec(), name="x"),
    ):
        pass


def test_a_cluster_that_cannot_be_deleted_is_said_with_the_command_that_does(operator, monkeypatch, caplog):
    monkeypatch.setattr(kubernetes, "DELETE_TIMEOUT_S", 0.1)
    operator.objects["daskclusters"]["x"] = {"metadata": {"name": "x", "namespace": "default"}}
    operator.is_stuck = True
    with (
        pytest.raises(FeaturemapsError, match=r"did not start the Dask cluster x .*TimeoutError: it is still there 0 s later"),
        kubernetes_cluster(spec(), name="x"),
    ):
        pass
    assert "DaskCluster x in namespace default was not deleted" in caplog.text
    assert "kubectl -n default delete daskcluster x" in caplog.text


def test_workers_are_not_there_while_the_scheduler_does_not_answer(operator):
    def sync(*_, **__):
        raise ConnectionRefusedError

    cluster = SimpleNamespace(sync=sync, scheduler_comm=SimpleNamespace(identity=None))
    pods = PodCluster(cluster, spec(), "x")
    assert pods.describe() == "extract: 0 of 1 worker; read: 0 of 1 worker"
    assert not pods.is_hopeless(99, everybody=False)
