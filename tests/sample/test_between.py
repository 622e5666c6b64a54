"""Between two captions: the ends are what the captions are drawn as alone, whatever is mixed of
source and condition, and a row has one noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support import perturbed, tiny_recipe
from text_support import bert, save
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.flow import SampleConfig
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.model.assemble import FlowModel, Source, build_model
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.sample.arithmetic import sum_latents
from flowray.sample.between import arc_weights, between, between_latents, weighted
from flowray.sample.generate import decoded, generate, generate_latents, source_noise, source_of

ADALN = {"model.velocity.condition.kind": "adaln"}
CROSS = {"model.velocity.condition.kind": "cross_attention"}
NOISE = {"model.source.kind": "noise", "loss.kl.weight": 0}
SOURCES: dict[str, dict[str, Any]] = {
    "text": {},
    "text, adaln": ADALN,
    "text, adaln, dropped where null": ADALN
    | {"model.source.drop_null": True, "model.source.amplitude": 2.0},
    "noise, adaln": NOISE | ADALN,
    "noise, cross-attention": NOISE | CROSS,
}
A, B, C = "cross", "a large red circle on the left of a blue square", "a green ring"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("between"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A text encoder, which makes more tokens of a longer caption."""
    path = tmp_path_factory.mktemp("bert")
    save(bert, path)
    return {"model.text": {"kind": "encoder", "path": str(path), "max_tokens": 16}}


def model_of(recipe: Recipe, **overrides: Any) -> FlowModel:
    model = build_model(override_recipe(recipe, overrides).model, recipe.loss, 0).eval()
    perturbed(model.velocity)
    if model.head is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.head.parameters():
                p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def ends(model: FlowModel, *captions: list[str]) -> list[Source]:
    with torch.no_grad():
        return [model.source(each, source_noise(model, [A], 0, CPU)) for each in captions]


def check_ends(model: FlowModel, guidance: float) -> None:
    """One noise: at 0 the first caption's latent, at 1 the second's, neither of them half-way."""
    config = SampleConfig(steps=3, guidance_scale=guidance)
    noise = source_noise(model, [A], 7, CPU)
    a, b = (generate_latents(model, [caption], config, noise)[0] for caption in (A, B))
    shares = torch.tensor([0.0, 0.5, 1.0])
    row = noise.expand(3, -1, -1, -1)
    first, second = ends(model, [A] * 3, [B] * 3)
    start, middle, end = between_latents(model, first, second, shares, config, row)
    assert torch.allclose(start, a, atol=1e-4)
    assert torch.allclose(end, b, atol=1e-4)
    assert apart(a, b) > 0.01
    assert min(apart(middle, a), apart(middle, b)) > 0.1 * apart(a, b)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", SOURCES)
def test_the_ends_are_the_captions_own(recipe: Recipe, name: str, guidance: float) -> None:
    check_ends(model_of(recipe, **SOURCES[name]), guidance)


@pytest.mark.parametrize("condition", [ADALN, CROSS])
@pytest.mark.parametrize("source", [{}, NOISE])
def test_captions_of_different_length(
    recipe: Recipe, encoder: dict[str, Any], source: dict[str, Any], condition: dict[str, Any]
) -> None:
    model = model_of(recipe, **encoder, **source, **condition)
    short, long = model.text.tokenize([A, B]).mask.sum(1).tolist()
    assert short < long
    check_ends(model, 3.0)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", ["text, adaln", "text, adaln, dropped where null"])
def test_a_quarter_of_the_way_by_hand(recipe: Recipe, name: str, guidance: float) -> None:
    """One step: mean and log-variance mixed by a quarter, and so the two captions' velocities; the
    null velocity lacks the mixed mean where the recipe drops it.
    """
    model = model_of(recipe, **SOURCES[name])
    config = SampleConfig(steps=1, guidance_scale=guidance)
    noise = source_noise(model, [A], 7, CPU)
    got = between_latents(model, *ends(model, [A], [B]), torch.tensor([0.25]), config, noise)
    with torch.no_grad():
        a, b = (model.source([caption], noise) for caption in (A, B))
        mean = 0.75 * a.posterior.mean + 0.25 * b.posterior.mean
        logvar = 0.75 * a.posterior.logvar + 0.25 * b.posterior.logvar
        z0 = mean + (logvar / 2).exp() * noise
        code, yes, no = torch.zeros(1), torch.tensor([True]), torch.tensor([False])
        v_a, v_b = (model.velocity(z0, code, no, each.text) for each in (a, b))
        dropped = mean if model.drops else torch.zeros_like(mean)
        null = model.velocity(z0 - dropped / 2, code, yes, a.text) - dropped
        v = null + guidance * (0.75 * v_a + 0.25 * v_b - null)
    assert apart(v_a, v_b) > 0.01
    assert apart(a.posterior.mean, b.posterior.mean) > 0.01
    assert apart(a.posterior.logvar, b.posterior.logvar) > 0.01
    assert torch.allclose(got, z0 + v, atol=1e-4)


