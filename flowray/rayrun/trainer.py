"""One run under Ray Train: the loop of flowray.train in every worker of a TorchTrainer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.rayrun.gauges import RunGauges
from flowray.rayrun.session import in_cluster
from flowray.rayrun.storage import check_here, marked
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import is_finished, train
from flowray.train.state import Halted


class RunFailed(RuntimeError):
    """A run ended without finishing; the message is one line."""


def _failure(run: RunDirectory) -> Path:
    return run.path / ".failure"


Report = Callable[[dict[str, Any]], None]  # takes the rows of probes


def train_worker(config: dict[str, Any], report: Report = ray.train.report) -> None:
    """What each Ray Train worker runs. config: {"recipe": the recipe as JSON, "run_dir": str, "mark": str}.

    A failure that would come again (bad input, a non-finite loss, a full disk) is written down and not raised, so that Ray does
    not retry it.
    """
    recipe = Recipe.model_validate(config["recipe"])
    run = RunDirectory(Path(config["run_dir"]))
    check_here(run.path, config["mark"])
    torch.set_num_threads(recipe.resources.cpus_per_worker)
    group = Group.current(recipe.train.device)
    if _failure(run).exists():
        return
    try:
        train(recipe, run, group, _with_gauges(run, report) if group.lead else report)
    except (InputError, Halted) as error:
        _note(run, error)
        if group.world > 1:
            raise  # the other ranks wait in a collective; only tearing the group down frees them


def _with_gauges(run: RunDirectory, report: Report) -> Report:
    """Rows also go to Ray's gauges, under the run's name."""
    gauges = RunGauges(run.path)

    def tell(row: dict[str, Any]) -> None:
        gauges.show(row)
        report(row)

    return tell


def _note(run: RunDirectory, error: Exception) -> None:
    try:
        _failure(run).write_text(f"{type(error).__name__}: {error}")
    except OSError:  # no room even for that: then Ray hears of it
        _failure(run).unlink(missing_ok=True)
        raise error from None


def fit(recipe: Recipe, run_dir: Path, *, callbacks: Sequence[Any] = (), name: str, ray_storage: Path, here: Report | None = None) -> None:
    """Train `recipe` in `run_dir` under a TorchTrainer; resumes from its newest valid checkpoint, returns at once if it has finished.

    here: train in this very process (Ray Train's local mode, one worker), and give it the rows: no controller and no worker to
    start. The caller holds the worker's resources and retries where the process dies.
    Needs Ray to be started. `run.stop_request` ends it with a checkpoint, also when it is there before the start. Checkpoints are
    the run directory's own; Ray's storage holds nothing worth keeping and is removed.
    Raises InputError or RunFailed with one line.
    """
    run = RunDirectory(run_dir.absolute())
    if is_finished(recipe, run):
        return
    run.create()
    _failure(run).unlink(missing_ok=True)
    resources = recipe.resources
    _check_gpus(recipe)
    per_worker = {"CPU": float(resources.cpus_per_worker), "GPU": float(resources.gpus_per_worker)}
    config = {"recipe": recipe.model_dump(mode="json"), "run_dir": str(run.path)}  # Ray's dashboard shows all of it
    workers = resources.num_workers if here is None else 0  # 0: the local mode
    scaling = ScalingConfig(num_workers=workers, use_gpu=resources.gpus_per_worker > 0, resources_per_worker=per_worker)
    work = train_worker if here is None else partial(train_worker, report=here)
    kept = RunConfig(
        name=name,
        storage_path=str(ray_storage.absolute()),
        failure_config=FailureConfig(max_failures=resources.max_failures),
        callbacks=list(callbacks),
    )
    try:
        with marked(run.path, alone=True) as mark:
            TorchTrainer(work, train_loop_config={**config, "mark": mark}, scaling_config=scaling, run_config=kept).fit()
    except ray.train.TrainingFailedError as error:
        _raise_noted(run)
        cause = _root_cause(error)
        if cause.startswith(bad := f"{InputError.__module__}.{InputError.__name__}: "):  # of a node that cannot write it down
            raise InputError(cause.removeprefix(bad)) from error
        raise RunFailed(f"{run.path}: {cause}; --resume continues from the last checkpoint") from error
    finally:
        shutil.rmtree(ray_storage / name, ignore_errors=True)
    _raise_noted(run)


def _check_gpus(recipe: Recipe) -> None:
    """A machine grows no GPU: without this check Ray would wait for one. A cluster may grow."""
    wanted, have = recipe.resources.num_workers * recipe.resources.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
    if wanted > have and not in_cluster():
        raise InputError(f"resources: {wanted:g} GPU(s) asked for, this machine has {have:g}; type resources.gpus_per_worker=0")


def _raise_noted(run: RunDirectory) -> None:
    """Raise the failure that a worker wrote down, if one did."""
    if not _failure(run).exists():
        return
    kind, _, message = _failure(run).read_text().partition(": ")
    _failure(run).unlink()
    if kind == InputError.__name__:
        raise InputError(message)
    raise RunFailed(f"{run.path}: {message}")


def _root_cause(error: BaseException) -> str:
    """The last line of the first worker's traceback: what went wrong, without the way there."""
    failures = getattr(error, "worker_failures", None) or {0: error}
    lines = [line.strip() for line in str(next(iter(failures.values()))).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
