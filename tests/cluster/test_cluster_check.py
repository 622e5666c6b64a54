"""What a cluster check makes of its facts, who may use a Ray that flowray starts, and what
counts as one folder on all nodes.
"""

from __future__ import annotations

import io
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support import remarks

from flowray.cli.cluster import table
from flowray.cluster import access, session, storage
from flowray.cluster.check import Prober, bundles, skew, wait_for
from flowray.cluster.verdict import NO_CUDA, PAYLOAD_BYTES, ClusterFacts, NodeFacts, healthy, judge
from flowray.config.errors import InputError
from flowray.config.paths import storage_folder, storage_place
from flowray.config.train import DataConfig

VERSIONS = {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0", "flowray": "0.1.0"}


def node(name: str, **changes) -> NodeFacts:
    good = {
        "versions": VERSIONS,
        "gpus": ("A10G",),
        "ray_gpus": 1.0,
        "storage_mb_s": 300.0,
        "shards": 4,
    }
    return NodeFacts(name, **{**good, **changes})


def cluster(*nodes: NodeFacts, **changes) -> ClusterFacts:
    good = {
        "storage": Path("/mnt/x"),
        "wanted_shards": 4,
        "links": [("a", "b", 900.0), ("b", "a", 900.0)],
        "allreduces": [("gloo", 2, 0.1, "")],
    }
    return ClusterFacts(list(nodes), **{**good, **changes})


def test_a_sound_cluster_has_a_row_for_every_check_of_every_node():
    rows = judge(
        cluster(
            node("a"), node("b", versions=VERSIONS | {"torch": "2.13.0+cpu"}, gpus=(), ray_gpus=0.0)
        )
    )
    assert healthy(rows)
    for check in ("python", "torch", "ray", "flowray", "gpus", "storage", "data", "clock"):
        assert [row.node for row in rows if row.check == check] == ["a", "b"]
    assert [row.check for row in rows][-3:] == ["network", "network", "all-reduce"]
    assert not [row for row in rows if row.fix]


@pytest.mark.parametrize(
    ("changes", "check", "severity", "words"),
    [
        ({"versions": VERSIONS | {"ray": "2.59.0"}}, "ray", "bad", "ray==2.60.0"),
        ({"versions": VERSIONS | {"flowray": ""}}, "flowray", "bad", "pip install flowray==0.1.0"),
        ({"versions": VERSIONS | {"python": "3.12.1"}}, "python", "bad", "one Python"),
        ({"cuda_problem": NO_CUDA}, "gpus", "bad", "CUDA build"),
        ({"cuda_problem": "The NVIDIA driver on your system is too old"}, "gpus", "bad", "driver"),
        # a container without them
        (
            {"gpus": (), "cuda_problem": "Found no NVIDIA driver on your system."},
            "gpus",
            "bad",
            "--gpus all",
        ),
        ({"ray_gpus": 0.0}, "gpus", "warn", "--num-gpus=1"),
        ({"storage_problem": "there is no such folder there"}, "storage", "bad", "/mnt/x"),
        ({"storage_mb_s": 3.0}, "storage", "warn", "faster"),
        ({"shards": 3}, "data", "bad", "same path"),
        ({"skew_s": -31.0, "skew_error_s": 0.01}, "clock", "warn", "ntpd"),
    ],
)
def test_a_fault_is_found_on_its_node_with_its_fix(changes, check, severity, words):
    rows = judge(cluster(node("a"), node("b", **changes), node("c")))
    (wrong,) = [row for row in rows if row.severity not in ("ok", "info")]
    assert (wrong.check, wrong.node, wrong.severity) == (check, "b", severity)
    assert words in wrong.fix
    assert not healthy(rows)


def test_a_node_without_nvidia_smi_whose_gpus_work_is_sound():
    assert healthy(judge(cluster(node("a", gpus=(), ray_gpus=2.0))))


def test_nodes_that_may_still_come_are_told_and_those_that_did_not_come_are_a_fault():
    """A head without workers is no sound cluster, only one of which nothing is known."""
    head = node("head", gpus=(), ray_gpus=0.0)
    rows = judge(cluster(head, may_come=8))
    (told,) = [row for row in rows if row.check == "nodes"]
    assert healthy(rows)
    assert (told.severity, "1 up; up to 8 more" in told.found, "--workers" in told.fix) == (
        "info",
        True,
        True,
    )
    assert "the others not seen" in str(table(rows, 1).title)
    asked = judge(cluster(head, may_come=8, missing="1 worker(s) asked for, 0 came in 20 minutes"))
    assert not healthy(asked)
    assert [row.severity for row in asked if row.check == "nodes"] == ["bad", "info"]


def test_workers_are_asked_for_whole_and_waited_for():
    assert bundles([(8, 1), (4, 0)]) == [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}]
    came = iter(range(10))
    assert wait_for(lambda: next(came), 3, patience_s=30, pause_s=0.01) == 3
    began = time.monotonic()
    assert wait_for(lambda: 1, 2, patience_s=0.1, pause_s=0.01) == 1
    assert 0.1 <= time.monotonic() - began < 10


