"""A route for tokens in training: drawn by seed, step and sample, and left out of probes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from support import tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.model import TokenRoute
from flowray.config.recipe import Recipe
from flowray.config.resume import refuse_changes
from flowray.flow.draws import Draws
from flowray.losses.total import Batch
from flowray.probes.battery import make_probe_batch, run_probes
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.latents import LatentSet, ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train
from flowray.train.state import fresh_state
from flowray.train.step import BatchMaker, kept_tokens, train_step, whole_batches

CPU = Group(0, 1, torch.device("cpu"))
ROUTE = {"model.velocity.route": {"before": 0, "after": 1, "keep": 0.5}}
OFTEN = {"train.log_every": 1, "train.sample_every": 100, "train.checkpoint_every": 3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    often = {**OFTEN, "train.steps": 6, "train.probe_every": 100}
    return tiny_recipe(tmp_path_factory.mktemp("routed"), **often, **ROUTE)


@pytest.fixture(scope="module")
def latents(base: Recipe) -> LatentSet:
    made_of = base.data, base.model.autoencoder, base.model.latent
    return load_latents(ensure_latents(*made_of)["train"])


def kept(batch: Batch) -> torch.Tensor:
    assert batch.kept is not None
    return batch.kept


def test_the_choice_is_of_seed_step_and_sample_whatever_the_ranks(
    base: Recipe, latents: LatentSet
) -> None:
    whole = kept(BatchMaker(base, latents, CPU)(4))
    assert whole.shape == (base.train.batch_size, 8)  # of 16
    ranks = [BatchMaker(base, latents, Group(i, 2, CPU.device))(4) for i in range(2)]
    assert torch.equal(torch.cat([kept(batch) for batch in ranks]), whole)
    assert len({tuple(row) for row in whole.tolist()}) > 1  # each sample's own
    assert not torch.equal(kept(BatchMaker(base, latents, CPU)(5)), whole)
    other = override_recipe(base, {"seed": base.seed + 1})
    assert not torch.equal(kept(BatchMaker(other, latents, CPU)(4)), whole)


def test_all_else_of_a_batch_is_as_without(base: Recipe, latents: LatentSet) -> None:
    without = override_recipe(base, {"model.velocity.route": None})
    routed, plain = (BatchMaker(recipe, latents, CPU)(2) for recipe in (base, without))
    assert plain.kept is None
    for field in fields(Batch):
        a, b = getattr(routed, field.name), getattr(plain, field.name)
        assert field.name == "kept" or (torch.equal(a, b) if hasattr(a, "shape") else a == b)


def test_latents_of_another_size_have_another_count() -> None:
    draws = Draws(0, 0, 4, slice(None), CPU.device)
    sizes = {(4, 4): 4, (2, 8): 4, (4, 12): 12, (2, 2): 1}
    for size, tokens in sizes.items():
        places = kept_tokens(TokenRoute(keep=0.5), draws, 2, size)
        assert places is not None
        assert places.shape == (4, max(1, tokens // 2))
        assert int(places.max()) < tokens


def test_training_alone_routes(base: Recipe, latents: LatentSet) -> None:
    """Not the probes, nor what the doctor looks at."""
    state, seen = fresh_state(base, CPU.device), set()
    first, last = state.model.velocity.token_blocks().blocks
    for block in (first, last):
        block.register_forward_pre_hook(lambda module, args: seen.add((module, args[0].shape[1])))
    train_step(state, state.objective, BatchMaker(base, latents, CPU)(0), base, CPU)
    assert seen == {(first, 8), (last, 16)}
    seen.clear()
    probed = make_probe_batch(base, latents, CPU.device, latents)
    run_probes(state.model, base, probed, endpoints=False)
    assert seen == {(first, 16), (last, 16)}
    assert whole_batches(base, latents, CPU.device)(0).kept is None


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_make_the_undivided_gradient(
    base: Recipe, latents: LatentSet, parts: int
) -> None:
    found = []
    for accumulate in (1, parts):
        keys = {"train.accumulate": accumulate, "optim.clip_grad": 1e9, "loss.clip.weight": 0.0}
        recipe = override_recipe(base, keys)
        state, draw = fresh_state(recipe, CPU.device), torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in state.parameters.values():
                p.add_(0.05 * torch.randn(p.shape, generator=draw))
        train_step(state, state.objective, BatchMaker(recipe, latents, CPU)(0), recipe, CPU)
        grads = [p.grad.flatten() for p in state.parameters.values() if p.grad is not None]
        found.append(torch.cat(grads))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 2e-6


def test_a_resumed_run_repeats_the_whole_one_bit_for_bit(base: Recipe) -> None:
    def go(name: str, **overrides: int) -> RunDirectory:
        same = {"name": name, "optim.schedule.kind": "constant"}
        recipe = override_recipe(base, {**same, **overrides})
        run = RunDirectory(Path(str(recipe.storage_path)) / name)
        train(recipe, run, CPU, lambda row: None)
        return run

    whole = go("whole")
    go("parts", **{"train.steps": 3})
    parts = go("parts")
    losses = [[row["loss/total"] for row in read_rows(run.metrics)] for run in (whole, parts)]
    assert losses[0] == losses[1]
    ends = [newest_checkpoint(run.checkpoints) for run in (whole, parts)]
    weights = [(end / "model.safetensors").read_bytes() for end in ends if end is not None]
    assert weights[0] == weights[1]
    plain = go("plain", **{"model.velocity.route": None})
    assert [row["loss/total"] for row in read_rows(plain.metrics)] != losses[0]


def test_a_resume_may_end_it(base: Recipe) -> None:
    """A last part of the training with every token in every block."""
    refuse_changes(base, override_recipe(base, {"model.velocity.route": None}), 3, "run")
    refuse_changes(base, override_recipe(base, {"model.velocity.route.keep": 0.9}), 3, "run")
