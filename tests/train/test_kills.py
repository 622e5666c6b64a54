"""The plain loop, killed by SIGKILL at seeded random instants and started again each time: it comes
to the state of a run that nobody touched, bit for bit.
"""

import multiprocessing
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import assert_as_if_untouched, came, instants, writing
from support import tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

STEPS = 120
CADENCE = {
    "train.steps": STEPS,
    "train.log_every": 1,
    "train.probe_every": 4,
    "train.sample_every": 1000,
    "train.checkpoint_every": 3,
    "probes.raw": False,
}
# what a checkpoint has to keep beside weights, EMA and Adam's moments
KEPT: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "moving": {"loss.dino.weight": 0.1, "loss.dino.prototypes": 16, "loss.clip.weight": 0.5},
    "balance": {"loss.balance.kind": "gradnorm", "loss.balance.lr": 0.1, "loss.clip.weight": 0.5},
    "scaler": {"train.precision": "fp16", "train.loss_scale": 2.0**40},
    "one": {"train.keep_checkpoints": 1, "train.accumulate": 2, "train.grad_every": 2},
}
# forks of a server that has imported the loop: a start takes 0.3 s, not 5
PROCESSES = multiprocessing.get_context("forkserver")


def start(recipe: Recipe) -> Any:
    """The run in a process of its own."""
    process = PROCESSES.Process(target=_train, args=(recipe.model_dump(mode="json"),))
    process.start()
    return process


def _train(plain: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    recipe = Recipe.model_validate(plain)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current("cpu"), lambda row: None)


def finish(recipe: Recipe) -> RunDirectory:
    process = start(recipe)
    process.join()
    assert process.exitcode == 0
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def check_kills(recipe: Recipe, seed: int, count: int) -> None:
    """Kill it `count` times, let it end and hold it against an untouched one. Of the kills that aim
    at a checkpoint's writing some do cut it off.
    """
    whole = finish(override_recipe(recipe, {"name": "whole"}))
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    cut = 0
    for instant in instants(seed, count, recipe.train.steps, starting=count // 5):
        process = start(recipe)
        assert came(instant, run, process.is_alive), f"{instant}: the run ended before"
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        cut += instant.when == "writing" and any(writing(run))
    finish(recipe)
    assert_as_if_untouched(run, whole, recipe)
    assert cut >= 1
    print(f"{cut} of {count // 2} kills cut a checkpoint's writing off")


def test_a_few_kills(tmp_path):
    recipe = tiny_recipe(tmp_path, **{**CADENCE, "train.steps": 24})
    check_kills(recipe, seed=10, count=4)


@pytest.mark.faults
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("seed", "kept"), list(enumerate(KEPT)))
def test_kills_at_twenty_random_instants(tmp_path, seed, kept):
    check_kills(tiny_recipe(tmp_path, **CADENCE, **KEPT[kept]), seed, count=20)
