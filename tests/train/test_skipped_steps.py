"""Steps whose loss or gradient is not finite: the weights stay, the run goes on, and what happened
is written down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import on_two_ranks, tiny_recipe
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.data.order import EpochOrder
from flowray.losses.balance import Balancer, Measured
from flowray.report.load import load_run
from flowray.store.checkpoint import load_state, load_tensors, newest_checkpoint
from flowray.store.latents import LatentSet, ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import Halted, TrainState, fresh_state
from flowray.train.step import BatchMaker, train_step

CPU = Group(0, 1, torch.device("cpu"))
BAD = 20  # the sample whose latent is not finite
CADENCE = {
    "train.steps": 16,
    "train.log_every": 3,
    "train.probe_every": 100,
    "train.sample_every": 100,
    "train.checkpoint_every": 4,
    "loss.dino.weight": 0.1,
    "loss.dino.prototypes": 8,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("skips"), **CADENCE)


def poison(patch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Samples of the 64 training ones read as NaN from the cache."""
    moments = LatentSet.moments

    def corrupt(self: LatentSet, indices: np.ndarray) -> Any:
        made = moments(self, indices)
        if len(self) == 64:
            made.mean[torch.from_numpy(np.isin(indices, list(bad)))] = torch.nan
        return made

    patch.setattr(LatentSet, "moments", corrupt)


def go(
    recipe: Recipe, name: str, told: Callable[[], bool] | None = None, **overrides: Any
) -> RunDirectory:
    recipe = override_recipe(recipe, {"name": name, **overrides})
    run = RunDirectory(Path(str(recipe.storage_path)) / name)
    train(recipe, run, CPU, lambda row: None, told=told)
    return run


def steps_of(recipe: Recipe, sample: int) -> list[int]:
    """The steps, from 1, whose batch has the sample."""
    size, steps = recipe.train.batch_size, recipe.train.steps
    order = EpochOrder(64, recipe.seed)(np.arange(size * steps)).reshape(steps, size)
    return [int(step) + 1 for step in np.flatnonzero((order == sample).any(axis=1))]


def snapshot(state: TrainState) -> dict[str, Tensor]:
    kept = {name: p.detach().clone() for name, p in state.parameters.items()}
    for name, p in state.parameters.items():
        kept |= {f"{name}/{slot}": x.clone() for slot, x in state.optimizer.state[p].items()}
    return kept | {f"moving/{k}": v.clone() for k, v in state.model.semantic.moving().items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train.grad_every": 3},
        {"loss.balance.kind": "gradnorm"},
        {"train.precision": "fp16", "train.loss_scale": 1.0},
        {"train.precision": "fp16", "train.loss_scale": 1024.0},
        {"optim.matrices.kind": "muon"},
    ],
)
def test_a_bad_step_leaves_weights_moments_and_centre_and_takes_its_turn(
    base: Recipe, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = override_recipe(base, options)
    latents = load_latents(
        ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)["train"]
    )
    poison(monkeypatch, {BAD})
    state, batches = fresh_state(recipe, CPU.device), BatchMaker(recipe, latents, CPU)
    bad = steps_of(base, BAD)[0]
    for step in range(bad + 1):
        before = snapshot(state)
        train_step(state, state.objective, batches(step), recipe, CPU)
        after = snapshot(state)
        moved = {
            name for name, x in after.items() if name not in before or not x.equal(before[name])
        }
        if step + 1 == bad:  # DINO's teacher follows a student that stands still
            assert {name for name in moved if "moving/dino.teacher" not in name} == set()
        else:
            assert {"moving/dino.centre", "head.out.weight"} & moved
        assert all(bool(x.isfinite().all()) for x in after.values())
    assert state.step == bad + 1
    assert [skipped.step for skipped in state.tally.look(CPU)] == [bad]
    assert state.balancer.state.multipliers.keys() <= {"flow", "kl", "dino"}
    assert all(np.isfinite(x) for x in state.balancer.state.multipliers.values())


