"""The launcher files of Ray: accepted by Ray's own code, for every node that they may start, and
safe.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import stat
import subprocess
from typing import Any

import jsonschema
import pytest
from cluster_files import BIN, CLOUDS, CLUSTER, KUBERAY, LAUNCHERS, TOKEN_PATH, header, load


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_takes_the_launcher_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(load(name)))
    validate_config(config)
    assert config["docker"]["container_name"] == "flowray"
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"idle_timeout": 5})  # a typing error is found


class Shell:
    """In place of ssh, for Ray's code: answers as a fresh host does, and keeps the commands."""

    def __init__(self):
        self.commands: list[str] = []

    def check_call(self, command: list[str], **_: Any) -> int:
        self.commands.append(" ".join(command))
        return 0

    def check_output(self, command: list[str], **_: Any) -> bytes:
        self.commands.append(" ".join(command))
        return (
            b'["HOME=/home/ray"]'
            if "inspect -f" in self.commands[-1] and "Config.Env" in self.commands[-1]
            else b""
        )


def image_started(docker: dict[str, Any], *, as_head: bool) -> str:
    """The image in the `docker run` that Ray would type on a node, given the docker section for
    it.
    """
    from ray.autoscaler._private.command_runner import DockerCommandRunner

    class Hosts:
        def internal_ip(self, node_id: str) -> str:
            return "10.0.0.11"

    shell = Shell()
    node = {
        "log_prefix": "",
        "node_id": "node",
        "provider": Hosts(),
        "auth_config": {"ssh_user": "ubuntu"},
        "cluster_name": "flowray",
    }
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
        assert image_started(config.get_docker_config(node_type), as_head=head) == (
            "cpu" if head else "cuda"
        )
    assert image_started(plain["docker"], as_head=True) == "cpu"
    assert "RAY_UP_enable_autoscaler_v2" not in header(name)


def test_own_hosts_get_their_image_from_autoscaler_v1():
    """v2 takes every host for a head, as there is but one type; so the header switches it off,
    by the name that Ray's `ray up` reads.
    """
    from ray.autoscaler._private import commands
    from ray.autoscaler._private.util import prepare_config
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    plain = prepare_config(load("onprem.yaml"))
    (node_type,) = plain["available_node_types"]
    assert image_started(plain["docker"], as_head=True) == "cpu"
    assert image_started(plain["docker"], as_head=False) == "cuda"
    v2 = AutoscalingConfig(copy.deepcopy(plain), skip_content_hash=True).get_docker_config(
        node_type
    )
    assert image_started(v2, as_head=False) == "cpu"
    lines = [line.lstrip("# ") for line in header("onprem.yaml").splitlines()]
    (switch,) = [
        i for i, line in enumerate(lines) if line.startswith("export RAY_UP_enable_autoscaler_v2=0")
    ]
    assert switch < lines.index("ray up cluster/onprem.yaml")
    assert 'os.getenv("RAY_UP_enable_autoscaler_v2", "1") == "1"' in inspect.getsource(
        commands.get_or_create_head_node
    )


def test_gpus_reach_the_containers_and_the_driver_is_new_enough():
    """NVIDIA's runtime shows a container the GPUs that NVIDIA_VISIBLE_DEVICES names.

    Drivers from 580 on run CUDA 12 and 13.
    """
    stages = re.split(r"^FROM ", (CLUSTER / "Dockerfile").read_text(), flags=re.M)
    (cuda,) = [stage for stage in stages if " AS torch-cuda" in stage.partition("\n")[0]]
    assert re.search(
        r"^ENV NVIDIA_VISIBLE_DEVICES=all \\\n +NVIDIA_DRIVER_CAPABILITIES=compute,utility$",
        cuda,
        re.M,
    )
    (default,) = re.findall(r"^ARG CUDA=cu(\d+)$", cuda, re.M)
    assert "https://download.pytorch.org/whl/${CUDA}" in cuda
    drivers = {"12": 525, "13": 580}
    assert f"driver >= {drivers[default[:2]]}" in header("Dockerfile")
    for name in ("onprem.yaml", *KUBERAY):
        assert f"driver >= {drivers[default[:2]]}" in " ".join(
            header(name).replace("#", " ").split()
        )
    nodes = [t["node_config"] for t in load("gcp.yaml")["available_node_types"].values()]
    assert {
        int(node["disks"][0]["initializeParams"]["sourceImage"].rpartition("-")[2]) >= 580
        for node in nodes
    } == {True}
    for node in load("aws.yaml")["available_node_types"].values():
        # `latest_dlami` is one of 2022 in Ray's code
        assert re.fullmatch(r"ami-[0-9a-f]{17}", node["node_config"]["ImageId"])
    assert (
        "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-22.04/latest/ami-id"
        in header("aws.yaml")
    )


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("uid", [1000, 1001])
def test_another_ssh_user_than_the_images_is_refused(name, uid, tmp_path):
    """Its token would be readable for nobody in the container."""
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {uid}\n")
    (tmp_path / "id").chmod(0o755)
    (line,) = [command for command in load(name)["initialization_commands"] if "id -u" in command]
    done = subprocess.run(
        ["bash", "-c", line],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (uid != 1000)
    assert ("ssh_user must have uid 1000" in done.stderr) == (uid != 1000)
    assert f"--uid {1000} " in (CLUSTER / "Dockerfile").read_text()


def test_the_token_is_made_for_its_owner_alone(tmp_path):
    """The headers' own command, in a home of its own."""
    commands = {
        re.search(r"Before: +(\(.*get-auth-token.*?\))", header(name))[1] for name in LAUNCHERS
    }
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
    assert all(
        t["max_workers"] == config["max_workers"] > 0 and t["resources"]["GPU"] > 0
        for t in types.values()
    )
    spot, on_demand = (types[k] for k in ("gpu_spot", "gpu_on_demand"))
    assert spot["priority"] > on_demand["priority"]
    node = spot["node_config"]
    assert (
        node.get("InstanceMarketOptions", {}).get("MarketType")
        or node["scheduling"]["provisioningModel"]
    ).lower() == "spot"
    plain = {k: v for k, v in node.items() if k not in ("InstanceMarketOptions", "scheduling")}
    assert plain == {k: v for k, v in on_demand["node_config"].items() if k != "scheduling"}
    assert "SPOT" not in json.dumps(on_demand).upper()


def test_the_autoscaler_prefers_spot_and_falls_back():
    """Ray's own scheduler (autoscaler v2) on the shipped node types: spot while it is to be had,
    on-demand when it is not.
    """
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
            resource_requests=ResourceRequestUtil.group_by_count(
                [ResourceRequestUtil.make({"GPU": 1, "CPU": 1})] * 3
            ),
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
    """A relative storage_path is found from FLOWRAY_STORAGE; the folder is mounted into the
    containers and is where jobs start.
    """
    config = load(name)
    options = config["docker"]["run_options"]
    for wanted in (
        "-v /mnt/flowray:/mnt/flowray",
        "-e FLOWRAY_STORAGE=/mnt/flowray",
        "-e FLOWRAY_CACHE=/mnt/flowray/.cache",
    ):
        assert wanted in options
    assert all(
        c[-1].startswith("cd /mnt/flowray && ")
        for c in (config["head_start_ray_commands"], config["worker_start_ray_commands"])
    )
    assert any("mountpoint -q /mnt/flowray" in c for c in config["initialization_commands"])


# --- Kubernetes
