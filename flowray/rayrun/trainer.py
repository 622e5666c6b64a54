"""One run under Ray Train: the loop of flowray.train in every worker of a TorchTrainer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from flowray.cluster.capacity import capacity
from flowray.cluster.network import NodeNetwork, told_to_go
from flowray.cluster.ray_private import StartTimeout, cause_of
from flowray.cluster.session import set_defaults, start_with_fewer
from flowray.cluster.storage import StorageNotShared, marker_file, refusal_here
from flowray.cluster.waiting import told_of_waiting
from flowray.config.errors import InputError, last_line
from flowray.config.recipe import Recipe
from flowray.doctor.visits import Visits
from flowray.rayrun.failures import (
    RunFailed,
    errno_of,
    failure_file,
    out_of_memory,
    raise_failure,
    write_failure,
)
from flowray.rayrun.lost import LossTold
from flowray.rayrun.ranklog import rank_log
from flowray.rayrun.retries import newest_step, should_retry
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import is_finished, train
from flowray.train.state import Halted
from flowray.tune.room import asked_words
from flowray.views.gauges import RunGauges

START_S = 1800  # for the ranks to find each other, as Ray has it by default

Report = Callable[[dict[str, Any]], None]  # takes the rows of probes


def train_worker(config: dict[str, Any], report: Report = ray.train.report) -> None:
    """What each Ray Train worker runs. config: {"recipe": the recipe as JSON, "run_dir": str,
    "marker": the name of the driver's marker file}.

    A failure that would come again (bad input, a non-finite loss, a full disk, too little memory)
    is written to a file for the driver and not raised, so that Ray does not retry it.
    """
    recipe = Recipe.model_validate(config["recipe"])
    run = RunDirectory(Path(config["run_dir"]))
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    group = Group.current(recipe.train.device)
    if _lacks_storage(run, config["marker"], group) or failure_file(run).exists():
        return
    try:
        recipe = recipe.for_workers(group.world)
        telling = _with_gauges(run, report) if group.lead else report
        with rank_log(run, group):
            outcome = train(recipe, run, group, telling, Visits, told_to_go)
        if outcome == "preempted" and group.lead:
            run.preempted.touch()
    except (InputError, Halted, torch.OutOfMemoryError) as error:
        write_failure(run, out_of_memory(error) or error)
        if group.world > 1:
            raise  # the other ranks wait in a collective; only tearing the group down frees them


def _lacks_storage(run: RunDirectory, marker: str, group: Group) -> bool:
    """Whether the node of any rank does not see the driver's storage; asked of all ranks together.

    The ranks that do see it write the failure file there, which the others cannot. Where none does,
    StorageNotShared is raised instead.
    """
    mine = refusal_here(run.path, marker)
    of_ranks = group.gathered(mine)
    first = next(filter(None, of_ranks), "")
    if all(of_ranks):
        raise StorageNotShared(first)
    if first and not mine:
        write_failure(run, StorageNotShared(first))
    return bool(first)


def _with_gauges(run: RunDirectory, report: Report) -> Report:
    """Rows also go to Ray's gauges, under the run's name."""
    gauges = RunGauges(run.path)

    def tell(row: dict[str, Any]) -> None:
        gauges.show(row)
        report(row)

    return tell


def fit(
    recipe: Recipe,
    run_dir: Path,
    *,
    callbacks: Sequence[Any] = (),
    name: str,
    ray_storage: Path,
    here: Report | None = None,
    worker: Callable[..., None] = train_worker,
    say: Callable[[str], None] | None = None,
) -> None:
    """Train `recipe` in `run_dir` under a TorchTrainer; resumes from its newest valid checkpoint,
    returns at once if it has finished.

    here: train in this very process (Ray Train's local mode, one worker), and give it the rows: no
    controller and no worker to start. The caller holds the worker's resources and retries where the
    process dies.
    worker: what each worker runs, `train_worker` with something around it.
    say: takes a line a minute while the cluster has no room for the workers. Needs Ray to be
    started. `run.stop_request` ends it with a checkpoint, also when it is there before the start.
    Checkpoints are the run directory's own; Ray's storage holds nothing worth keeping and is
    removed. Workers lost with their nodes do not count against max_failures where a checkpoint came
    since the start before. Raises InputError (StorageNotShared, where a node lacks the storage) or
    RunFailed with one line.
    """
    run = RunDirectory(run_dir.absolute())
    if is_finished(recipe, run):
        return
    run.create()
    failure_file(run).unlink(missing_ok=True)
    for left in (run.doing, run.stuck):  # of workers that were killed
        left.unlink(missing_ok=True)
    set_defaults()  # on a cluster a trial that drives workers has none of its sweep's
    resources = recipe.resources
    per_worker = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    # Ray's dashboard shows all of it
    config = {"recipe": recipe.model_dump(mode="json"), "run_dir": str(run.path)}
    workers: Any = resources.num_workers if here is None else 0  # 0: the local mode
    if workers and resources.least_workers < resources.num_workers:
        workers = resources.least_workers, resources.num_workers
        start_with_fewer()
    scaling = ScalingConfig(
        num_workers=workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker
    )
    work = worker if here is None else partial(worker, report=here)
    # see `_trained`
    limits: dict[str, Any] = dict.fromkeys(
        ("max_failures", "controller_failure_limit"), resources.max_failures
    )
    heard = [*callbacks, LossTold(run.path)] if here is None else list(callbacks)
    kept = RunConfig(
        name=name,
        storage_path=str(ray_storage.absolute()),
        failure_config=FailureConfig(**limits),
        callbacks=heard,
    )
    # until the ranks watch each other: to start takes minutes on a cold cluster
    network = NodeNetwork(timeout_s=max(START_S, math.ceil(resources.stuck_after_s)))
    trainer = partial(
        TorchTrainer, work, scaling_config=scaling, torch_config=network, run_config=kept
    )
    try:
        with ExitStack() as closing:
            config["marker"] = closing.enter_context(marker_file(run.path, sole=True))
            if say:
                closing.enter_context(told_of_waiting(resources, run, say))
            while (
                not _trained(trainer(train_loop_config=config), run, recipe)
                and not run.stop_request.exists()
            ):
                _check_room(recipe, run)
    except ray.train.TrainingFailedError as error:
        raise_failure(run)
        raise _failure_of(error, run) from error
    finally:
        shutil.rmtree(ray_storage / name, ignore_errors=True)
    raise_failure(run)


def _trained(trainer: TorchTrainer, run: RunDirectory, recipe: Recipe) -> bool:
    """Train; False where it is to be tried again.

    There was no room for the workers, now or again after some were lost: Ray Train has waited for
    it then, 1 + max_failures times RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S, 20 minutes by default.
    Or workers were lost too often for Ray, but see `should_retry`. Or they have ended with a
    checkpoint, as one of them was told that it goes: which a worker of the start before may say
    late, and this one has then finished, or failed.
    """
    before = newest_step(run)
    run.preempted.unlink(missing_ok=True)
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        if run.preempted.exists() and not failure_file(run).exists():
            return False  # they were gone before Ray heard that they had ended
        if failure_file(run).exists() or not should_retry(error, before, newest_step(run)):
            raise
        return False
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, StartTimeout):
            return False
        raise
    preempted = run.preempted.exists() and not failure_file(run).exists()
    return not preempted or is_finished(recipe, run)


def _check_room(recipe: Recipe, run: RunDirectory) -> None:
    """RunFailed where the cluster has become too small for the run and no autoscaler brings it
    back, so that nobody waits for ever.

    Where others use it, or a node has yet to come, waiting is right.
    """
    each, cluster = recipe.resources, capacity()
    if (
        cluster.grows
        or cluster.workers(each.cpus_per_worker, each.gpus_per_worker) >= each.least_workers
    ):
        return
    raise RunFailed(
        f"{run.path}: no room for {asked_words(each)}: {cluster} are left; bring lost hosts back,"
        " or type resources.num_workers=N; --resume continues from the last checkpoint"
    )


def _failure_of(error: ray.train.TrainingFailedError, run: RunDirectory) -> Exception:
    """What a worker raised and could not write to the failure file, as the driver raises it."""
    failures = list((getattr(error, "worker_failures", None) or {0: error}).values())
    for failure in failures:
        if isinstance(bad_input := cause_of(failure), InputError):
            return bad_input
    # of a traceback the last line says what went wrong, without the way there
    said = last_line(str(failures[0])) or type(error).__name__
    return RunFailed(
        f"{run.path}: {said}; --resume continues from the last checkpoint",
        errno_of(cause_of(failures[0])),
    )
