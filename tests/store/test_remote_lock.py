"""One run's place in a bucket is sent to by one machine at a time, whatever their disks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_servers import BUCKET, Failing, s3_server, use
from support import tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.data.remote_place import RemotePlace
from flowray.store import remote_lock
from flowray.store.checkpoint import list_checkpoints
from flowray.store.remote_lock import RemoteLock
from flowray.store.remote_run import RemoteRun
from flowray.store.run import RunDirectory
from flowray.train import loop
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import Halted
from flowray.train.uploading import Uploader

CPU = Group(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Failing]]:
    with s3_server() as found:
        yield found


@pytest.fixture
def place(
    server: tuple[str, Failing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> RemotePlace:
    use(server[0], monkeypatch)
    for name, value in {"RENEW_S": 0.2, "STALE_S": 5.0, "LOOK_S": 0.1, "SETTLE_S": 1.0}.items():
        monkeypatch.setattr(remote_lock, name, value)
    return RemotePlace(f"s3://{BUCKET}")


@pytest.fixture
def name(tmp_path: Path) -> str:
    return f"{BUCKET}/{tmp_path.name}/.lock"


def on(machine: str, place: RemotePlace, name: str) -> RemoteLock:
    """As a process of that machine has it."""
    lock = RemoteLock(place, name)
    lock._me |= {"machine": machine, "host": machine}
    return lock


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_live_owner_elsewhere_is_not_disturbed_and_lets_go(place, name):
    other = on("b", place, name)
    with on("a", place, name):
        with pytest.raises(InputError, match=r"^train.checkpoint_url: s3://.* in use by .* on a;"):
            other.__enter__()
        assert json.loads(place.read(name))["host"] == "a"
    assert place.read(name) is None
    with other:
        assert json.loads(place.read(name))["host"] == "b"


def test_who_waits_gets_it_when_the_owner_lets_go(place, name):
    patient = RemoteLock(place, name, patience_s=60)
    with on("a", place, name):
        waiting = threading.Thread(target=patient.__enter__)
        waiting.start()
        time.sleep(1)
        assert waiting.is_alive()
    waiting.join(60)
    assert json.loads(place.read(name))["id"] == patient._me["id"]
    patient.__exit__()


def test_a_dead_owners_is_taken_over_elsewhere_once_it_is_stale(place, name):
    place.write(name, on("a", place, name)._content())
    began = time.monotonic()
    with on("b", place, name) as taken:
        assert time.monotonic() - began >= remote_lock.STALE_S
        assert json.loads(place.read(name))["host"] == "b"
        assert not taken.lost


def test_a_dead_process_of_the_same_machine_is_not_waited_for(place, name, monkeypatch):
    code = f"""if True:
        from flowray.data.remote_place import RemotePlace
        from flowray.store.remote_lock import RemoteLock
        RemoteLock(RemotePlace("s3://{BUCKET}"), {name!r}).__enter__()
        import os
        os._exit(0)
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert place.read(name) is not None
    monkeypatch.setattr(remote_lock, "STALE_S", 1000.0)
    with RemoteLock(place, name) as taken:
        assert json.loads(place.read(name))["id"] == taken._me["id"]


class Careless(RemotePlace):
    """Storage that writes over what is there whatever it is told."""

    def create(self, name: str, content: bytes) -> bool:
        self.write(name, content)
        return True


@pytest.mark.parametrize("kind", [RemotePlace, Careless])
@pytest.mark.parametrize("left", [True, False])
def test_of_many_at_once_one_has_it(place, name, kind, left):
    """Of an empty place, or of one that a dead owner has left."""
    if left:
        place.write(name, on("dead", place, name)._content())
    place = kind(f"s3://{BUCKET}")
    locks = [on(f"m{n}", place, name) for n in range(4)]
    together = threading.Barrier(len(locks))
    held, refused = [], []

    def take(lock: RemoteLock) -> None:
        together.wait()
        try:
            held.append(lock.__enter__())
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("in use by" in why or "same moment" in why for why in refused)
    time.sleep(3 * remote_lock.RENEW_S)
    (winner,) = [lock for lock in held if not lock.lost]
    assert json.loads(place.read(name))["id"] == winner._me["id"]
    for lock in held:
        lock.__exit__()


def test_an_owner_that_was_taken_for_dead_sends_nothing_more(place, tmp_path):
    run = RunDirectory(tmp_path / "run")
    remote = RemoteRun(f"s3://{BUCKET}/{tmp_path.name}", run)
    said: list[str] = []
    name = remote.lock._name
    lost = "on b has taken it over"

    def sleep_for_long() -> None:
        with remote.lock, Uploader(remote, 3, 60.0, said.append) as uploader:
            uploader.check()
            place.write(name, on("b", place, name)._content())
            until(lambda: remote.lock.lost)
            for sends in (remote.send_rows, lambda: remote.send(run.checkpoint(1))):
                with pytest.raises(InputError, match=lost):
                    sends()
            uploader.check()

    with pytest.raises(Halted, match=lost):
        sleep_for_long()
    assert said == []
    assert json.loads(place.read(name))["host"] == "b"


def test_two_runs_from_two_disks(place, tmp_path, monkeypatch):
    """The second one ends with one line and has sent nothing."""
    monkeypatch.setattr(loop, "ORPHANED_S", 0.0)
    url = f"s3://{BUCKET}/{tmp_path.name}"
    one = tiny_recipe(tmp_path, **{"train.checkpoint_url": url, "train.sample_every": 100})
    two = override_recipe(one, {"storage_path": str(tmp_path / "elsewhere"), "optim.lr": 5e-4})
    runs = [RunDirectory(Path(each.storage_path) / each.name) for each in (one, two)]
    refused = []

    def meanwhile(row: dict[str, Any]) -> None:
        if not refused:
            with pytest.raises(InputError, match=r"checkpoint_url.* in use by process") as told:
                train(two, runs[1], CPU, lambda row: None)
            refused.append(str(told.value))

    train(one, runs[0], CPU, meanwhile)
    assert len(refused) == 1
    assert "\n" not in refused[0]
    assert not list_checkpoints(runs[1].checkpoints)
    sent = RemoteRun(url, runs[1])
    last = list_checkpoints(runs[0].checkpoints)[-1]
    assert (
        place.read(f"{sent._folder(one.train.steps)}/state.json")
        == (last / "state.json").read_bytes()
    )
    assert place.read(sent.lock._name) is None  # let go at the end
    train(two, runs[1], CPU, lambda row: None)  # and it goes on from there
    assert list_checkpoints(runs[1].checkpoints)[-1].name == last.name


def test_while_the_storage_does_not_answer_nothing_is_sent_and_the_lock_is_taken_later(
    place, server, tmp_path
):
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    run.metrics.write_text("{}\n")
    remote = RemoteRun(f"s3://{BUCKET}/{tmp_path.name}", run)
    failing = server[1]
    failing.every = 1
    try:
        with remote.lock:
            with pytest.raises(InputError, match="cannot be reached"):
                remote.send_rows()
            failing.every = 0
            assert place.read(remote.lock._name) is None
            remote.send_rows()
            assert place.read(remote.lock._name)
            assert place.read(f"{remote._root}/metrics.jsonl") == b"{}\n"
    finally:
        failing.every = 0
    assert place.read(remote.lock._name) is None
