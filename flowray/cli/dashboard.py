"""`flowray.dashboard DIR`: TensorBoard and optuna-dashboard of a sweep on loopback, with the
links, until Ctrl-C.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flowray.cli.common import FINDINGS, GOOD
from flowray.cli.parser import Parser, whole_number
from flowray.cli.progress import ConsoleProgress
from flowray.config.errors import InputError, last_line
from flowray.config.paths import argument
from flowray.report.load import is_run, is_sweep

HOST = "127.0.0.1"  # neither server asks who is there: nobody else on the network may
START_S = 60.0  # until a server answers
# where a sweep under way leaves the address of Ray's own dashboard
RAY_LINK = Path(".ray") / "dashboard"
INSTALL = (
    "optuna-dashboard is not installed; to see the study and the trials' pictures: pip install"
    " 'flowray[dashboard]'"
)


@dataclass(frozen=True)
class Server:
    """A viewer of the folder: its name, what to run, where it will be."""

    name: str
    command: tuple[str, ...]
    port: int

    @property
    def link(self) -> str:
        return f"http://{HOST}:{self.port}/"


def _parser() -> Parser:
    parser = Parser(
        prog="flowray.dashboard",
        description=(
            "Serve a sweep (or a run) on 127.0.0.1 while it trains or afterwards: TensorBoard with"
            " a row of HParams for every trial, optuna-dashboard on the study with the trials'"
            " pictures. Prints the links, Ray's own too; Ctrl-C ends it."
        ),
    )
    parser.add_argument(
        "dir",
        metavar="DIR",
        type=argument,
        help="a folder that flowray.tune or flowray.train wrote",
    )
    parser.add_argument(
        "--port",
        type=whole_number(1, 65535),
        default=6006,
        help="the first port to try; default %(default)s",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the links and the commands; start nothing"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="the links as one JSON object on stdout, the rest on stderr",
    )
    return parser


def servers(folder: Path, first_port: int) -> list[Server]:
    """TensorBoard, and for a sweep optuna-dashboard where it is installed, each on a free port
    from `first_port` on.
    """
    board = free_port(first_port)
    logdir = (
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        HOST,
        "--port",
        str(board),
    )
    found = [Server("TensorBoard", (*logdir, "--reload_interval", "15"), board)]
    study, program = folder / "study.journal", optuna_dashboard()
    if study.is_file() and program:
        port = free_port(board + 1)
        command = (
            program,
            str(study),
            "--host",
            HOST,
            "--port",
            str(port),
            "--artifact-dir",
            str(folder / "artifacts"),
        )
        found.append(Server("optuna-dashboard", command, port))
    return found


def optuna_dashboard() -> str | None:
    """The program beside this Python, or on the path; None where it is not installed."""
    return shutil.which(
        "optuna-dashboard",
        path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    )


def free_port(first: int) -> int:
    """The first free port of a hundred from `first` on."""
    for port in range(first, min(first + 100, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise InputError(f"--port {first}: no free port among the next 100; type another --port")


def ray_link(folder: Path) -> str | None:
    """Ray's own dashboard: the cluster's that RAY_ADDRESS names, or that of the sweep's local
    Ray while it runs.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        return address
    try:
        kept = (folder / RAY_LINK).read_text().strip()
    except OSError:
        return None
    host, _, port = kept.removeprefix("http://").rpartition(":")
    return kept if port.isdigit() and answers(host, int(port)) else None


def answers(host: str, port: int) -> bool:
    """Whether a server listens there."""
    try:
        with socket.create_connection((host, port), timeout=0.5):
            return True
    except OSError:
        return False


def main(argv: list[str]) -> int:
    """Serve until Ctrl-C (0); 1: a server ended by itself. InputError where one does not start."""
    args = _parser().parse_args(argv)
    folder: Path = args.dir.absolute()
    if not (is_sweep(folder) or is_run(folder)):
        raise InputError(
            f"{args.dir}: neither a sweep (it has sweep.yaml) nor a run (config.yaml); give a"
            " folder that flowray wrote"
        )
    chosen = servers(folder, args.port)
    progress = ConsoleProgress()
    if is_sweep(folder) and optuna_dashboard() is None:
        progress.say(INSTALL)
    links = {server.name: server.link for server in chosen}
    if ray := ray_link(folder):
        links["Ray"] = ray
    if args.plan:
        _show(links, args.json)
        for server in chosen:
            print(" ".join(server.command), file=sys.stderr if args.json else sys.stdout)
        return GOOD
    with ExitStack() as running:
        started = [running.enter_context(serving(server)) for server in chosen]
        for one in started:
            with progress.task(f"starting {one.server.name}"):
                one.wait_until_it_answers()
        try:
            _show(links, args.json)
            progress.say("Ctrl-C ends it")
            while all(one.process.poll() is None for one in started):
                time.sleep(0.5)
        except KeyboardInterrupt:
            return GOOD
        ended = next(one for one in started if one.process.poll() is not None)
        progress.say(f"{ended.server.name} ended by itself: {ended.last_words()}")
        return FINDINGS


@dataclass(frozen=True)
class Started:
    """A server's process, and the file that takes what it says."""

    server: Server
    process: subprocess.Popen[bytes]
    log: IO[bytes]

    def wait_until_it_answers(self) -> None:
        """InputError where it ends before it answers, or does not in START_S."""
        until = time.monotonic() + START_S
        while not answers(HOST, self.server.port):
            if self.process.poll() is not None:
                raise InputError(
                    f"{self.server.name} did not start: {self.last_words()}; type"
                    f" {' '.join(self.server.command)}"
                )
            if time.monotonic() > until:
                raise InputError(
                    f"{self.server.name} does not answer after {START_S:.0f} s; type"
                    f" {' '.join(self.server.command)}"
                )
            time.sleep(0.1)

    def last_words(self) -> str:
        """The last line that it said."""
        self.log.seek(0)
        return last_line(self.log.read().decode(errors="replace")) or "it said nothing"


@contextmanager
def serving(server: Server) -> Iterator[Started]:
    """The server's process for the block."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            server.command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield Started(server, process, log)
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _show(links: Mapping[str, str], as_json: bool) -> None:
    if as_json:
        print(json.dumps(links), flush=True)
        return
    for name, link in links.items():
        print(f"{name:<17} {link}", flush=True)
