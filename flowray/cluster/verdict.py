"""What a cluster check makes of its facts: a row for every check of every node, with the fix. No
Ray.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Severity = Literal["ok", "info", "warn", "bad"]
PACKAGES = ("torch", "ray", "flowray")
NO_CUDA = "it is built without CUDA"
MEGABYTE = 2**20
PAYLOAD_BYTES = 32 * MEGABYTE  # sent from node to node, and all-reduced
SKEW_S = 2.0  # clocks further apart make locks look stale (40 s) and logs hard to read
SLOW_NETWORK_MB_S = 100.0  # about 1 Gbit/s
SLOW_STORAGE_MB_S = 20.0


@dataclass(frozen=True)
class Row:
    """One line of the table: what was checked, where, what was found, and what to do about it
    ('' where nothing).
    """

    check: str
    node: str
    severity: Severity
    found: str
    fix: str = ""


@dataclass
class NodeFacts:
    """What one node says of itself. versions: '' for a package that is not there; skew_s: its clock
    minus the driver's.

    cuda_problem: why torch cannot compute on a GPU there; '' where it can, and where there is none
    and Ray hands out none.
    """

    node: str
    versions: dict[str, str] = field(default_factory=dict)
    gpus: tuple[str, ...] = ()
    ray_gpus: float = 0.0  # what Ray hands out there
    cuda_problem: str = ""
    skew_s: float = 0.0
    skew_error_s: float = 0.0
    storage_problem: str = ""
    storage_mb_s: float = 0.0
    shards: int | None = None  # None: no data set was asked for
    error: str = ""


@dataclass
class ClusterFacts:
    """Facts of all nodes. links: (from, to, MB/s); allreduces: (backend, ranks, seconds, error).

    may_come: nodes that an autoscaler may still add, of which nothing is known; missing: why
    workers that were asked for are not there. absent: the storage is not there yet, and `storage`
    is the folder in which the first run would make it.
    """

    nodes: list[NodeFacts]
    storage: Path
    wanted_shards: int | None = None
    links: list[tuple[str, str, float]] = field(default_factory=list)
    allreduces: list[tuple[str, int, float, str]] = field(default_factory=list)
    may_come: int = 0
    missing: str = ""
    absent: bool = False


def judge(facts: ClusterFacts) -> list[Row]:
    """The table: a row for every check of every node, bad and warn ones with what to do."""
    silent = [
        Row(
            "answer",
            n.node,
            "bad",
            n.error,
            "python -m pip show flowray there; the same image or environment on every node",
        )
        for n in facts.nodes
        if n.error
    ]
    nodes = [node for node in facts.nodes if not node.error]
    rows = [*_versions(nodes), *map(_gpu_row, nodes)]
    rows += [_storage_row(node, facts.storage, facts.absent) for node in nodes]
    rows += [row for node in nodes if (row := _data_row(node, facts.wanted_shards))]
    rows += [_clock_row(node) for node in nodes]
    rows += [_link_row(*link) for link in facts.links]
    return [
        *_nodes_rows(facts),
        *silent,
        *rows,
        *(_allreduce_row(*found) for found in facts.allreduces),
    ]


def _nodes_rows(facts: ClusterFacts) -> Iterator[Row]:
    """What is not there: a check of those that are says nothing about it."""
    if facts.missing:
        fix = (
            "`ray status`, and monitor.* in /tmp/ray/session_latest/logs on the head, say why; on"
            " Kubernetes kubectl describe pod"
        )
        yield Row("nodes", "all", "bad", facts.missing, fix)
    if facts.may_come:
        found = f"{len(facts.nodes)} up; up to {facts.may_come} more may come, and are not checked"
        yield Row(
            "nodes", "all", "info", found, "--workers 1 has one brought up first, and checks it too"
        )


def _versions(nodes: list[NodeFacts]) -> Iterator[Row]:
    """Every package must be there and the same everywhere; the majority is taken for right, the
    first node's in a tie.

    What follows a + does not count: a CPU head beside CUDA workers has torch 2.13.0+cpu beside
    2.13.0.
    """
    for name in ("python", *PACKAGES):
        public = [node.versions.get(name, "").partition("+")[0] for node in nodes]
        most = Counter(filter(None, public)).most_common(1)
        right = most[0][0] if most else ""
        for node, have in zip(nodes, public, strict=True):
            if have and have == right:
                yield Row(name, node.node, "ok", node.versions[name])
            elif have:
                fix = (
                    "one Python on every node"
                    if name == "python"
                    else f"python -m pip install {name}=={right} there"
                )
                yield Row(
                    name, node.node, "bad", f"{node.versions[name]}, others have {right}", fix
                )
            else:
                yield Row(
                    name,
                    node.node,
                    "bad",
                    "not installed",
                    f"python -m pip install {name}{right and f'=={right}'} there",
                )


def _gpu_row(node: NodeFacts) -> Row:
    names = ", ".join(f"{count} x {name}" for name, count in Counter(node.gpus).items())
    if not node.gpus and not node.ray_gpus:
        return Row("gpus", node.node, "info", "none")
    if node.cuda_problem:
        found = (
            f"{names or 'none to be seen'}, Ray hands out {node.ray_gpus:g}, but torch cannot use"
            f" them: {node.cuda_problem}"
        )
        driver = (
            "an NVIDIA driver that is new enough, and the GPUs in the container (docker run --gpus"
            " all, NVIDIA_VISIBLE_DEVICES=all)"
        )
        return Row(
            "gpus",
            node.node,
            "bad",
            found,
            "install the CUDA build of torch there" if node.cuda_problem == NO_CUDA else driver,
        )
    if not node.gpus:
        return Row(
            "gpus", node.node, "ok", f"{node.ray_gpus:g}, without an nvidia-smi there to name them"
        )
    if node.ray_gpus != len(node.gpus):
        found = f"{names}, Ray hands out {node.ray_gpus:g}"
        return Row(
            "gpus",
            node.node,
            "warn",
            found,
            f"start Ray there with --num-gpus={len(node.gpus)}, or see CUDA_VISIBLE_DEVICES",
        )
    return Row("gpus", node.node, "ok", names)


def _storage_row(node: NodeFacts, storage: Path, absent: bool) -> Row:
    if node.storage_problem:
        fix = (
            f"mount one shared folder at {storage} on every node, or type --storage FOLDER"
            " (storage_path=FOLDER, FLOWRAY_STORAGE)"
        )
        return Row("storage", node.node, "bad", f"{storage}: {node.storage_problem}", fix)
    here = f"{storage}, where a run will make it" if absent else str(storage)
    found = f"{here}: written and read at {node.storage_mb_s:.0f} MB/s"
    return _unless(
        node.storage_mb_s < SLOW_STORAGE_MB_S,
        "storage",
        node.node,
        found,
        "checkpoints will wait: a faster share",
    )


def _data_row(node: NodeFacts, wanted: int | None) -> Row | None:
    if wanted is None:
        return None
    found = f"{node.shards} of {wanted} shards visible"
    if node.shards == wanted:
        return Row("data", node.node, "ok", found)
    return Row(
        "data",
        node.node,
        "bad",
        found,
        "put the shards on the shared folder, or mount theirs at the same path on every node",
    )


def _clock_row(node: NodeFacts) -> Row:
    found = f"{1000 * node.skew_s:+.0f} ms (within {1000 * node.skew_error_s:.0f} ms)"
    return _unless(
        abs(node.skew_s) - node.skew_error_s > SKEW_S,
        "clock",
        node.node,
        found,
        "run chrony or ntpd there",
    )


def _link_row(giver: str, taker: str, mb_s: float) -> Row:
    place = f"{giver} to {taker}"
    if not mb_s:
        fix = "open all TCP ports between the nodes (the security group or firewall)"
        return Row("network", place, "bad", "no data came through", fix)
    return _unless(
        mb_s < SLOW_NETWORK_MB_S,
        "network",
        place,
        f"{mb_s:.0f} MB/s",
        "keep a run on one node: resources.num_workers=1",
    )


def _allreduce_row(backend: str, ranks: int, seconds: float, error: str) -> Row:
    where = "nodes with GPUs" if backend == "nccl" else "all"
    if error:
        fix = (
            "open all TCP ports between the nodes; where they have several interfaces, set"
            f" {backend.upper()}_SOCKET_IFNAME"
        )
        return Row("all-reduce", where, "bad", f"{backend}: {error}", fix)
    return Row(
        "all-reduce",
        where,
        "ok",
        f"{ranks} rank(s), {backend}, {PAYLOAD_BYTES // MEGABYTE} MB in {1000 * seconds:.0f} ms",
    )


def _unless(wrong: bool, check: str, node: str, found: str, fix: str) -> Row:
    """An ok row, or a warn one with its fix."""
    return Row(check, node, "warn" if wrong else "ok", found, fix if wrong else "")


def healthy(rows: Sequence[Row]) -> bool:
    """Whether no row is worse than info."""
    return all(row.severity in ("ok", "info") for row in rows)
