"""A resume on other samples or with another batch size is refused, or goes on by samples seen where
that is asked for.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import assert_refused, tiny_pictures, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.config.resume import refuse_changes
from flowray.data.order import BatchSizes, EpochOrder
from flowray.store.checkpoint import STATE, load_state, newest_checkpoint
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.step import BatchMaker


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
    assert (told["data"]["samples"], told["batch_sizes"]) == (64, [[0, 8]])
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


def test_another_batch_size_is_refused(recipe):
    other = override_recipe(recipe, {"train.batch_size": 16})
    words = "^train.batch_size: got 16, .*trained .*with 8; .*on_changed_data=continue"
    assert_refused(lambda: refuse_changes(recipe, other, 4, "runs/x"), InputError, words)
    assert_refused(lambda: go(other), InputError, words)  # without the run's recipe
    refuse_changes(recipe, override_recipe(other, ASKED), 4, "runs/x")


ASKED = {"train.on_changed_data": "continue"}


@pytest.fixture
def taken(monkeypatch) -> dict[int, list[int]]:
    """The samples that each step from 0 took, where one rank takes them."""
    found: dict[int, list[int]] = {}
    indices = BatchMaker.indices

    def noted(self: BatchMaker, step: int) -> np.ndarray:
        made = indices(self, step)
        assert found.setdefault(step, made.tolist()) == made.tolist()
        return made

    monkeypatch.setattr(BatchMaker, "indices", noted)
    return found


def stage(recipe: Recipe, steps: int, **changes: object) -> RunDirectory:
    fixed = {"optim.schedule": {"kind": "constant"}, "loss.kl.schedule": {"kind": "constant"}}
    return go(override_recipe(recipe, {**fixed, **changes, "train.steps": steps}))


def changed_twice(recipe: Recipe) -> RunDirectory:
    """Four steps of 8, three of 16, which lead into the second epoch, and then of 4."""
    stage(recipe, 4)
    stage(recipe, 7, **ASKED, **{"train.batch_size": 16})
    stage(recipe, 8, **ASKED, **{"train.batch_size": 4})
    return stage(recipe, 11, **{"train.batch_size": 4})  # from now on it is the run's own


def test_a_run_goes_on_with_another_batch_size_at_the_sample_where_it_stopped(recipe, taken):
    own = override_recipe(recipe, {"name": "sizes", "data.prefetch": 0})
    run = changed_twice(own)
    assert [len(taken[step]) for step in range(11)] == [8] * 4 + [16] * 3 + [4] * 4
    stream = [i for step in range(11) for i in taken[step]]
    assert stream == EpochOrder(64, recipe.seed)(np.arange(96)).tolist()
    assert sorted(stream[:64]) == list(range(64))
    kept = load_state(newest_checkpoint(run.checkpoints))
    assert kept["batch_sizes"] == [[0, 8], [4, 16], [7, 4]]
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(1, 12))


def test_a_resume_after_changes_repeats_the_run_bit_for_bit(recipe):
    straight = override_recipe(recipe, {"name": "straight", "train.checkpoint_every": 1})
    again = override_recipe(recipe, {"name": "again", "train.checkpoint_every": 1})
    changed_twice(straight)
    stage(again, 4)
    for steps in (5, 6, 7):
        stage(again, steps, **ASKED, **{"train.batch_size": 16})
    for steps in (9, 10, 11):
        stage(again, steps, **ASKED, **{"train.batch_size": 4})
    runs = [RunDirectory(Path(recipe.storage_path) / each.name) for each in (straight, again)]
    first, second = (newest_checkpoint(run.checkpoints) for run in runs)
    for name in ("model", "ema", "optim"):
        file = f"{name}.safetensors"
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert load_state(first)["batch_sizes"] == load_state(second)["batch_sizes"]


def test_draws_stay_a_function_of_seed_and_step(recipe):
    wide = override_recipe(recipe, {"train.batch_size": 16})
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    latents, sizes = load_latents(folders["train"]), BatchSizes.of(8).changed(4, 16)
    group = Group(0, 1, torch.device("cpu"))
    plain, changed = (
        BatchMaker(wide, latents, group)(5),
        BatchMaker(wide, latents, group, sizes=sizes)(5),
    )
    assert torch.equal(plain.noise, changed.noise)
    assert torch.equal(plain.t, changed.t)
    assert plain.captions != changed.captions  # the samples 48 to 63, not 80 to 95


def test_checkpoints_of_one_batch_size_alone_count_steps(recipe, taken):
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    file = newest_checkpoint(run.checkpoints) / STATE
    kept = json.loads(file.read_text())
    del kept["batch_sizes"]
    file.write_text(json.dumps({**kept, "batch_size": 8}))
    other = {**ASKED, "train.batch_size": 16, "train.steps": 5, "data.prefetch": 0}
    go(override_recipe(recipe, other))
    assert taken[4] == EpochOrder(64, recipe.seed)(np.arange(32, 48)).tolist()


def test_checkpoints_of_before_do_not_say(recipe):
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    file = newest_checkpoint(run.checkpoints) / STATE
    kept = json.loads(file.read_text())
    del kept["data"], kept["batch_sizes"]
    file.write_text(json.dumps(kept))
    grow(recipe)
    assert read_rows(go(recipe).metrics)[-1]["step"] == 8
