"""The files under cluster/: accepted by the tools that will read them, or by their schema, and in agreement with the code."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent  # shellcheck and hadolint come with the dev extra
LAUNCHERS = ["aws.yaml", "gcp.yaml", "onprem.yaml"]
CLOUDS = LAUNCHERS[:2]
KUBERAY = ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
TOKEN_PATH = "/home/ray/.ray/auth_token"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def strings(node: Any) -> Iterator[tuple[str, str]]:
    """(key, text) of every string in a parsed file."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from ((key, value),) if isinstance(value, str) else ((key if k == "" else k, v) for k, v in strings(value))
    elif isinstance(node, list):
        for value in node:
            yield from (("", value),) if isinstance(value, str) else strings(value)


def starts_something() -> list[Path]:
    files = [p for p in CLUSTER.rglob("*") if p.is_file() and p.suffix not in (".md", ".json", ".dockerignore")]
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
    for name in [*LAUNCHERS, *KUBERAY, "slurm/sweep.sbatch", "Dockerfile", "monitoring/compose.yaml"]:
        assert name in text


# --- Ray's cluster launcher


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_the_launcher_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(load(name)))
    validate_config(config)
    assert config["docker"]["container_name"] == "flowray"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"idle_timeout": 5})  # a typing error is found


def header(name: str) -> str:
    return "\n".join(line for line in (CLUSTER / name).read_text().splitlines()[:24] if line.startswith("#"))


class Shell:
    """In place of ssh, for Ray's code: answers as a fresh host does, and keeps the commands."""

    def __init__(self):
        self.commands: list[str] = []

    def check_call(self, command: list[str], **_: Any) -> int:
        self.commands.append(" ".join(command))
        return 0

    def check_output(self, command: list[str], **_: Any) -> bytes:
        self.commands.append(" ".join(command))
        return b'["HOME=/home/ray"]' if "inspect -f" in self.commands[-1] and "Config.Env" in self.commands[-1] else b""


def image_started(docker: dict[str, Any], *, as_head: bool) -> str:
    """The image in the `docker run` that Ray would type on a node, given the docker section for it."""
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    class Hosts:
        def internal_ip(self, node_id: str) -> str:
            return "10.0.0.11"

    shell = Shell()
    node = {"log_prefix": "", "node_id": "node", "provider": Hosts(), "auth_config": {"ssh_user": "ubuntu"}, "cluster_name": "flowray"}
    runner = DockerCommandRunner(docker, **node, process_runner=shell, use_internal_ip=True)
    runner.ssh_command_runner.ssh_control_path = None  # nothing is left in /tmp
    runner.run_init(as_head=as_head, file_mounts={}, sync_run_yet=True)
    (run,) = [command for command in shell.commands if "docker run" in command]
    (image,) = re.findall(r"registry\.example\.com/flowray:\S+-(cpu|cuda)", run)
    return image


@pytest.mark.parametrize("name", CLOUDS)
def test_every_node_of_a_cloud_gets_its_image(name):
    """As autoscaler v2, which `ray up` starts there, and `ray up` itself for the head choose it."""
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    plain = prepare_config(load(name))
    config = AutoscalingConfig(copy.deepcopy(plain), skip_content_hash=True)
    for node_type in plain["available_node_types"]:
        head = node_type == plain["head_node_type"]
        assert image_started(config.get_docker_config(node_type), as_head=head) == ("cpu" if head else "cuda")
    assert image_started(plain["docker"], as_head=True) == "cpu"
    assert "RAY_UP_enable_autoscaler_v2" not in header(name)


def test_own_hosts_get_their_image_from_autoscaler_v1():
    """v2 takes every host for a head, as there is but one type; so the header switches it off, by the name that Ray's `ray up` reads."""
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    plain = prepare_config(load("onprem.yaml"))
    (node_type,) = plain["available_node_types"]
    assert image_started(plain["docker"], as_head=True) == "cpu"
    assert image_started(plain["docker"], as_head=False) == "cuda"
    v2 = AutoscalingConfig(copy.deepcopy(plain), skip_content_hash=True).get_docker_config(node_type)
    assert image_started(v2, as_head=False) == "cpu"
    lines = [line.lstrip("# ") for line in header("onprem.yaml").splitlines()]
    (switch,) = [i for i, line in enumerate(lines) if line.startswith("export RAY_UP_enable_autoscaler_v2=0")]
    assert switch < lines.index("ray up cluster/onprem.yaml")
    assert 'os.getenv("RAY_UP_enable_autoscaler_v2", "1") == "1"' in inspect.getsource(commands.get_or_create_head_node)


