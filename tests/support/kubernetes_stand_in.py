"""Stands for the API server of Kubernetes and for the operator of dask-kubernetes, neither of which can run here.

It speaks as much HTTP as kr8s and `KubeCluster` need, and starts what the manifests say as processes of this machine: what containers
would run is run, with their arguments and variables. Images, volumes, nodes, limits, service accounts and networks are not looked at.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import subprocess
import sys
import threading
import uuid
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.support.services import free_port


class Operator:
    """Objects by kind and name, and the processes that stand for containers."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict]] = {"daskclusters": {}, "daskworkergroups": {}, "pods": {}, "services": {}}
        self.posted: list[dict] = []
        self.n_deleted = 0
        self.processes: list[subprocess.Popen] = []
        self.ports = {"tcp-comm": free_port(), "http-dashboard": free_port()}
        self.has_operator, self.has_room, self.is_allowed, self.lacks_operator_kinds = True, True, True, False
        self.is_stuck = False

    def create(self, kind: str, document: dict) -> None:
        self.posted.append(document)
        self.objects[kind][document["metadata"]["name"]] = document
        if not self.has_operator:
            return
        if kind == "daskclusters":
            self._start_scheduler(document)
        else:
            self._start_workers(document["metadata"]["name"], document["spec"]["cluster"], document["spec"]["worker"])

    def _start_scheduler(self, document: dict) -> None:
        name = document["metadata"]["name"]
        labels = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
        document["status"] = {"phase": "Running"}
        self._pod(f"{name}-scheduler", labels)
        if not self.has_room:
            return
        (container,) = document["spec"]["scheduler"]["spec"]["containers"]
        arguments = list(container["args"])
        arguments[arguments.index("--port") + 1] = str(self.ports["tcp-comm"])
        arguments[arguments.index("--host") + 1] = "127.0.0.1"
        self._run([*arguments, "--dashboard-address", f"127.0.0.1:{self.ports['http-dashboard']}"], container["env"], {})
        service = document["spec"]["scheduler"]["service"]
        ports = [port | {"port": self.ports[port["name"]]} for port in service["ports"]]
        self.objects["services"][f"{name}-scheduler"] = {
            "metadata": {"name": f"{name}-scheduler", "namespace": "default", "labels": labels},
            "spec": service | {"type": "LoadBalancer", "ports": ports, "clusterIP": "127.0.0.1"},
            "status": {"loadBalancer": {"ingress": [{"ip": "127.0.0.1"}]}},
        }
        self._start_workers(f"{name}-default", name, document["spec"]["worker"])

    def _start_workers(self, group: str, cluster: str, worker: dict) -> None:
        (container,) = worker["spec"]["containers"]
        for _ in range(worker["replicas"]):
            name = f"{group}-worker-{uuid.uuid4().hex[:10]}"
            self._pod(name, {"dask.org/cluster-name": cluster, "dask.org/component": "worker"})
            given = {"DASK_WORKER_NAME": name, "DASK_SCHEDULER_ADDRESS": f"tcp://127.0.0.1:{self.ports['tcp-comm']}"}
            if self.has_room:
                self._run([word.replace("$(DASK_WORKER_NAME)", name) for word in container["args"]], container["env"], given)

    def _pod(self, name: str, labels: dict) -> None:
        unscheduled = {"reason": "Unschedulable", "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."}
        conditions = [{"type": kind, "status": "True"} for kind in ("Ready", "ContainersReady")]
        state = {"phase": "Running", "conditions": conditions, "containerStatuses": [{"state": {"running": {}}}]}
        if not self.has_room:
            state = {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False"} | unscheduled]}
        self.objects["pods"][name] = {"metadata": {"name": name, "namespace": "default", "labels": labels}, "status": state}

    def _run(self, arguments: list[str], variables: list[dict], given: dict[str, str]) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DASK_")} | given
        environment |= {variable["name"]: variable["value"].replace("$$", "$") for variable in variables}
        command = [str(Path(sys.executable).with_name(arguments[0])), *arguments[1:]]
        self.processes.append(subprocess.Popen(command, env=environment, start_new_session=True))

    def delete(self, kind: str, name: str) -> bool:
        if name not in self.objects[kind]:
            return False
        if self.is_stuck:
            return True
        del self.objects[kind][name]
        self.n_deleted += 1
        self.clear()
        for others in self.objects.values():
            others.clear()
        return True

    def clear(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        self.processes.clear()

    def answer(self, method: str, url: str, body: bytes) -> tuple[int, dict]:
        """Status and document."""
        if not self.is_allowed:
            return 403, {"kind": "Status", "code": 403, "message": "daskclusters is forbidden: user cannot create"}
        path, query = urlsplit(url).path.strip("/").split("/"), parse_qs(urlsplit(url).query)
        if path == ["version"]:
            return 200, {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
        if path in (["api"], ["api", "v1"]):
            resources = [{"name": n, "kind": k, "namespaced": True, "singularName": k.lower(), "verbs": []} for n, k in _CORE]
            return 200, {"versions": ["v1"], "resources": resources}
        if path == ["apis"]:
            return 200, {"groups": []}
        if self.lacks_operator_kinds and path[1] == "kubernetes.dask.org":
            return 404, {"message": "404 page not found"}
        kind, name = path[path.index("namespaces") + 2], path[path.index("namespaces") + 3 :]
        if method == "POST":
            self.create(kind, json.loads(body))
            return 201, json.loads(body)
        if method == "DELETE":
            return (200, {}) if self.delete(kind, name[0]) else (404, {"message": f"{kind} {name[0]!r} not found"})
        found = list(self.objects[kind].values())
        if name:
            document = self.objects[kind].get(name[0])
            return (200, document) if document else (404, {"message": f"{kind} {name[0]!r} not found"})
        for key, labels in ((key, item["metadata"].get("labels", {})) for key, item in list(self.objects[kind].items())):
            wanted = dict(part.split("=", 1) for text in query.get("labelSelector", []) for part in text.split(","))
            fields = dict(part.split("=", 1) for text in query.get("fieldSelector", []) for part in text.split(","))
            document = self.objects[kind][key]
            seen = {"metadata.name": key, "status.phase": document.get("status", {}).get("phase")}
            if not wanted.items() <= labels.items() or not fields.items() <= seen.items():
                found.remove(document)
        return 200, {"items": found, "metadata": {}}


_CORE = (("pods", "Pod"), ("services", "Service"), ("nodes", "Node"), ("namespaces", "Namespace"))


@contextlib.contextmanager
def kubernetes_api(folder: Path):
    """Serve on a port of this machine; yields the operator and a kubeconfig that leads to it."""
    operator = Operator()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, document = operator.answer(self.command, self.path, body)
            content = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = do_PATCH = handle_any  # noqa: N815 (the names that the base class looks for)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "default"}}],
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{server.server_address[1]}"}}],
        "users": [{"name": "me", "user": {"token": "none"}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    try:
        yield operator, folder / "kubeconfig"
    finally:
        operator.clear()
        server.shutdown()
        server.server_close()
        thread.join()