@pytest.mark.cluster
@pytest.mark.timeout(1800)
def test_a_worker_that_is_asked_for_comes_and_is_checked(tmp_path):
    """Ray's own autoscaler, with real nodes on this machine; of three that it may add, one is
    asked for.
    """
    from autoscaling import NODES, autoscaling_head

    with autoscaling_head(tmp_path) as head:
        alone = json.loads(head.command("flowray.cluster", "check", "--json").stdout)
        asked = head.command("flowray.cluster", "check", "--workers", "1", "--json")
    assert len(alone["nodes"]) == 1
    told = json.loads(asked.stdout)
    assert len(told["nodes"]) == 2, asked.stderr
    for found, more in ((alone, NODES), (told, NODES - 1)):
        (row,) = [row for row in found["rows"] if row["check"] == "nodes"]
        assert (row["severity"], f"up to {more} more" in row["found"]) == ("info", True)
        assert not [row for row in found["rows"] if row["severity"] == "bad"]


def test_gloo_and_nccl_have_a_row_each():
    rows = judge(
        cluster(
            node("a"),
            allreduces=[
                ("gloo", 3, 0.1, ""),
                ("nccl", 2, 0.0, "ncclSystemError: Socket timed out"),
            ],
        )
    )
    plain, gpus = [row for row in rows if row.check == "all-reduce"]
    assert (plain.severity, plain.node, "3 rank(s), gloo" in plain.found) == ("ok", "all", True)
    assert (gpus.severity, gpus.node, "NCCL_SOCKET_IFNAME" in gpus.fix) == (
        "bad",
        "nodes with GPUs",
        True,
    )


def test_faults_between_nodes_and_of_silent_ones():
    silent, cut = node("b", error="No module named 'flowray'"), [("gloo", 2, 0.0, "timed out")]
    rows = judge(cluster(node("a"), silent, links=[("a", "b", 0.0)], allreduces=cut))
    wrong = {row.check: row for row in rows if row.severity == "bad"}
    assert set(wrong) == {"answer", "network", "all-reduce"}
    assert "flowray" in wrong["answer"].found
    assert all(row.fix for row in wrong.values())
    # nothing is made up for it
    assert not [row for row in rows if row.node == "b" and row.check != "answer"]
    slow = judge(cluster(node("a"), node("b"), links=[("a", "b", 12.0)]))
    assert [row.severity for row in slow if row.check == "network"] == ["warn"]


def test_the_table_has_the_fix_beside_the_fault():
    rows = judge(
        cluster(node("a"), node("b", storage_problem="it cannot be written there: [Errno 30]"))
    )
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(rows, 2))
    text = console.export_text()
    assert "2 node(s): 1 finding(s)" in text
    (line,) = [line for line in text.splitlines() if "Errno 30" in line]
    assert "bad" in line
    assert "mount one shared" in line
    console.print(table(judge(cluster(node("a"), node("b"))), 2))
    assert "fit for training" in console.export_text()


