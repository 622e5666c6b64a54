"""The files under cluster/: accepted by the tools that will read them, or by their schema, and
in agreement with the code.
"""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from cluster_files import BIN, CLUSTER, KUBERAY, LAUNCHERS, ROOT, header, load, strings


def starts_something() -> list[Path]:
    files = [
        p
        for p in CLUSTER.rglob("*")
        if p.is_file() and p.suffix not in (".md", ".json", ".dockerignore")
    ]
    return sorted(p for p in files if p.parent.name != "schemas")


@pytest.mark.parametrize("path", starts_something(), ids=lambda p: str(p.relative_to(CLUSTER)))
def test_every_file_says_what_it_starts_how_its_cost_and_how_to_stop_it(path):
    head = "\n".join(line for line in path.read_text().splitlines()[:24] if line.startswith("#"))
    if "nothing by itself" in head:
        assert "cost and stop: there" in head
        return
    for words in ("What it starts:|What it is:", "Command:|Build:", "Cost class:", "Stop:"):
        assert re.search(words, head), f"{path.name} does not say {words}"


def test_the_readme_names_every_choice():
    text = (CLUSTER / "README.md").read_text()
    for name in [
        *LAUNCHERS,
        *KUBERAY,
        "slurm/sweep.sbatch",
        "Dockerfile",
        "monitoring/compose.yaml",
    ]:
        assert name in text


# --- Ray's cluster launcher


@pytest.fixture(scope="module")
def kuberay() -> jsonschema.Draft202012Validator:
    schema = load("schemas/kuberay.yaml")
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_fit_the_schema(name, kuberay):
    assert not list(kuberay.iter_errors(load(name)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "autoscalerOptions", "version"), "2"),
        (("spec", "authOptions", "secret"), "x"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        (
            (
                "spec",
                "workerGroupSpecs",
                0,
                "template",
                "spec",
                "containers",
                0,
                "volumeMounts",
                0,
                "mountPath",
            ),
            "mnt",
        ),
        (("spec", "gcsFaultToleranceOptions", "redisAddress"), None),
        (("apiVersion",), "ray.io/v1alpha1"),
    ],
)
def test_the_schema_refuses_what_is_wrong(path, value, kuberay):
    manifest = load("kuberay/raycluster.yaml")
    node = manifest
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    assert not kuberay.is_valid(manifest)


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_clusters_scale_hold_a_token_and_share_storage(name):
    manifest = load(name)
    spec = (
        manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    )
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    assert spec["authOptions"] == {"mode": "token", "secretName": "flowray-token"}
    assert spec["gcsFaultToleranceOptions"]["redisAddress"].split(":")[0] in {
        d["metadata"]["name"]
        for d in yaml.safe_load_all((CLUSTER / "kuberay/redis.yaml").read_text())
        if d["kind"] == "Service"
    }
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    claim = load("kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        assert {
            "name": "storage",
            "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]},
        } in pod["volumes"]
        (container,) = pod["containers"]
        assert {"name": "FLOWRAY_STORAGE", "value": "/mnt/flowray"} in container["env"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    # so the spot pools of GKE and AKS keep others away
    tainted = {t["key"] for t in workers["template"]["spec"]["tolerations"]}
    assert tainted == {
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
        "kubernetes.azure.com/scalesetpriority",
    }
    assert (
        f"LocalQueue named {manifest['metadata']['labels']['kueue.x-k8s.io/queue-name']}"
        in header(name)
    )
    gpus = workers["template"]["spec"]["containers"][0]["resources"]
    assert gpus["requests"]["nvidia.com/gpu"] == gpus["limits"]["nvidia.com/gpu"] == "1"


def test_the_two_manifests_describe_one_cluster():
    assert (
        load("kuberay/raycluster.yaml")["spec"]
        == load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]
    )


