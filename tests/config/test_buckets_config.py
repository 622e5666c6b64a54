"""Which latent sizes a recipe's aspect ratios come to, and which recipes they do not fit."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from flowray.config.base import LatentSpec
from flowray.config.buckets import latent_sizes, size_for, sizes_of
from flowray.config.errors import InputError, RuleError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.config.train import DataConfig

RATIOS = (0.25, 0.5, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 2.0, 4.0)
ON = {"data.aspect_ratios": [0.5, 2.0], "data.prepare.resize": "area"}


@pytest.mark.parametrize(("side", "step"), [(16, 1), (32, 2), (64, 4), (128, 8), (30, 1)])
def test_sizes_have_the_tokens_and_about_the_shape_asked_for(side: int, step: int) -> None:
    sizes = latent_sizes(LatentSpec(height=side, width=side), RATIOS, step)
    assert next(iter(sizes)) == (side, side)
    assert sorted(sizes.values()) == sorted(RATIOS)
    for (height, width), ratio in sizes.items():
        assert 0.85 * side**2 <= height * width <= side**2
        assert abs(math.log(width / height / ratio)) < 0.16
        if (height, width) != (side, side):
            assert height % step == width % step == 0
    tall = {(h, w) for h, w in sizes if h > w}
    assert {(w, h) for h, w in tall} == {(h, w) for h, w in sizes if w > h}
    asked = list(sizes.values())[1:]
    assert all(a < b for a, b in pairwise(asked))


def test_the_models_own_ratio_may_be_named_or_not() -> None:
    wide = LatentSpec(height=8, width=16)
    assert latent_sizes(wide, (), 1) == {}
    assert latent_sizes(wide, (2.0,), 3) == {(8, 16): 2.0}
    assert latent_sizes(wide, (1.0,), 1) == latent_sizes(wide, (2.0, 1.0), 1)
    assert latent_sizes(wide, (1.0,), 1) == {(8, 16): 2.0, (11, 11): 1.0}


@pytest.mark.parametrize(
    ("ratios", "step"), [((1.01,), 1), ((0.51, 0.55), 1), ((0.5, 0.5), 1), ((0.5, 0.6), 4)]
)
def test_ratios_that_give_one_size_twice(ratios: tuple[float, ...], step: int) -> None:
    with pytest.raises(RuleError, match=r"gives latents of \d+ x \d+ cells, as"):
        latent_sizes(LatentSpec(height=8, width=8), ratios, step)


def test_a_step_that_is_too_large() -> None:
    with pytest.raises(RuleError, match=r"aspect_step 9 is too large"):
        latent_sizes(LatentSpec(height=8, width=8), (0.5,), 9)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"model.velocity.patch": 2}, "data.aspect_step=2"),
        ({"data.prepare.resize": "none"}, "data.prepare.resize"),
        ({"loss.clip.weight": 0.1, "model.semantic.kind": "image"}, "model.semantic.kind"),
        ({"data.aspect_ratios": [0.5, 5]}, "data.aspect_ratios"),
        ({"data.aspect_ratios": [0.1]}, "data.aspect_ratios"),
        ({"data.aspect_ratios": [0.5, 0.5]}, "as 0.5 does"),
        ({"data.aspect_step": 0}, "data.aspect_step"),
        (
            {
                "data.aspect_ratios": [0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 1.5, 2, 3, 4],
                "model.latent.height": 32,
                "model.latent.width": 32,
                "train.compile": True,
            },
            "train.compile",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: dict[str, object], key: str) -> None:
    fits = override_recipe(Recipe(), ON)
    assert sizes_of(fits.data, fits.model.latent) == ((8, 8), (11, 5), (5, 11))
    with pytest.raises(InputError) as caught:
        override_recipe(Recipe(), ON | overrides)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def test_as_told() -> None:
    recipe = override_recipe(Recipe(), ON | {"model.velocity.patch": 2, "data.aspect_step": 2})
    assert sizes_of(recipe.data, recipe.model.latent) == ((8, 8), (10, 6), (6, 10))


def test_off_by_default() -> None:
    assert sizes_of(Recipe().data, Recipe().model.latent) == ()


def test_the_size_of_a_ratio() -> None:
    latent = LatentSpec()
    data = DataConfig(aspect_ratios=(0.5, 2 / 3))
    assert size_for(data, latent, 0.667) == (10, 6)
    assert size_for(data, latent, 1) == size_for(DataConfig(), latent, 1) == (8, 8)
    for other in (2.0, 0.6, 0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"trained on 0.5, 0.666667, 1"):
            size_for(data, latent, other)
