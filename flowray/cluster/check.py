"""The facts of a cluster check: an actor on every node says what it has, sees and reaches."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.autoscaler.sdk import request_resources

from flowray.cluster.capacity import alive_nodes, capacity, node_name, only_on
from flowray.cluster.gpus import reduced, seeing_gpus
from flowray.cluster.network import bind_gloo
from flowray.cluster.ray_private import HEAD
from flowray.cluster.storage import marker_file, problem_here
from flowray.cluster.verdict import MEGABYTE, PACKAGES, PAYLOAD_BYTES, ClusterFacts, NodeFacts
from flowray.config.errors import last_line
from flowray.config.paths import is_address, storage_place
from flowray.config.progress import Progress, counted
from flowray.data.shards import find_shards
from flowray.tune.plan import Node

PATIENCE_S = 120.0  # for an answer
# for nodes that were asked for: a machine starts, and pulls an image of several GB
WORKERS_S = 1200.0
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

    def gpus(self, promised: float) -> tuple[tuple[str, ...], str]:
        """(their names, as `NodeFacts.cuda_problem`). promised: how many Ray hands out here."""
        try:
            listed = subprocess.run(
                ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError):
            listed = ""
        names = tuple(re.findall(r"^GPU \d+: (.+?) \(UUID", listed, re.M))
        return names, seeing_gpus("cuda_problem()") if names or promised else ""

    def clock(self) -> float:
        """Seconds since the epoch."""
        return time.time()

    def storage(self, folder: Path, marker: str) -> tuple[str, float]:
        """(what is wrong with `folder`, MB/s of writing, syncing and reading back a file)."""
        if problem := problem_here(folder, marker):
            return problem, 0.0
        file = folder / f"{marker}-{socket.gethostname()}-{os.getpid()}"
        payload = os.urandom(STORED_BYTES)
        start = time.perf_counter()
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
        speed = 2 * STORED_BYTES / MEGABYTE / max(time.perf_counter() - start, 1e-9)
        return "" if whole else "what was written there reads back differently", speed

    def shards(self, asked: list[Path] | str) -> int:
        """How many of these paths are files here, or how many shards an address has from here."""
        if isinstance(asked, str):
            return len(find_shards(asked))
        return sum(path.is_file() for path in asked)

    def give(self) -> np.ndarray:
        """An object to fetch, of PAYLOAD_BYTES."""
        return np.zeros(PAYLOAD_BYTES, dtype=np.uint8)

    def take(self, boxed: list[Any]) -> float:
        """Seconds to fetch another node's object; boxed: its reference in a list, so that Ray
        does not fetch it beforehand.
        """
        start = time.perf_counter()
        size = ray.get(boxed[0]).nbytes
        assert size == PAYLOAD_BYTES
        return time.perf_counter() - start

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def all_reduce(self, backend: str, host: str, port: int, rank: int, world: int) -> float:
        """`reduced` on this node: gloo in this process, whose network it shares with training;
        NCCL in one that sees the GPUs.
        """
        if backend == "gloo":
            bind_gloo()  # as training does
            return reduced(backend, host, port, rank, world)
        return float(seeing_gpus(f"reduced({backend!r}, {host!r}, {port}, {rank}, {world})"))


@dataclass(frozen=True)
class _Place:
    """A node and the actor on it. gpus: what Ray hands out there."""

    name: str
    host: str
    gpus: float
    actor: Any

    def ask(self, method: str, *arguments: Any) -> Any:
        return ray.get(getattr(self.actor, method).remote(*arguments), timeout=PATIENCE_S)


def gather(storage: Path, data: str | None, progress: Progress, workers: int = 0) -> ClusterFacts:
    """Ask every live node; Ray is started. data: as in `data.shards`, None for no data set.

    A `storage` that is not there is not made: the folder in which it would be is asked about.
    workers: how many the autoscaler shall bring up before that. A node that fails to answer costs
    its own facts. InputError where this process cannot write `storage` or sees no shards.
    """
    tried = storage_place(storage)
    shards = [path.absolute() for path in find_shards(data)] if data else None
    asked = data if data and is_address(data) else shards
    with _brought_up(workers, progress) as missing, _places() as places:
        asking = f"asking the nodes: versions, GPUs, clock, storage{', data' if shards else ''}"
        with (
            marker_file(tried, make=False) as marker,
            progress.task(asking, len(places)) as advance,
        ):
            facts = [_node_facts(place, tried, marker, asked) for place in counted(places, advance)]
        sound = [place for place, node in zip(places, facts, strict=True) if not node.error]
        with progress.task("sending from node to node"):
            links = list(_links(sound))
        with progress.task("all-reduce of all nodes, gloo"):
            reduces = [_all_reduce("gloo", sound)]
        able = {
            place.host
            for place, node in zip(places, facts, strict=True)
            if (node.gpus or node.ray_gpus) and not node.cuda_problem
        }
        # one rank a host, on its first GPU
        if training := list({place.host: place for place in sound if place.host in able}.values()):
            with progress.task("all-reduce of the nodes with GPUs, NCCL"):
                reduces.append(_all_reduce("nccl", training))
        may_come = max(0, len(capacity().nodes) - len(places))
        wanted = None if shards is None else len(shards)
        return ClusterFacts(
            facts, tried, wanted, links, reduces, may_come, missing, absent=tried != storage
        )


@contextmanager
def _brought_up(workers: int, progress: Progress) -> Iterator[str]:
    """Have the autoscaler bring up nodes until this many workers are there; after the block they
    may go. Yields why not all came, or ''.
    """
    sizes = capacity().nodes[1:] if workers else ()  # the first is the head's
    if len(sizes) < workers:
        yield f"{workers} worker(s) asked for; the cluster has or may have {len(sizes)}"
        return
    if not workers:
        yield ""
        return
    request_resources(bundles=bundles(sizes[:workers]))
    try:
        with progress.task(f"waiting for {workers} worker(s), up to {WORKERS_S / 60:.0f} minutes"):
            there = wait_for(_workers_up, workers, WORKERS_S)
        yield (
            ""
            if there >= workers
            else f"{workers} worker(s) asked for, {there} came in {WORKERS_S / 60:.0f} minutes"
        )
    finally:
        request_resources(bundles=[])


def _workers_up() -> int:
    return sum(HEAD not in node["Resources"] for node in alive_nodes())


def bundles(sizes: Sequence[Node]) -> list[dict[str, float]]:
    """What to ask Ray's autoscaler for, so that a node of each of these sizes is up: all of it."""
    return [
        {name: float(count) for name, count in (("CPU", cpus), ("GPU", gpus)) if count}
        for cpus, gpus in sizes
    ]


