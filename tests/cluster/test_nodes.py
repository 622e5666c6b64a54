"""Heads and nodes started by hand, beside other Rays and other programs, and their end."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from ray_nodes import BIN
from support import remarks

from flowray.cli.cluster import main
from flowray.cluster import nodes, ports
from flowray.cluster.nodes import MARK, running
from flowray.config.errors import InputError

SMALL = ["--", "--num-cpus=1", "--object-store-memory=100000000"]


@contextlib.contextmanager
def taken(port: int = 0, host: str = "127.0.0.1") -> Iterator[int]:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# --- ports


def test_ports_that_are_taken_are_passed_over():
    with taken() as port:
        assert not ports.is_free(port)
        lines: list[str] = []
        found = ports.chosen({"--port": port, "--other": port, "--any": 0}, [], lines.append)
        assert len({port, *found.values()}) == 4
        assert all(map(ports.is_free, found.values()))
        assert [f"--port={found['--port']}" in line for line in lines] == [True, False]
        assert str(port) in lines[0]
    assert ports.is_free(port)


def test_no_port_of_rays_workers_is_taken():
    found = ports.chosen(dict.fromkeys("abc", 10001), [], lambda line: None)
    assert not [port for port in found.values() if port in ports.WORKERS]


@pytest.mark.parametrize("form", ["{0}={1}", "{0} {1}"])
def test_a_port_that_was_typed_is_kept_or_refused(form):
    with taken() as port:
        typed = form.format("--port", port).split()
        assert ports.value_of(["--port=1", *typed, "--portal=2"], "--port") == str(port)
        with pytest.raises(InputError, match=f"--port={port}: taken"):
            ports.chosen({"--port": 6379}, typed, lambda line: None)
    assert ports.chosen({"--port": 6379}, typed, lambda line: None) == {"--port": port}
    with pytest.raises(InputError, match="--port=x: want a port"):
        ports.chosen({"--port": 6379}, ["--port=x"], lambda line: None)


# --- what is refused before anything starts


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["head", "--host", "192.0.2.77"], "--host 192.0.2.77"),  # TEST-NET-1: nobody has it
        (["head", "--host", "nosuchhost.invalid"], "nosuchhost.invalid"),
        (["head", "nonsense"], "nonsense"),
        (["head", "--", "--block"], "--block"),
        (["head", "--", "--dashboard-port", "99999"], "--dashboard-port=99999"),
        (["head", "--", "--temp-dir=/dev/null/x"], "--temp-dir /dev/null/x"),
        (["join", "10.0.0.9"], "10.0.0.9"),
        (["stop", "192.0.2.77:6379"], "192.0.2.77:6379"),
    ],
)
def test_mistakes_are_a_line(home, argv, named):
    with pytest.raises(InputError) as told:
        main(argv)
    assert named in str(told.value)


def test_who_joins_needs_the_heads_token_and_makes_none(home):
    with taken() as port:
        with pytest.raises(InputError, match="auth_token: no token"):
            main(["join", f"127.0.0.1:{port}"])
        assert not (home / ".ray").exists()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text("f" * 64)
    with pytest.raises(InputError, match=f"127.0.0.1:{port}: nothing listens there"):
        main(["join", f"127.0.0.1:{port}"])


# --- their end


def test_stop_ends_what_is_marked_and_its_children_and_nothing_else(
    tmp_path, home, monkeypatch, capsys
):
    """Processes with the mark, one of them deaf to SIGTERM; the child of one lost the mark."""
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    child = (
        "import os, subprocess, time; subprocess.Popen(['sleep', '100'], env={}); time.sleep(100)"
    )
    monkeypatch.setattr(nodes, "END_S", 1.0)
    files = tmp_path / f"{nodes.FOLDERS}files"
    files.mkdir()
    mine = os.environ | {MARK: f"head 192.0.2.9:1 {files}"}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=mine) for code in (deaf, child, "pass")
    ]
    other = os.environ | {MARK: f"worker 192.0.2.8:1 {tmp_path}"}
    foreign = os.environ | {MARK: "1"}  # a variable of that name that is nobody's node
    kept = [subprocess.Popen(["sleep", "100"], env=env) for env in (other, os.environ, foreign)]
    try:
        started[-1].wait(60)
        deadline = time.monotonic() + 60
        while len(nodes.psutil.Process(started[1].pid).children()) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (found,) = running("192.0.2.9:1")
        assert {process.pid for process in found.processes} == {one.pid for one in started[:2]}
        assert main(["stop", "192.0.2.9:1"]) == 0
        said = capsys.readouterr()
        assert "ended the head of 192.0.2.9:1: 3 processes" in said.out
        assert "ending the head of 192.0.2.9:1" in said.err  # the deaf one takes its time
        assert not [one for one in started if nodes.psutil.pid_exists(one.pid)]
        assert not files.exists()
        assert [one.poll() for one in kept] == [None, None, None]
        assert main(["stop", "192.0.2.8:1"]) == 0
        assert "192.0.2.8:1" in capsys.readouterr().out
        assert not nodes.psutil.pid_exists(kept[0].pid)
        assert [one.poll() for one in kept[1:]] == [None, None]
        assert tmp_path.exists()  # no folder of a node's: whoever set the variable, it stays
    finally:
        for one in (*started, *kept):
            one.kill()
            one.wait()


# --- the real thing


def command(
    *argv: str, before: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*before, sys.executable, "-m", "flowray.cluster", *argv],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def printed(done: subprocess.CompletedProcess, word: str) -> str:
    (line,) = [line for line in done.stdout.splitlines() if line.split()[:1] == [word]]
    return line.split(maxsplit=1)[1]


@pytest.mark.cluster
@pytest.mark.timeout(900)
def test_two_heads_side_by_side(home, monkeypatch):
    """Each with its own ports; a job, a node and an end by the lines that the second one
    printed.
    """
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    ours: list[str] = []
    try:
        heads = [command("head", *SMALL) for _ in range(2)]
        for head in heads:
            assert head.returncode == 0, head.stderr
            ours.append(printed(head, "stop").split()[-1])
        assert len(set(ours)) == 2
        assert {node.address for node in running()} >= set(ours)
        first, second = ours

        asks = (
            "import ray; ray.init(logging_level=40); print(ray.get_runtime_context().gcs_address)"
        )
        submit = printed(heads[1], "submit").partition(" -- ")[0]
        job = f"{submit} -- python -c {shlex.quote(asks)}"
        said = subprocess.run(job, shell=True, capture_output=True, text=True, timeout=300)
        assert said.returncode == 0, said.stdout + said.stderr
        assert f":{second.rpartition(':')[2]}" in said.stdout

        refused = command("head", "--port", first.rpartition(":")[2], *SMALL)
        assert (refused.returncode, len(refused.stderr.splitlines()[-1:])) == (2, 1)
        assert "taken" in refused.stderr

        wrong = home / "wrong"
        wrong.write_text("f" * 64)
        turned_away = command("join", second, *SMALL, RAY_AUTH_TOKEN_PATH=str(wrong))
        assert turned_away.returncode == 2
        (line,) = remarks(turned_away.stderr)
        assert "token" in line
        pointed = command(
            "check", "--storage", str(home), RAY_ADDRESS=second, RAY_AUTH_TOKEN_PATH=str(wrong)
        )
        assert pointed.returncode == 2
        assert "token" in pointed.stderr

        outside = ["unshare", "-p", "-f", "--mount-proc"]  # a machine on which no node runs
        if subprocess.run([*outside, "true"], capture_output=True).returncode == 0:
            stranger = command("check", "--storage", str(home), RAY_ADDRESS=second, before=outside)
            assert stranger.returncode == 2
            assert "no node of that cluster" in stranger.stderr.splitlines()[-1]

        joined = command("join", second, *SMALL)
        assert joined.returncode == 0, joined.stderr
        checked = command("check", "--json", "--storage", str(home / "new"), RAY_ADDRESS=second)
        assert len(json.loads(checked.stdout)["nodes"]) == 2, checked.stderr
        assert not (home / "new").exists()
        assert not list(home.glob(".shared-*"))

        files = [node.folder for node in running(second)]
        assert len(files) == 2
        ended = command("stop", second)
        assert ended.returncode == 0
        assert running(second) == []
        assert not any(folder.exists() for folder in files)
        alive = command("check", "--json", "--storage", str(home), RAY_ADDRESS=first)
        assert len(json.loads(alive.stdout)["nodes"]) == 1, alive.stderr
        gone = command("check", "--storage", str(home), RAY_ADDRESS=second)
        assert gone.returncode == 2
        assert "nothing listens" in gone.stderr
    finally:
        for address in ours:
            command("stop", address)
    assert not [node for node in running() if node.address in ours]


@pytest.mark.cluster
@pytest.mark.timeout(300)
def test_a_head_that_does_not_come_up_leaves_nothing(home):
    before = {path.name for path in Path("/tmp").glob(f"{nodes.FOLDERS}*")}
    there = len(running())
    done = command("head", "--", "--num-cpu=1")
    assert done.returncode == 2
    assert "--num-cpu" in done.stderr.splitlines()[-1]
    assert {path.name for path in Path("/tmp").glob(f"{nodes.FOLDERS}*")} == before
    assert len(running()) == there
    assert shutil.which("ray", path=str(BIN))
