"""Whether what a run or a trial asks for can be had: asked by `--plan` and before anything
starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.config.train import ResourceConfig
from flowray.store.found import find_checkpoint
from flowray.sweepconfig.check import check_trials
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.plan import Cluster, batch_that_does_not_split, share_cluster, split_values

WORKER_BYTES = 400 * 2**20  # of a worker that has imported torch and Ray, before its model


@dataclass(frozen=True)
class Placed:
    """A sweep on the machines that there are.

    base: the recipe of every trial, resources included. takes: those as overrides. concurrent:
    trials at a time.
    """

    base: Recipe
    takes: dict[str, Any]
    concurrent: int


def this_machine() -> Cluster:
    """This machine as the private Ray on it has it; only GPUs that torch can use count."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    node = os.cpu_count() or 1, torch.cuda.device_count()
    return Cluster((node,), here=True, drivers=max(1, memory // WORKER_BYTES))


def place(sweep: Sweep, base: Recipe, cluster: Cluster) -> Placed:
    """The sweep on this cluster. InputError where its trials cannot be placed, its workers do not
    split a batch, or the run whose pictures it scores has no checkpoint.
    """
    if sweep.task == "sample":
        find_checkpoint(Path(sweep.base))
    takes, concurrent = share_cluster(sweep, base, cluster)
    workers = takes["resources.num_workers"]
    _refuse_shared_or_idle_gpus(workers, takes["resources.gpus_per_worker"])
    if (batch := batch_that_does_not_split(sweep, base, workers)) is not None:
        raise InputError(
            f"sweep {sweep.name}: {workers} workers do not split every batch that is searched, such"
            f" as train.batch_size {batch}; type resources.num_workers=1, or batch sizes that are"
            f" multiples of {workers}"
        )
    fits = {key: split_values(sweep, key, given)[0] for key, given in _parts(base).items()}
    placed = override_recipe(base, {**fits, **takes})  # of a searched key a value that trials have
    check_trials(sweep, placed)
    refuse_without_room(placed.resources, cluster)
    return Placed(placed, takes, concurrent)


def _parts(base: Recipe) -> dict[str, int]:
    train = base.train
    return {"train.batch_size": train.batch_size, "train.accumulate": train.accumulate}


def asked_words(asked: ResourceConfig) -> str:
    """ "8 worker(s) of 4 CPU and 1 GPU"."""
    gpus = f" and {asked.gpus_per_worker:g} GPU" if asked.gpus_per_worker else ""
    least, most = asked.least_workers, asked.num_workers
    count = f"{least} to {most}" if least < most else str(most)
    return f"{count} worker(s) of {asked.cpus_per_worker} CPU{gpus}"


def refuse_without_room(asked: ResourceConfig, cluster: Cluster) -> None:
    """InputError where the workers could not train, or where the cluster can never hold them. One
    that may grow beyond what is known of it is not asked.
    """
    _refuse_shared_or_idle_gpus(asked.num_workers, asked.gpus_per_worker)
    if cluster.grows:
        return
    where = "this machine" if cluster.here else "the cluster"
    cpus, gpus, workers = asked.cpus_per_worker, asked.gpus_per_worker, asked.least_workers
    largest = max((have for have, _ in cluster.nodes), default=0)
    if not largest:
        raise InputError(
            f"resources: {where} has no CPUs yet, and no autoscaler of Ray's: add its nodes first"
        )
    if gpus and not cluster.places(gpus):
        raise InputError(
            f"resources.gpus_per_worker: got {gpus:g}, but {where} has no GPU; type"
            " resources.gpus_per_worker=0"
        )
    if cpus > largest:
        node = "" if cluster.here else " on one node"
        raise InputError(
            f"resources.cpus_per_worker: got {cpus}, but {where} has {largest} CPUs{node}; type"
            f" resources.cpus_per_worker={largest}"
        )
    hold = cluster.workers(cpus, gpus)
    if workers > hold:
        room = "the memory of this machine" if cluster.here and not gpus else where
        more = "" if cluster.here else ", or add nodes first"
        raise InputError(
            f"resources.num_workers: asked {asked_words(asked)}, but {room} holds {hold} of them "
            f"({cluster}); type resources.num_workers={max(1, hold)} or less{more}"
        )


def _refuse_shared_or_idle_gpus(workers: int, gpus: float) -> None:
    """A worker drives one GPU, and NCCL refuses two ranks on one."""
    if gpus > 1:
        raise InputError(
            f"resources.gpus_per_worker: got {gpus:g}, but a worker drives one GPU; type "
            f"resources.num_workers={workers * int(gpus)} resources.gpus_per_worker=1"
        )
    if workers > 1 and 0 < gpus < 1:
        raise InputError(
            f"resources.gpus_per_worker: got {gpus:g}, but {workers} workers that train together"
            " need a GPU each; type resources.gpus_per_worker=1, or resources.num_workers=1"
        )


def needed_cpus(placed: Placed) -> int:
    """What a Ray on this machine has to offer, where workers share its CPUs."""
    each = placed.base.resources
    return placed.concurrent * each.num_workers * each.cpus_per_worker