def test_a_clock_that_is_off_by_less_than_the_round_trip_is_not_blamed():
    assert healthy(judge(cluster(node("a", skew_s=2.5, skew_error_s=1.0))))


def test_skew_is_measured_as_ntp_does():
    """The remote clock is 5 s ahead and the way there and back takes 20 ms: off by no more than
    half of that.
    """

    def clock() -> float:
        time.sleep(0.01)
        told = time.time() + 5.0
        time.sleep(0.01)
        return told

    off, error = skew(clock)
    assert error >= 0.01
    assert abs(off - 5.0) <= error


def test_the_prober_measures_this_machine(tmp_path):
    """The very methods that run on every node, here without one;
    tests/cluster/test_job_submit.py has them on two.
    """
    prober = Prober()
    (tmp_path / "mark").touch()
    assert set(prober.versions()) == set(VERSIONS)
    problem, speed = prober.storage(tmp_path, "mark")
    assert (problem, speed > 0) == ("", True)
    assert [path.name for path in tmp_path.iterdir()] == ["mark"]
    assert prober.shards([tmp_path / "mark", tmp_path / "gone"]) == 1
    assert prober.give().nbytes == PAYLOAD_BYTES
    # as if Ray handed one out: torch tries to compute on it, in a process of its own
    names, problem = prober.gpus(1.0)
    if not torch.cuda.is_available():
        assert problem == (NO_CUDA if torch.version.cuda is None else problem) != ""
        assert names or prober.gpus(0.0) == ((), "")  # nobody asked
    before = time.time()
    assert before <= prober.clock() <= time.time()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert prober.all_reduce("gloo", "127.0.0.1", port, 0, 1) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="NCCL works here")
def test_nccl_without_a_gpu_says_why():
    with pytest.raises(RuntimeError) as told:
        Prober().all_reduce("nccl", "127.0.0.1", 1, 0, 1)
    assert "CUDA" in str(told.value)
    assert len(str(told.value).splitlines()) == 1


# --- one folder on all nodes


def test_a_folder_is_shared_when_it_holds_the_mark(tmp_path):
    other = tmp_path / "other"
    with storage.marker_file(tmp_path / "storage") as mark:
        assert storage.problem_here(tmp_path / "storage", mark) == ""
        assert "no such folder" in storage.problem_here(other, mark)
        other.mkdir()
        assert "another one" in storage.problem_here(other, mark)
    assert list((tmp_path / "storage").iterdir()) == []


def test_marks_of_a_killed_owner_go_with_the_next(tmp_path):
    (tmp_path / f"{storage.MARKER}old").touch()
    with storage.marker_file(tmp_path, sole=True) as mark:
        assert [path.name for path in tmp_path.iterdir()] == [mark]


def test_storage_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            InputError, match=r"storage_path: .*file.* cannot be written: Not a directory"
        ),
        storage.marker_file(tmp_path / "file" / "x"),
    ):
        pass


def test_storage_in_the_job_folder_is_refused_on_a_cluster_only(tmp_path, monkeypatch):
    folder = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_x" / "runs"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    storage.refuse_unshared(folder, DataConfig())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    with pytest.raises(InputError, match=r"removed with the job.*FLOWRAY_STORAGE"):
        storage.refuse_unshared(folder, DataConfig())
    assert not folder.exists()


