"""A resume on other samples is refused, or goes on with them where that is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import assert_refused, tiny_pictures, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.config.resume import refuse_changes
from flowray.store.checkpoint import STATE, load_state, newest_checkpoint
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train


def go(recipe: Recipe) -> RunDirectory:
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    return run


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    """Trained to step 4 of 8."""
    made = tiny_recipe(tmp_path, **{"train.log_every": 1, "train.sample_every": 100})
    go(override_recipe(made, {"train.steps": 4}))
    return override_recipe(made, {"train.steps": 8})


def grow(recipe: Recipe) -> None:
    """Another shard of 16 pictures in the folder of the recipe's."""
    folder = Path(recipe.data.shards)
    more = tiny_pictures(folder.with_name("more"), 16, start=200)
    for tar in more.glob("*.tar"):
        shutil.copy(tar, folder / f"later-{tar.name}")
    for manifest in folder.glob("manifest.json"):
        manifest.unlink()


def test_changed_shards_are_refused_and_nothing_is_written(recipe):
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    told = load_state(newest_checkpoint(run.checkpoints))
    assert (told["data"]["samples"], told["batch_size"]) == (64, 8)
    grow(recipe)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert_refused(
        lambda: go(recipe),
        InputError,
        r"^data.shards: .*step_000004 was trained on 64 samples .* 80 samples .*on_changed_data",
    )
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert after == before


def test_a_run_goes_on_with_them_where_that_is_asked_for(recipe):
    grow(recipe)
    asked = override_recipe(recipe, {"train.on_changed_data": "continue"})
    run = go(asked)
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(1, 9))
    assert load_state(newest_checkpoint(run.checkpoints))["data"]["samples"] == 80
    go(override_recipe(recipe, {"train.steps": 9}))  # from now on they are the run's own
    other = override_recipe(recipe, {"data.shards": str(Path(recipe.data.shards).with_name("val"))})
    assert_refused(lambda: refuse_changes(recipe, other, 4, "runs/x"), InputError, "^data.shards")
    asked = override_recipe(other, {"train.on_changed_data": "continue"})
    refuse_changes(recipe, asked, 4, "runs/x")


def test_moved_shards_are_the_same_data(recipe):
    folder = Path(recipe.data.shards)
    folder.rename(folder.with_name("moved"))
    run = go(override_recipe(recipe, {"data.shards": str(folder.with_name("moved"))}))
    assert read_rows(run.metrics)[-1]["step"] == 8


def test_another_batch_size_is_refused_without_the_runs_recipe(recipe):
    other = override_recipe(recipe, {"train.batch_size": 16})
    assert_refused(lambda: go(other), InputError, "^train.batch_size: got 16, .*trained with 8")


def test_checkpoints_of_before_do_not_say(recipe):
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    file = newest_checkpoint(run.checkpoints) / STATE
    kept = json.loads(file.read_text())
    del kept["data"], kept["batch_size"]
    file.write_text(json.dumps(kept))
    grow(recipe)
    assert read_rows(go(recipe).metrics)[-1]["step"] == 8