def test_what_was_skipped_is_written_counted_and_told(
    base: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = go(base, "clean")
    assert not clean.skipped.exists()
    poison(monkeypatch, {BAD})
    run, bad = go(base, "skips"), steps_of(base, BAD)
    assert len(bad) == 2
    rows = read_rows(run.skipped)
    assert [row["step"] for row in rows] == bad
    for row in rows:
        assert "s00020" in row["samples"]
        assert row["losses"]["flow"] == "nan"
        assert row["losses"]["kl"] > 0
        assert "rolled_back_to" not in row
    assert rows[0]["broken_samples"] == ["s00020"]
    assert rows[0]["module"] is not None
    metrics = read_rows(run.metrics)
    assert [row["grad/skipped"] for row in metrics] == [
        sum(step <= row["step"] for step in bad) for row in metrics
    ]
    for row, plain in zip(metrics, read_rows(clean.metrics), strict=True):
        assert row["lr/trunk"] == plain["lr/trunk"]
    assert load_state(newest_checkpoint(run.checkpoints))["tally"]["skipped"] == 2
    (note,) = [line for line in load_run(run.path).notes if "skipped" in line]
    assert f"{bad[0]}, {bad[1]}" in note


def test_a_resume_repeats_a_run_with_skipped_steps_bit_for_bit(
    base: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {BAD})
    fixed = {"optim.schedule": {"kind": "constant"}, "loss.kl.schedule": {"kind": "constant"}}
    recipe = override_recipe(base, fixed)
    whole = go(recipe, "whole")
    go(recipe, "halves", **{"train.steps": 7})
    halves = RunDirectory(Path(str(base.storage_path)) / "halves")
    go(recipe, "halves")
    kept = [(newest_checkpoint(run.checkpoints) / "ema.safetensors") for run in (whole, halves)]
    assert kept[0].read_bytes() == kept[1].read_bytes()
    assert read_rows(whole.skipped) == read_rows(halves.skipped)


def test_after_enough_in_a_row_the_weights_are_those_of_the_checkpoint_again(
    base: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = EpochOrder(64, base.seed)(np.arange(64)).reshape(8, 8)
    poison(monkeypatch, {int(sample) for sample in order[5:8, 0]})  # steps 6 to 8
    run = go(base, "back", **{"train.rollback_after": 3, "train.log_every": 1, "train.steps": 9})
    rows = read_rows(run.skipped)
    assert [row["step"] for row in rows] == [6, 7, 8]
    assert [row.get("rolled_back_to") for row in rows] == [None, None, 4]
    # no row is lost and none comes twice
    assert [row["step"] for row in read_rows(run.metrics)] == list(range(1, 10))
    # step 5 is undone: what step 9 starts from is the checkpoint
    slots = load_file(newest_checkpoint(run.checkpoints) / "optim.safetensors")
    assert {float(value) for name, value in slots.items() if name.endswith("/step")} == {5.0}
    assert any("went back to step 4" in note for note in load_run(run.path).notes)


BACK = {"train.rollback_after": 3, "train.log_every": 1}


def poison_steps_6_to_8(patch: pytest.MonkeyPatch, seed: int) -> None:
    order = EpochOrder(64, seed)(np.arange(64)).reshape(8, 8)
    poison(patch, {int(sample) for sample in order[5:8, 0]})


def test_a_stop_amid_skipped_steps_goes_on_from_before_them(
    base: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_steps_6_to_8(monkeypatch, base.seed)
    fixed = {"optim.schedule": {"kind": "constant"}, "loss.kl.schedule": {"kind": "constant"}}
    recipe, asked = override_recipe(base, {**fixed, **BACK, "train.steps": 10}), []

    def told() -> bool:
        asked.append(1)
        return len(asked) == 7

    stopped, whole = go(recipe, "amid", told), go(recipe, "not-stopped")
    assert [row["step"] for row in read_rows(stopped.skipped)] == [6, 7]
    assert load_state(newest_checkpoint(stopped.checkpoints))["step"] == 4
    go(recipe, "amid")
    assert read_rows(stopped.skipped) == read_rows(whole.skipped)
    kept = [newest_checkpoint(run.checkpoints) / "ema.safetensors" for run in (stopped, whole)]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_what_was_skipped_is_written_where_the_way_back_fails(
    base: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only checkpoint, of step 4, is damaged meanwhile."""
    poison_steps_6_to_8(monkeypatch, base.seed)
    checkpoint = RunDirectory(Path(str(base.storage_path)) / "no-way").checkpoint(4)

    def told() -> bool:
        if (file := checkpoint / "model.safetensors").exists():
            file.write_bytes(bytes(file.stat().st_size))
        return False

    with pytest.raises(InputError, match="no checkpoint in it is intact"):
        go(base, "no-way", told, **BACK)
    rows = read_rows(RunDirectory(checkpoint.parent.parent).skipped)
    assert [row["step"] for row in rows] == [6, 7, 8]


def in_parts(rank: int, plain: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        poison_steps_6_to_8(patch, plain["seed"])
        recipe = Recipe.model_validate(plain)
        run = RunDirectory(Path(str(recipe.storage_path)) / recipe.name)
        train(recipe, run, Group.current("cpu"), lambda row: None)


def test_ranks_that_hold_parts_go_back_to_the_checkpoint(base: Recipe) -> None:
    """The last step is the one that goes back, so that its checkpoint is that of step 4."""
    parts = {"name": "parts", "resources.num_workers": 2, "resources.shard": "full"}
    two = override_recipe(base, {**parts, **BACK, "train.steps": 8})
    ensure_latents(two.data, two.model.autoencoder, two.model.latent)
    on_two_ranks(in_parts, two.model_dump(mode="json"))
    run = RunDirectory(Path(str(two.storage_path)) / "parts")
    rows = read_rows(run.skipped)
    assert [(row["step"], row.get("rolled_back_to")) for row in rows] == [
        (6, None),
        (7, None),
        (8, 4),
    ]
    for group in ("model", "ema", "optim", "moving"):
        before, after = (load_tensors(run.checkpoint(step), group) for step in (4, 8))
        assert before.keys() == after.keys()
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), group


def test_too_many_halt_and_before_a_checkpoint_too(
    base: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, set(range(64)))
    with pytest.raises(Halted, match=r"^step 3: loss/flow is not finite, as in 2 steps before"):
        go(base, "nowhere", **{"train.rollback_after": 2})
    with pytest.raises(Halted, match=r"^step 6: loss/flow is not finite, as in 5 steps before"):
        go(base, "many", **{"train.rollback_after": 0, "train.max_skipped": 4})
    for name, count in (("nowhere", 3), ("many", 6)):
        run = RunDirectory(Path(str(base.storage_path)) / name)
        assert len(read_rows(run.skipped)) == count
        for line in run.skipped.read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_a_loss_that_is_not_finite_moves_no_multiplier(base: Recipe) -> None:
    balance = override_recipe(base, {"loss.balance.kind": "gradnorm"}).loss.balance
    balancer = Balancer(balance)
    ones = {"flow": 1.0, "kl": 1.0}
    balancer.update(
        Measured(
            gramian=torch.eye(2, dtype=torch.float64),
            losses={"flow": 1.0, "kl": float("nan")},
            weights=ones,
            full=ones,
            seed=0,
        )
    )
    assert balancer.kept() == {"multipliers": {}, "initial": {}}


def rank(rank: int, plain: dict[str, Any]) -> None:
    """Only one rank's rows are bad: a loss of its own is not finite, and both must skip."""
    order = EpochOrder(64, plain["seed"])(np.arange(64))
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, {int(order[8 + 1])})  # of step 2, in rank 0's half
        recipe = Recipe.model_validate(plain)
        run = RunDirectory(Path(str(recipe.storage_path)) / recipe.name)
        train(recipe, run, Group.current("cpu"), lambda row: None)


def test_ranks_skip_together(base: Recipe) -> None:
    two = override_recipe(
        base, {"name": "two", "resources.num_workers": 2, "train.steps": 4, "train.log_every": 1}
    )
    ensure_latents(two.data, two.model.autoencoder, two.model.latent)
    on_two_ranks(rank, two.model_dump(mode="json"))
    run = RunDirectory(Path(str(two.storage_path)) / "two")
    (row,) = read_rows(run.skipped)
    assert row["step"] == 2
    assert len(row["broken_samples"]) == 1
    assert [row["step"] for row in read_rows(run.metrics)] == [1, 2, 3, 4]
    assert read_rows(run.metrics)[-1]["loss/flow"] > 0
