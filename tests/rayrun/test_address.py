"""RAY_ADDRESS names no cluster, TMPDIR no folder for a Ray: one line within seconds, or it
works.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest
import ray
from support import remarks

from flowray.cli import train, tune
from flowray.cluster import address, session
from flowray.cluster.address import host_and_port, problem_at, refuse_unreachable
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError


@pytest.fixture(autouse=True)
def no_token(tmp_path, monkeypatch):
    """Nobody's token: the questions are answered before one is needed."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@contextlib.contextmanager
def listening(say: bytes = b"") -> Iterator[int]:
    """A server that says this to whoever comes, and nothing more."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    kept.append(server.accept()[0])
                    kept[-1].sendall(say)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        for one in kept:
            one.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_dead_cluster_is_one_line_and_soon(tmp_path):
    where = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-m", "flowray.cluster", "check", "--storage", str(tmp_path)],
        env={**os.environ, "RAY_ADDRESS": where},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = remarks(done.stderr)
    assert line.startswith(f"error: RAY_ADDRESS={where}")
    assert "unset RAY_ADDRESS" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (train.main, ["quickstart", "name=x"]),
        (tune.main, ["sweeps/head.yaml"]),
        (tune.main, ["sweeps/head.yaml", "--plan"]),
    ],
)
def test_nothing_is_begun_for_a_dead_cluster(tmp_path, monkeypatch, main, argv):
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(InputError, match="RAY_ADDRESS"):
        main([*argv, f"storage_path={tmp_path / 'runs'}"])
    assert time.monotonic() - began < 30
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "given",
    [
        "10.0.0.9",
        "10.0.0.9:",
        ":6379",
        "10.0.0.9:x",
        "10.0.0.9:99999",
        "10.0.0.9:0",
        "::1",
        "/tmp/ray",
        "a/b:1",
    ],
)
def test_what_is_no_address_is_refused(given, monkeypatch):
    with pytest.raises(InputError, match="want HOST:PORT"):
        host_and_port(given)
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(InputError, match="RAY_ADDRESS"):
        refuse_unreachable()


def test_what_is_an_address():
    assert host_and_port("head.lan:6379") == ("head.lan", 6379)
    assert host_and_port("[fd00::1]:6380") == ("fd00::1", 6380)


@pytest.mark.parametrize(
    ("given", "submit"),
    [
        ("http://10.0.0.9:8266", "--address http://10.0.0.9:8266 "),
        ("ray://10.0.0.9:10001", "--address http://10.0.0.9:8265 "),
    ],
)
def test_the_addresses_of_other_clients_are_told_apart(given, submit, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", given)
    with pytest.raises(InputError, match="ray job submit") as told:
        refuse_unreachable()
    assert submit in str(told.value)


def test_auto_without_a_ray_is_refused(tmp_path, monkeypatch):
    """Also where an ended Ray left its address behind, which Ray itself would go on asking."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(address.services, "find_gcs_addresses", set)
    for left in (None, f"127.0.0.1:{free_port()}"):
        monkeypatch.setattr(address.services, "find_bootstrap_address", lambda _, left=left: left)
        with pytest.raises(InputError, match=r"RAY_ADDRESS=auto.*unset RAY_ADDRESS"):
            refuse_unreachable()


@pytest.mark.parametrize("given", ["", " ", "local"])
def test_no_cluster_is_meant(given, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", given)
    assert not in_cluster()


def test_a_name_that_nobody_has():
    assert "nosuchhost.invalid" in problem_at("nosuchhost.invalid", 6379)


def test_something_other_than_a_ray_listens(monkeypatch):
    monkeypatch.setattr(address, "PROBE_S", 1.0)
    for say in (b"", b"SSH-2.0-OpenSSH_9.2\r\n"):  # silent, or one that talks first
        with listening(say) as port:
            began = time.monotonic()
            assert problem_at("127.0.0.1", port)
            assert time.monotonic() - began < 10
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert problem_at("127.0.0.1", server.server_address[1])
        server.shutdown()


def test_a_ray_that_does_not_start_is_one_line_with_its_own_words(tmp_path):
    """What Ray makes of a variable that it cannot read; nothing of it stays."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    given = {
        "TMPDIR": str(folder),
        "RAY_GCS_SERVER_PORT": "any",
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
    }
    command = [sys.executable, "-m", "flowray.cluster", "check", "--storage", str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | given, capture_output=True, text=True, timeout=200
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = remarks(done.stderr)
    assert line.startswith("error: Ray did not start: ")
    assert "'any'" in line
    assert str(folder) in line
    assert list(folder.iterdir()) == []
    folder.rmdir()


# --- the folder of a local Ray


def used(monkeypatch, folder: Path | str) -> Path:
    """Where a local Ray's files go when TMPDIR says this."""
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    with session.local_folder() as made:
        assert made.is_dir()
        assert os.environ["TMPDIR"] == str(made.parent)  # what Ray's processes inherit
        place = made.parent
    assert os.environ["TMPDIR"] == str(folder)
    return place


def test_a_short_folder_is_taken_and_what_is_none_is_passed_over(tmp_path, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        assert used(monkeypatch, short) == Path(short)
        assert list(Path(short).iterdir()) == []
    long = tmp_path / ("d" * 80)
    long.mkdir()
    (tmp_path / "file").touch()
    for bad in (long, tmp_path / "gone", tmp_path / "file", "/proc"):
        assert used(monkeypatch, bad) == Path("/tmp")
    assert list(long.iterdir()) == []


def test_the_longest_folder_that_is_taken_leaves_room_for_the_longest_socket(monkeypatch):
    """By one byte: the folder's own name is 12 long with its slash."""
    room = 107 - len(str(session.SOCKET)) - 1 - 12
    base = tempfile.mkdtemp(dir="/tmp")
    fits = Path(base, "x" * (room - len(base) - 1))
    fits.mkdir()
    longer = Path(f"{fits}x")
    longer.mkdir()
    assert used(monkeypatch, fits) == fits
    assert used(monkeypatch, longer) == Path("/tmp")
    for folder in (fits, longer, Path(base)):
        folder.rmdir()


def test_a_disk_without_room_is_passed_over_and_no_room_anywhere_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "LEAST_FREE", 2**60)
    with pytest.raises(InputError, match=r"TMPDIR: .*MB free"), session.local_folder():
        pass


class _Ending(address.gcs_stubs.NodeInfoGcsServiceServicer):
    """A head that says it is alive and is gone at the next question."""

    def CheckAlive(self, request, context):
        return address.gcs_messages.CheckAliveReply(ray_version=ray.__version__)

    def GetAllNodeInfo(self, request, context):
        context.abort(grpc.StatusCode.UNAVAILABLE, "ending")


def test_a_head_that_ends_between_two_questions_is_one_line(monkeypatch):
    server = grpc.server(ThreadPoolExecutor(1))
    address.gcs_stubs.add_NodeInfoGcsServiceServicer_to_server(_Ending(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        with pytest.raises(InputError, match=str(port)):
            refuse_unreachable()
    finally:
        server.stop(0)
