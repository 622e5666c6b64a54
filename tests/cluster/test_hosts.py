"""Several hosts for real, as network namespaces joined by a cable (veth): a run over both, and
the cable pulled.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray_nodes
from ray_nodes import Head, Node, running_head
from support import tiny_recipe

from flowray.config.load import dump_recipe, load_recipe
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SLOW_S = 600  # for what takes seconds where nothing else runs
LONG = [
    "train.steps=600",
    "train.probe_every=600",
    "train.sample_every=600",
    "train.checkpoint_every=50",
]


@dataclass(frozen=True)
class Host:
    """A network namespace with one cable, and what else makes a host: a name, an /etc/hosts as
    Debian writes it.
    """

    name: str
    address: str
    names: Path

    def inside(self, *mounts: str) -> tuple[str, ...]:
        """Goes before a command that is to run there. mounts: shell lines, seen there alone."""
        script = " && ".join(
            [
                f"hostname {self.name}",
                f"mount --bind {self.names} /etc/hosts",
                *mounts,
                'exec "$0" "$@"',
            ]
        )
        return ("ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", "sh", "-c", script)

    def cable(self, state: str) -> None:
        """`up` or `down`. Both ends lose the carrier."""
        ip("-n", self.name, "link", "set", "cable", state)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[tuple[Host, Host]]:
    folder, mark = tmp_path_factory.mktemp("hosts"), os.getpid() % 60000
    pair = []
    for number in (1, 2):
        name, address = f"fr{mark}-{number}", f"10.{200 + mark % 50}.{mark // 50 % 250}.{number}"
        names = folder / name
        names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        pair.append(Host(name, address, names))
    try:
        try:
            for host in pair:
                ip("netns", "add", host.name)
            ip(
                "-n",
                pair[0].name,
                "link",
                "add",
                "cable",
                "type",
                "veth",
                "peer",
                "name",
                "cable",
                "netns",
                pair[1].name,
            )
            for host in pair:
                ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "cable")
                ip("-n", host.name, "link", "set", "lo", "up")
                host.cable("up")
            subprocess.run([*pair[0].inside(), "true"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(
                "this machine gives no network namespaces (ip netns, unshare):"
                f" {getattr(error, 'stderr', '') or error}"
            )
        yield pair[0], pair[1]
    finally:
        for host in pair:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


@pytest.fixture(scope="module")
def head(hosts, tmp_path_factory) -> Iterator[Head]:
    """On the first host, with one CPU: two workers have to lie on different hosts."""
    here = hosts[0]
    with running_head(
        tmp_path_factory.mktemp("cluster"), "--num-cpus=1", host=here.address, inside=here.inside()
    ) as head:
        yield head


@pytest.fixture(scope="module")
def tiny(head) -> Path:
    path = head.shared / "tiny.yaml"
    path.write_text(
        dump_recipe(
            tiny_recipe(head.shared / "made", storage_path="runs", **{"train.log_every": 1})
        )
    )
    return path


def alive(head: Head) -> set[str]:
    """Addresses of the nodes that the head believes in; not to be asked all the time."""
    time.sleep(1)
    return set(head.alive())


def wait_for(
    what: Callable[[], bool], seconds: float, told: Callable[[], str] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, told()
        time.sleep(0.1)


@contextlib.contextmanager
def joined(head: Head, host: Host, *mounts: str) -> Iterator[Node]:
    """A node on `host` with a disk of its own for what Ray keeps; it is gone after the block.
    mounts: shell lines, seen there alone.
    """
    own = Path(tempfile.mkdtemp(dir=head.folder))
    with ray_nodes.joined(
        head, host.address, host.inside(f"mount --bind {own} {head.files}", *mounts)
    ) as node:
        yield node
    wait_for(lambda: alive(head) == {head.host}, SLOW_S)  # the next test is to see its own


def rows_of(head: Head, name: str) -> list[dict]:
    path = head.shared / "runs" / name / "metrics.jsonl"
    return read_rows(path) if path.exists() else []


def start_run(
    head: Head, tiny: Path, name: str, *overrides: str, **environment: str
) -> subprocess.Popen:
    command = [
        *head.inside,
        sys.executable,
        "-m",
        "flowray.train",
        str(tiny),
        f"name={name}",
        "resources.num_workers=2",
        *overrides,
    ]
    with (head.folder / f"{name}.log").open("w") as out:
        return subprocess.Popen(
            command, env=head.as_driver | environment, stdout=out, stderr=out, cwd=head.folder
        )


def told(head: Head, name: str) -> str:
    return (head.folder / f"{name}.log").read_text()


def test_ddp_over_two_hosts_is_one_run(head, hosts, tiny):
    """Two ranks on two hosts, each with an address of its own and a name that its /etc/hosts
    leads astray.
    """
    with joined(head, hosts[1]):
        wait_for(lambda: alive(head) == {host.address for host in hosts}, SLOW_S)
        run = start_run(head, tiny, "both")
        assert run.wait(SLOW_S) == 0, told(head, "both")
    # The Train API knows where the workers were.
    (api,) = json.loads(head.get("/api/train/v2/runs/v1", head.token)[1])["train_runs"]
    workers = api["attempts"][-1]["workers"]
    assert {worker["node_ip"] for worker in workers} == {host.address for host in hosts}
    alone = load_recipe(str(tiny), ["name=alone", f"storage_path={head.shared / 'runs'}"]).recipe
    train(
        alone, RunDirectory(head.shared / "runs" / "alone"), Group.current("cpu"), lambda row: None
    )
    one, two = rows_of(head, "alone"), rows_of(head, "both")
    assert [row["step"] for row in two] == [row["step"] for row in one] == list(range(1, 13))
    for mine, theirs in zip(one, two, strict=True):
        for key in ("loss/flow", "loss/kl", "loss/total", "grad/total", "std/mean"):
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5, abs=1e-6), (key, mine["step"])


def same_run(before: list[dict], after: list[dict]) -> None:
    """Every step once, and those that were trained again came out as they had before."""
    assert [row["step"] for row in after] == list(range(1, 601))
    for first, again in zip(before, after, strict=False):
        for key in ("loss/flow", "loss/kl", "loss/total", "grad/total"):
            assert first[key] == again[key], (key, first["step"])


@contextlib.contextmanager
def ended(run: subprocess.Popen) -> Iterator[None]:
    """No run outlives its test."""
    try:
        yield
    finally:
        run.kill()
        run.wait(60)


def test_a_host_that_is_cut_off_and_comes_back(head, hosts, tiny):
    """A short cut is sat out.

    After a long one the run waits for a node and goes on from its checkpoint.
    """
    with joined(head, hosts[1]) as node:
        wait_for(lambda: len(alive(head)) == 2, SLOW_S)
        run = start_run(head, tiny, "cut", *LONG)
        with ended(run):
            wait_for(
                lambda: len(rows_of(head, "cut")) > 60 or run.poll() is not None,
                SLOW_S,
                lambda: told(head, "cut"),
            )
            hosts[1].cable("down")
            time.sleep(3)
            stood = len(rows_of(head, "cut"))
            time.sleep(1)
            assert len(rows_of(head, "cut")) == stood, "the ranks do not talk over the cable"
            hosts[1].cable("up")
            wait_for(
                lambda: len(rows_of(head, "cut")) > stood + 10, SLOW_S, lambda: told(head, "cut")
            )
            hosts[1].cable("down")
            try:
                before = rows_of(head, "cut")
                wait_for(lambda: alive(head) == {head.host}, SLOW_S)
            finally:
                hosts[1].cable("up")
            node.process.wait(SLOW_S)  # it sees that it was given up, and ends
            assert run.poll() is None, told(head, "cut")
            with joined(head, hosts[1]):
                assert run.wait(SLOW_S) == 0, told(head, "cut")
    assert 60 < len(before) < 600
    same_run(before, rows_of(head, "cut"))


def test_a_host_that_does_not_come_back(head, hosts, tiny):
    """The run ends after a while and says why; what is left of the cluster can go on with it."""
    with joined(head, hosts[1]):
        wait_for(lambda: len(alive(head)) == 2, SLOW_S)
        run = start_run(
            head,
            tiny,
            "lost",
            *LONG,
            "resources.max_failures=1",
            RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
        )
        with ended(run):
            wait_for(
                lambda: len(rows_of(head, "lost")) > 60 or run.poll() is not None,
                SLOW_S,
                lambda: told(head, "lost"),
            )
            hosts[1].cable("down")
            try:
                before = rows_of(head, "lost")
                assert run.wait(SLOW_S) == 1, told(head, "lost")
            finally:
                hosts[1].cable("up")
    line = told(head, "lost").splitlines()[-1]
    assert line.startswith(
        f"error: {head.shared / 'runs' / 'lost'}: no room for 2 worker(s) of 1 CPU: 1 CPUs"
    )
    assert "--resume" in line
    again = head.command("flowray.train", str(tiny), "name=lost", *LONG, "--resume")  # one worker
    assert again.returncode == 0, again.stderr
    after = rows_of(head, "lost")
    assert [row["step"] for row in after] == list(range(1, 601))
    assert after[:50] == before[:50]


def test_more_workers_than_the_hosts_hold_are_refused_at_once(head, tiny):
    """Whatever storage hosts might have that are still to come: no autoscaler will bring them."""
    run = start_run(head, tiny, "early")
    assert run.wait(SLOW_S) == 2, told(head, "early")
    line = told(head, "early").splitlines()[-1]
    assert line.startswith("error: resources.num_workers: asked 2 worker(s)")
    assert "resources.num_workers=1" in line
    assert "nodes" in line
    assert not (head.shared / "runs" / "early").exists()


def test_a_host_that_is_replaced_by_one_with_another_disk_is_refused(head, hosts, tiny):
    """The new one was not there when the nodes were asked.

    The refusal names path and node, and the run goes on where the disk is right.
    """
    with joined(head, hosts[1]):
        run = start_run(head, tiny, "late", *LONG)
        wait_for(
            lambda: len(rows_of(head, "late")) > 60 or run.poll() is not None,
            SLOW_S,
            lambda: told(head, "late"),
        )
    with ended(run), joined(head, hosts[1], f"mount -t tmpfs none {head.shared}"):
        before = rows_of(head, "late")
        assert run.wait(SLOW_S) == 2, told(head, "late")
    path = head.shared / "runs" / "late"
    line = told(head, "late").splitlines()[-1]
    assert line.startswith(
        f"error: storage_path: {path} is not shared with node {hosts[1].name} ({hosts[1].address})"
    )
    with joined(head, hosts[1]):
        again = start_run(head, tiny, "late", *LONG, "--resume")
        assert again.wait(SLOW_S) == 0, told(head, "late")
    assert 60 < len(before) < 600
    same_run(before, rows_of(head, "late"))


def test_a_sweep_waits_for_the_storage_of_a_host_that_was_replaced_and_goes_on_without_it(
    head, hosts, tiny
):
    """The head's one CPU trains a trial; the other one lands on the bad host, and waits for the
    same command.
    """
    sweep = [
        "sweeps/head.yaml",
        f"base={tiny}",
        "name=bad-host",
        "points=[]",
        "run_cap=4",
        "early_terminate=null",
        "stop=[]",
        "set.train.steps=400",
    ]
    command = [*head.inside, sys.executable, "-m", "flowray.tune", *sweep]
    folder = head.shared / "runs" / "bad-host"
    with joined(head, hosts[1]):
        with (head.folder / "bad-host.log").open("w") as out:
            tune = subprocess.Popen(
                command, env=head.as_driver, stdout=out, stderr=out, cwd=head.folder
            )
        wait_for(
            lambda: (
                ((folder / "0").is_dir() and (folder / "1").is_dir()) or tune.poll() is not None
            ),
            SLOW_S,
            lambda: told(head, "bad-host"),
        )
    with ended(tune), joined(head, hosts[1], f"mount -t tmpfs none {head.shared}"):
        assert tune.wait(SLOW_S) == 2, told(head, "bad-host")
    (line,) = [line for line in told(head, "bad-host").splitlines() if line.startswith("error: ")]
    assert f"is not shared with node {hosts[1].name}" in line
    rows = read_rows(folder / "trials.jsonl")
    assert not [row for row in rows if row["status"] == "failed"]
    again = head.command("flowray.tune", *sweep)
    assert again.returncode == 0, again.stderr[-3000:]
    rows = read_rows(folder / "trials.jsonl")
    assert [row["trial"] for row in rows] == [0, 1, 2, 3]
    assert {row["status"] for row in rows} == {"finished"}
