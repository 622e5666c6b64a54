"""Servers on loopback for tests of remote shards: moto's S3 in a process of its own, and before it
a proxy that counts requests and fails now and then.
"""

from __future__ import annotations

import hashlib
import http.client
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import boto3
import pytest

from flowray.data import remote

BUCKET = "pictures"
KEYS = {
    "AWS_ACCESS_KEY_ID": "AKIAXXTESTONLY",
    "AWS_SECRET_ACCESS_KEY": "kept-to-itself",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class Failing:
    """Which requests fail, and all of them so far.

    every: each `every`-th one fails, in turn by status 500, by a cut connection, and by half a body
    (of a GET); 0: none. holds: requests (method, path) that get no answer. behind: the
    endpoint that never fails.
    """

    every: int = 0
    seen: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    holds: Callable[[str, str], bool] | None = None
    behind: str = ""

    def fetched(self, name: str = r"[^/]+\.tar") -> list[str]:
        """The keys of such a name that were read whole."""
        paths = (path.partition("?")[0] for method, path in self.seen if method == "GET")
        return [path for path in paths if re.search(rf"/{name}$", path)]


def s3_process() -> tuple[subprocess.Popen[bytes], int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    silent = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=silent, stderr=silent, env=os.environ | KEYS)
    for _ in range(600):
        with socket.socket() as trying:
            if not trying.connect_ex(("127.0.0.1", port)):
                return process, port
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("moto's server does not answer")


@contextmanager
def s3_server() -> Iterator[tuple[str, Failing]]:
    """The endpoint of an S3 with an empty BUCKET, through the proxy, and what that does."""
    process, port = s3_process()
    failing = Failing(behind=f"http://127.0.0.1:{port}")
    try:
        with served(partial(_Proxy, port, failing)) as proxy:
            endpoint = f"http://127.0.0.1:{proxy}"
            client(endpoint).create_bucket(Bucket=BUCKET)
            yield endpoint, failing
    finally:
        process.kill()
        process.wait()


def client(endpoint: str) -> Any:
    """A client that is not the one under test."""
    keys = {name.lower(): KEYS[name] for name in list(KEYS)[:2]}
    return boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)


def upload(endpoint: str, folder: Path, prefix: str) -> None:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        client(endpoint).upload_file(str(file), BUCKET, f"{prefix}/{name}")


def use(endpoint: str, patch: pytest.MonkeyPatch) -> None:
    """Have this process and those that it starts take `endpoint` for S3."""
    for name, value in (KEYS | {"AWS_ENDPOINT_URL": endpoint}).items():
        patch.setenv(name, value)
    patch.setattr(remote, "_FIRST_PAUSE_S", 0.01)
    remote._filesystem.cache_clear()


@contextmanager
def served(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[int]:
    """The port of a server on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Files(SimpleHTTPRequestHandler):
    """A plain web server of files, without a word."""

    def log_message(self, *args: Any) -> None:
        pass


class Hub(BaseHTTPRequestHandler):
    """The few answers of a model hub that a data set is read by: what is in a folder of the
    repository `org/set`, what is said of files, and their bytes.
    """

    protocol_version = "HTTP/1.1"

    def __init__(self, folder: Path, *rest: Any):
        self._folder = folder
        super().__init__(*rest)

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/datasets/org/set/tree/main"):
            folder = self._folder / path.removeprefix("/api/datasets/org/set/tree/main").lstrip("/")
            self._json(
                [self._row(each) for each in sorted(folder.iterdir())] if folder.is_dir() else None
            )
        elif path.startswith("/datasets/org/set/resolve/main/"):
            self._file(self._folder / path.removeprefix("/datasets/org/set/resolve/main/"))
        elif path.removesuffix("/revision/main") == "/api/datasets/org/set":
            self._json({"id": "org/set", "sha": "0" * 40})
        else:
            self._json(None)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        files = (self._folder / name for name in asked["paths"])
        self._json([self._row(file) for file in files if file.exists()])

    def _row(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self._folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        sha256, size = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        row = {"type": "file", "path": name, "oid": sha256[:40], "size": size}
        large = {"lfs": {"oid": sha256, "size": size, "pointerSize": 130}}
        return row | (large if path.suffix == ".tar" else {})

    def _file(self, path: Path) -> None:
        data, status = path.read_bytes() if path.is_file() else None, 200
        if data is not None and (
            asked := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        ):
            data, status = data[int(asked[1]) : int(asked[2] or len(data)) + 1], 206
        self._answer(data, status)

    def _json(self, found: Any) -> None:
        self._answer(None if found is None else json.dumps(found).encode())

    def _answer(self, data: bytes | None, status: int = 200) -> None:
        self.send_response_only(404 if data is None else status)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data or b"")


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    _kinds = itertools.count()

    def __init__(self, port: int, failing: Failing, *rest: Any):
        self._port, self._failing = port, failing
        super().__init__(*rest)

    def log_message(self, *args: Any) -> None:
        pass

    def _pass_on(self) -> None:
        seen, failing = self._failing.seen, self._failing
        seen.append((self.command, self.path))
        fails = failing.every and len(seen) % failing.every == 0
        kind = next(self._kinds) % 3 if fails else -1
        failing.failed += bool(fails)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if failing.holds and failing.holds(self.command, self.path):
            self.close_connection = True
            while failing.holds:
                time.sleep(0.02)
            return
        if kind == 0:
            self._answer(500, "now and then", {}, b"<Error><Code>InternalError</Code></Error>")
            return
        if kind == 1:
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        if kind == 2 and self.command == "GET":
            self._answer(answer.status, answer.reason, dict(answer.headers), data, len(data) // 2)
            self.close_connection = True
            return
        self._answer(answer.status, answer.reason, dict(answer.headers), data)

    def _answer(
        self, status: int, why: str, headers: dict[str, str], data: bytes, cut: int | None = None
    ) -> None:
        self.send_response_only(status, why)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        for name, value in headers.items():
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        with suppress(ConnectionError):  # who fetches ahead may have ended
            self.wfile.write(data[:cut])

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on