def test_the_arc_between_two_draws_keeps_their_size() -> None:
    """Halfway: straight mixing of independent noise has half of its variance, the arc all of it;
    the ends are the ends, and along one direction the arc is the straight line.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 4, 32, 32, generator=generator)
    shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    arc = weighted([a, b], arc_weights(a, b, shares))
    straight = weighted([a, b], torch.stack([1 - shares, shares]))
    assert torch.allclose(arc[0], a[0])
    assert torch.allclose(arc[4], b[4], atol=1e-6)
    assert [round(float(each.var()), 1) for each in arc] == [1.0] * 5
    assert round(float(straight[2].var()), 1) == 0.5
    turned = [
        float(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0).acos())
        for x, y in ((arc[1], a[1]), (b[1], a[1]))
    ]
    assert turned[0] == pytest.approx(turned[1] / 4, rel=0.03)  # their lengths differ a little
    same = arc_weights(a, 2 * a, shares)
    assert torch.allclose(same, torch.stack([1 - shares, shares]), atol=1e-6)
    opposed = arc_weights(a, -a, shares)
    assert bool(opposed.isfinite().all())


@pytest.mark.parametrize("name", ["text, adaln", "noise, adaln"])
def test_spherically_each_end_is_the_captions_own_picture(recipe: Recipe, name: str) -> None:
    """Of its own noise, in each row; halfway is z0 of both by the arc's weights."""
    model, config = model_of(recipe, **SOURCES[name]), SampleConfig(steps=2)
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    flat = between(model, autoencoder, [A, B], 3, 2, config, 7, mix="spherical")
    rows = flat.reshape(2, 3, 8, 8, 3).astype(int)
    for column, caption in ((0, A), (2, B)):
        own = generate(model, autoencoder, [caption] * 2, config, 7)
        assert np.abs(rows[:, column] - own).max() <= 1
    held = between(model, autoencoder, [A, B], 3, 2, config, 7, mix="linear")
    assert np.abs(rows[:, 2] - held.reshape(rows.shape)[:, 2]).max() > 1
    suits = between(model, autoencoder, [A, B], 3, 2, config, 7)
    assert np.array_equal(suits, flat if name.startswith("noise") else held)


def test_latents_that_are_not_finite_are_no_black_pictures(recipe: Recipe) -> None:
    model = model_of(recipe, **ADALN)
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    config = SampleConfig(guidance_scale=1e38)
    with pytest.raises(InputError, match="'cross' and 2 more: the latent is not finite"):
        between(model, autoencoder, [A, B], 3, 1, config, 7)


def test_rows_through_three_captions(recipe: Recipe) -> None:
    """Each caption once, in order, as it is drawn with the row's noise, which is the first
    caption's; in batches too.
    """
    model, config = model_of(recipe, **ADALN), SampleConfig(steps=2)
    autoencoder: Autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    heard: list[int] = []
    read: list[int] = []  # captions that the text model was given

    def drawn(seed: int) -> np.ndarray:
        flat = between(model, autoencoder, [A, B, C], 3, 2, config, seed, heard.append)
        return flat.reshape(2, 5, 8, 8, 3).astype(int)

    hook = model.text.register_forward_pre_hook(lambda _, given: read.append(len(given[0].mask)))
    pictures = drawn(7)
    hook.remove()
    assert (sum(heard), sum(read)) == (10, config.batch_size)  # once, in one filled batch
    for column, caption in ((0, A), (2, B), (4, C)):
        noise = source_noise(model, [A, A], 7, CPU)
        alone = decoded(autoencoder, generate_latents(model, [caption] * 2, config, noise), 2)
        assert np.abs(pictures[:, column] - alone).max() <= 1
    first = generate(model, autoencoder, [A, A], config, 7)
    assert np.abs(pictures[:, 0] - first).max() <= 1
    for column in range(4):
        assert np.abs(pictures[:, column] - pictures[:, column + 1]).max() > 1
    assert np.abs(pictures[0] - pictures[1]).max() > 1
    assert np.array_equal(pictures, drawn(7))
    assert np.abs(pictures - drawn(8)).max() > 1
    config = config.model_copy(update={"batch_size": 4})
    assert np.abs(pictures - drawn(7)).max() <= 1


def test_sources_do_not_hang_on_the_captions_beside_them(
    recipe: Recipe, encoder: dict[str, Any]
) -> None:
    model = model_of(recipe, **CROSS, **encoder)
    config = SampleConfig(steps=2, batch_size=2)
    noise = source_noise(model, [A, B, C], 3, CPU)
    every = source_of(model, [A, B, C], config, noise)
    for i, caption in enumerate((A, B, C)):
        alone = source_of(model, [caption], config, noise[i : i + 1])
        assert torch.equal(alone.z0[0], every.z0[i])
        assert alone.text is not None
        assert every.text is not None
        assert torch.equal(alone.text.values[0], every.text.values[i])
    # of the whole length, as plain sampling has them
    assert every.text is not None
    assert every.text.mask.shape == (3, 16)


def test_ends_have_tokens_of_the_whole_length(recipe: Recipe, encoder: dict[str, Any]) -> None:
    """As plain sampling has them."""
    model = model_of(recipe, **CROSS, **encoder)
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    config = SampleConfig(steps=2, batch_size=2)
    lengths = set[int]()
    model.text.register_forward_hook(lambda _, __, tokens: lengths.add(tokens.mask.shape[1]))
    between(model, autoencoder, [A, "cross x"], 2, 1, config, 0)
    sum_latents(model, A, ["cross x"], [A], config, source_noise(model, [A], 0, CPU))
    assert lengths == {16}
