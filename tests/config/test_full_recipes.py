"""The full-scale recipes: what the notes and the published systems demand of all of them."""

from __future__ import annotations

import pytest

from flowray.config.load import load_recipe
from flowray.config.towers import ImageTower

FULL = ("crossflow_256", "crossflow_512", "crossflow_dit", "openuni_512", "fieldnotes_256")


def test_their_contrastive_loss_has_a_picture_tower_frozen_or_trained() -> None:
    """Not the small tower of the embedded runs, which sees latents."""
    recipes = [load_recipe(name).recipe for name in FULL]
    towers = [recipe.model.semantic for recipe in recipes if recipe.loss.clip.weight > 0]
    assert len(towers) >= 4
    assert all(isinstance(tower, ImageTower) for tower in towers)
    assert {tower.frozen for tower in towers if isinstance(tower, ImageTower)} == {False, True}


def test_openuni_is_the_published_one() -> None:
    """From noise, all tokens read by cross-attention, nothing trained but by the flow."""
    recipe = load_recipe("openuni_512").recipe
    model = recipe.model
    assert (model.source.kind, model.velocity.condition.kind) == ("noise", "cross_attention")
    assert model.text.connector is not None
    assert (model.text.tokens, model.text.connector.out) == (256, 2304)
    assert recipe.loss.on_source == ()
    assert (recipe.flow.time.kind, recipe.flow.null_probability) == ("uniform", 0.1)
    assert (recipe.sample.steps, recipe.sample.guidance_scale) == (20, 4.5)


@pytest.mark.parametrize("name", FULL)
def test_no_group_learns_faster_than_the_notes_allow(name: str) -> None:
    """Text side and heads of the contrastive loss at most 2e-4, the trunk at most 1e-4."""
    optim = load_recipe(name).recipe.optim
    for group, most in {"text": 2e-4, "z_head": 2e-4, "trunk": 1e-4}.items():
        assert (
            min(optim.lr * getattr(optim.lr_scale, group), getattr(optim.lr_max, group) or most)
            <= most
        ), group


def test_the_notes_limits_hold_whatever_the_lr() -> None:
    optim = load_recipe("fieldnotes_256", ["optim.lr=1e-2"]).recipe.optim
    assert (optim.lr_max.text, optim.lr_max.z_head, optim.lr_max.trunk) == (2e-4, 2e-4, 1e-4)
