"""Is a folder one and the same on every node? Asked before a cluster starts to work, and again
by every worker that comes later.
"""

from __future__ import annotations

import socket
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from flowray.cluster.capacity import alive_nodes, ask_on, node_name
from flowray.cluster.session import started
from flowray.config.cache import cache_dir
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError, last_line
from flowray.config.progress import SILENT, Progress
from flowray.config.train import DataConfig
from flowray.data.emoji import made_emoji
from flowray.data.shards import EMBEDDED, FETCHED, find_shards

MARKER = ".shared-"  # begins the name of the file that nodes look for
PATIENCE_S = 60.0  # for a node to answer, or to have mounted its folders
# a part of the path of a job's working directory, which Ray removes
JOB_FOLDER = "runtime_resources"


class StorageNotShared(InputError):
    """A node does not see the storage of the process that drives the run; the message names
    both.
    """


@contextmanager
def marker_file(
    folder: Path, *, sole: bool = False, make: bool = True, option: str = "storage_path="
) -> Iterator[str]:
    """A file in `folder` for the block, by which other nodes know that they see the same folder;
    yields its name, which is always a new one: NFS clients remember for a while what was not there.

    sole: markers that killed owners left are removed. make: the folder is made where it is not
    there, and stays.
    """
    marker = folder / f"{MARKER}{uuid.uuid4().hex}"
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(f"{MARKER}*") if sole else ():
            old.unlink(missing_ok=True)
        marker.touch()
    except OSError as error:
        raise InputError(
            f"{option.strip('= ')}: {folder} cannot be written: {error.strerror}; set"
            f" {option}FOLDER"
        ) from error
    try:
        yield marker.name
    finally:
        marker.unlink(missing_ok=True)


def problem_here(folder: Path, marker: str) -> str:
    """What is wrong with `folder` on this node, '' if it holds the marker and can be written."""
    if not folder.is_dir():
        return "there is no such folder there"
    if not (folder / marker).exists():
        return "the folder of that name there is another one"
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"it cannot be written there: {error.strerror}"


def this_node() -> str:
    """Host name and address, for messages."""
    return f"{socket.gethostname()} ({ray.util.get_node_ip_address()})"


def refusal_here(folder: Path, marker: str, patience_s: float = PATIENCE_S) -> str:
    """The message of a StorageNotShared where this worker's node does not see the driver's
    `folder`, '' where it does.

    A node that has only just started may still be mounting it: that long it is given.
    """
    deadline = time.monotonic() + patience_s
    while problem := problem_here(folder, marker):
        if time.monotonic() > deadline:
            return _unshared(folder, this_node(), problem)
        time.sleep(1.0)
    return ""


def refuse_unshared(storage: Path, data: DataConfig, progress: Progress = SILENT) -> None:
    """On a cluster: InputError, naming path and node, unless every node shares `storage` and sees
    the shards. Elsewhere nothing.

    Starts Ray for the questions where it is not started.
    """
    if not in_cluster():
        return
    if JOB_FOLDER in storage.parts:
        raise InputError(
            f"storage_path: {storage} lies in the job's working directory, which is removed with"
            " the job; type storage_path=/SHARED/FOLDER, or set FLOWRAY_STORAGE on the cluster"
        )
    with started(progress=progress), progress.task("asking the nodes for the storage"):
        require_shared(storage, [] if data.shards in EMBEDDED else _shards(data))


def require_shared(
    storage: Path,
    shards: Sequence[Path] = (),
    option: str = "storage_path=",
    what: str = "data.shards",
) -> None:
    """InputError unless every other live node shares `storage` with this process and sees all
    `shards`. Ray is started. option, what: the two in messages, as they are typed.

    Nodes that an autoscaler adds later are not asked; their workers ask `refusal_here`.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in alive_nodes() if node["NodeID"] != here]
    if not nodes:
        return
    with marker_file(storage, option=option) as marker:
        answers = [ask_on(node, _look, storage, marker, shards) for node in nodes]
        for node, answer in zip(nodes, answers, strict=True):
            name = node_name(node)
            try:
                problem, unseen = _heard(answer, name)
            except InputError:
                if node["NodeID"] in {other["NodeID"] for other in alive_nodes()}:
                    raise
                continue  # it has gone meanwhile, as spot nodes do
            if problem:
                raise InputError(_unshared(storage, name, problem, option))
            if unseen:
                more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
                raise InputError(
                    f"{what}: node {name} does not see {unseen[0]}{more}; put them where every node"
                    " reads them"
                )


def _look(storage: Path, marker: str, shards: Sequence[Path]) -> tuple[str, list[Path]]:
    """What is wrong with `storage` on this node, and the shards that it does not see."""
    return problem_here(storage, marker), [path for path in shards if not path.is_file()]


def _heard(answer: Any, node: str) -> tuple[str, list[Path]]:
    try:
        problem, unseen = ray.get(answer, timeout=PATIENCE_S)
    except ray.exceptions.RayError as error:
        timed_out = isinstance(error, ray.exceptions.GetTimeoutError)
        why = "no answer" if timed_out else last_line(str(error))
        raise InputError(
            f"node {node} cannot be asked about storage_path: {why[:200]}; type `python -m"
            " flowray.cluster check`"
        ) from error
    return problem, unseen


def _unshared(folder: Path, node: str, problem: str, option: str = "storage_path=") -> str:
    return (
        f"{option.strip('= ')}: {folder} is not shared with node {node}: {problem}; type"
        f" {option}/FOLDER with one that every node mounts (`python -m flowray.cluster check`"
        " shows which do)"
    )


def _shards(data: DataConfig) -> list[Path]:
    if data.shards in FETCHED:
        made = made_emoji(data.shards, cache_dir(data.cache)).values()
        return [path.absolute() for folder in made for path in find_shards(str(folder))]
    return [
        path.absolute()
        for name in (data.shards, data.val_shards)
        if name
        for path in find_shards(name)
    ]
