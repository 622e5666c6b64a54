"""How large the cluster is or could grow to: what a sweep shares out. With an autoscaler its
maximum counts, not the nodes of the moment.

No autoscaler of Ray 2.60 tells Ray's GCS its maximum (Ray has a place for it there, which only
hosted services fill), so it is read where the autoscaler itself reads it, on the head.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flowray.cluster.ray_private import HEAD
from flowray.cluster.session import started
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError
from flowray.tune.plan import Cluster, Node
from flowray.tune.room import WORKER_BYTES, this_machine

PATIENCE_S = 60.0  # for the head to answer
# Kubernetes puts it into every pod with an account
POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def machines() -> Cluster:
    """What a command may use: the started Ray, else this machine, where a private one would run."""
    return capacity() if ray.is_initialized() else this_machine()


def capacity() -> Cluster:
    """The nodes that the started Ray has or could grow to; where no maximum can be read, those that
    are there now.

    The maximum: of the file that the head's autoscaler was started with (`ray up`, `ray start
    --autoscaling-config`), or of KubeRay's RayCluster. Neither states how large on-premise hosts
    are: such a cluster `grows` beyond what is known of it. The head itself is one of the nodes.
    """
    heads, present = _present()
    config = _on_head(heads[0]) if heads and in_cluster() else None
    grown = workers_at_most(config or {})
    workers = max(
        present,
        grown,
        key=lambda nodes: (sum(gpus for _, gpus in nodes), sum(cpus for cpus, _ in nodes)),
    )
    memory = sum(node["Resources"].get("memory", 0) for node in heads)
    drivers = max(1, int(memory / WORKER_BYTES)) if memory else None
    nodes = (*(_size(node["Resources"]) for node in heads), *workers)
    return Cluster(nodes, drivers, grows=config is not None and of_unknown_size(config))


def present() -> Cluster:
    """The nodes that the started Ray has at this moment."""
    heads, workers = _present()
    return Cluster((*(_size(node["Resources"]) for node in heads), *workers))


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the started Ray, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def node_name(node: Mapping[str, Any]) -> str:
    """Host name and address, for messages."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def only_on(node: Mapping[str, Any]) -> NodeAffinitySchedulingStrategy:
    """Puts a task or an actor on this node and no other."""
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def ask_on(node: Mapping[str, Any], question: Callable[..., Any], *arguments: Any) -> Any:
    """Ray's reference to the answer of `question(*arguments)`, called on this node."""
    where = only_on(node)
    task = ray.remote(question).options(num_cpus=0, scheduling_strategy=where, max_retries=0)
    return task.remote(*arguments)


def _present() -> tuple[list[dict[str, Any]], list[Node]]:
    """(heads as Ray describes them, the sizes of the other nodes)."""
    alive = alive_nodes()
    heads = [node for node in alive if HEAD in node["Resources"]]
    return heads, [_size(node["Resources"]) for node in alive if node not in heads]


def cluster_of_address() -> Cluster:
    """`capacity` of the cluster that RAY_ADDRESS names. InputError where none answers."""
    try:
        with started():
            return capacity()
    except (ConnectionError, RuntimeError) as error:
        address = os.environ["RAY_ADDRESS"]
        raise InputError(
            f"RAY_ADDRESS={address}: no cluster answers ({error}); unset it to plan for this"
            " machine"
        ) from None


def of_unknown_size(config: Mapping[str, Any]) -> bool:
    """Whether an autoscaler's configuration, {} where it cannot be read, allows nodes whose size it
    does not state.
    """
    types = config.get("available_node_types", {})
    unstated = [name for name, each in types.items() if not any(_size(each.get("resources", {})))]
    workers = [name for name in unstated if name != config.get("head_node_type") or len(types) == 1]
    return not types or bool(workers and int(config.get("max_workers", 0)))


def workers_at_most(config: Mapping[str, Any]) -> list[Node]:
    """The largest set of workers that an autoscaler's configuration allows, most GPUs first;
    types of unstated size are left out.
    """
    left, workers = int(config.get("max_workers", 0)), []
    types = config.get("available_node_types", {})
    sizes = {name: _size(spec.get("resources", {})) for name, spec in types.items()}
    for name in sorted(types, key=lambda name: sizes[name][::-1], reverse=True):
        most = types[name].get("max_workers", 0 if name == config.get("head_node_type") else left)
        count = min(left, int(most)) if any(sizes[name]) else 0
        workers += [sizes[name]] * count
        left -= count
    return workers


def _size(resources: Mapping[str, Any]) -> Node:
    return int(resources.get("CPU", 0)), int(resources.get("GPU", 0))


def _on_head(head: Mapping[str, Any]) -> dict[str, Any] | None:
    """`read_config` on the head: by a task where this process is on another node, {} without an
    answer.
    """
    context = ray.get_runtime_context()
    if head["NodeID"] == context.get_node_id():
        return read_config(context.gcs_address)
    try:
        return ray.get(ask_on(head, read_config, context.gcs_address), timeout=PATIENCE_S)
    except ray.exceptions.RayError:
        return {}


def read_config(gcs_address: str) -> dict[str, Any] | None:
    """The configuration of the autoscaler that serves the GCS at this address, seen from the head;
    None where there is none, {} where it cannot be read.
    """
    path = _autoscaler_file(gcs_address)
    try:
        return yaml.safe_load(path.read_text()) if path else _ray_cluster()
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _autoscaler_file(gcs_address: str) -> Path | None:
    """The file that the autoscaler's process of this very cluster was given."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text().split("\0")
            given = [
                word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")
            ]
            if given and f"--gcs-address={gcs_address}" in words:
                return Path(os.readlink(process / "cwd"), os.path.expanduser(given[0]))
        except (OSError, UnicodeDecodeError):  # it has just ended, or is another user's
            continue
    return None


def _ray_cluster() -> dict[str, Any] | None:
    """The RayCluster of this pod, as KubeRay's autoscaler reads it: the head's service account
    may. None outside Kubernetes.
    """
    name, namespace = os.environ.get("RAY_CLUSTER_NAME"), os.environ.get("RAY_CLUSTER_NAMESPACE")
    # not every KubeRay sets that variable in Ray's own container
    if name and not namespace and POD_NAMESPACE.exists():
        namespace = POD_NAMESPACE.read_text().strip()
    if not name or not namespace:
        return None
    from flowray.cluster.ray_private import KubernetesClient, kuberay_config

    cluster = KubernetesClient(namespace).get(f"rayclusters/{name}")
    return kuberay_config(cluster) if cluster["spec"].get("enableInTreeAutoscaling") else None