def wait_for(count: Callable[[], int], wanted: int, patience_s: float, pause_s: float = 2.0) -> int:
    """The count once it is what is wanted, or when patience ends."""
    until = time.monotonic() + patience_s
    while (there := count()) < wanted and time.monotonic() < until:
        time.sleep(pause_s)
    return there


@contextmanager
def _places() -> Iterator[list[_Place]]:
    """An actor on every live node; gone after the block."""
    actor, found = ray.remote(Prober), list[_Place]()
    try:
        for node in alive_nodes():
            name, host = node_name(node), node["NodeManagerHostname"]
            # several nodes on one host
            taken = sum(place.name.startswith(name) for place in found)
            prober = actor.options(num_cpus=0, scheduling_strategy=only_on(node)).remote()
            name = f"{name} #{taken + 1}" if taken else name
            found.append(_Place(name, host, node["Resources"].get("GPU", 0.0), prober))
        yield found
    finally:
        for place in found:
            ray.kill(place.actor)


def _node_facts(
    place: _Place, storage: Path, marker: str, asked: list[Path] | str | None
) -> NodeFacts:
    facts = NodeFacts(place.name, ray_gpus=place.gpus)
    try:
        facts.versions = place.ask("versions")
        facts.gpus, facts.cuda_problem = place.ask("gpus", place.gpus)
        facts.skew_s, facts.skew_error_s = skew(lambda: place.ask("clock"))
        facts.storage_problem, facts.storage_mb_s = place.ask("storage", storage, marker)
        facts.shards = None if asked is None else place.ask("shards", asked)
    except Exception as error:  # whatever it was, it is this node's finding
        facts.error = last_line(str(error))[:200] or type(error).__name__
    return facts


def skew(clock: Callable[[], float], rounds: int = CLOCK_ROUNDS) -> tuple[float, float]:
    """(that clock - this clock, how wrong that may be), seconds: the shortest of several round
    trips, its middle, as NTP does.
    """
    best = (0.0, float("inf"))
    for _ in range(rounds):
        before = time.time()
        there = clock()
        after = time.time()
        best = min(
            best, (there - (before + after) / 2, (after - before) / 2), key=lambda found: found[1]
        )
    return best


def _links(places: list[_Place]) -> Iterator[tuple[str, str, float]]:
    """(from, to, MB/s) around a ring, 0 where nothing came: every node sends once and receives
    once.
    """
    for giver, taker in (
        zip(places, places[1:] + places[:1], strict=True) if len(places) > 1 else ()
    ):
        try:
            reference = giver.actor.give.remote()
            ray.wait([reference], fetch_local=False, timeout=PATIENCE_S)
            speed = PAYLOAD_BYTES / MEGABYTE / max(taker.ask("take", [reference]), 1e-9)
        except Exception:
            speed = 0.0
        yield giver.name, taker.name, speed


def _all_reduce(backend: str, places: list[_Place]) -> tuple[str, int, float, str]:
    """(backend, ranks, seconds, error) with one rank on every place."""
    try:
        host, port = places[0].ask("address")
        runs = [
            place.actor.all_reduce.remote(backend, host, port, rank, len(places))
            for rank, place in enumerate(places)
        ]
        return backend, len(places), max(ray.get(runs, timeout=PATIENCE_S)), ""
    except IndexError:
        return backend, 0, 0.0, "no node answered"
    except Exception as error:
        return backend, len(places), 0.0, last_line(str(error))[:200] or type(error).__name__
