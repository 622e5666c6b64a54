"""DiMR's norms, gates and blocks against their formulas, and the losses of its levels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import perturbed, tiny_recipe
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.losses import FlowLossConfig
from flowray.config.model import DiMRVelocity
from flowray.flow.path import sample_path
from flowray.losses.terms import Forward, box_sum, loss_term
from flowray.losses.total import Batch, Objective
from flowray.model.assemble import build_model
from flowray.model.dimr import ConvNeXtBlock, GatedMLP, TDLayerNorm, TDRMSNorm, TimeVector
from flowray.model.posterior import Posterior


def test_tdrms_norm_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = TDRMSNorm(6)
    x, tau = 3 * torch.randn(2, 4, 6, generator=generator), torch.tensor([-0.7, 0.4])
    plain = F.rms_norm(x, (6,), eps=TDRMSNorm.EPS)
    assert torch.allclose(norm(x, tau), plain, atol=1e-6)  # p0 = p1 = 1: no time at the start
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(6, generator=generator))
    for i in range(2):
        assert torch.allclose(norm(x, tau)[i], plain[i] * at(norm.scale, tau[i]), atol=1e-5)


def at(vector: TimeVector, tau: Tensor) -> Tensor:
    gate = 1 / (1 + torch.exp(-(vector.w * tau + vector.b)))
    return gate * vector.p0 + (1 - gate) * vector.p1


def test_td_layer_norm_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = TDLayerNorm(6)
    x, tau = 2 + 3 * torch.randn(2, 3, 4, 6, generator=generator), torch.tensor([-0.7, 0.4])
    plain = F.layer_norm(x, (6,))
    assert torch.allclose(norm(x, tau), plain, atol=1e-6)
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn(6, generator=generator))
    for i in range(2):
        assert torch.allclose(
            norm(x, tau)[i], plain[i] * at(norm.scale, tau[i]) + at(norm.shift, tau[i]), atol=1e-5
        )


def test_gated_mlp_formula() -> None:
    mlp, x = GatedMLP(4, 6), torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    normed = F.rms_norm(x, (4,), eps=TDRMSNorm.EPS)
    gated = F.gelu(F.linear(normed, mlp.w0.weight, mlp.w0.bias)) * F.linear(
        normed, mlp.w1.weight, mlp.w1.bias
    )
    assert torch.allclose(
        mlp(x, torch.zeros(2)), F.linear(gated, mlp.w2.weight, mlp.w2.bias), atol=1e-6
    )


def test_convnext_block_is_depthwise() -> None:
    """With the MLP off, a channel depends on itself alone, within the kernel."""
    block = ConvNeXtBlock(3, 6, 3)
    for p in (block.mlp.w2.weight, block.mlp.w2.bias):
        nn.init.zeros_(p)
    x = torch.zeros(1, 7, 7, 3)
    moved = x.clone()
    moved[0, 3, 3, 1] = 1
    change = (block(moved, torch.zeros(1)) - block(x, torch.zeros(1)))[0].abs() > 0
    assert change.nonzero().tolist() == [[i, j, 1] for i in range(2, 5) for j in range(2, 5)]


@pytest.mark.parametrize("k", [2, 4])
def test_box_sum_keeps_the_variance_of_white_noise(k: int) -> None:
    noise = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    level = torch.zeros(64, 4, 16 // k, 16 // k)
    target = box_sum(noise, level)
    assert target.shape == level.shape
    assert float(target.var()) == pytest.approx(1, abs=0.05)
    assert torch.allclose(target[0, 0, 0, 0], noise[0, 0, :k, :k].sum() / k, atol=1e-5)


def test_flow_loss_weighs_the_levels() -> None:
    """loss/flow of a multi-resolution network is the sum of the levels' weighted errors; full
    and coarse targets agree on one field.
    """
    generator = torch.Generator().manual_seed(0)
    z0, z1 = (torch.randn(2, 3, 4, 8, generator=generator) for _ in range(2))
    path = sample_path(torch.tensor([0.2, 0.7]), z0, z1, 1e-5, "full")
    target = path.v_target
    posterior = Posterior(z0, torch.zeros_like(z0))

    def loss(last: Tensor, lower: Tensor) -> float:
        forward = Forward(posterior, z0, z1, path, last, lower=((0.25, lower),))
        return float(loss_term(FlowLossConfig(), forward))

    coarse = box_sum(target, torch.zeros(2, 3, 2, 4))
    assert loss(target, coarse) == pytest.approx(0, abs=1e-10)
    assert loss(target + 2, coarse) == pytest.approx(4, rel=1e-5)
    assert loss(target, coarse + 2) == pytest.approx(1, rel=1e-5)


def test_a_multi_resolution_network_trains_on_all_its_levels(tmp_path: Path) -> None:
    """loss/flow of a recipe with dimr: each level's error against its box sum, under its own
    weight, lowest resolution first.
    """
    options = {
        "model.velocity": {
            "kind": "dimr",
            "widths": [8, 8, 8],
            "depths": [1, 1, 1],
            "heads": 2,
            "level_weights": [0.25, 0.5, 1],
        }
    }
    recipe = tiny_recipe(tmp_path, **options)
    model = build_model(recipe.model, recipe.loss, 0)
    perturbed(model.velocity)
    z1, noise = torch.randn(
        2, 2, *recipe.model.latent.shape, generator=torch.Generator().manual_seed(1)
    )
    batch = Batch(
        ["a red circle", "cross"],
        z1,
        z1,
        noise,
        torch.tensor([0.2, 0.7]),
        torch.tensor([False, True]),
    )
    losses, forward = Objective(model, recipe.flow, recipe.loss)(batch)
    levels = model.velocity.levels(forward.path.xt, 4 - 8 * batch.t, batch.null)
    target, expected = forward.path.v_target, 0.0
    for weight, level, k in zip((0.25, 0.5, 1.0), levels, (4, 2, 1), strict=True):
        box = target.unflatten(3, (-1, k)).unflatten(2, (-1, k)).sum((3, 5)) / k
        expected += weight * float((level - box).square().mean().detach())
    assert float(losses["flow"].detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (4, 3)}, "must be odd"),
        ({"depths": (3,)}, "must be as many"),
        ({"level_weights": (0.25, 0.5)}, "end in 1"),
        ({"kernel": 4}, "kernel 4 must be odd"),
        ({"heads": 3}, "must be a multiple of heads 3"),
    ],
)
def test_dimr_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiMRVelocity(**options)
