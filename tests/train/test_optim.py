"""Learning rates against torch's schedulers, parameter groups, the EMA."""

import math

import pytest
import torch
from pydantic import TypeAdapter
from support import tiny_recipe
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts

from flowray.config.base import LatentSpec
from flowray.config.model import VelocityConfig
from flowray.config.schema import kind_of
from flowray.config.schema import members as schema_members
from flowray.config.train import (
    ConstantLR,
    CosineLR,
    GroupCaps,
    GroupScales,
    OptimConfig,
    WarmRestarts,
)
from flowray.model.velocity import build_velocity
from flowray.train.optim import Ema, build_optimizer, delta_rms, lr_at, resolve_schedule, set_lr
from flowray.train.state import fresh_state

LR = 3e-3
SMALL = {  # options that make each velocity network small
    "dit": {"width": 16, "depth": 2, "heads": 2},
    "dimr": {},
}


def torch_rates(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_torchs(floor):
    ours = [lr_at(CosineLR(floor=floor), LR, step, 50) for step in range(50)]
    assert ours == pytest.approx(
        torch_rates(lambda o: CosineAnnealingLR(o, T_max=50, eta_min=floor * LR), 50), rel=1e-6
    )


@pytest.mark.parametrize(("t0", "t_mult"), [(7, 1), (5, 2)])
def test_warm_restarts_are_torchs(t0, t_mult):
    config = WarmRestarts(t0=t0, t_mult=t_mult, eta_min=1e-5)
    ours = [lr_at(config, LR, step, 1) for step in range(60)]
    theirs = torch_rates(
        lambda o: CosineAnnealingWarmRestarts(o, T_0=t0, T_mult=t_mult, eta_min=1e-5), 60
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_warm_up_is_linear_and_ends_at_the_schedule():
    config = ConstantLR(warmup=4)
    assert [lr_at(config, LR, step, 10) for step in range(6)] == pytest.approx(
        [LR / 4, LR / 2, LR * 0.75, LR, LR, LR]
    )
    assert lr_at(CosineLR(warmup=4), LR, 20, 40) == lr_at(CosineLR(), LR, 20, 40)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    recipe = tiny_recipe(tmp_path_factory.mktemp("optim"), **{"loss.clip.weight": 1.0})
    return fresh_state(recipe, torch.device("cpu"))


def members(optimizer: torch.optim.Optimizer, state) -> dict[str, set[str]]:
    names = {id(p): name for name, p in state.parameters.items()}
    return {
        group["name"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups
    }


def test_only_the_trunks_matrices_decay(state):
    scales = GroupScales(text=0.5, z_head=2.0, trunk=0.25, flow_head=3.0)
    config = OptimConfig(weight_decay=0.3, lr_scale=scales, lr_max=GroupCaps(z_head=0.3))
    optimizer = build_optimizer(state.parameters, config, state.model.velocity.last_layers)
    groups, parts = (
        {group["name"]: group for group in optimizer.param_groups},
        members(optimizer, state),
    )
    decays = {"trunk": 0.3, "trunk_plain": 0.0, "flow_head": 0.0, "z_head": 0.0, "text": 0.0}
    assert {name: group["weight_decay"] for name, group in groups.items()} == decays
    assert sum(map(len, parts.values())) == len(state.parameters)
    assert set().union(*parts.values()) == state.parameters.keys()
    assert all(
        name.startswith("velocity.") and state.parameters[name].ndim >= 2 for name in parts["trunk"]
    )
    assert all(
        name.startswith("velocity.") and state.parameters[name].ndim < 2
        for name in parts["trunk_plain"]
    )
    assert parts["flow_head"] == {"velocity.patch_out.weight", "velocity.patch_out.bias"}
    assert {name.split(".")[0] for name in parts["z_head"]} == {"head"}
    assert {name.split(".")[0] for name in parts["text"]} == {"text", "semantic"}
    rates = {"trunk": 0.05, "trunk_plain": 0.05, "flow_head": 0.6, "z_head": 0.3, "text": 0.1}
    assert set_lr(optimizer, 0.2) == pytest.approx(rates)  # 0.2 x 2 is above z_head's limit
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == pytest.approx(rates)


@pytest.mark.parametrize("kind", [kind_of(cls) for cls in schema_members(VelocityConfig)])
def test_every_velocity_network_has_a_last_layer_that_makes_the_velocity(tmp_path, kind):
    """With it at zero the velocity is zero, whatever the rest holds."""
    # by the schema's defaults alone: the network's own dimensions are not what is tested
    config = TypeAdapter(VelocityConfig).validate_python({"kind": kind, **SMALL[kind]})
    net = build_velocity(config, LatentSpec(channels=4, height=8, width=8), 16)
    parameters = {f"velocity.{name}": p for name, p in net.named_parameters()}
    groups = {
        g["name"]: g["params"]
        for g in build_optimizer(parameters, OptimConfig(), net.last_layers).param_groups
    }
    x, t, null = torch.randn(2, 4, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1)
        assert all(bool(level.any()) for level in net.levels(x, t, null))
        for p in groups["flow_head"]:
            p.zero_()
    assert not any(bool(level.any()) for level in net.levels(x, t, null))
    assert len(groups["flow_head"]) == 2 * len(net.level_weights)


def test_a_restart_takes_over_at_its_step():
    config = WarmRestarts(t0=7, eta_min=1e-5, start=10)
    assert [lr_at(config, LR, step, 1) for step in range(10)] == [LR] * 10
    plain = WarmRestarts(t0=7, eta_min=1e-5)
    assert [lr_at(config, LR, step, 1) for step in range(10, 40)] == [
        lr_at(plain, LR, step, 1) for step in range(30)
    ]


def test_a_restart_from_a_checkpoint_has_its_lr_as_floor():
    config = WarmRestarts(t0=4, start="resume", eta_min="current")
    resolved = resolve_schedule(config, step=100, lr=1e-6)
    rates = [lr_at(resolved, 2e-6, step, 1) for step in range(100, 108)]
    assert rates[0] == rates[4] == 2e-6  # the base lr, at each cycle's begin
    assert rates[3] == pytest.approx(1e-6 + (2e-6 - 1e-6) * (1 + math.cos(math.pi * 3 / 4)) / 2)
    assert min(rates) > 1e-6
    with pytest.raises(ValueError, match="needs start resume"):
        WarmRestarts(eta_min="current")
    with pytest.raises(ValueError, match="resolve_schedule"):
        lr_at(config, LR, 0, 1)


def test_ema_formula_and_exact_restore():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, expected = Ema({"w": weight}, decay=0.9), torch.tensor([1.0, -2.0])
    for step in range(200):
        with torch.no_grad():
            weight.add_(torch.tensor([0.01, 0.02]))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        # at every step: the warm-up is forgotten in the end
        torch.testing.assert_close(ema.average["w"], expected)
    delta = (ema.average["w"] - weight.detach()).square().mean().sqrt()
    found = delta_rms(ema.average, {"w": weight.detach()})
    assert found == pytest.approx(float(delta), rel=1e-5)

    before, pointer = weight.detach().clone(), weight.data_ptr()
    with ema.applied():
        assert torch.equal(weight, ema.average["w"])
    assert torch.equal(weight, before)
    assert weight.data_ptr() == pointer  # the optimiser's state still belongs to this storage
