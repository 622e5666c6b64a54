"""One synthetic sweep through flowray's tuner and through stock Ray Tune: trials that only
report, so that what is left is overhead.
"""

from __future__ import annotations

import io
import logging
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.rayrun.tuner import run_sweep
from flowray.sweepconfig.sweep import Sweep

METRIC, KEY = "ema/shoot/nmse", "optim.lr"
LOW, HIGH = 1e-4, 1e-2
ETA = 3


@dataclass(frozen=True)
class Cost:
    """What a sweep took: wall seconds, trials that ended, rows that they reported."""

    seconds: float
    trials: int
    rows: int


def curve(lr: float, step: int) -> float:
    """A learning curve in closed form: best at lr 1e-3, falling over the steps."""
    return (math.log10(lr) + 3) ** 2 + 1 / step


def report_rows(recipe: Recipe, run_dir: Path) -> None:
    """A trial of flowray's tuner that reports a row a step and trains nothing."""
    for step in range(1, recipe.train.steps + 1):
        tune.report(
            {"step": step, "budget_steps": recipe.train.steps, METRIC: curve(recipe.optim.lr, step)}
        )


def through_flowray(folder: Path, trials: int, rows: int) -> Cost:
    """The sweep as `flowray.tune` runs it: study journal, ledger, session, console. Needs Ray
    to be started.
    """
    sweep = Sweep.model_validate(
        {
            "name": "synthetic",
            "storage_path": str(folder),
            "base": "base",
            "metric": {"name": METRIC},
            "parameters": {KEY: {"distribution": "log_uniform_values", "min": LOW, "max": HIGH}},
            "early_terminate": {"type": "hyperband", "min_iter": grace(rows), "eta": ETA},
            "run_cap": trials,
            "max_concurrent": os.cpu_count() or 1,
        }
    )
    base = override_recipe(Recipe(), {"train.steps": rows})
    began = time.perf_counter()
    result = run_sweep(sweep, base, resume=False, trial_fn=report_rows, stream=io.StringIO())
    return Cost(
        time.perf_counter() - began,
        len(result.trials),
        sum(trial.last_step for trial in result.trials),
    )


def through_stock(folder: Path, trials: int, rows: int, *, reuse: bool = False) -> Cost:
    """The same sweep by Ray Tune's own means: OptunaSearch (TPE), ASHA, a function that reports.
    Needs Ray to be started.

    reuse: Tune's `reuse_actors`, off where nobody asks for it: one process trains one trial after
    the other, as flowray's do.
    """

    def trial(config: dict[str, Any]) -> None:
        for step in range(1, rows + 1):
            tune.report({"step": step, METRIC: curve(config[KEY], step)})

    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    tuner = tune.Tuner(
        trial,
        param_space={KEY: tune.loguniform(LOW, HIGH)},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="min",
            search_alg=OptunaSearch(seed=0),
            scheduler=AsyncHyperBandScheduler(
                time_attr="step", max_t=rows, grace_period=grace(rows), reduction_factor=ETA
            ),
            num_samples=trials,
            max_concurrent_trials=os.cpu_count() or 1,
            reuse_actors=reuse,
        ),
        run_config=tune.RunConfig(name="stock", storage_path=str(folder), verbose=0),
    )
    began = time.perf_counter()
    results = tuner.fit()
    seconds = time.perf_counter() - began
    ended = [results[i].metrics or {} for i in range(len(results))]
    done = [int(metrics["step"]) for metrics in ended if "step" in metrics]
    return Cost(seconds, len(done), sum(done))


def grace(rows: int) -> int:
    """The first rung: a third of the rows."""
    return max(1, rows // 3)