def test_gpus_reach_the_containers_and_the_driver_is_new_enough():
    """NVIDIA's runtime shows a container the GPUs that NVIDIA_VISIBLE_DEVICES names. Drivers from 580 on run CUDA 12 and 13."""
    stages = re.split(r"^FROM ", (CLUSTER / "Dockerfile").read_text(), flags=re.M)
    (cuda,) = [stage for stage in stages if " AS torch-cuda" in stage.partition("\n")[0]]
    assert re.search(r"^ENV NVIDIA_VISIBLE_DEVICES=all \\\n +NVIDIA_DRIVER_CAPABILITIES=compute,utility$", cuda, re.M)
    (default,) = re.findall(r"^ARG CUDA=cu(\d+)$", cuda, re.M)
    assert "https://download.pytorch.org/whl/${CUDA}" in cuda
    drivers = {"12": 525, "13": 580}
    assert f"driver >= {drivers[default[:2]]}" in header("Dockerfile")
    for name in ("onprem.yaml", *KUBERAY):
        assert f"driver >= {drivers[default[:2]]}" in " ".join(header(name).replace("#", " ").split())
    nodes = [t["node_config"] for t in load("gcp.yaml")["available_node_types"].values()]
    assert {int(node["disks"][0]["initializeParams"]["sourceImage"].rpartition("-")[2]) >= 580 for node in nodes} == {True}
    for node in load("aws.yaml")["available_node_types"].values():
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["node_config"]["ImageId"])  # `latest_dlami` is one of 2022 in Ray's code
    assert "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id" in header("aws.yaml")


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("uid", [1000, 1001])
def test_another_ssh_user_than_the_images_is_refused(name, uid, tmp_path):
    """Its token would be readable for nobody in the container."""
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {uid}\n")
    (tmp_path / "id").chmod(0o755)
    (line,) = [command for command in load(name)["initialization_commands"] if "id -u" in command]
    done = subprocess.run(["bash", "-c", line], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, text=True)
    assert done.returncode == (uid != 1000)
    assert ("ssh_user must have uid 1000" in done.stderr) == (uid != 1000)
    assert f"--uid {1000} " in (CLUSTER / "Dockerfile").read_text()


def test_the_token_is_made_for_its_owner_alone(tmp_path):
    """The headers' own command, in a home of its own."""
    commands = {re.search(r"Before: +(\(.*get-auth-token.*?\))", header(name))[1] for name in LAUNCHERS}
    (command,) = commands
    assert command in (CLUSTER / "README.md").read_text()
    environment = {"HOME": str(tmp_path), "PATH": f"{BIN}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", f"umask 022; {command}"], env=environment, check=True)
    assert stat.S_IMODE((tmp_path / ".ray" / "auth_token").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", CLOUDS)
def test_workers_scale_from_nothing_and_spot_comes_first(name):
    config = load(name)
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert {t["min_workers"] for t in types.values()} == {0}
    assert all(t["max_workers"] == config["max_workers"] > 0 and t["resources"]["GPU"] > 0 for t in types.values())
    spot, on_demand = (types[k] for k in ("gpu_spot", "gpu_on_demand"))
    assert spot["priority"] > on_demand["priority"]
    node = spot["node_config"]
    assert (node.get("InstanceMarketOptions", {}).get("MarketType") or node["scheduling"]["provisioningModel"]).lower() == "spot"
    plain = {k: v for k, v in node.items() if k not in ("InstanceMarketOptions", "scheduling")}
    assert plain == {k: v for k, v in on_demand["node_config"].items() if k != "scheduling"}
    assert "SPOT" not in json.dumps(on_demand).upper()


def test_the_autoscaler_prefers_spot_and_falls_back():
    """Ray's own scheduler (autoscaler v2) on the shipped node types: spot while it is to be had, on-demand when it is not."""
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(prepare_config(load("aws.yaml")), skip_content_hash=True)

    def launched(recoverable: dict[str, float]) -> dict[str, int]:
        request = SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"GPU": 1, "CPU": 1})] * 3),
            cloud_resource_availabilities={},
            recoverable_resource_availabilities=recoverable,
        )
        reply = ResourceDemandScheduler(None).schedule(request)
        return {r.instance_type: r.count for r in reply.to_launch if r.instance_type != "head"}

    assert launched({}) == {"gpu_spot": 3}
    assert launched({"gpu_spot": 0.2}) == {"gpu_on_demand": 3}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_token_is_a_file_and_the_dashboard_on_loopback(name):
    config = load(name)
    options = config["docker"]["run_options"]
    assert "-e RAY_AUTH_MODE=token" in options
    assert f"-e RAY_AUTH_TOKEN_PATH={TOKEN_PATH}" in options
    assert config["file_mounts"][TOKEN_PATH] == "~/.ray/auth_token"
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert "disabled" not in json.dumps(config)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_runs_land_on_the_shared_folder(name):
    """A relative storage_path is found from FLOWRAY_STORAGE; the folder is mounted into the containers and is where jobs start."""
    config = load(name)
    options = config["docker"]["run_options"]
    for wanted in ("-v /mnt/flowray:/mnt/flowray", "-e FLOWRAY_STORAGE=/mnt/flowray", "-e FLOWRAY_CACHE=/mnt/flowray/.cache"):
        assert wanted in options
    assert all(c[-1].startswith("cd /mnt/flowray && ") for c in (config["head_start_ray_commands"], config["worker_start_ray_commands"]))
    assert any("mountpoint -q /mnt/flowray" in c for c in config["initialization_commands"])


