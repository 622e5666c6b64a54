"""The facts of a cluster check: an actor on every node says what it has, sees and reaches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flowray.data.shards import find_shards
from flowray.rayrun.cluster_verdict import MEGABYTE, PACKAGES, PAYLOAD_BYTES, ClusterFacts, NodeFacts
from flowray.rayrun.network import bind_gloo
from flowray.rayrun.storage import marked, problem_here

PATIENCE_S = 120.0  # for an answer
STORED_BYTES = 8 * MEGABYTE
CLOCK_ROUNDS = 5


class Prober:
    """Runs on one node; every method answers for that node."""

    def versions(self) -> dict[str, str]:
        """Of Python and the packages; '' for one that is not there."""
        found = {"python": platform.python_version()}
        for name in PACKAGES:
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = ""
        return found

    def gpus(self) -> tuple[tuple[str, ...], bool]:
        """(their names, whether this torch can use CUDA). The actor holds no GPU, so CUDA itself would show none."""
        import torch

        try:
            listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            listed = ""
        return tuple(re.findall(r"^GPU \d+: (.+?) \(UUID", listed, re.M)), torch.version.cuda is not None

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def storage(self, folder: Path, mark: str) -> tuple[str, float]:
        """(what is wrong with `folder`, MB/s of writing, syncing and reading back a file)."""
        if problem := problem_here(folder, mark):
            return problem, 0.0
        file = folder / f"{mark}-{socket.gethostname()}-{os.getpid()}"
        payload = os.urandom(STORED_BYTES)
        began = time.perf_counter()
        try:
            with file.open("wb") as out:
                out.write(payload)
                out.flush()
                os.fsync(out.fileno())
            whole = file.read_bytes() == payload
        except OSError as error:
            return f"a file cannot be written there: {error.strerror}", 0.0
        finally:
            file.unlink(missing_ok=True)
        speed = 2 * STORED_BYTES / MEGABYTE / max(time.perf_counter() - began, 1e-9)
        return "" if whole else "what was written there reads back differently", speed

    def shards(self, paths: list[Path]) -> int:
        """How many of `paths` are files here."""
        return sum(path.is_file() for path in paths)

    def give(self) -> np.ndarray:
        """An object to fetch, of PAYLOAD_BYTES."""
        return np.zeros(PAYLOAD_BYTES, dtype=np.uint8)

    def take(self, boxed: list[Any]) -> float:
        """Seconds to fetch another node's object; boxed: its reference in a list, so that Ray does not fetch it beforehand."""
        began = time.perf_counter()
        size = ray.get(boxed[0]).nbytes
        assert size == PAYLOAD_BYTES
        return time.perf_counter() - began

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def all_reduce(self, host: str, port: int, rank: int, world: int) -> float:
        """Seconds of a gloo all-reduce of PAYLOAD_BYTES, the second of two. RuntimeError where the sum is wrong."""
        import torch
        import torch.distributed as dist

        bind_gloo()  # as training does
        where = f"tcp://{host}:{port}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        try:
            for _ in range(2):
                tensor = torch.full((PAYLOAD_BYTES // 4,), float(rank + 1))
                began = time.perf_counter()
                dist.all_reduce(tensor)
                seconds = time.perf_counter() - began
            want = world * (world + 1) / 2
            if not bool((tensor == want).all()):
                raise RuntimeError(f"the sum over {world} ranks is {tensor[0].item():g}, not {want:g}")
            return seconds
        finally:
            dist.destroy_process_group()


@dataclass(frozen=True)
class _Place:
    """A node and the actor on it. gpus: what Ray hands out there."""

    name: str
    gpus: float
    actor: Any

    def ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self.actor, method).remote(*arguments), timeout=PATIENCE_S)


def gather(storage: Path, data: str | None, say: Callable[[str], None]) -> ClusterFacts:
    """Ask every live node; Ray is started. data: as in `data.shards`, None for no data set; say: takes lines on what is going on.

    A node that fails to answer costs its own facts. InputError where this process cannot write `storage` or sees no shards.
    """
    shards = [path.absolute() for path in find_shards(data)] if data else None
    with _places() as places:
        say(f"{len(places)} node(s): versions, GPUs, clock, storage{', data' if shards else ''}")
        with marked(storage) as mark:
            facts = [_node_facts(place, storage, mark, shards) for place in places]
        sound = [place for place, node in zip(places, facts, strict=True) if not node.error]
        say("network between the nodes, all-reduce")
        links = list(_links(sound))
        return ClusterFacts(facts, storage, None if shards is None else len(shards), links, _all_reduce(sound))


@contextmanager
def _places() -> Iterator[list[_Place]]:
    """An actor on every live node; gone after the block."""
    actor, found = ray.remote(Prober), list[_Place]()
    try:
        for node in ray.nodes():
            if node["Alive"]:
                name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
                taken = sum(place.name.startswith(name) for place in found)  # several nodes on one host
                where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                prober = actor.options(num_cpus=0, scheduling_strategy=where).remote()
                found.append(_Place(f"{name} #{taken + 1}" if taken else name, node["Resources"].get("GPU", 0.0), prober))
        yield found
    finally:
        for place in found:
            ray.kill(place.actor)


def _node_facts(place: _Place, storage: Path, mark: str, shards: list[Path] | None) -> NodeFacts:
    facts = NodeFacts(place.name, ray_gpus=place.gpus)
    try:
        facts.versions = place.ask("versions")
        facts.gpus, facts.torch_cuda = place.ask("gpus")
        facts.skew_s, facts.skew_error_s = skew(lambda: place.ask("clock"))
        facts.storage_problem, facts.storage_mb_s = place.ask("storage", storage, mark)
        facts.shards = None if shards is None else place.ask("shards", shards)
    except Exception as error:  # whatever it was, it is this node's finding
        facts.error = _last_line(error)
    return facts


def skew(clock: Callable[[], float], rounds: int = CLOCK_ROUNDS) -> tuple[float, float]:
    """(that clock - this clock, how wrong that may be), seconds: the shortest of several round trips, its middle, as NTP does."""
    best = (0.0, float("inf"))
    for _ in range(rounds):
        before = time.time()
        there = clock()
        after = time.time()
        best = min(best, (there - (before + after) / 2, (after - before) / 2), key=lambda found: found[1])
    return best


def _links(places: list[_Place]) -> Iterator[tuple[str, str, float]]:
    """(from, to, MB/s) around a ring, 0 where nothing came: every node sends once and receives once."""
    for giver, taker in zip(places, places[1:] + places[:1], strict=True) if len(places) > 1 else ():
        try:
            reference = giver.actor.give.remote()
            ray.wait([reference], fetch_local=False, timeout=PATIENCE_S)
            speed = PAYLOAD_BYTES / MEGABYTE / max(taker.ask("take", [reference]), 1e-9)
        except Exception:
            speed = 0.0
        yield giver.name, taker.name, speed


def _all_reduce(places: list[_Place]) -> tuple[int, float, str]:
    """(ranks, seconds, error) with one rank on every node."""
    try:
        host, port = places[0].ask("address")
        runs = [place.actor.all_reduce.remote(host, port, rank, len(places)) for rank, place in enumerate(places)]
        return len(places), max(ray.get(runs, timeout=PATIENCE_S)), ""
    except IndexError:
        return 0, 0.0, "no node answered"
    except Exception as error:
        return len(places), 0.0, _last_line(error)


def _last_line(error: Exception) -> str:
    """What went wrong, without the way there."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:200] if lines else type(error).__name__
