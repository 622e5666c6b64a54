"""An autoscaling cluster on one machine, and real sweeps on it, watched second by second.

Ray's `fake_multinode` provider starts and ends real nodes (a raylet each) for Ray's own autoscaler;
the head has no CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
)
from ray_nodes import Head, free_ports, offspring, own_address, running_head
from support import tiny_recipe

from flowray.config.load import dump_recipe
from flowray.store.checkpoint import load_state, newest_checkpoint
from flowray.store.rows import read_rows

NODES = 3  # the autoscaler's maximum
IDLE_S = 6.0  # after which it ends a node
LOST_S = 15  # without a sign of life, after which it takes a node for lost
PATIENCE_S = 1200.0  # for a sweep and the end of its nodes, on a slow machine
CHECKPOINT_EVERY, LOG_EVERY = 100, 10
GROWS = [2000, 100, 100, 100, 100]  # steps of each trial: a straggler first
LOSES, LOST = [600] * NODES, 1  # the node under this trial is killed


@dataclass(frozen=True)
class Moment:
    """What was seen at one time.

    waiting: trials handed out that do not train yet; processes: those of trials.
    """

    seconds: float
    nodes: int
    processes: int
    training: int
    waiting: int
    ended: int


@dataclass(frozen=True)
class Loss:
    """The death of the node under trial LOST.

    step: the last one logged; rows: the trial's metrics.jsonl up to its newest checkpoint.
    """

    seconds: float
    step: int
    checkpoint: int
    rows: tuple[str, ...]


@dataclass(frozen=True)
class Story:
    """A sweep from its start until its last node is gone."""

    folder: Path
    code: int
    told: str
    moments: tuple[Moment, ...]
    loss: Loss | None = None

    @property
    def node_counts(self) -> list[int]:
        """How many nodes there were, without repetition."""
        counts = [moment.nodes for moment in self.moments]
        return [count for i, count in enumerate(counts) if i == 0 or count != counts[i - 1]]


@contextlib.contextmanager
def autoscaling_head(folder: Path) -> Iterator[Head]:
    """A head without CPUs that grows to NODES nodes of one CPU and shrinks to none."""
    (port,) = free_ports(1)
    fixed = {
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "launch_multiple": True,
    }
    config = {
        "cluster_name": "fake",
        "max_workers": NODES,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {"type": "fake_multinode", "gcs_address": f"{own_address()}:{port}", **fixed},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": NODES,
            },
        },
        "upscaling_speed": 1.0,
        **{key: {} for key in ("auth", "docker", "file_mounts")},
        **{
            key: []
            for key in (
                "cluster_synced_files",
                "initialization_commands",
                "setup_commands",
                "head_setup_commands",
            )
        },
        **{
            key: []
            for key in (
                "worker_setup_commands",
                "head_start_ray_commands",
                "worker_start_ray_commands",
            )
        },
        "file_mounts_sync_continuously": False,
    }
    file = folder / "autoscaling.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "0",  # with v2 this provider adds no node
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "AUTOSCALER_HEARTBEAT_TIMEOUT_S": str(LOST_S),
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    with running_head(
        folder, "--num-cpus=0", f"--autoscaling-config={file}", port=port, **environment
    ) as head:
        yield head


def tell_growth(head: Head, name: str) -> Story:
    """A sweep over GROWS, with `max_concurrent: auto`, until no node is left."""
    return _watched(head, name, GROWS, lambda folder, seconds: None)


def tell_loss(head: Head, name: str) -> Story:
    """A sweep over LOSES; the node under trial LOST is killed when that has a checkpoint."""

    killed: list[tuple[int, float]] = []  # whose node, when

    def kill(folder: Path, seconds: float) -> Loss | None:
        run = folder / str(LOST)
        newest, owner = newest_checkpoint(run / "checkpoints"), _owner(run)
        if newest is None:
            return None
        if not killed and owner is not None:
            raylet = int(_environment(owner)["RAY_RAYLET_PID"])
            for pid in (raylet, owner):  # a node goes as a whole
                os.kill(pid, signal.SIGKILL)
            killed.append((owner, seconds))
        if not killed or _command(killed[0][0]):
            return None
        lines, step = (run / "metrics.jsonl").read_text().splitlines(), load_state(newest)["step"]
        kept = tuple(line for line in lines if json.loads(line)["step"] <= step)
        return Loss(killed[0][1], json.loads(lines[-1])["step"], step, kept)

    return _watched(head, name, LOSES, kill)


def _watched(
    head: Head, name: str, steps: Sequence[int], meddle: Callable[[Path, float], Loss | None]
) -> Story:
    recipe = tiny_recipe(
        head.shared / "made",
        **{"train.checkpoint_every": CHECKPOINT_EVERY, "train.log_every": LOG_EVERY},
    )
    recipe_file, sweep_file = head.shared / "tiny.yaml", head.shared / f"{name}.yaml"
    recipe_file.write_text(dump_recipe(recipe))
    sweep = {
        "name": name,
        "base": str(recipe_file),
        "set": {"train.probe_every": CHECKPOINT_EVERY, "train.sample_every": max(steps)},
        "metric": {"name": "ema/shoot/nmse", "goal": "minimize"},
        "parameters": {
            "train.steps": {"values": sorted(set(steps))},
            "optim.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        },
        "points": [{"train.steps": count} for count in steps],
        "run_cap": len(steps),
    }
    sweep_file.write_text(yaml.safe_dump(sweep))
    folder, log = head.shared / "runs" / name, head.folder / f"{name}.log"
    moments: list[Moment] = []
    loss = None
    with log.open("w") as out:
        command = [*head.inside, sys.executable, "-m", "flowray.tune", str(sweep_file)]
        driver = subprocess.Popen(
            command, env=head.as_driver, cwd=head.folder, stdout=out, stderr=out
        )
        try:
            began = time.monotonic()
            while (seconds := time.monotonic() - began) < PATIENCE_S:
                moments.append(_look(head, folder, seconds))
                loss = loss or meddle(folder, seconds)
                if driver.poll() is not None and moments[-1].nodes == 0:
                    break
                time.sleep(1 - (time.monotonic() - began) % 1)
        finally:
            driver.kill()
            code = driver.wait()
    return Story(folder, code, log.read_text(), tuple(moments), loss)


def _look(head: Head, folder: Path, seconds: float) -> Moment:
    rows = read_rows(folder / "trials.jsonl")
    out = [row["trial"] for row in rows if row["status"] == "running"]
    training = sum(_owner(folder / str(trial)) is not None for trial in out)
    commands = [_command(pid) for pid in offspring(f"FLOWRAY_CLUSTER_TEST={head.folder}")]
    # A raylet's command names its own socket. What it starts bears the same command until it has
    # become a worker; one that does not get its ports ends unknown to Ray, and one that was killed
    # is known for a while.
    raylets = len({command for command in commands if command.split(b"\0")[0].endswith(b"/raylet")})
    nodes = min(raylets, len(head.alive())) - 1  # one is the head's
    processes = sum(b"ray::ImplicitFunc" in command for command in commands)
    return Moment(seconds, nodes, processes, training, len(out) - training, len(rows) - len(out))


def _owner(run: Path) -> int | None:
    """The live process that trains in a run directory."""
    try:
        pid = json.loads((run / ".lock").read_text())["pid"]
    except (OSError, ValueError):
        return None
    return pid if _command(pid) else None


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _environment(pid: int) -> dict[str, str]:
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(word.decode(errors="replace").split("=", 1) for word in words if b"=" in word)
