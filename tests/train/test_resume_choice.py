"""Which checkpoint a resume goes on from, and that all ranks go on from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support import assert_refused, on_two_ranks, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.store.checkpoint import list_checkpoints
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Recipe:
    """Eight steps, a checkpoint at 4 and at 8."""
    return tiny_recipe(tmp_path_factory.mktemp("resume"), **{"train.steps": 8})


def run_of(recipe: Recipe) -> RunDirectory:
    return RunDirectory(Path(recipe.storage_path) / recipe.name)


def go(recipe: Recipe) -> RunDirectory:
    train(recipe, run_of(recipe), Group.current("cpu"), lambda row: None)
    return run_of(recipe)


def test_a_run_of_which_all_checkpoints_are_damaged_is_left_as_it_is(base):
    recipe = override_recipe(base, {"name": "damaged"})
    run = go(recipe)
    for checkpoint in list_checkpoints(run.checkpoints):
        content = bytearray((checkpoint / "model.safetensors").read_bytes())
        content[-3] ^= 1
        (checkpoint / "model.safetensors").write_bytes(content)
    files = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    longer = override_recipe(recipe, {"train.steps": 12})
    assert_refused(lambda: go(longer), InputError, "no checkpoint in it is intact")
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == files


def of_two_storages(rank: int, plain: dict, other: str) -> None:
    """Rank 1 sees another folder under the run's name; what each rank was told goes beside it."""
    recipe = Recipe.model_validate(plain)
    run = run_of(recipe) if rank == 0 else RunDirectory(Path(other))
    told = "trained"
    try:
        train(recipe, run, Group.current("cpu"), lambda row: None)
    except InputError as error:
        told = str(error)
    Path(f"{other}-told-{rank}").write_text(told)


@pytest.mark.parametrize("differs", ["step", "weights", "nothing there"])
def test_ranks_that_see_different_checkpoints_do_not_train_together(base, differs):
    name = differs.replace(" ", "_")
    recipe = override_recipe(base, {"name": name})
    run = go(recipe)
    other = run.path.with_name(f"{name}-other")
    shutil.copytree(run.path, other)
    newest = RunDirectory(other).checkpoints / "step_000008"
    if differs == "step":
        shutil.rmtree(newest)
        shutil.copytree(newest.with_name("step_000004"), newest)
    elif differs == "weights":
        shutil.rmtree(newest)
        go(override_recipe(recipe, {"name": f"{name}-third", "seed": 5}))
        third = run.path.with_name(f"{name}-third")
        shutil.copytree(RunDirectory(third).checkpoints / "step_000008", newest)
    else:
        shutil.rmtree(newest)
    rows = run.metrics.read_bytes()
    two = override_recipe(recipe, {"resources.num_workers": 2, "train.steps": 12})
    on_two_ranks(of_two_storages, two.model_dump(mode="json"), str(other))
    told = [Path(f"{other}-told-{rank}").read_text() for rank in (0, 1)]
    assert told[0] == told[1] != "trained"
    assert "\n" not in told[0]
    assert "rank 1" in told[0]
    assert run.metrics.read_bytes() == rows


def test_ranks_without_the_leads_folder_do_not_begin(base):
    """They would train to the first checkpoint, of which each is to write a share."""
    recipe = override_recipe(base, {"name": "begun", "resources.num_workers": 2})
    other = run_of(recipe).path.with_name("begun-other")
    on_two_ranks(of_two_storages, recipe.model_dump(mode="json"), str(other))
    said = "rank 1 has no such folder: storage_path must be one and the same folder on every node"
    for rank in (0, 1):
        assert Path(f"{other}-told-{rank}").read_text().endswith(f"/checkpoints: {said}")
    assert not run_of(recipe).metrics.exists()


def test_ranks_that_see_the_same_one_do(base):
    recipe = override_recipe(base, {"name": "same"})
    run = go(recipe)
    two = override_recipe(recipe, {"resources.num_workers": 2, "train.steps": 12})
    on_two_ranks(of_two_storages, two.model_dump(mode="json"), str(run.path))
    assert read_rows(run.metrics)[-1]["step"] == 12
