"""Nodes of a Ray that this user starts by hand: a head, machines that join one, and their end."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from flowray.cluster.access import LOOPBACK, require_token, start_command, take_token
from flowray.cluster.address import PROBE_S, address_of, host_and_port, problem_at, session_at
from flowray.cluster.ports import AGENT, DASHBOARD, OF_A_HEAD, OF_A_NODE, chosen, value_of
from flowray.cluster.ray_private import psutil, token_headers
from flowray.cluster.session import new_folder
from flowray.config.errors import InputError, last_line
from flowray.config.progress import Progress

MARK = "FLOWRAY_NODE"  # in the environment of all that a node starts: by it they are found
FOLDERS = "frn-"  # begins the names of nodes' folders; not those that `session` clears away
START_S = 300.0  # for `ray start`, which gives itself 30 s for each of its parts
UP_S = 60.0  # for a head's services to answer
END_S = 10.0  # for processes that were asked to end
NO_DASHBOARD = ("false", "0", "no")


@dataclass(frozen=True)
class Node:
    """What runs on this machine. address: of the head; folder: of its files."""

    kind: str  # head or worker
    address: str
    folder: Path
    processes: tuple[Any, ...]  # of psutil


def start_head(
    host: str, port: int | None, options: Sequence[str], progress: Progress
) -> tuple[str, int]:
    """Start a head that others find at `host`; (its HOST:PORT, its dashboard's port, 0 for none).

    options: further ones of `ray start`. Ports that are not given are free ones, with a line for
    each that is not Ray's usual one. Its GCS, dashboard and job agent have answered for this very
    Ray when this returns; InputError where they do not, and nothing of it is left then.
    """
    _refuse_foreign(host)
    given = [*options, *([f"--port={port}"] if port else [])]
    remarks: list[str] = []
    ports = chosen(OF_A_HEAD, given, remarks.append)
    address = address_of(host, ports["--port"])
    dashboard = value_of(options, "--include-dashboard") not in NO_DASHBOARD
    fixed = ["--head", f"--node-ip-address={host}", f"--dashboard-host={LOOPBACK}"]
    with _starting("head", address, [*fixed, *_named(ports)], options, progress) as files:
        wanted = {"GCS": lambda: _gcs_problem(host, ports["--port"], files)}
        if dashboard:
            wanted["dashboard"] = lambda: _dashboard_problem(ports[DASHBOARD], files)
        wanted["job agent"] = lambda: _agent_problem(host, ports[AGENT])
        _wait_for(wanted, progress)
    for line in remarks:
        progress.say(line)
    return address, ports[DASHBOARD] if dashboard else 0


def join(address: str, options: Sequence[str], progress: Progress) -> None:
    """Make this machine a node of the cluster whose head is at HOST:PORT.

    InputError where no head of this Ray's version answers there to the token of this machine.
    """
    host, port = host_and_port(address)
    require_token(make=False)
    take_token()
    with progress.task(f"asking the head at {address}"):
        problem = problem_at(host, port)
    if problem:
        raise InputError(f"{address}: {problem}")
    ports = chosen(OF_A_NODE, options, lambda line: None)
    with _starting("worker", address, [f"--address={address}", *_named(ports)], options, progress):
        pass


def running(address: str | None = None) -> list[Node]:
    """The nodes of this user that run here, all or those of one head, with all their processes."""
    found: dict[str, set[Any]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            own = process.uids().real == os.getuid() and process.pid != os.getpid()
            if own and (mark := process.environ().get(MARK)):
                found.setdefault(mark, set()).add(process)
    nodes = []
    for mark, processes in found.items():
        kind, _, rest = mark.partition(" ")
        where, _, folder = rest.partition(" ")
        if kind in ("head", "worker") and where and address in (None, where):
            nodes.append(Node(kind, where, Path(folder), tuple(processes)))
    return sorted(nodes, key=lambda node: (node.kind == "head", node.address))


def end(node: Node) -> int:
    """End a node's processes, first asked and then made to, and remove its files; how many."""
    processes = set(node.processes)
    for process in node.processes:
        with suppress(psutil.Error):  # workers write titles over the environment they were given
            processes.update(process.children(recursive=True))
    processes = {process for process in processes if process.pid != os.getpid()}
    store = {process for process in processes if _name(process) == "gcs_server"}
    for part in (processes - store, store):  # a raylet takes its leave of the GCS
        _end(part)
    _remove(node.folder)
    return len(processes)


def _remove(folder: Path) -> None:
    """Remove a folder of ours: one that was named on the command line stays."""
    if folder.name.startswith(FOLDERS):
        shutil.rmtree(folder, ignore_errors=True)


def _end(processes: Collection[Any]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.terminate()
    for process in psutil.wait_procs(list(processes), timeout=END_S)[1]:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(list(processes), timeout=END_S)


def _name(process: Any) -> str:
    with suppress(psutil.Error):
        return str(process.name())
    return ""


@contextmanager
def _starting(
    kind: str, address: str, fixed: Sequence[str], options: Sequence[str], progress: Progress
) -> Iterator[Path]:
    """Run `ray start`; yields the folder of its files. Where it or the block fails, all ends.

    The folder is a new one, removed in the end, or the one that --temp-dir names, which stays.
    """
    given = value_of(options, "--temp-dir")
    folder = Path(given).absolute() if given else new_folder(FOLDERS)
    own = [] if given else [f"--temp-dir={folder}"]
    command, environment = start_command([*fixed, *own, *options])
    environment |= {MARK: f"{kind} {address} {folder}"} | (
        {} if given else {"TMPDIR": str(folder.parent)}
    )
    log = folder / f"{kind}-start.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # a file: daemons keep what they inherit, a pipe would not end
        with progress.task(f"starting Ray's {kind}"), log.open("w") as out:
            code = subprocess.run(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                timeout=START_S,
            ).returncode  # fmt: skip
        if code:
            said = last_line(log.read_text(errors="replace"))
            raise InputError(f"ray start: {said or 'it said nothing'}")
        yield folder
    except BaseException as error:
        with progress.task("ending what was started"):
            for node in running(address):
                if node.folder == folder:
                    end(node)
        _remove(folder)
        if given and isinstance(error, OSError):
            raise InputError(f"--temp-dir {folder}: {error.strerror}") from None
        if isinstance(error, subprocess.TimeoutExpired):
            raise InputError(f"ray start: not through in {START_S:.0f} s") from None
        raise


def _named(ports: dict[str, int]) -> list[str]:
    return [f"{name}={port}" for name, port in ports.items()]


def _refuse_foreign(host: str) -> None:
    """InputError where this machine does not have the address."""
    try:
        family, *_, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except socket.gaierror:
        raise InputError(f"--host {host}: no host has this name") from None
    try:
        with socket.socket(family) as probe:
            probe.bind(where)
    except OSError:
        own = ", ".join(sorted(_addresses()))
        raise InputError(
            f"--host {host}: not an address of this machine, which has {own}"
        ) from None


def _addresses() -> set[str]:
    every = (one for held in psutil.net_if_addrs().values() for one in held)
    return {one.address for one in every if one.family == socket.AF_INET}


def _wait_for(wanted: dict[str, Callable[[], str]], progress: Progress) -> None:
    """InputError, naming the first that fails, unless each finds nothing wrong within UP_S."""
    take_token()
    deadline = time.monotonic() + UP_S
    for name, problem_of in wanted.items():
        with progress.task(f"waiting for the head's {name}"):
            while problem := problem_of():
                if time.monotonic() > deadline:
                    raise InputError(
                        f"the head's {name} does not answer: {problem}; it was ended again"
                    )
                time.sleep(0.3)


def _session(files: Path) -> str:
    return (files / "session_latest").resolve().name


def _gcs_problem(host: str, port: int, files: Path) -> str:
    if problem := problem_at(host, port):
        return problem
    try:
        session = session_at(host, port)
    except grpc.RpcError as error:
        return str(error.details())
    return "" if session == _session(files) else f"another Ray ({session}) is at port {port}"


def _dashboard_problem(port: int, files: Path) -> str:
    try:
        session = json.loads(_get(f"http://{LOOPBACK}:{port}/api/version"))["session_name"]
    except (OSError, ValueError, KeyError) as error:
        return str(error)
    return "" if session == _session(files) else f"another Ray ({session}) is at port {port}"


def _agent_problem(host: str, port: int) -> str:
    """Jobs run through it. Its port was free before."""
    try:
        _get(f"http://{address_of(host, port)}/api/local_raylet_healthz")
    except OSError as error:
        return str(error)
    return ""


def _get(url: str) -> Any:
    headers = token_headers({})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(urllib.request.Request(url, headers=headers), timeout=PROBE_S) as answer:
        return answer.read()
