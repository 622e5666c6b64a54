"""Networks at latents of another size than the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import perturbed, tiny_recipe
from torch.nn import functional as F

from flowray.config.base import LatentSpec
from flowray.config.model import CrossAttentionCondition, DiMRVelocity, DiTVelocity, VelocityConfig
from flowray.model.assemble import build_model
from flowray.model.layers import positions_2d, resized
from flowray.model.text import TextTokens
from flowray.model.velocity import build_velocity

SPEC, WIDTH = LatentSpec(channels=3, height=8, width=8), 6
CONFIGS = [
    DiTVelocity(patch=2, width=16, depth=2, heads=2),
    DiTVelocity(width=16, depth=1, heads=2, indicator="token", condition=CrossAttentionCondition()),
    DiMRVelocity(widths=(16, 8), depths=(3, 1), heads=2),
]


def tokens(count: int) -> TextTokens:
    made = torch.randn(count, 4, WIDTH, generator=torch.Generator().manual_seed(0))
    return TextTokens(made, torch.ones(count, 4, dtype=torch.bool))


@pytest.mark.parametrize("config", CONFIGS, ids=["dit", "dit tokens", "dimr"])
@pytest.mark.parametrize("size", [(12, 4), (4, 12), (6, 10)])
def test_every_network_answers_at_every_size(config: VelocityConfig, size: tuple[int, int]) -> None:
    net = perturbed(build_velocity(config, SPEC, WIDTH))
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    given = torch.tensor([3.0, -1.0]), torch.tensor([False, True]), tokens(2)
    *lower, out = net.levels(x, *given)
    assert out.shape == x.shape
    assert all(level.shape[2:] == (size[0] // 2, size[1] // 2) for level in lower)
    # every place has its own position: a constant picture does not come out constant
    flat = net(
        torch.zeros(1, 3, *size), torch.zeros(1), torch.zeros(1, dtype=torch.bool), tokens(1)
    )
    assert flat.std((2, 3)).min() > 1e-4
    sum(level.square().sum() for level in (*lower, out)).backward()
    assert x.grad is not None
    assert x.grad.abs().amin() > 0
    # all weights train at every size, as DistributedDataParallel wants
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=["dit", "dit tokens", "dimr"])
def test_a_network_for_that_size_with_the_same_weights_agrees(config: VelocityConfig) -> None:
    """But for DiMR's positions, of which that network has a table of its own."""
    net = perturbed(build_velocity(config, SPEC, WIDTH))
    other = build_velocity(config, LatentSpec(channels=3, height=4, width=12), WIDTH)
    weights = {
        name: resized(x.permute(2, 0, 1)[None], other.state_dict()[name].shape[:2], "bicubic")[
            0
        ].permute(1, 2, 0)
        if name.endswith("positions")
        else x
        for name, x in net.state_dict().items()
    }
    other.load_state_dict(weights)
    x = torch.randn(2, 3, 4, 12, generator=torch.Generator().manual_seed(1))
    given = torch.tensor([3.0, -1.0]), torch.tensor([False, True]), tokens(2)
    torch.testing.assert_close(net(x, *given), other(x, *given))


def test_positions_of_another_grid_keep_rows_and_columns() -> None:
    own, wide = (
        positions_2d(4, 4, 8).unflatten(0, (4, 4)),
        positions_2d(3, 6, 8).unflatten(0, (3, 6)),
    )
    torch.testing.assert_close(wide[:, :4], own[:3])


def test_resizing_keeps_constants_and_edges() -> None:
    x = torch.full((2, 3, 4, 4), 1.5)
    torch.testing.assert_close(resized(x, (3, 5), "bilinear"), torch.full((2, 3, 3, 5), 1.5))
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    doubled = resized(ramp, (4, 8), "bilinear")
    torch.testing.assert_close(F.avg_pool2d(doubled, (1, 2)), ramp.clamp(0.125, 2.875))
    assert resized(x, (4, 4), "bicubic") is x


def test_the_source_of_a_bucket_is_the_heads_own_resized(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{"model.posterior.logvar_max": 0.5})
    model = build_model(recipe.model, recipe.loss, 0).eval()
    with torch.no_grad():
        for p in model.head.parameters():  # type: ignore[union-attr]
            p += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        captions = ["a red circle", "a blue square"]
        own = model.source(captions, torch.zeros(2, 4, 4, 4)).posterior
        noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
        made = model.source(captions, noise)
    posterior = made.posterior
    assert posterior.mu.shape == posterior.logvar.shape == (2, 4, 3, 5)
    torch.testing.assert_close(posterior.mu, resized(own.mu, (3, 5), "bilinear"))
    assert float(posterior.logvar.max()) <= 0.5
    torch.testing.assert_close(made.z0, posterior.mean + posterior.std * noise)
