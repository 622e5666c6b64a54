"""The same tiny trials through flowray's tuner and through stock Ray Tune with a TorchTrainer in
each, with the times of their starts.
"""

from __future__ import annotations

import io
import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray import tune
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search.optuna import OptunaSearch

from benchmarks.timed_loop import FIRST_LINE, timed_loop
from flowray.cluster.storage import marker_file
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.rayrun.tuner import run_sweep, train_trial
from flowray.sweepconfig.sweep import Sweep
from flowray.tune.observers import Observer
from flowray.tune.records import TrialRecord

METRIC, KEY = "ema/shoot/nmse", "optim.lr"
LOW, HIGH = 1e-4, 1e-2


@dataclass(frozen=True)
class Start:
    """Seconds from the moment a trial was asked for: to the first line of its training loop, and
    to its first row at the tuner.
    """

    loop: float
    row: float


class _Times(Observer):
    """Notes when a trial started, and when its first row came."""

    def __init__(self) -> None:
        self.started_at: dict[int, float] = {}
        self.probed_at: dict[int, float] = {}

    def started(self, trial: TrialRecord) -> None:
        self.started_at.setdefault(trial.trial, time.time())

    def probed(self, trial: TrialRecord) -> None:
        self.probed_at.setdefault(trial.trial, time.time())


def through_flowray(folder: Path, recipe: Recipe, trials: int) -> list[Start]:
    """A sweep as `flowray.tune` runs it. Needs Ray to be started."""
    sweep = Sweep.model_validate(
        {
            "name": "startup",
            "storage_path": str(folder),
            "base": "sweep_proxy",
            "method": "random",
            "metric": {"name": METRIC},
            "parameters": {KEY: {"distribution": "log_uniform_values", "min": LOW, "max": HIGH}},
            "run_cap": trials,
            "max_concurrent": 1,
        }
    )
    times = _Times()
    result = run_sweep(
        sweep,
        recipe,
        resume=False,
        trial_fn=partial(train_trial, worker=timed_loop),
        stream=io.StringIO(),
        observers=[times],
    )
    done = [trial.trial for trial in result.trials if trial.status == "finished"]
    return [
        _start(times.started_at[n], result.sweep_dir / str(n), times.probed_at[n]) for n in done
    ]


def _start(asked: float, run_dir: Path, probed: float) -> Start:
    return Start(float((run_dir / FIRST_LINE).read_text()) - asked, probed - asked)


class _Asked(OptunaSearch):
    """Optuna's own adapter, with the time of every trial that it hands out."""

    def __init__(self) -> None:
        super().__init__(seed=0)
        self.at: dict[str, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        chosen: dict[str, Any] | None = super().suggest(trial_id)
        self.at[trial_id] = time.time()
        return chosen


class _Rows(tune.Callback):
    """When the first row of every trial came."""

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.at.setdefault(trial.trial_id, time.time())


def through_stock(folder: Path, recipe: Recipe, trials: int) -> list[Start]:
    """The same trials by Ray's own means: a Tune function that drives a TorchTrainer, as Ray
    documents it. Needs Ray to be started.
    """

    def trial(config: dict[str, Any]) -> None:
        run_dir = folder / tune.get_context().get_trial_id()
        to_tune: list[Any] = [TuneReportCallback()]
        with marker_file(run_dir) as marker:
            TorchTrainer(
                timed_loop,
                train_loop_config={
                    "recipe": override_recipe(recipe, config).model_dump(mode="json"),
                    "run_dir": str(run_dir),
                    "marker": marker,
                },
                scaling_config=ray.train.ScalingConfig(
                    num_workers=recipe.resources.num_workers, resources_per_worker={"CPU": 1}
                ),
                run_config=ray.train.RunConfig(
                    name=run_dir.name, storage_path=str(folder / "train"), callbacks=to_tune
                ),
            ).fit()

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    asked, rows = _Asked(), _Rows()
    tune.Tuner(
        tune.with_resources(trial, {"node:__internal_head__": 0.001}),
        param_space={KEY: tune.loguniform(LOW, HIGH)},
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="min", search_alg=asked, num_samples=trials, max_concurrent_trials=1
        ),
        run_config=tune.RunConfig(
            name="stock", storage_path=str(folder), callbacks=[rows], verbose=0
        ),
    ).fit()
    return [
        _start(asked.at[name], folder / name, rows.at[name]) for name in asked.at if name in rows.at
    ]
