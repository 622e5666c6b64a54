"""Learning rates against torch's schedulers, parameter groups, the EMA."""

import pytest
import torch
from support import tiny_recipe
from torch.optim.lr_scheduler import CosineAnnealingLR, CosineAnnealingWarmRestarts

from flowray.config.train import ConstantLR, CosineLR, OptimConfig, WarmRestarts
from flowray.train.optim import Ema, build_optimizer, lr_at, set_lr
from flowray.train.state import fresh_state

LR = 3e-3


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
    assert ours == pytest.approx(torch_rates(lambda o: CosineAnnealingLR(o, T_max=50, eta_min=floor * LR), 50), rel=1e-6)


@pytest.mark.parametrize(("t0", "t_mult"), [(7, 1), (5, 2)])
def test_warm_restarts_are_torchs(t0, t_mult):
    config = WarmRestarts(t0=t0, t_mult=t_mult, eta_min=1e-5)
    ours = [lr_at(config, LR, step, 1) for step in range(60)]
    theirs = torch_rates(lambda o: CosineAnnealingWarmRestarts(o, T_0=t0, T_mult=t_mult, eta_min=1e-5), 60)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_warm_up_is_linear_and_ends_at_the_schedule():
    config = ConstantLR(warmup=4)
    assert [lr_at(config, LR, step, 10) for step in range(6)] == pytest.approx([LR / 4, LR / 2, LR * 0.75, LR, LR, LR])
    assert lr_at(CosineLR(warmup=4), LR, 20, 40) == lr_at(CosineLR(), LR, 20, 40)


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    recipe = tiny_recipe(tmp_path_factory.mktemp("optim"), **{"loss.clip.weight": 1.0})
    return fresh_state(recipe, torch.device("cpu"))


def test_only_the_trunks_matrices_decay(state):
    optimizer = build_optimizer(state.parameters, OptimConfig(weight_decay=0.3, head_lr_scale=0.5))
    names = {id(p): name for name, p in state.parameters.items()}
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {"trunk": 0.3, "trunk_plain": 0.0, "heads": 0.0}
    members = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert sum(map(len, members.values())) == len(state.parameters)
    assert set().union(*members.values()) == state.parameters.keys()
    assert all(name.startswith("velocity.") and state.parameters[name].ndim >= 2 for name in members["trunk"])
    assert all(name.startswith("velocity.") and state.parameters[name].ndim < 2 for name in members["trunk_plain"])
    assert {name.split(".")[0] for name in members["heads"]} == {"text", "head", "semantic"}
    assert set_lr(optimizer, 0.2) == {"trunk": 0.2, "trunk_plain": 0.2, "heads": 0.1}
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.2, 0.1]


def test_ema_formula_and_exact_restore():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    ema, expected = Ema({"w": weight}, decay=0.9), torch.tensor([1.0, -2.0])
    for step in range(200):
        with torch.no_grad():
            weight.add_(torch.tensor([0.01, 0.02]))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        torch.testing.assert_close(ema.average["w"], expected)  # at every step: the warm-up is forgotten in the end
    delta = (ema.average["w"] - weight.detach()).square().mean().sqrt()
    assert ema.delta_rms() == pytest.approx(float(delta), rel=1e-5)

    before, pointer = weight.detach().clone(), weight.data_ptr()
    with ema.applied():
        assert torch.equal(weight, ema.average["w"])
    assert torch.equal(weight, before)
    assert weight.data_ptr() == pointer  # the optimiser's state still belongs to this storage
