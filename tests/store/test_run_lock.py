"""One process writes a run: a live owner is respected, a dead one's lock is taken over."""

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from flowray.config.errors import InputError
from flowray.store import run as module
from flowray.store.run import RunDirectory, RunLock

HOLD = """
import sys, time
from pathlib import Path
from flowray.store.run import RunDirectory, RunLock
with RunLock(RunDirectory(Path(sys.argv[1]))):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(tmp_path)


def lock_of_another_host(run: RunDirectory, age: float) -> None:
    file = run.path / ".lock"
    file.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": "1"}))
    os.utime(file, (time.time() - age,) * 2)


def test_live_owner_refused_dead_owner_taken_over(run):
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout.readline() == "held\n"
        with (
            pytest.raises(
                InputError, match=f"in use by process {owner.pid} on {socket.gethostname()}"
            ),
            RunLock(run),
        ):
            pass
        with pytest.raises(InputError, match="in use"):
            RunLock(run).refuse_if_held()
    finally:
        owner.kill()
        owner.wait()
    RunLock(run).refuse_if_held()
    with RunLock(run):
        assert json.loads((run.path / ".lock").read_text())["pid"] == os.getpid()
    assert list(run.path.iterdir()) == []


def test_a_reused_process_id_is_not_the_owner(run):
    (run.path / ".lock").write_text(
        json.dumps({"host": socket.gethostname(), "pid": os.getppid(), "started": "12"})
    )
    with RunLock(run):
        pass


@pytest.mark.parametrize("content", ["", "[]", '{"host": "x"}'])
def test_a_torn_lock_is_taken_over(run, content, monkeypatch):
    monkeypatch.setattr(module, "EMPTY_S", 0.2)
    (run.path / ".lock").write_text(content)
    with RunLock(run):
        pass


def test_a_lock_that_is_still_being_written_is_respected(run):
    """A file appears before its content where it cannot be linked into place."""
    (run.path / ".lock").touch()
    mine = json.dumps(RunLock(run)._me | {"host": "elsewhere", "pid": 1})
    writes = threading.Timer(0.3, lambda: (run.path / ".lock").write_text(mine))
    renews = threading.Timer(1.0, lambda: os.utime(run.path / ".lock"))
    writes.start()
    renews.start()
    with pytest.raises(InputError, match="process 1 on elsewhere"), RunLock(run):
        pass
    renews.join()


def test_many_at_once_and_one_gets_it(run):
    """Each holds it until its end, so that no second one can have it after the first."""
    owners = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run.path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    try:
        refused = [owner.stderr.read() for owner in owners if owner.stdout.readline() != "held\n"]
        assert len(refused) == 3
        assert all("in use by process" in text for text in refused)
    finally:
        for owner in owners:
            owner.kill()
            owner.communicate()


def test_another_hosts_lock_is_stale_without_renewals_and_held_with_them(run, monkeypatch):
    monkeypatch.setattr(module, "STALE_S", 2.0)
    lock_of_another_host(run, age=60)
    with RunLock(run):
        pass
    lock_of_another_host(run, age=0)
    began = time.monotonic()
    with RunLock(run):  # its owner died a moment ago: waited for, then taken over
        assert time.monotonic() - began > 1.5
    lock_of_another_host(run, age=0)
    renewal = threading.Timer(0.2, lambda: os.utime(run.path / ".lock"))
    renewal.start()
    with pytest.raises(InputError, match="process 1 on elsewhere"), RunLock(run):
        pass
    renewal.join()


def test_a_held_lock_is_renewed(run, monkeypatch):
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    with RunLock(run):
        os.utime(run.path / ".lock", (0, 0))
        deadline = time.monotonic() + 5
        while (run.path / ".lock").stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (run.path / ".lock").stat().st_mtime > 1


def test_a_run_directory_under_a_file_is_one_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"storage_path: .*cannot be written: Not a directory"):
        RunDirectory(tmp_path / "file" / "run").create()
