"""Work done by Ray tasks, each of which takes its share: latents of shards, pictures of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.queue import Queue

from flowray.cluster.capacity import machines, only_on
from flowray.cluster.ray_private import cause_of
from flowray.cluster.session import connected, started
from flowray.cluster.storage import require_shared
from flowray.config.cache import cache_dir
from flowray.config.cluster import in_cluster
from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.train import ResourceConfig
from flowray.store.apart import Message, SentProgress, ShownProgress
from flowray.store.latents import ensure_latents_apart
from flowray.tune.room import refuse_without_room

T = TypeVar("T")
Work = Callable[[Progress], T]  # can be pickled, and goes on where one that was lost ended
_RETRIES = 10  # of a task whose node or process is lost; what it has written by then stays
_SHOWN_EVERY_S = 0.2
_BEGUN: Message = ("begun",)


@dataclass(frozen=True)
class RayTasks:
    """A `Fleet` of Ray tasks with so many CPUs and GPUs each, on the cluster or a private Ray; it
    is started for them where it is not. The folders that they write must be this process's own.

    InputError and what else a task raises comes as it is; RayError where Ray gives a task up.
    """

    count: int
    cores: int
    gpus: float = 0.0

    def __call__(self, works: Sequence[Work[T]], progress: Progress) -> list[T]:
        with ExitStack() as closing:
            closing.enter_context(started(len(works) * self.cores, progress))
            # on this node: who hears of progress must not die with another one
            here = only_on({"NodeID": ray.get_runtime_context().get_node_id()})
            queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
            closing.callback(queue.shutdown, force=True)
            shown = [closing.enter_context(ShownProgress(progress)) for _ in works]
            task: Any = ray.remote(_work).options(
                num_cpus=self.cores, num_gpus=self.gpus, max_retries=_RETRIES
            )
            references = [task.remote(i, work, queue) for i, work in enumerate(works)]
            closing.callback(_cancel, references)
            waiting = references
            while waiting:
                done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_SHOWN_EVERY_S)
                _show(queue, shown)
                try:
                    ray.get(done)
                except RayTaskError as error:
                    raise cause_of(error) from error
            return list(ray.get(references))


def _work(number: int, work: Work[T], queue: Queue) -> T:
    def send(message: Message) -> None:
        queue.put((number, message))

    send(_BEGUN)
    return work(SentProgress(send))


def _show(queue: Queue, shown: Sequence[ShownProgress]) -> None:
    for number, message in queue.get_nowait_batch(queue.qsize()):
        if message == _BEGUN:  # again, where the process before it was lost
            shown[number].begin_anew()
        else:
            shown[number](message)


def _cancel(references: Sequence[ray.ObjectRef[Any]]) -> None:
    for reference in references:
        with suppress(Exception):  # Ray may be gone, or the task done
            ray.cancel(reference)


def tasks_of(each: ResourceConfig, count: int, progress: Progress = SILENT) -> RayTasks:
    """`count` tasks with the resources of a worker each; InputError where not even one has room."""
    with connected(progress):
        refuse_without_room(each.model_copy(update={"num_workers": 1}), machines())
    return RayTasks(count, each.cpus_per_worker, each.gpus_per_worker)


def ensure_encoded(recipe: Recipe, workers: int, progress: Progress = SILENT) -> None:
    """The latents of a recipe, before its workers start: encoded on a cluster by `workers` tasks
    with the resources of a worker each, and so on several GPUs of this machine; else here.

    On a cluster whose nodes do not share the cache nothing is done: workers then encode on first
    use, each node its own.
    """
    each = recipe.resources
    fleet = RayTasks(workers, each.cpus_per_worker, each.gpus_per_worker)
    if in_cluster():
        with started(progress=progress):
            if not _is_shared(cache_dir(recipe.data.cache), progress):
                return
            ensure_latents_apart(recipe, progress, fleet)
    else:
        several = workers > 1 and each.gpus_per_worker > 0
        ensure_latents_apart(recipe, progress, fleet if several else None)


def shared_by_all(folder: Path, checkpoint: Path, progress: Progress = SILENT) -> None:
    """InputError unless every node of the cluster shares a folder with this process and sees a
    checkpoint; without a cluster nothing.
    """
    if in_cluster():
        with started(progress=progress), progress.task("asking the nodes for the folder"):
            files = [file for file in checkpoint.iterdir() if file.is_file()]
            require_shared(folder, files, "--each ", "the run")


def _is_shared(cache: Path, progress: Progress) -> bool:
    try:
        with progress.task("asking the nodes for the cache"):
            require_shared(cache)
    except InputError:
        progress.say(
            f"the nodes do not share {cache}, so each encodes latents of its own; set FLOWRAY_CACHE"
            " to a folder that every node mounts to encode once"
        )
        return False
    return True