def test_a_check_makes_no_storage(tmp_path):
    """It asks about the folder that would hold it, and where that is not there either, says so."""
    there = tmp_path / "runs"
    assert storage_place(there) == tmp_path
    assert storage_place(tmp_path) == tmp_path
    (tmp_path / "file").touch()
    for bad in (tmp_path / "a" / "b" / "runs", tmp_path / "file"):
        with pytest.raises(InputError, match=f"--storage {bad}: "):
            storage_place(bad)
    with pytest.raises(InputError), storage.marker_file(there, make=False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    rows = judge(cluster(node("a"), storage=tmp_path, absent=True))
    assert healthy(rows)
    assert [row.found for row in rows if row.check == "storage"] != [
        row.found for row in judge(cluster(node("a"), storage=tmp_path)) if row.check == "storage"
    ]


def test_relative_storage_lies_in_flowray_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWRAY_STORAGE", raising=False)
    assert storage_folder("runs") == str(tmp_path / "runs")
    monkeypatch.setenv("FLOWRAY_STORAGE", "/mnt/shared")
    assert storage_folder("runs") == "/mnt/shared/runs"
    assert storage_folder("/elsewhere") == "/elsewhere"
    assert storage_folder("~/runs") == str(Path.home() / "runs")
    with pytest.raises(InputError, match="got 's3://bucket/runs', want a folder"):
        storage_folder("s3://bucket/runs")


# --- who may use it


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    for name in (access.MODE, access.TOKEN, access.TOKEN_PATH, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_the_token_is_made_once_and_for_its_owner_alone(home):
    path = access.require_token()
    assert path == home / ".ray" / "auth_token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text()
    assert len(token) == 64
    assert access.require_token() == path
    assert path.read_text() == token


def test_without_a_home_a_private_rays_token_is_in_its_environment_alone(home, monkeypatch):
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.raises(
        InputError, match=r"/dev/null/\.ray/auth_token: the token cannot be written"
    ):
        access.require_token()  # of a cluster, where others must be able to get it
    monkeypatch.setenv(access.TOKEN, "")
    assert access.require_token(private=True) is None
    assert len(os.environ[access.TOKEN]) == 64


def test_a_given_token_is_taken(home, monkeypatch):
    given = home / "token"
    monkeypatch.setenv(access.TOKEN_PATH, str(given))
    for content in (None, "", " \n"):
        if content is not None:
            given.write_text(content)
        with pytest.raises(InputError, match=f"{given}: no token"):
            access.require_token()
    given.write_text("f" * 64)
    assert access.require_token() == given
    monkeypatch.setenv(access.TOKEN, "x")
    assert access.require_token() is None
    assert not (home / ".ray").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "10.0.0.10"])
def test_no_head_without_a_token(host, home, monkeypatch):
    monkeypatch.setenv(access.MODE, "disabled")
    with pytest.raises(InputError, match=r"RAY_AUTH_MODE=disabled.*type `unset RAY_AUTH_MODE`"):
        access.start_command(["--head", f"--node-ip-address={host}"])


def test_no_local_ray_without_a_token(home, monkeypatch):
    import ray

    if ray.is_initialized():
        pytest.skip("a Ray of another test is up")
    monkeypatch.setenv(access.MODE, "disabled")
    with pytest.raises(InputError, match="RAY_AUTH_MODE=disabled"), session.started():
        pass
    assert not ray.is_initialized()


def test_a_node_takes_a_token_and_no_other_clusters_address(home, monkeypatch):
    for name in access.ADDRESSES:
        monkeypatch.setenv(name, "10.0.0.1:6379")
    command, environment = access.start_command(["--head", "--num-cpus=0"])
    assert command[1] == "start"
    assert {"--head", "--num-cpus=0"} <= set(command)
    assert environment[access.MODE] == "token"
    assert not environment.keys() & set(access.ADDRESSES)
    token = (home / ".ray" / "auth_token").read_text()
    # neither `ps` nor /proc shows it
    assert not [text for text in (*command, *environment.values()) if token in text]


def test_the_command_refuses_with_one_line_and_exit_code_2(home, monkeypatch):
    monkeypatch.setenv(access.MODE, "disabled")
    done = subprocess.run(
        [sys.executable, "-m", "flowray.cluster", "head", "--host", "0.0.0.0"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = remarks(done.stderr)
    assert line.startswith("error: RAY_AUTH_MODE=disabled")


def test_help_is_one_screen(capsys):
    from flowray.cli.cluster import main

    for argv in (["--help"], *([verb, "--help"] for verb in ("check", "head", "join", "stop"))):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        assert len(capsys.readouterr().out.splitlines()) <= 24
    with pytest.raises(InputError, match="nonsense"):
        main(["nonsense"])
