"""Gradient probes against torch's own backward pass, norms and AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from flowray.losses.gradients import loss_gradients
from flowray.probes.grads import gradient_rows, next_adamw_update, next_update_ratio, step_gradient


class Toy(nn.Module):
    """A head and a velocity network in miniature; the second loss reaches the head alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.velocity = nn.Linear(3, 3), nn.Linear(3, 3)

    def losses(self) -> dict[str, Tensor]:
        z = self.head(torch.arange(6.0).view(2, 3) / 5)
        return {"flow": (self.velocity(z) - 1).square().mean(), "kl": z.square().mean()}


FACTORS = {"flow": 1.0, "kl": 0.25}


def test_norms_and_shares_are_those_of_backward() -> None:
    model = Toy()
    parameters = dict(model.named_parameters())
    rows = gradient_rows(
        loss_gradients(list(model.losses().values()), list(parameters.values())),
        parameters,
        FACTORS,
    )
    assert all(p.grad is None for p in parameters.values())
    norms, head = {}, {}
    for name in FACTORS:
        model.zero_grad()
        model.losses()[name].backward()
        grads = {n: p.grad.flatten() for n, p in parameters.items() if p.grad is not None}
        norms[name] = float(torch.cat(list(grads.values())).norm())
        head[name] = float(torch.cat([g for n, g in grads.items() if n.startswith("head.")]).norm())
    model.zero_grad()
    sum(FACTORS[name] * loss for name, loss in model.losses().items()).backward()
    total = float(
        torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None]).norm()
    )
    assert rows["grad/flow"] == pytest.approx(norms["flow"], rel=1e-5)
    assert rows["grad/kl_weighted"] == pytest.approx(0.25 * norms["kl"], rel=1e-5)
    assert rows["grad/kl_head"] == pytest.approx(0.25 * head["kl"], rel=1e-5)
    assert rows["grad/flow_head"] == pytest.approx(head["flow"], rel=1e-5) != rows["grad/flow"]
    assert rows["grad/total"] == pytest.approx(total, rel=1e-5)
    assert rows["share/kl"] == pytest.approx(0.25 * norms["kl"] / norms["flow"], rel=1e-5)
    assert rows["grad/flow_of_total"] == pytest.approx(norms["flow"] / total, rel=1e-5)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_the_next_update_is_the_one_that_training_makes(steps_before: int) -> None:
    torch.manual_seed(1)
    weight = nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(steps_before):
        weight.grad = torch.randn(4, 3)
        optimizer.step()
    gradient, before = torch.randn(4, 3), weight.detach().clone()
    slots = copy.deepcopy(dict(optimizer.state[weight]))
    predicted = next_adamw_update(gradient, slots, lr=0.01, betas=(0.9, 0.95))
    assert all(torch.equal(value, slots[name]) for name, value in optimizer.state[weight].items())
    weight.grad = gradient
    optimizer.step()
    assert torch.allclose(predicted, weight.detach() - before, atol=1e-7)


def test_update_ratio_leaves_out_zero_tensors() -> None:
    weights = {"a": torch.full((4,), 2.0), "b": torch.zeros(3)}
    gradient = {"a": torch.tensor([1.0, -1.0, 3.0, -7.0]), "b": torch.ones(3)}
    # a first AdamW step moves every number by lr: ||update|| / ||weight|| = lr / 2
    assert next_update_ratio(weights, gradient, {}, lr=1e-3, betas=(0.9, 0.95)) == pytest.approx(
        5e-4, rel=1e-5
    )
    assert next_update_ratio({"b": weights["b"]}, gradient, {}, lr=1e-3, betas=(0.9, 0.95)) is None


def test_weighted_sum_is_clipped_as_a_whole() -> None:
    gradients, parameters = (
        torch.tensor([[3.0, 0.0], [0.0, 8.0]]),
        {name: nn.Parameter(torch.zeros(1)) for name in "ab"},
    )
    plain = step_gradient(gradients, parameters, {"flow": 1.0, "kl": 0.5}, clip=100.0)
    assert [float(x) for x in plain.values()] == [3.0, 4.0]
    clipped = step_gradient(gradients, parameters, {"flow": 1.0, "kl": 0.5}, clip=1.0)
    assert [float(x) for x in clipped.values()] == pytest.approx([0.6, 0.8], rel=1e-5)
