"""A real cluster on this machine: a head that takes a token, a second node, jobs submitted as
users do, storage that is not shared.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray_nodes import Head, joined, running_head
from support import tiny_recipe

from flowray.config.load import dump_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
SHORT = ["run_cap=2", "points=[]", "max_concurrent=1"]


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    with running_head(tmp_path_factory.mktemp("cluster")) as head:
        yield head


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
        f"flowray.cluster join {head.host}:{head.port}",
        f"ray job submit --address http://127.0.0.1:{head.dashboard}",
        f"flowray.cluster stop {head.host}:{head.port}",
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
    refused = head.ray(
        "job",
        "submit",
        "--address",
        address,
        "--",
        "touch",
        str(head.shared / "was-here"),
        RAY_AUTH_TOKEN_PATH=str(wrong),
    )
    assert refused.returncode != 0
    assert not (head.shared / "was-here").exists()
    connect = "import ray; ray.init(address='auto', logging_level='ERROR'); print(ray.nodes())"
    joined = subprocess.run(
        [sys.executable, "-c", connect],
        env=head.as_driver | {"RAY_AUTH_TOKEN_PATH": str(wrong)},
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
    """Only the package is on the cluster: the sweep file is the packaged one, and runs land on
    the shared folder.
    """
    assert not (head.shared / "sweeps").exists()
    done = head.submit(
        "verbatim",
        "python",
        "-m",
        "flowray.tune",
        "sweeps/head.yaml",
        f"base={tiny}",
        "name=verbatim",
        *SHORT,
    )
    check_sweep(head, "verbatim", done)


def test_job_submit_from_a_clone(head, tiny):
    """--working-dir: this clone travels, but for what .gitignore and .rayignore name, and is
    what the job imports.
    """
    clone = head.folder / "clone"
    shutil.copytree(
        ROOT,
        clone,
        symlinks=True,
        ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info"),
    )
    sweep = clone / "sweeps" / "clones-own.yaml"
    sweep.write_text((clone / "sweeps" / "head.yaml").read_text())
    command = [
        "python",
        "-m",
        "flowray.tune",
        "sweeps/clones-own.yaml",
        f"base={tiny}",
        "name=clone",
        *SHORT,
    ]
    check_sweep(
        head, "clone", head.submit("clone", *command, options=("--working-dir", str(clone)))
    )


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
        with urllib.request.urlopen(
            f"http://{head.host}:{head.metrics}/metrics", timeout=60
        ) as answer:
            text = answer.read().decode()
        time.sleep(2)
    assert "ray_node_cpu_utilization" in text
    assert head.token not in text


def test_storage_in_the_job_folder_is_refused(head, tiny):
    folder = head.folder / "small"
    folder.mkdir()
    options = (
        "--working-dir",
        str(folder),
        "--runtime-env-json",
        json.dumps({"env_vars": {"FLOWRAY_STORAGE": ""}}),
    )
    done = head.submit(
        "vanishing", "python", "-m", "flowray.train", str(tiny), "name=vanishing", options=options
    )
    assert done.returncode != 0
    assert "is removed with the job" in done.stdout


def test_the_check_finds_this_cluster_sound(head):
    done = head.submit("check", "python", "-m", "flowray.cluster", "check", "--json")
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith('{"healthy"'))
    )
    assert len(found["nodes"]) == 1
    wrong = [row for row in found["rows"] if row["severity"] == "bad"]
    assert wrong == []
    assert (done.returncode == 0) == found["healthy"]  # a slow disk is a finding too
    assert {row["check"] for row in found["rows"]} >= {
        "python",
        "torch",
        "ray",
        "flowray",
        "gpus",
        "storage",
        "clock",
        "all-reduce",
    }


@pytest.fixture
def second_node(head) -> Iterator[None]:
    """A node in a mount namespace of its own, where another file system lies over the shared
    folder.
    """
    mount = f"mount -t tmpfs none {head.shared}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets no process have its own mounts (unshare -m)")
    with joined(head, inside=("unshare", "-m", "sh", "-c", f'{mount} && exec "$0" "$@"')) as node:
        nodes = (
            "import ray; ray.init(logging_level='ERROR'); print(sum(n['Alive'] for n in"
            " ray.nodes()))"
        )
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            asked = subprocess.run(
                [sys.executable, "-c", nodes], env=head.as_driver, capture_output=True, text=True
            )
            if asked.stdout.strip().endswith("2"):
                break
        else:
            pytest.fail(node.log.read_text())
        yield


def test_unshared_storage_is_refused_by_path_and_node(head, tiny, second_node):
    """Before anything starts: no run directory, no sweep directory."""
    train = head.command("flowray.train", str(tiny), "name=unshared")
    tune = head.command("flowray.tune", "sweeps/head.yaml", f"base={tiny}", "name=unshared", *SHORT)
    for done in (train, tune):
        assert done.returncode == 2
        line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
        assert f"storage_path: {head.shared / 'runs'} is not shared with node" in line
        assert head.host in line
    assert not (head.shared / "runs" / "unshared").exists()
    check = head.command("flowray.cluster", "check", "--json")
    assert check.returncode == 1
    found = json.loads(
        next(line for line in check.stdout.splitlines() if line.startswith('{"healthy"'))
    )
    bad = [row for row in found["rows"] if row["severity"] == "bad"]
    assert [row["check"] for row in bad] == ["storage"]
    assert str(head.shared / "runs") in bad[0]["fix"]
    assert len([row for row in found["rows"] if row["check"] == "network"]) == 2
    assert next(row for row in found["rows"] if row["check"] == "all-reduce")["found"].startswith(
        "2 rank(s), gloo"
    )