def test_a_retried_job_resumes_and_its_command_is_valid():
    from flowray.sweepconfig.file import load_sweep

    spec = load("kuberay/rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    *command, sweep, flag = spec["entrypoint"].split()
    assert (command, flag) == (["python", "-m", "flowray.tune"], "--resume")
    assert load_sweep(sweep).name == "head"


def test_versions_are_those_that_the_tests_pass_with():
    pins = dict(
        re.findall(r"^([A-Za-z0-9-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    )
    for name in KUBERAY:
        assert re.findall(r'rayVersion: "(.+)"', (CLUSTER / name).read_text()) == [pins["ray"]]
    assert set(re.findall(r"torch==([\d.]+)", (CLUSTER / "Dockerfile").read_text())) == {
        pins["torch"]
    }


def test_no_secret_is_written_down():
    """Every key that sounds like one holds a name, a reference or a variable, never a value."""
    named = re.compile(r"password|token|secret|credential|api_?key", re.I)
    fine = re.compile(r"^(token|flowray-token|flowray-redis|~/\.ray/auth_token|\$\{\w+:\?.*\})$")
    for path in CLUSTER.rglob("*.yaml"):
        if path.parent.name == "schemas":
            continue
        for document in yaml.safe_load_all(path.read_text()):
            wrong = [(k, v) for k, v in strings(document) if named.search(k) and not fine.match(v)]
            assert wrong == [], path


# --- Slurm


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """An environment as Slurm's, with srun and scontrol that write down what they were given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text(
        '#!/bin/sh\necho "$@" >> "$OUT/scontrol"\ntest "$1" = requeue || printf'
        ' "node1\\nnode2\\n"\n'
    )
    (tools / "srun").write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT/args"\ncp -p "$RAY_AUTH_TOKEN_PATH"'
        ' "$OUT/token"\nenv > "$OUT/env"\nif [ -n "$SRUN_WAITS" ]; then until [ -e "$OUT/go" ]; do'
        ' sleep 0.05; done; fi\nexit "${SRUN_EXIT:-0}"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "8",
    }
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "OUT": str(tmp_path),
        "FLOWRAY_STORAGE": str(tmp_path / "storage"),
        **job,
    }


def sbatch(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    script = CLUSTER / "slurm" / "sweep.sbatch"
    return subprocess.run(
        ["bash", script, *command], env=environment, capture_output=True, text=True, timeout=30
    )


def test_slurm_starts_one_node_each_and_the_sweep_on_the_head(slurm, tmp_path):
    done = sbatch(slurm)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "args").read_text().splitlines()
    start, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    ray = start[start.index("ray") :]
    address = ray[ray.index("--address") + 1]
    assert ray[1] == "symmetric-run"
    # srun takes no --cpus-per-task from its job
    assert {"--nodes=2", "--ntasks=2", "--cpus-per-task=8"} <= set(start)
    assert re.fullmatch(r"node1:2\d{4}|node1:3\d{4}", address)
    assert ray[ray.index("--min-nodes") + 1] == "2"
    # Ray's own reading of what it hands to `ray start`
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    assert curate_and_validate_ray_start_args(ray[2:]) == [
        "--num-cpus=8",
        "--num-gpus=0",
        "--dashboard-host=127.0.0.1",
    ]
    assert command == [
        "env",
        f"RAY_ADDRESS={address}",
        "python",
        "-m",
        "flowray.tune",
        "sweeps/head.yaml",
        "--resume",
    ]
    token = tmp_path / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert "RAY_AUTH_MODE=token" in (tmp_path / "env").read_text().splitlines()
    # the token is gone with the job
    assert list((tmp_path / "storage").iterdir()) == [tmp_path / "storage" / ".cache"]
    assert token.read_text() not in "\n".join(arguments)


def test_slurm_passes_a_command_and_its_exit_code_on(slurm, tmp_path):
    done = sbatch(
        slurm | {"SRUN_EXIT": "75"},
        "python",
        "-m",
        "flowray.train",
        "quickstart",
        "card.title=two words",
    )
    assert done.returncode == 75
    assert (tmp_path / "args").read_text().splitlines()[-1] == "card.title=two words"


def test_slurm_puts_a_job_back_into_the_queue_before_its_time_is_up(slurm, tmp_path):
    """Slurm signals the batch shell alone, minutes before the limit; what runs is left to end by
    itself, as it is told to.
    """
    script = CLUSTER / "slurm" / "sweep.sbatch"
    (asked,) = re.findall(r"^#SBATCH --signal=B:(\w+)@(\d+)$", script.read_text(), re.M)
    assert (asked[0], int(asked[1]) >= 120) == ("USR1", True)
    waits = slurm | {"SRUN_WAITS": "1", "SRUN_EXIT": "75"}
    job = subprocess.Popen(["bash", script], env=waits, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: (tmp_path / "env").exists())
        job.send_signal(signal.SIGUSR1)
        wait_until(lambda: "requeue 123456" in (tmp_path / "scontrol").read_text().splitlines())
        time.sleep(0.2)
        assert job.poll() is None
        assert list((tmp_path / "storage").glob(".ray-token-*"))  # still in use
        (tmp_path / "go").touch()
        assert job.wait(timeout=30) == 75
    finally:
        job.kill()
        job.communicate()
    assert not list((tmp_path / "storage").glob(".ray-token-*"))


def wait_until(true: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"RAY_AUTH_MODE": "disabled"}, "without a token"), ({"FLOWRAY_STORAGE": ""}, "every node")],
)
def test_slurm_refuses_what_is_not_safe(change, words, slurm, tmp_path):
    done = sbatch(slurm | change)
    assert done.returncode != 0
    assert words in done.stderr
    assert not (tmp_path / "args").exists()


def scripts() -> list[Path]:
    return sorted(
        p
        for p in ROOT.joinpath("cluster").rglob("*")
        if p.is_file() and p.read_bytes().startswith(b"#!")
    )


@pytest.mark.parametrize("script", scripts(), ids=lambda p: p.name)
def test_shell_scripts_are_clean(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    done = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launchers_commands_are_clean(name, tmp_path):
    """Each as Ray types it over ssh, in a bash of its own."""
    config = load(name)
    for kind in ("initialization_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for number, command in enumerate(config[kind]):
            (tmp_path / f"{kind}{number}.sh").write_text(f"#!/bin/bash\n{command}\n")
    found = subprocess.run(
        [BIN / "shellcheck", "--severity=warning", *tmp_path.glob("*.sh")],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout


# --- the image


def test_the_dockerfile_copies_what_there_is_and_builds_both():
    text = (CLUSTER / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.M)
    known: set[str] = {"python:3.11-slim"}
    for parent, name in stages:
        assert parent in known, f"{name} is built from {parent}, which comes nowhere before it"
        known.add(name)
    assert {"cpu", "cuda"} <= known
    for line in re.findall(r"^COPY (.+) \S+$", text, re.M):
        assert all((ROOT / source).exists() for source in line.split()), line
    sent = {
        line.removeprefix("!")
        for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert {
        source for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for source in line.split()
    } == sent
    assert "RAY_AUTH_MODE=token" in text
    assert text.rstrip().rfind("USER 1000:100") > text.rfind("FROM ")


def test_the_dockerfile_is_linted():
    done = subprocess.run(
        [BIN / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


# --- Prometheus and Grafana


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads((CLUSTER / "monitoring/grafana/dashboards/flowray.json").read_text())


def queries(board: dict[str, Any]) -> list[str]:
    variables = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return variables + [
        target["expr"] for panel in board["panels"] for target in panel.get("targets", [])
    ]


def emitted() -> set[str]:
    """The names that flowray declares, and those that stand in Ray's own code."""
    import ray

    from flowray.views.gauges import exported_names

    package = Path(ray.__file__).parent
    reporter = (package / "dashboard/modules/reporter/reporter_agent.py").read_text()
    train = "".join(p.read_text() for p in (package / "train/v2/_internal/metrics").glob("*.py"))
    names = re.findall(r'Gauge\(\s*"(\w+)"', reporter) + re.findall(r'_TIME_S = "(\w+)"', train)
    assert len(names) > 40
    return set(exported_names()) | {f"ray_{name}" for name in names}


def test_the_dashboard_asks_only_for_metrics_that_are_emitted(board):
    asked = set(
        re.findall(
            r"\b(?:ray|flowray|autoscaler)_\w+",
            re.sub(r"by \([^)]*\)", "", " ".join(queries(board))),
        )
    )
    assert asked - emitted() == set()
    assert all(re.fullmatch(r"[a-zA-Z_]\w*", name) for name in emitted())  # Prometheus takes
    assert {
        "ray_flowray_trials",
        "ray_flowray_shoot_energy",
        "ray_flowray_shoot_nmse",
        "ray_flowray_step",
        "ray_node_gpus_utilization",
    } <= asked
    assert "ray_train_run_name" not in asked  # labels are not taken for metrics


def test_the_dashboard_shows_what_it_should(board):
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["Sweep progress", "Probes by trial", "Throughput and goodput", "Machines"]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert {
        "Steps per second",
        "Images per second",
        "Goodput",
        "GPU use",
        "shoot/energy",
        "shoot/nmse",
        "Trials by state",
    } <= {panel["title"] for panel in panels}
    assert all(panel["description"] and panel["targets"] for panel in panels)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for query in queries(board):
        assert all(query.count(a) == query.count(b) for a, b in ("()", "[]", "{}")), query


def test_grafana_and_prometheus_find_each_other_and_stay_at_home(board):
    compose, source = (
        load("monitoring/compose.yaml"),
        load("monitoring/grafana/datasource.yaml")["datasources"][0],
    )
    used = {
        json.dumps(p["datasource"], sort_keys=True) for p in board["panels"] if "datasource" in p
    }
    assert used == {json.dumps({"type": source["type"], "uid": source["uid"]})}
    prometheus, grafana = compose["services"]["prometheus"], compose["services"]["grafana"]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in prometheus["command"]
    assert grafana["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert "ports" not in prometheus | grafana  # nothing is published to the network
    for mount in (*prometheus["volumes"], *grafana["volumes"]):
        if mount.startswith("./"):
            assert (CLUSTER / "monitoring" / mount.split(":")[0]).exists(), mount
    provider = load("monitoring/grafana/provider.yaml")["providers"][0]["options"]["path"]
    assert f"./grafana/dashboards:{provider}:ro" in grafana["volumes"]


def test_prometheus_reads_the_list_that_ray_writes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    (job,) = load("monitoring/prometheus.yml")["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_prometheus_follows_rays_link_to_the_list(elsewhere, tmp_path):
    """Ray's own writer leaves the list in its session's folder and an absolute link to it above;
    both must exist in the container.
    """
    from ray._private.metrics_agent import PrometheusServiceDiscoveryWriter as Writer

    class OneNode(Writer):
        def get_file_discovery_content(self) -> str:
            return '[{"labels": {"job": "ray"}, "targets": ["10.0.0.10:8080"]}]'

    folder = tmp_path / "other" if elsewhere else tmp_path / "tmp" / "ray"
    session = folder / "session_1"
    session.mkdir(parents=True)
    writer = OneNode.__new__(OneNode)  # without the GCS that it would ask for the nodes
    vars(writer).update(
        temp_dir=str(folder),
        session_dir=str(session),
        _symlink_created=False,
        _use_fallback_copy=False,
    )
    writer.write()
    (job,) = load("monitoring/prometheus.yml")["scrape_configs"]
    mounts = {}  # folder in the container -> on the host
    for mount in load("monitoring/compose.yaml")["services"]["prometheus"]["volumes"]:
        host, inside = mount.replace("${RAY_TMP:-/tmp/ray}", str(folder)).split(":")[:2]
        mounts[inside] = host

    def seen(path: str) -> Path:
        """On the host, of a path in the container; links lead on within the container."""
        inside = next(
            (m for m in sorted(mounts, key=len, reverse=True) if path.startswith(f"{m}/")), None
        )
        assert inside, f"{path} is in no mount"
        there = Path(mounts[inside] + path.removeprefix(inside))
        return seen(os.readlink(there)) if there.is_symlink() else there

    assert "10.0.0.10:8080" in seen(job["file_sd_configs"][0]["files"][0]).read_text()


# --- what `ray job submit --working-dir .` sends


def test_the_package_of_a_clone_is_small_and_whole():
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split("\0")
    if not tracked[0]:
        pytest.skip("no git checkout")
    files = [ROOT / name for name in tracked if name and (ROOT / name).is_file()]
    sent = {
        f.relative_to(ROOT)
        for f in files
        if not any(
            skip(f) or any(skip(p) for p in f.parents if ROOT in p.parents) for skip in excluded
        )
    }
    assert all(
        p in sent
        for p in (
            Path("flowray/cli/tune.py"),
            Path("sweeps/head.yaml"),
            Path("flowray/assets/text/model.safetensors"),
        )
    )
    assert not [p for p in sent if p.parts[0] in ("docs", "tests", "cluster", "benchmarks", ".git")]
    models = [p for p in sent if p.parts[:2] == ("flowray", "assets")]
    assert sum((ROOT / p).stat().st_size for p in models) < 13 * 2**20
    assert sum((ROOT / p).stat().st_size for p in sent.difference(models)) < 4 * 2**20
