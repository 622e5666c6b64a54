"""The battery on a real tiny model: read-only, deterministic, and its parts agree with doing it
by hand.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support import tiny_latents, tiny_recipe

from flowray.config.keys import describe
from flowray.config.recipe import Recipe
from flowray.config.scale import UNIT
from flowray.flow.guidance import conditional
from flowray.flow.path import sample_path, time_code
from flowray.model.assemble import FlowModel, build_model
from flowray.model.latent import Moments
from flowray.probes.battery import ProbeBatch, make_probe_batch, run_probes
from flowray.probes.field import cosines, nmse, time_bins
from flowray.probes.rollout import shoot
from flowray.store.latents import LatentSet, load_latents

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("battery")


@pytest.fixture(scope="module")
def recipe(home: Path) -> Recipe:
    return tiny_recipe(home)


@pytest.fixture(scope="module")
def held_out(home: Path) -> LatentSet:
    return load_latents(tiny_latents(home / "latents", 20))


@pytest.fixture(scope="module")
def batch(recipe: Recipe, held_out: LatentSet) -> ProbeBatch:
    return make_probe_batch(recipe, held_out, CPU)


@pytest.fixture
def model(recipe: Recipe) -> FlowModel:
    made = build_model(recipe.model, recipe.loss, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.trainable().values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return made


def test_probe_batch(recipe: Recipe, held_out: LatentSet, batch: ProbeBatch) -> None:
    assert batch.z1.shape == batch.noise.shape == batch.other_noise.shape == (8, 4, 4, 4)
    assert batch.captions == [held_out.captions(i)[0] for i in range(8)]
    assert batch.variance == held_out.variance
    assert batch.times.shape == (10, 8)
    assert torch.equal(time_bins(batch.times), torch.arange(10)[:, None].expand(10, 8))
    mean, logvar = held_out.moments(torch.arange(8).numpy())
    scaled = held_out.scale.sample(Moments(mean, logvar), torch.zeros_like(mean))
    # the same latents, scaled once, plus posterior noise
    assert float((batch.z1 - scaled).abs().max()) < 1.0
    assert not torch.equal(batch.z1, scaled)
    again = make_probe_batch(recipe, held_out, CPU)
    assert all(
        torch.equal(getattr(batch, name), getattr(again, name))
        for name in ("z1", "noise", "other_noise", "times", "others")
    )
    assert not torch.equal(batch.noise, batch.other_noise)


def test_a_small_held_out_set_gives_a_small_batch(recipe: Recipe, home: Path) -> None:
    few = load_latents(tiny_latents(home / "few", 5))
    assert len(make_probe_batch(recipe, few, CPU).captions) == 5


def test_probes_leave_training_as_it_was(
    model: FlowModel, recipe: Recipe, batch: ProbeBatch
) -> None:
    model.train()
    sum(p.square().sum() for p in model.trainable().values()).backward()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.trainable().items() if p.grad is not None}
    modes = [module.training for module in model.modules()]
    rng, inputs = (
        torch.get_rng_state(),
        {name: getattr(batch, name).clone() for name in ("z1", "noise", "other_noise", "times")},
    )
    first = run_probes(model, recipe, batch, endpoints=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert len(grads) == len(model.trainable())
    assert all(
        torch.equal(p.grad, grads[name])
        for name, p in model.trainable().items()
        if p.grad is not None
    )
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(getattr(batch, name), value) for name, value in inputs.items())
    assert torch.is_grad_enabled()
    torch.manual_seed(99)
    assert run_probes(model, recipe, batch, endpoints=True) == first


def test_modes_come_back_after_an_error(
    model: FlowModel, recipe: Recipe, batch: ProbeBatch
) -> None:
    model.train()
    short = ProbeBatch(**{**vars(batch), "noise": batch.noise[:3]})
    with pytest.raises(RuntimeError):
        run_probes(model, recipe, short, endpoints=False)
    assert model.training


def test_every_key_is_declared_and_finite(
    model: FlowModel, recipe: Recipe, batch: ProbeBatch
) -> None:
    rows = run_probes(model, recipe, batch, endpoints=True)
    assert all(math.isfinite(value) for value in rows.values())
    assert [key for key in rows if not key.startswith("trivial/") and describe(key) is None] == []
    without = run_probes(model, recipe, batch, endpoints=False)
    ends = {f"flow/endpt_rmse@{k}" for k in (8, 16, 32, 64)}
    assert {key for key in rows if key not in without} == ends | {f"trivial/{key}" for key in ends}


@torch.no_grad()
def test_every_probe_stands_beside_its_trivial_baseline(
    model: FlowModel, recipe: Recipe, batch: ProbeBatch
) -> None:
    rows = run_probes(model, recipe, batch, endpoints=True)
    measured = {key for key in rows if not key.startswith("trivial/")} - {UNIT}
    assert {key.removeprefix("trivial/") for key in rows if key.startswith("trivial/")} == measured
    blind = {key: rows[f"trivial/{key}"] for key in measured}
    assert rows[UNIT] == batch.variance
    assert (
        blind["flow/nmse"],
        blind["flow/cos"],
        blind["flow/speed_ratio"],
        blind["shoot/skill"],
    ) == (1.0, 0.0, 0.0, 0.0)
    assert blind["text/cos_mu"] == pytest.approx(1.0, abs=1e-5)
    assert blind["text/snr"] == pytest.approx(0.0, abs=1e-9)
    z0 = model.source(batch.captions, batch.noise).z0
    assert blind["shoot/nmse"] == pytest.approx(
        float((z0 - batch.z1).square().mean()) / batch.variance, rel=1e-5
    )
    assert blind["flow/endpt_rmse@64"] == pytest.approx(
        float((z0 - batch.z1).square().mean().sqrt()), rel=1e-5
    )


@torch.no_grad()
def test_field_and_shoot_by_hand(model: FlowModel, recipe: Recipe, batch: ProbeBatch) -> None:
    model.eval()
    rows = run_probes(model, recipe, batch, endpoints=False)
    z0 = model.source(batch.captions, batch.noise).z0
    null, rho = torch.zeros(8, dtype=torch.bool), recipe.flow.path.rho
    for b in (0, 9):
        path = sample_path(batch.times[b], z0, batch.z1, rho)
        v = model.velocity(path.xt, time_code(path.t), null)
        assert rows[f"flow/nmse_t{b}"] == pytest.approx(float(nmse(v, path.v_target)), rel=1e-5)
    cos = {}
    for name, source in (("own", z0), ("other", z0[batch.others])):
        paths = [sample_path(t, source, batch.z1, rho) for t in batch.times]
        cos[name] = torch.stack(
            [cosines(model.velocity(p.xt, time_code(p.t), null), p.v_target) for p in paths]
        ).mean()
    assert rows["flow/cond_gain_cos"] == pytest.approx(float(cos["own"] - cos["other"]), abs=1e-5)
    field = conditional(lambda x, t, n: model.velocity(x, time_code(t), n))
    end = shoot(field, z0, recipe.probes.shoot_steps)
    assert rows["shoot/nmse"] == pytest.approx(
        float((end - batch.z1).square().mean()) / batch.variance, rel=1e-5
    )
    end = shoot(field, z0[batch.others], recipe.probes.shoot_steps)
    gain = float((end - batch.z1).square().mean()) / batch.variance - rows["shoot/nmse"]
    assert rows["shoot/cond_gain"] == pytest.approx(gain, abs=1e-5)


def test_an_untrained_field_scores_as_nothing(recipe: Recipe, batch: ProbeBatch) -> None:
    """The velocity network starts at zero: nmse 1, skill 0."""
    rows = run_probes(build_model(recipe.model, recipe.loss, 0), recipe, batch, endpoints=False)
    assert rows["flow/nmse"] == pytest.approx(1.0)
    assert rows["shoot/skill"] == pytest.approx(0.0, abs=1e-6)
    assert rows["flow/cos"] == 0