# --- Kubernetes


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
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "volumeMounts", 0, "mountPath"), "mnt"),
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
    spec = manifest["spec"] if manifest["kind"] == "RayCluster" else manifest["spec"]["rayClusterSpec"]
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert (spec["enableInTreeAutoscaling"], spec["autoscalerOptions"]["version"]) == (True, "v2")
    assert spec["authOptions"] == {"mode": "token", "secretName": "flowray-token"}
    assert spec["gcsFaultToleranceOptions"]["redisAddress"].split(":")[0] in {
        d["metadata"]["name"] for d in yaml.safe_load_all((CLUSTER / "kuberay/redis.yaml").read_text()) if d["kind"] == "Service"
    }
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    claim = load("kuberay/storage.yaml")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["minReplicas"], workers["maxReplicas"]) == (0, 8)
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        assert {"name": "storage", "persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}} in pod["volumes"]
        (container,) = pod["containers"]
        assert {"name": "FLOWRAY_STORAGE", "value": "/mnt/flowray"} in container["env"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    tainted = {t["key"] for t in workers["template"]["spec"]["tolerations"]}  # so the spot pools of GKE and AKS keep others away
    assert tainted == {"nvidia.com/gpu", "cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"}
    assert f"LocalQueue named {manifest['metadata']['labels']['kueue.x-k8s.io/queue-name']}" in header(name)
    gpus = workers["template"]["spec"]["containers"][0]["resources"]
    assert gpus["requests"]["nvidia.com/gpu"] == gpus["limits"]["nvidia.com/gpu"] == "1"


def test_the_two_manifests_describe_one_cluster():
    assert load("kuberay/raycluster.yaml")["spec"] == load("kuberay/rayjob.yaml")["spec"]["rayClusterSpec"]


def test_a_retried_job_resumes_and_its_command_is_valid():
    from flowray.config.sweepfile import load_sweep

    spec = load("kuberay/rayjob.yaml")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True
    *command, sweep, flag = spec["entrypoint"].split()
    assert (command, flag) == (["python", "-m", "flowray.tune"], "--resume")
    assert load_sweep(sweep).name == "head"


def test_versions_are_those_that_the_tests_pass_with():
    pins = dict(re.findall(r"^([A-Za-z0-9-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M))
    for name in KUBERAY:
        assert re.findall(r'rayVersion: "(.+)"', (CLUSTER / name).read_text()) == [pins["ray"]]
    assert set(re.findall(r"torch==([\d.]+)", (CLUSTER / "Dockerfile").read_text())) == {pins["torch"]}


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
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$OUT/scontrol"\ntest "$1" = requeue || printf "node1\\nnode2\\n"\n')
    (tools / "srun").write_text(
        '#!/bin/sh\nprintf "%s\\n" "$@" > "$OUT/args"\ncp -p "$RAY_AUTH_TOKEN_PATH" "$OUT/token"\n'
        'env > "$OUT/env"\nif [ -n "$SRUN_WAITS" ]; then until [ -e "$OUT/go" ]; do sleep 0.05; done; fi\nexit "${SRUN_EXIT:-0}"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
    return {"PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(tmp_path), "FLOWRAY_STORAGE": str(tmp_path / "storage"), **job}


def sbatch(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    script = CLUSTER / "slurm" / "sweep.sbatch"
    return subprocess.run(["bash", script, *command], env=environment, capture_output=True, text=True, timeout=30)


def test_slurm_starts_one_node_each_and_the_sweep_on_the_head(slurm, tmp_path):
    done = sbatch(slurm)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "args").read_text().splitlines()
    start, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    ray = start[start.index("ray") :]
    address = ray[ray.index("--address") + 1]
    assert ray[1] == "symmetric-run"
    assert {"--nodes=2", "--ntasks=2", "--cpus-per-task=8"} <= set(start)  # srun takes no --cpus-per-task from its job
    assert re.fullmatch(r"node1:2\d{4}|node1:3\d{4}", address)
    assert ray[ray.index("--min-nodes") + 1] == "2"
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args  # Ray's own reading of what it hands to `ray start`

    assert curate_and_validate_ray_start_args(ray[2:]) == ["--num-cpus=8", "--num-gpus=0", "--dashboard-host=127.0.0.1"]
    assert command == ["env", f"RAY_ADDRESS={address}", "python", "-m", "flowray.tune", "sweeps/head.yaml", "--resume"]
    token = tmp_path / "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert re.fullmatch("[0-9a-f]{64}", token.read_text())
    assert "RAY_AUTH_MODE=token" in (tmp_path / "env").read_text().splitlines()
    assert list((tmp_path / "storage").iterdir()) == [tmp_path / "storage" / ".cache"]  # the token is gone with the job
    assert token.read_text() not in "\n".join(arguments)


def test_slurm_passes_a_command_and_its_exit_code_on(slurm, tmp_path):
    done = sbatch(slurm | {"SRUN_EXIT": "75"}, "python", "-m", "flowray.train", "quickstart", "card.title=two words")
    assert done.returncode == 75
    assert (tmp_path / "args").read_text().splitlines()[-1] == "card.title=two words"


def test_slurm_puts_a_job_back_into_the_queue_before_its_time_is_up(slurm, tmp_path):
    """Slurm signals the batch shell alone, minutes before the limit; what runs is left to end by itself, as it is told to."""
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


@pytest.mark.parametrize(("change", "words"), [({"RAY_AUTH_MODE": "disabled"}, "without a token"), ({"FLOWRAY_STORAGE": ""}, "every node")])
def test_slurm_refuses_what_is_not_safe(change, words, slurm, tmp_path):
    done = sbatch(slurm | change)
    assert done.returncode != 0
    assert words in done.stderr
    assert not (tmp_path / "args").exists()


def scripts() -> list[Path]:
    return sorted(p for p in ROOT.joinpath("cluster").rglob("*") if p.is_file() and p.read_bytes().startswith(b"#!"))


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
    found = subprocess.run([BIN / "shellcheck", "--severity=warning", *tmp_path.glob("*.sh")], capture_output=True, text=True)
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
    sent = {line.removeprefix("!") for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {source for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for source in line.split()} == sent
    assert "RAY_AUTH_MODE=token" in text
    assert text.rstrip().rfind("USER 1000:100") > text.rfind("FROM ")


def test_the_dockerfile_is_linted():
    done = subprocess.run([BIN / "hadolint", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- Prometheus and Grafana


@pytest.fixture(scope="module")
def board() -> dict[str, Any]:
    return json.loads((CLUSTER / "monitoring/grafana/dashboards/flowray.json").read_text())


def queries(board: dict[str, Any]) -> list[str]:
    variables = [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    return variables + [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]


def emitted() -> set[str]:
    """The names that flowray declares, and those that stand in Ray's own code."""
    import ray

    from flowray.rayrun.gauges import exported_names

    package = Path(ray.__file__).parent
    reporter = (package / "dashboard/modules/reporter/reporter_agent.py").read_text()
    train = "".join(p.read_text() for p in (package / "train/v2/_internal/metrics").glob("*.py"))
    names = re.findall(r'Gauge\(\s*"(\w+)"', reporter) + re.findall(r'_TIME_S = "(\w+)"', train)
    assert len(names) > 40
    return set(exported_names()) | {f"ray_{name}" for name in names}


def test_the_dashboard_asks_only_for_metrics_that_are_emitted(board):
    asked = set(re.findall(r"\b(?:ray|flowray|autoscaler)_\w+", re.sub(r"by \([^)]*\)", "", " ".join(queries(board)))))
    assert asked - emitted() == set()
    assert {"ray_flowray_trials", "ray_flowray_shoot_nmse", "ray_flowray_step", "ray_node_gpus_utilization"} <= asked
    assert "ray_train_run_name" not in asked  # labels are not taken for metrics


def test_the_dashboard_shows_what_it_should(board):
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert rows == ["Sweep progress", "Probes by trial", "Throughput and goodput", "Machines"]
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert {"Steps per second", "Images per second", "Goodput", "GPU use", "shoot/nmse", "Trials by state"} <= {
        panel["title"] for panel in panels
    }
    assert all(panel["description"] and panel["targets"] for panel in panels)
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for query in queries(board):
        assert all(query.count(a) == query.count(b) for a, b in ("()", "[]", "{}")), query


def test_grafana_and_prometheus_find_each_other_and_stay_at_home(board):
    compose, source = load("monitoring/compose.yaml"), load("monitoring/grafana/datasource.yaml")["datasources"][0]
    used = {json.dumps(p["datasource"], sort_keys=True) for p in board["panels"] if "datasource" in p}
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
    """Ray's own writer leaves the list in its session's folder and an absolute link to it above; both must exist in the container."""
    from ray._private.metrics_agent import PrometheusServiceDiscoveryWriter as Writer

    class OneNode(Writer):
        def get_file_discovery_content(self) -> str:
            return '[{"labels": {"job": "ray"}, "targets": ["10.0.0.10:8080"]}]'

    folder = tmp_path / "other" if elsewhere else tmp_path / "tmp" / "ray"
    session = folder / "session_1"
    session.mkdir(parents=True)
    writer = OneNode.__new__(OneNode)  # without the GCS that it would ask for the nodes
    vars(writer).update(temp_dir=str(folder), session_dir=str(session), _symlink_created=False, _use_fallback_copy=False)
    writer.write()
    (job,) = load("monitoring/prometheus.yml")["scrape_configs"]
    mounts = {}  # folder in the container -> on the host
    for mount in load("monitoring/compose.yaml")["services"]["prometheus"]["volumes"]:
        host, inside = mount.replace("${RAY_TMP:-/tmp/ray}", str(folder)).split(":")[:2]
        mounts[inside] = host

    def seen(path: str) -> Path:
        """On the host, of a path in the container; links lead on within the container."""
        inside = next((m for m in sorted(mounts, key=len, reverse=True) if path.startswith(f"{m}/")), None)
        assert inside, f"{path} is in no mount"
        there = Path(mounts[inside] + path.removeprefix(inside))
        return seen(os.readlink(there)) if there.is_symlink() else there

    assert "10.0.0.10:8080" in seen(job["file_sd_configs"][0]["files"][0]).read_text()


# --- what `ray job submit --working-dir .` sends


def test_the_package_of_a_clone_is_small_and_whole():
    from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

    excluded = get_excludes_from_ignore_files(ROOT, include_gitignore=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    if not tracked[0]:
        pytest.skip("no git checkout")
    files = [ROOT / name for name in tracked if name and (ROOT / name).is_file()]
    sent = {
        f.relative_to(ROOT) for f in files if not any(skip(f) or any(skip(p) for p in f.parents if ROOT in p.parents) for skip in excluded)
    }
    assert all(p in sent for p in (Path("flowray/cli/tune.py"), Path("sweeps/head.yaml"), Path("flowray/assets/text/model.safetensors")))
    assert not [p for p in sent if p.parts[0] in ("docs", "tests", "cluster", ".git")]
    assert sum((ROOT / p).stat().st_size for p in sent) < 10 * 2**20
