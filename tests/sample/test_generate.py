"""Pictures from prompts: noise by place, guidance, the path of training, and nothing left
behind.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import tiny_recipe

from flowray.config.flow import Dopri5Solver, HeunSolver, SampleConfig
from flowray.config.recipe import Recipe
from flowray.data.pixels import from_pictures
from flowray.flow.path import time_code
from flowray.model.assemble import FlowModel, build_model
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.sample.generate import generate, generate_latents, save_strip, source_noise

PROMPTS = ["a small red circle on the left", "a large blue square", "cross"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("generate"))


@pytest.fixture(scope="module")
def model(recipe: Recipe) -> FlowModel:
    made = build_model(recipe.model, recipe.loss, 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.velocity.parameters():
            p += 0.15 * torch.randn(p.shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def autoencoder(recipe: Recipe) -> Autoencoder:
    return load_autoencoder(recipe.model.autoencoder, recipe.model.latent)


def test_noise_depends_on_seed_and_place_alone(model: FlowModel) -> None:
    three, five, other = (
        source_noise(model, 3, 7, CPU),
        source_noise(model, 5, 7, CPU),
        source_noise(model, 3, 8, CPU),
    )
    assert three.shape == (3, 4, 4, 4)
    assert torch.equal(three, five[:3])
    assert not torch.equal(three[0], three[1])
    assert not torch.equal(three, other)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_equals_its_prompts_alone(model: FlowModel, guidance: float) -> None:
    config = SampleConfig(steps=6, guidance_scale=guidance)
    noise = source_noise(model, 3, 7, CPU)
    together = generate_latents(model, PROMPTS, config, noise)
    alone = torch.cat(
        [generate_latents(model, PROMPTS[i : i + 1], config, noise[i : i + 1]) for i in range(3)]
    )
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_path_of_training_by_hand(model: FlowModel) -> None:
    """z0 from the posterior at t = 0, midpoint Euler, time code 4 - 8 t, no null."""
    noise = source_noise(model, 3, 7, CPU)
    got = generate_latents(model, PROMPTS, SampleConfig(steps=5), noise)
    with torch.no_grad():
        posterior = model.posterior(model.text(model.text.tokenize(PROMPTS)))
        x = posterior.mu + (posterior.logvar / 2).exp() * noise
        for k in range(5):
            t = torch.full((3,), (k + 0.5) / 5)
            x = x + model.velocity(x, 4 - 8 * t, torch.zeros(3, dtype=torch.bool)) / 5
    assert torch.allclose(got, x, atol=1e-5)


def test_guidance_1_is_off_and_more_moves_away_from_null(model: FlowModel) -> None:
    noise = source_noise(model, 3, 7, CPU)
    off, same, more = (
        generate_latents(model, PROMPTS, SampleConfig(steps=1, guidance_scale=s), noise)
        for s in (1.0, 1.0, 4.0)
    )
    assert torch.equal(off, same)
    with torch.no_grad():
        z0 = model.source(PROMPTS, noise).z0
        code = time_code(torch.full((3,), 0.5))
        v_c, v_u = (model.velocity(z0, code, torch.full((3,), null)) for null in (False, True))
    assert float((v_c - v_u).abs().max()) > 1e-3  # the null indicator does something
    assert torch.allclose(off, z0 + v_c, atol=1e-5)
    assert torch.allclose(more, z0 + v_u + 4 * (v_c - v_u), atol=1e-4)


def test_solvers_agree_in_the_limit(model: FlowModel) -> None:
    noise = source_noise(model, 3, 7, CPU)
    exact = generate_latents(
        model, PROMPTS, SampleConfig(solver=Dopri5Solver(rtol=1e-6, atol=1e-6)), noise
    )
    heun = generate_latents(model, PROMPTS, SampleConfig(solver=HeunSolver(), steps=128), noise)
    quantiles = generate_latents(
        model, PROMPTS, SampleConfig(solver=HeunSolver(), steps=256, grid="logit_normal"), noise
    )
    assert torch.allclose(exact, heun, atol=5e-3)
    assert torch.allclose(exact, quantiles, atol=5e-2)


def test_generate_decodes_and_leaves_no_trace(model: FlowModel, autoencoder: Autoencoder) -> None:
    config, rng = SampleConfig(steps=3), torch.get_rng_state()
    model.train()
    try:
        pictures = generate(model, autoencoder, PROMPTS, config, seed=7)
        assert model.training
        assert not model.text.backbone.training
    finally:
        model.eval()
    assert pictures.shape == (3, 8, 8, 3)
    assert pictures.dtype == np.uint8
    assert torch.equal(torch.get_rng_state(), rng)
    latents = generate_latents(model, PROMPTS, config, source_noise(model, 3, 7, CPU))
    with torch.no_grad():
        assert np.array_equal(pictures, from_pictures(autoencoder.decode(latents)))
    assert np.array_equal(pictures, generate(model, autoencoder, PROMPTS, config, seed=7))
    assert not np.array_equal(pictures, generate(model, autoencoder, PROMPTS, config, seed=8))


def test_many_prompts_run_in_parts_with_the_same_pictures(
    model: FlowModel, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = generate(model, autoencoder, PROMPTS * 2, SampleConfig(steps=2), seed=7)
    monkeypatch.setattr("flowray.sample.generate.BATCH", 4)
    parts = generate(model, autoencoder, PROMPTS * 2, SampleConfig(steps=2), seed=7)
    assert int(np.abs(whole.astype(int) - parts.astype(int)).max()) <= 1


def test_strip(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    save_strip(pictures, tmp_path / "step_1.png")
    read = np.asarray(Image.open(tmp_path / "step_1.png"))
    assert read.shape == (8, 24, 3)
    assert np.array_equal(read[:, 8:16], pictures[1])
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.png"]
