"""Which checkpoint is named the best, and how commands find it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import assert_refused, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import dump_recipe
from flowray.store.best import best_step, name_best
from flowray.store.checkpoint import save_checkpoint
from flowray.store.found import find_checkpoint
from flowray.store.frozen import WEIGHTS, frozen_weights
from flowray.store.run import RunDirectory

LOWER, HIGHER = "ema/shoot/nmse", "ema/flow/cos"


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Checkpoints at 10, 20 and 30, probes at 5 to 40, of which those at 20 and 30 are as good."""
    made, recipe = RunDirectory(tmp_path / "run"), tiny_recipe(tmp_path)
    made.create()
    values = {5: 0.1, 10: 0.9, 20: 0.5, 30: 0.5 + 1e-9, 40: 0.2}
    lines = [json.dumps({"step": s, LOWER: v, HIGHER: 1 - v}) for s, v in values.items()]
    made.probes.write_text("\n".join(lines) + "\n")
    made.config.write_text(dump_recipe(recipe))
    state = {"seed": 0, WEIGHTS: frozen_weights(recipe.model)}
    for step in (10, 20, 30):
        save_checkpoint(made.checkpoints, step, {"model": {"w": torch.ones(2)}}, state, keep=3)
    return made


@pytest.mark.parametrize("metric", [LOWER, HIGHER])
def test_the_best_of_those_with_probe_and_checkpoint(run: RunDirectory, metric: str) -> None:
    assert name_best(run, metric) == best_step(run) == 20
    save_checkpoint(run.checkpoints, 40, {"model": {"w": torch.ones(2)}}, {}, 2, {20})
    assert sorted(path.name[5:] for path in run.checkpoints.glob("step_*")) == [
        "000020",
        "000030",
        "000040",
    ]
    assert name_best(run, metric) == 40
    assert json.loads((run.checkpoints / "best.json").read_text())["metric"] == metric


def test_no_number_names_none(run: RunDirectory) -> None:
    run.probes.write_text('{"step": 10, "ema/shoot/nmse": null}\n')
    assert name_best(run, LOWER) is None
    assert best_step(run) is None


def test_it_is_found_by_its_name(run: RunDirectory) -> None:
    place = run.checkpoints / "best"
    assert_refused(lambda: find_checkpoint(place), InputError, "names none.*train.keep_best")
    name_best(run, LOWER)
    assert find_checkpoint(place).checkpoint == run.checkpoint(20)
    assert find_checkpoint(run.path).checkpoint == run.checkpoint(30)
