"""What a recipe says of the objective is what the objective does: gradient into the source, null
indicator, fractions of the run.
"""

from __future__ import annotations

import pytest
import torch
from support import answering_model, tiny_recipe
from torch import Tensor

from flowray.config.load import override_recipe
from flowray.config.losses import KLLossConfig, Linear, LossConfig
from flowray.config.recipe import Recipe
from flowray.losses.total import Batch, Objective, weights_at


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("options"))


def batch_of(recipe: Recipe, *, null: bool = False) -> Batch:
    z1, noise = torch.randn(
        2, 2, *recipe.model.latent.shape, generator=torch.Generator().manual_seed(0)
    )
    return Batch(
        ["a red circle", "cross"], z1, z1, noise, torch.tensor([0.2, 0.7]), torch.full((2,), null)
    )


def test_source_grad_decides_how_the_flow_loss_reaches_the_head(recipe: Recipe) -> None:
    """full = path + the target's own part, which is -dv*/dz0 of the residual; none: nothing."""
    model, batch = answering_model(recipe), batch_of(recipe)
    found: dict[str, Tensor | None] = {}
    for mode in ("full", "path", "none"):
        loss = override_recipe(recipe, {"loss.flow.source_grad": mode}).loss
        losses, forward = Objective(model, recipe.flow, loss)(batch)
        (found[mode],) = torch.autograd.grad(losses["flow"], forward.z0, allow_unused=True)
        residual = (forward.v_pred - forward.path.v_target).detach()
    assert found["none"] is None
    assert found["full"] is not None
    assert found["path"] is not None
    through_target = -2 * residual / residual.numel() * (recipe.flow.path.rho - 1)
    assert bool(found["path"].any())
    torch.testing.assert_close(found["full"] - found["path"], through_target, rtol=1e-4, atol=1e-6)


def test_the_null_indicator_reaches_the_velocity(recipe: Recipe) -> None:
    model = answering_model(recipe)
    with torch.no_grad():
        own, null = (
            Objective(model, recipe.flow, recipe.loss)(batch_of(recipe, null=null))[1]
            for null in (False, True)
        )
    assert torch.equal(own.path.xt, null.path.xt)
    assert float((own.v_pred - null.v_pred).abs().mean()) > 1e-3


@pytest.mark.parametrize("total", [50, 2000])
def test_a_warm_up_by_fraction_follows_the_length_of_the_run(total: int) -> None:
    config = LossConfig(kl=KLLossConfig(weight=3.0, schedule=Linear(fraction=0.1)))
    weights = [
        weights_at(config, step, total)["kl"] for step in (0, total // 20, total // 10, total - 1)
    ]
    assert weights == pytest.approx([0.0, 3.0 * (total // 20) / (total / 10), 3.0, 3.0])
