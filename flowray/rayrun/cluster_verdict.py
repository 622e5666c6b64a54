"""What a cluster check makes of its facts: a row for every check of every node, with the fix. No Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Severity = Literal["ok", "info", "warn", "bad"]
PACKAGES = ("torch", "ray", "flowray")
MEGABYTE = 2**20
PAYLOAD_BYTES = 32 * MEGABYTE  # sent from node to node, and all-reduced
SKEW_S = 2.0  # clocks further apart make locks look stale (40 s) and logs hard to read
SLOW_NETWORK_MB_S = 100.0  # about 1 Gbit/s
SLOW_STORAGE_MB_S = 20.0


@dataclass(frozen=True)
class Row:
    """One line of the table: what was checked, where, what was found, and what to do about it ('' where nothing)."""

    check: str
    node: str
    severity: Severity
    found: str
    fix: str = ""


@dataclass
class NodeFacts:
    """What one node says of itself. versions: '' for a package that is not there; skew_s: its clock minus the driver's."""

    node: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    ray_gpus: float = 0.0  # what Ray hands out there
    torch_cuda: bool = False
    skew_s: float = 0.0
    skew_error_s: float = 0.0
    storage_problem: str = ""
    storage_mb_s: float = 0.0
    shards: int | None = None  # None: no data set was asked for
    error: str = ""


@dataclass
class ClusterFacts:
    """Facts of all nodes. links: (from, to, MB/s); allreduce: (ranks, seconds, error)."""

    nodes: list[NodeFacts]
    storage: Path
    wanted_shards: int | None = None
    links: list[tuple[str, str, float]] = field(default_factory=list)
    allreduce: tuple[int, float, str] = (0, 0.0, "")


def judge(facts: ClusterFacts) -> list[Row]:
    """The table: a row for every check of every node, bad and warn ones with what to do."""
    silent = [
        Row("answer", n.node, "bad", n.error, "python -m pip show flowray there; the same image or environment on every node")
        for n in facts.nodes
        if n.error
    ]
    nodes = [node for node in facts.nodes if not node.error]
    rows = [*_versions(nodes), *map(_gpu_row, nodes)]
    rows += [_storage_row(node, facts.storage) for node in nodes]
    rows += [row for node in nodes if (row := _data_row(node, facts.wanted_shards))]
    rows += [_clock_row(node) for node in nodes]
    rows += [_link_row(*link) for link in facts.links]
    return [*silent, *rows, _allreduce_row(*facts.allreduce)]


def _versions(nodes: list[NodeFacts]) -> Iterator[Row]:
    """Every package must be there and the same everywhere; the majority is taken for right, the first node's in a tie.

    What follows a + does not count: a CPU head beside CUDA workers has torch 2.13.0+cpu beside 2.13.0.
    """
    for name in ("python", *PACKAGES):
        public = [node.versions.get(name, "").partition("+")[0] for node in nodes]
        most = Counter(filter(None, public)).most_common(1)
        right = most[0][0] if most else ""
        for node, have in zip(nodes, public, strict=True):
            if have and have == right:
                yield Row(name, node.node, "ok", node.versions[name])
            elif have:
                fix = "one Python on every node" if name == "python" else f"python -m pip install {name}=={right} there"
                yield Row(name, node.node, "bad", f"{node.versions[name]}, others have {right}", fix)
            else:
                yield Row(name, node.node, "bad", "not installed", f"python -m pip install {name}{right and f'=={right}'} there")


def _gpu_row(node: NodeFacts) -> Row:
    names = ", ".join(f"{count} x {name}" for name, count in Counter(node.gpus).items())
    if not node.gpus:
        return Row("gpus", node.node, "info", "none")
    if not node.torch_cuda:
        return Row("gpus", node.node, "bad", f"{names}, but torch is built without CUDA", "install the CUDA build of torch there")
    if node.ray_gpus != len(node.gpus):
        found = f"{names}, Ray hands out {node.ray_gpus:g}"
        return Row("gpus", node.node, "warn", found, f"start Ray there with --num-gpus={len(node.gpus)}, or see CUDA_VISIBLE_DEVICES")
    return Row("gpus", node.node, "ok", names)


def _storage_row(node: NodeFacts, storage: Path) -> Row:
    if node.storage_problem:
        fix = f"mount one shared folder at {storage} on every node, or type --storage FOLDER (storage_path=FOLDER, FLOWRAY_STORAGE)"
        return Row("storage", node.node, "bad", f"{storage}: {node.storage_problem}", fix)
    found = f"{storage}: written and read at {node.storage_mb_s:.0f} MB/s"
    return _unless(node.storage_mb_s < SLOW_STORAGE_MB_S, "storage", node.node, found, "checkpoints will wait: a faster share")


def _data_row(node: NodeFacts, wanted: int | None) -> Row | None:
    if wanted is None:
        return None
    found = f"{node.shards} of {wanted} shards visible"
    if node.shards == wanted:
        return Row("data", node.node, "ok", found)
    return Row("data", node.node, "bad", found, "put the shards on the shared folder, or mount theirs at the same path on every node")


def _clock_row(node: NodeFacts) -> Row:
    found = f"{1000 * node.skew_s:+.0f} ms (within {1000 * node.skew_error_s:.0f} ms)"
    return _unless(abs(node.skew_s) - node.skew_error_s > SKEW_S, "clock", node.node, found, "run chrony or ntpd there")


def _link_row(giver: str, taker: str, mb_s: float) -> Row:
    place = f"{giver} to {taker}"
    if not mb_s:
        fix = "open all TCP ports between the nodes (the security group or firewall)"
        return Row("network", place, "bad", "no data came through", fix)
    return _unless(mb_s < SLOW_NETWORK_MB_S, "network", place, f"{mb_s:.0f} MB/s", "keep a run on one node: resources.num_workers=1")


def _allreduce_row(ranks: int, seconds: float, error: str) -> Row:
    if error:
        fix = "open all TCP ports between the nodes; where they have several interfaces, set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME)"
        return Row("all-reduce", "all", "bad", error, fix)
    return Row("all-reduce", "all", "ok", f"{ranks} rank(s), gloo, {PAYLOAD_BYTES // MEGABYTE} MB in {1000 * seconds:.0f} ms")


def _unless(wrong: bool, check: str, node: str, found: str, fix: str) -> Row:
    """An ok row, or a warn one with its fix."""
    return Row(check, node, "warn" if wrong else "ok", found, fix if wrong else "")


def healthy(rows: Sequence[Row]) -> bool:
    """Whether no row is worse than info."""
    return all(row.severity in ("ok", "info") for row in rows)
