"""A real cluster on this machine: a head that takes a token, a second node, jobs submitted as users do, storage that is not shared."""

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
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import tiny_recipe

from flowray.config.load import dump_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
JOB_S = 900  # a job, on a slow machine
SHORT = ["run_cap=2", "max_concurrent=1"]


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Head:
    """A running head. folder holds: shared/ (FLOWRAY_STORAGE and where Ray was started), home/.ray/auth_token."""

    folder: Path
    port: int
    dashboard: int
    metrics: int
    environment: dict[str, str]
    files: Path  # Ray's own

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    @property
    def token(self) -> str:
        return Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()

    def ray(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        command = [str(BIN / "ray"), *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, timeout=JOB_S)

    def submit(self, name: str, *command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
        address = f"http://127.0.0.1:{self.dashboard}"
        return self.ray("job", "submit", "--address", address, "--submission-id", name, *options, "--", *command)

    def command(self, module: str, *arguments: str) -> subprocess.CompletedProcess:
        """`python -m module`, on the head's machine, pointed at the cluster."""
        there = self.environment | {"RAY_ADDRESS": f"{own_address()}:{self.port}"}
        command = [sys.executable, "-m", module, *arguments]
        return subprocess.run(command, cwd=self.folder, env=there, capture_output=True, text=True, timeout=JOB_S)

    def get(self, path: str, token: str | None) -> tuple[int, str]:
        """(status, body) of the dashboard's answer."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def offspring(mark: str) -> list[int]:
    """Live processes whose environment holds `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    """`python -m flowray.cluster head`, in a folder of its own, gone with all that it started after the module."""
    folder = tmp_path_factory.mktemp("cluster")
    files = Path(tempfile.mkdtemp(prefix="frc-"))  # Ray's; short, for its sockets
    port, dashboard, metrics, agent = free_ports(4)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "FLOWRAY_"))}
    token = folder / "home" / ".ray" / "auth_token"
    environment = kept | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_agent_register_timeout_ms": "120000",
        "FLOWRAY_STORAGE": str(folder / "shared"),
        "FLOWRAY_CACHE": str(folder / "shared" / ".cache"),
        "FLOWRAY_CLUSTER_TEST": str(folder),
    }
    (folder / "shared").mkdir()
    unset = {key: value for key, value in environment.items() if key not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
    options = [f"--temp-dir={files}", f"--dashboard-port={dashboard}", f"--metrics-export-port={metrics}", "--num-cpus=2"]
    options += [f"--dashboard-agent-listen-port={agent}", "--object-store-memory=200000000"]
    command = [sys.executable, "-m", "flowray.cluster", "head", "--port", str(port), "--host", own_address(), "--", *options]
    log = folder / "head.log"
    try:
        for _ in range(4):  # on a busy machine Ray gives up after 30 s that it lets nobody change
            with log.open("w") as out:  # a file: the daemons keep what they inherit, and a pipe would never end
                code = subprocess.run(command, cwd=folder / "shared", env=unset, stdout=out, stderr=out, timeout=600).returncode
            if code == 0 or "timed out during startup" not in log.read_text():
                break
            kill_all(folder)
        assert code == 0, log.read_text()[-3000:]
        yield Head(folder, port, dashboard, metrics, environment, files)
    finally:
        kill_all(folder)
        shutil.rmtree(files, ignore_errors=True)


def kill_all(folder: Path) -> None:
    for pid in offspring(f"FLOWRAY_CLUSTER_TEST={folder}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def own_address() -> str:
    """This machine's address on its network, without sending anything."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


@pytest.fixture(scope="module")
def tiny(head) -> Path:
    """A recipe that trains in seconds, on the shared folder."""
    path = head.shared / "tiny.yaml"
    recipe = tiny_recipe(head.shared / "made", storage_path="runs")
    path.write_text(dump_recipe(recipe))
    return path


def test_a_head_tells_how_to_use_it_and_not_its_token(head):
    told = (head.folder / "head.log").read_text()
    for words in (
        "ray start --address=",
        f"ray job submit --address http://127.0.0.1:{head.dashboard}",
        "ray stop",
        "flowray.cluster check",
    ):
        assert words in told
    assert head.token not in told
    assert (Path(head.environment["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o077) == 0


def test_without_the_token_nothing_is_to_be_had(head):
    assert head.get("/api/jobs/", None)[0] == 401
    assert head.get("/api/jobs/", "f" * 64)[0] in (401, 403)
    assert head.get("/api/jobs/", head.token)[0] == 200
    wrong = head.folder / "wrong"
    wrong.write_text("f" * 64)
    address = f"http://127.0.0.1:{head.dashboard}"
    refused = head.ray("job", "submit", "--address", address, "--", "touch", str(head.shared / "was-here"), RAY_AUTH_TOKEN_PATH=str(wrong))
    assert refused.returncode != 0
    assert not (head.shared / "was-here").exists()
    connect = "import ray; ray.init(address='auto', logging_level='ERROR'); print(ray.nodes())"
    joined = subprocess.run(
        [sys.executable, "-c", connect],
        env=head.environment | {"RAY_ADDRESS": f"{own_address()}:{head.port}", "RAY_AUTH_TOKEN_PATH": str(wrong)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert joined.returncode != 0
    assert "NodeID" not in joined.stdout


def check_sweep(head: Head, name: str, done: subprocess.CompletedProcess) -> None:
    """The job ended well, its artefacts lie on the shared storage, its log can be read."""
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    folder = head.shared / "runs" / name
    trials = [json.loads(line) for line in (folder / "trials.jsonl").read_text().splitlines()]
    assert [trial["trial"] for trial in trials] == [0, 1]
    assert {trial["status"] for trial in trials} <= {"finished", "stopped"}
    assert (folder / "report.html").is_file()
    assert (folder / "best.yaml").is_file()
    assert list((folder / "0" / "checkpoints").iterdir())
    logs = head.ray("job", "logs", "--address", f"http://127.0.0.1:{head.dashboard}", name)
    assert f"{name}: best is trial" in logs.stdout


def test_job_submit_verbatim(head, tiny):
    """Only the package is on the cluster: the sweep file is the packaged one, and runs land on the shared folder."""
    assert not (head.shared / "sweeps").exists()
    done = head.submit("verbatim", "python", "-m", "flowray.tune", "sweeps/head.yaml", f"base={tiny}", "name=verbatim", *SHORT)
    check_sweep(head, "verbatim", done)


def test_job_submit_from_a_clone(head, tiny):
    """--working-dir: this clone travels, but for what .gitignore and .rayignore name, and is what the job imports."""
    clone = head.folder / "clone"
    shutil.copytree(ROOT, clone, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info"))
    sweep = clone / "sweeps" / "clones-own.yaml"
    sweep.write_text((clone / "sweeps" / "head.yaml").read_text())
    command = ["python", "-m", "flowray.tune", "sweeps/clones-own.yaml", f"base={tiny}", "name=clone", *SHORT]
    check_sweep(head, "clone", head.submit("clone", *command, options=("--working-dir", str(clone))))


def test_a_job_trains_one_recipe_and_resumes_it(head, tiny):
    command = ["python", "-m", "flowray.train", str(tiny), "name=job", "--resume"]
    first = head.submit("train-1", *command)
    assert first.returncode == 0, first.stdout[-4000:]
    rows = (head.shared / "runs" / "job" / "metrics.jsonl").read_text()
    assert json.loads(rows.splitlines()[-1])["step"] == 12
    again = head.submit("train-2", *command)  # as a retried RayJob does
    assert again.returncode == 0, again.stdout[-4000:]
    assert (head.shared / "runs" / "job" / "metrics.jsonl").read_text() == rows
    assert not list((head.shared / "runs" / "job").glob(".shared-*"))


def test_the_train_api_shows_the_runs_and_no_secret(head, tiny):
    status, body = head.get("/api/train/v2/runs/v1", head.token)
    assert status == 200
    runs: dict[str, Any] = {run["name"]: run for run in json.loads(body)["train_runs"]}
    assert runs["train"]["status"] == "FINISHED"
    assert head.token not in body
    assert head.token not in head.get("/api/jobs/", head.token)[1]


def test_prometheus_can_read_the_metrics(head):
    listed = json.loads((head.files / "prom_metrics_service_discovery.json").read_text())
    assert any(str(head.metrics) in target for group in listed for target in group["targets"])
    deadline = time.monotonic() + 120
    text = ""
    while "ray_node_cpu_utilization" not in text and time.monotonic() < deadline:
        with urllib.request.urlopen(f"http://{own_address()}:{head.metrics}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        time.sleep(2)
    assert "ray_node_cpu_utilization" in text
    assert head.token not in text


def test_storage_in_the_job_folder_is_refused(head, tiny):
    folder = head.folder / "small"
    folder.mkdir()
    options = ("--working-dir", str(folder), "--runtime-env-json", json.dumps({"env_vars": {"FLOWRAY_STORAGE": ""}}))
    done = head.submit("vanishing", "python", "-m", "flowray.train", str(tiny), "name=vanishing", options=options)
    assert done.returncode != 0
    assert "is removed with the job" in done.stdout


def test_the_check_finds_this_cluster_sound(head):
    done = head.submit("check", "python", "-m", "flowray.cluster", "check", "--json")
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"healthy"')))
    assert len(found["nodes"]) == 1
    wrong = [row for row in found["rows"] if row["severity"] == "bad"]
    assert wrong == []
    assert (done.returncode == 0) == found["healthy"]  # a slow disk is a finding too
    assert {row["check"] for row in found["rows"]} >= {"python", "torch", "ray", "flowray", "gpus", "storage", "clock", "all-reduce"}


@pytest.fixture
def second_node(head) -> Iterator[None]:
    """A node in a mount namespace of its own, where another file system lies over the shared folder."""
    (agent,) = free_ports(1)
    mount = f"mount -t tmpfs none {head.shared}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets no process have its own mounts (unshare -m)")
    start = f"{BIN}/ray start --address={own_address()}:{head.port} --num-cpus=1 --object-store-memory=100000000"
    script = f"{mount} && exec {start} --dashboard-agent-listen-port={agent} --disable-usage-stats --block"
    with (head.folder / "second.log").open("w") as log:
        node = subprocess.Popen(["unshare", "-m", "sh", "-c", script], env=head.environment, stdout=log, stderr=log, cwd=head.folder)
    try:
        nodes = "import ray; ray.init(logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            asked = subprocess.run(
                [sys.executable, "-c", nodes],
                env=head.environment | {"RAY_ADDRESS": f"{own_address()}:{head.port}"},
                capture_output=True,
                text=True,
            )
            if asked.stdout.strip().endswith("2"):
                break
        else:
            pytest.fail((head.folder / "second.log").read_text())
        yield
    finally:
        node.terminate()
        node.wait(60)


def test_unshared_storage_is_refused_by_path_and_node(head, tiny, second_node):
    """Before anything starts: no run directory, no sweep directory."""
    train = head.command("flowray.train", str(tiny), "name=unshared")
    tune = head.command("flowray.tune", "sweeps/head.yaml", f"base={tiny}", "name=unshared", *SHORT)
    for done in (train, tune):
        assert done.returncode == 2
        line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert f"storage_path: {head.shared / 'runs'} is not shared with node" in line
        assert own_address() in line
    assert not (head.shared / "runs" / "unshared").exists()
    check = head.command("flowray.cluster", "check", "--json")
    assert check.returncode == 1
    found = json.loads(next(line for line in check.stdout.splitlines() if line.startswith('{"healthy"')))
    bad = [row for row in found["rows"] if row["severity"] == "bad"]
    assert [row["check"] for row in bad] == ["storage"]
    assert str(head.shared / "runs") in bad[0]["fix"]
    assert len([row for row in found["rows"] if row["check"] == "network"]) == 2
    assert next(row for row in found["rows"] if row["check"] == "all-reduce")["found"].startswith("2 rank(s), gloo")
