"""A real Ray head with a token, and nodes that join it: started as users start them, ended with
all that they started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
JOB_S = 900  # a job, on a slow machine
GET = """
import sys, urllib.error, urllib.request
headers = {"Authorization": f"Bearer {sys.argv[2]}"} if sys.argv[2] else {}
try:
    request = urllib.request.Request(sys.argv[1], headers=headers)
    answer = urllib.request.urlopen(request, timeout=60)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status)
print(answer.read().decode(), end="")
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def agent_ports() -> list[str]:
    """`ray start` options.

    A raylet waits half a minute for each of its agents to name a port that was not given, and then
    dies.
    """
    names = (
        "metrics-export-port",
        "dashboard-agent-listen-port",
        "dashboard-agent-grpc-port",
        "runtime-env-agent-port",
    )
    return [f"--{name}={port}" for name, port in zip(names, free_ports(len(names)), strict=True)]


def own_address() -> str:
    """This machine's address on its network, without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


@dataclass
class Head:
    """A running head. folder holds: shared/ (FLOWRAY_STORAGE and where Ray was started),
    home/.ray/auth_token.
    """

    folder: Path
    host: str
    port: int
    dashboard: int
    metrics: int
    environment: dict[str, str]  # of whatever takes part in the cluster; marks what `kill_all` ends
    files: Path  # Ray's own
    inside: tuple[str, ...] = ()  # goes before every command: `ip netns exec NAME`

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    @property
    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    @property
    def as_driver(self) -> dict[str, str]:
        """The environment of a command that is pointed at this cluster."""
        return self.environment | {"RAY_ADDRESS": f"{self.host}:{self.port}"}

    def ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [*self.inside, str(BIN / "ray"), *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=JOB_S,
        )

    def submit(
        self, name: str, *command: str, options: tuple[str, ...] = ()
    ) -> subprocess.CompletedProcess:
        address = f"http://127.0.0.1:{self.dashboard}"
        return self.ray(
            "job", "submit", "--address", address, "--submission-id", name, *options, "--", *command
        )

    def command(self, module: str, *arguments: str) -> subprocess.CompletedProcess:
        """`python -m module`, on the head's machine, pointed at the cluster."""
        command = [*self.inside, sys.executable, "-m", module, *arguments]
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.as_driver,
            capture_output=True,
            text=True,
            timeout=JOB_S,
        )

    def get(self, path: str, token: str | None) -> tuple[int, str]:
        """(status, body) of the dashboard's answer, asked for on the head's host."""
        command = [
            *self.inside,
            sys.executable,
            "-S",
            "-c",
            GET,
            f"http://127.0.0.1:{self.dashboard}{path}",
            token or "",
        ]
        answer = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=JOB_S, check=True
        ).stdout
        status, _, body = answer.partition("\n")
        return int(status), body

    def alive(self) -> list[str]:
        """Addresses of the nodes that the head believes in, its own among them."""
        status, body = self.get("/api/v0/nodes", self.token)
        nodes = json.loads(body)["data"]["result"]["result"] if status == 200 else []
        return [node["node_ip"] for node in nodes if node["state"] == "ALIVE"]


@contextlib.contextmanager
def running_head(
    folder: Path,
    *options: str,
    host: str | None = None,
    inside: tuple[str, ...] = (),
    port: int | None = None,
    **environment: str,
) -> Iterator[Head]:
    """`python -m flowray.cluster head -- OPTIONS` for the block, in `folder`; gone with all that it
    started after it.

    environment: further variables, of the head and of all that joins it. Options without
    --num-cpus: two CPUs.
    """
    files = Path(tempfile.mkdtemp(prefix="frc-"))  # Ray's; short, for its sockets
    host = host or own_address()
    (dashboard, free), agents = free_ports(2), agent_ports()
    port = port or free
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "FLOWRAY_"))
    }
    given = kept | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "home" / ".ray" / "auth_token"),
        "RAY_agent_register_timeout_ms": "120000",
        "FLOWRAY_STORAGE": str(folder / "shared"),
        "FLOWRAY_CACHE": str(folder / "shared" / ".cache"),
        "FLOWRAY_CLUSTER_TEST": str(folder),
        **environment,
    }
    (folder / "shared").mkdir()
    own = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")  # the head sets them itself
    unset = {key: value for key, value in given.items() if key not in own}
    fixed = [
        f"--temp-dir={files}",
        f"--dashboard-port={dashboard}",
        *agents,
        "--object-store-memory=200000000",
    ]
    fixed += [] if any(option.startswith("--num-cpus") for option in options) else ["--num-cpus=2"]
    command = f"-m flowray.cluster head --port {port} --host {host} --".split()
    start = [*inside, sys.executable, *command, *fixed, *options]
    log = folder / "head.log"
    try:
        for _ in range(4):  # on a busy machine Ray gives up after 30 s that it lets nobody change
            # a file: the daemons keep what they inherit, and a pipe would never end
            with log.open("w") as out:
                streams = {"stdout": out, "stderr": out, "timeout": 600}
                code = subprocess.run(start, cwd=folder / "shared", env=unset, **streams).returncode
            if code == 0 or "timed out during startup" not in log.read_text():
                break
            kill_all(folder)
        assert code == 0, log.read_text()[-3000:]
        yield Head(
            folder, host, port, dashboard, int(agents[0].partition("=")[2]), given, files, inside
        )
    finally:
        kill_all(folder)
        shutil.rmtree(files, ignore_errors=True)


@dataclass(frozen=True)
class Node:
    """A node that joined a head; `mark` is what `kill_all` knows its processes by."""

    process: subprocess.Popen
    mark: Path
    log: Path

    @property
    def pids(self) -> list[int]:
        return offspring(f"FLOWRAY_CLUSTER_TEST={self.mark}")

    def kill(self) -> None:
        """At once and whole, with the workers on it."""
        kill_all(self.mark)
        self.process.wait(60)


@contextlib.contextmanager
def joined(head: Head, address: str | None = None, inside: tuple[str, ...] = ()) -> Iterator[Node]:
    """A further node of one CPU, gone after the block. inside: goes before its command; address:
    its own, for the head's host None.

    It is up when the block begins: of two that start at once on one host, each may take a port that
    the other was to have.
    """
    mark = head.folder / str(time.monotonic_ns())
    log = mark.with_suffix(".log")
    command = [
        *inside,
        str(BIN / "ray"),
        "start",
        f"--address={head.host}:{head.port}",
        f"--node-ip-address={address or head.host}",
    ]
    command += [
        "--num-cpus=1",
        "--object-store-memory=100000000",
        *agent_ports(),
        "--disable-usage-stats",
        "--block",
    ]
    with log.open("w") as out:
        environment = head.environment | {"FLOWRAY_CLUSTER_TEST": str(mark)}
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=out, cwd=head.folder
        )
    node = Node(process, mark, log)
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        yield node
    finally:
        node.kill()


def offspring(mark: str) -> list[int]:
    """Live processes whose environment holds `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes().split(b"\0")
                and int(folder.name) != os.getpid()
            ):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def kill_all(folder: Path) -> None:
    """End what the head in `folder` started, and what joined it."""
    for pid in offspring(f"FLOWRAY_CLUSTER_TEST={folder}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
