"""Pictures from prompts: noise by caption, guidance, the path of training, and nothing left
behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from support import perturbed, tiny_recipe
from torch import Tensor

from flowray.config.errors import InputError
from flowray.config.flow import Dopri5Solver, HeunSolver, SampleConfig
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.data.pixels import from_pictures
from flowray.flow.path import time_code
from flowray.model.assemble import FlowModel, build_model
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.sample.generate import (
    check_finite,
    decoded,
    generate,
    generate_latents,
    latent_batches,
    network_calls,
    save_strip,
    source_noise,
)

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


def test_noise_depends_on_seed_caption_and_number_alone(model: FlowModel) -> None:
    a, b, c = PROMPTS
    noise = source_noise(model, [a, b, a, c], 7, CPU)
    assert noise.shape == (4, 4, 4, 4)
    turned = source_noise(model, [c, a, a], 7, CPU)
    assert torch.equal(turned, noise[[3, 0, 2]])
    assert torch.equal(source_noise(model, [a, b], 7, CPU, numbers=[1, 0]), noise[[2, 1]])
    assert len(torch.unique(noise.flatten())) == noise.numel()
    other = source_noise(model, [a, b, a, c], 8, CPU)
    assert not torch.isin(other, noise).any()


def alone(model: FlowModel, config: SampleConfig, prompts: list[str], **how: Any) -> Tensor:
    (made,) = latent_batches(model, prompts, config, 7, **how)
    return made


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_the_same_to_the_bit_whatever_is_beside_it(
    model: FlowModel, autoencoder: Autoencoder, guidance: float, precision: Literal["fp32", "bf16"]
) -> None:
    """Alone, among others, in another order, in a later batch, beside a prompt of more tokens."""
    a, b, c = PROMPTS
    config = SampleConfig(steps=6, guidance_scale=guidance, batch_size=4, precision=precision)
    latents = {
        "alone": alone(model, config, [c])[0],
        "among": alone(model, config, [a, c, b])[1],
        "turned": alone(model, config, [b, a, a, c])[3],
        "later": torch.cat(list(latent_batches(model, [a] * 5 + [b, c], config, 7)))[6],
        "numbered": alone(model, config, [c, a], numbers=[0, 3])[0],
    }
    for name, latent in latents.items():
        assert torch.equal(latent, latents["alone"]), name
    pictures = [
        generate(model, autoencoder, prompts, config, 7)[at]
        for prompts, at in (([c], 0), ([a, c, b], 1), ([a] * 5 + [b, c], 6))
    ]
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


def test_what_is_kept_of_a_text_does_not_change_its_picture(recipe: Recipe) -> None:
    """A text model that keeps what it makes computed it beside other captions."""
    cached = override_recipe(recipe, {"model.text.cache": True})
    model = build_model(cached.model, recipe.loss, 0).eval()
    model.text(model.text.tokenize(["cross", "a word or two more than that one had"]))
    assert model.text.kept is not None
    kept, fresh = len(model.text.kept), build_model(recipe.model, recipe.loss, 0).eval()
    config = SampleConfig(steps=2)
    assert torch.equal(alone(model, config, ["cross"]), alone(fresh, config, ["cross"]))
    assert len(model.text.kept) == kept == 2
    assert not model.text.pad_to_max


def test_bf16_computes_in_bf16_and_keeps_the_state_in_fp32(model: FlowModel) -> None:
    heard: list[torch.dtype] = []
    layer = next(m for m in model.velocity.modules() if isinstance(m, torch.nn.Linear))
    hook = layer.register_forward_hook(lambda _, given, out: heard.append(out.dtype))
    fp32, bf16 = (
        alone(model, SampleConfig.model_validate({"precision": precision}), PROMPTS)
        for precision in ("fp32", "bf16")
    )
    hook.remove()
    assert set(heard) == {torch.float32, torch.bfloat16}
    assert bf16.dtype == torch.float32
    assert 0 < float((fp32 - bf16).abs().max()) < 0.1


def test_an_observer_sees_every_step_and_changes_nothing(model: FlowModel) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def watch(k: int, t: float, x: Tensor, v: Tensor) -> None:
        seen.append((k, round(t, 3), tuple(x.shape)))
        x.zero_()
        v.zero_()

    config = SampleConfig(steps=2, batch_size=2)
    watched = torch.cat(list(latent_batches(model, PROMPTS, config, 7, observe=watch)))
    assert torch.equal(watched, torch.cat(list(latent_batches(model, PROMPTS, config, 7))))
    pair, one = (2, 4, 4, 4), (1, 4, 4, 4)
    assert seen == [(0, 0.25, pair), (1, 0.75, pair), (0, 0.25, one), (1, 0.75, one)]


def test_a_negative_prompt_takes_the_place_of_no_caption(recipe: Recipe) -> None:
    conditioned = override_recipe(recipe, {"model.velocity.condition.kind": "adaln"})
    model = build_model(conditioned.model, recipe.loss, 0).eval()
    perturbed(model.velocity)
    config = SampleConfig(steps=1, guidance_scale=3.0)
    got = alone(model, config, [PROMPTS[0]], negative=PROMPTS[1])
    with torch.no_grad():
        noise = source_noise(model, PROMPTS[:1], 7, CPU)
        wanted, other = (model.source([prompt], noise) for prompt in PROMPTS[:2])
        code, null = time_code(torch.full((1,), 0.5)), torch.zeros(1, dtype=torch.bool)
        towards, away = (
            model.velocity(wanted.z0, code, null, each.text) for each in (wanted, other)
        )
    assert float((towards - away).abs().max()) > 1e-3
    assert torch.allclose(got, wanted.z0 + away + 3 * (towards - away), atol=1e-4)
    same = alone(model, config, [PROMPTS[0]], negative=PROMPTS[0])
    assert torch.allclose(same, wanted.z0 + towards, atol=1e-4)
    for off in (1.0, 0.1 + 3 * 0.3, 1 + 5e-7):
        with pytest.raises(InputError, match="guidance is off"):
            alone(model, SampleConfig(guidance_scale=off), PROMPTS, negative="cross")


def test_no_prompt_is_negative_outside_the_interval_of_guidance(recipe: Recipe) -> None:
    conditioned = override_recipe(recipe, {"model.velocity.condition.kind": "adaln"})
    model = build_model(conditioned.model, recipe.loss, 0).eval()
    perturbed(model.velocity)
    plain = SampleConfig(steps=2)
    never = plain.model_copy(update={"guidance_scale": 3.0, "guidance_interval": (0.9, 1.0)})
    half = plain.model_copy(update={"guidance_scale": 3.0, "guidance_interval": (0.5, 1.0)})
    made = [
        alone(model, config, PROMPTS[:2], **how)
        for config, how in ((plain, {}), (never, {"negative": "cross"}), (half, {"negative": "x"}))
    ]
    assert torch.equal(made[0], made[1])
    assert float((made[0] - made[2]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("how", "calls"),
    [
        ({}, 10),
        ({"guidance_scale": 2.0}, 20),
        ({"guidance_scale": 2.0, "solver": {"kind": "heun"}}, 40),
        ({"guidance_scale": 2.0, "solver": {"kind": "midpoint"}, "steps": 3}, 12),
        # midpoints 0.05, 0.15, ...: four of ten steps are guided
        ({"guidance_scale": 2.0, "guidance_interval": (0.3, 0.7)}, 14),
        ({"guidance_scale": 2.0, "grid": "logit_normal", "precision": "bf16"}, 20),
    ],
)
def test_how_often_the_network_is_asked_for_a_picture(
    model: FlowModel, how: dict[str, Any], calls: int
) -> None:
    config = SampleConfig.model_validate({"steps": 10, **how})
    with torch.no_grad():
        assert network_calls(model, PROMPTS, config, 0) == calls


def test_an_adaptive_solver_asks_as_often_as_it_must(model: FlowModel) -> None:
    loose, tight = (
        SampleConfig(solver=Dopri5Solver(rtol=tolerance, atol=tolerance))
        for tolerance in (1e-2, 1e-5)
    )
    asked = [network_calls(model, PROMPTS, config, 0) for config in (loose, tight)]
    assert 7 <= asked[0] < asked[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "dimr"])
def test_compiled_blocks_sample_as_eager_ones(recipe: Recipe, kind: str) -> None:
    """And are made once: a graph for the first batch, one for all other sizes; without them all is
    as before to the last bit.
    """
    recipe = override_recipe(recipe, {"model.velocity": {"kind": kind}})
    model = build_model(recipe.model, recipe.loss, 0).eval()
    perturbed(model.velocity)
    how: dict[str, Any] = {"steps": 4, "guidance_scale": 3.0, "guidance_interval": (0.3, 0.9)}
    configs = [SampleConfig(batch_size=size, **how) for size in (3, 2, 4, 3)]
    eager = alone(model, configs[0], PROMPTS)
    torch._dynamo.utils.counters.clear()
    for config in configs:
        made = torch.cat(list(latent_batches(model, PROMPTS, config, 7, compiled=True)))
        assert float((made - eager).abs().max()) < 3e-4 * float(eager.abs().max())
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert torch.equal(alone(model, configs[0], PROMPTS), eager)


def test_a_negative_prompt_needs_a_network_that_reads_captions(model: FlowModel) -> None:
    with pytest.raises(InputError, match=r"model\.velocity\.condition"):
        alone(model, SampleConfig(guidance_scale=3.0), PROMPTS, negative="cross")


def test_decoding_in_pieces(
    model: FlowModel, autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more px at once than it may be, never another shape, the same pictures."""
    latents = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = from_pictures(autoencoder.decode(latents))
    shapes: list[torch.Size] = []
    decode = Autoencoder.decode
    monkeypatch.setattr(
        Autoencoder, "decode", lambda self, z: (shapes.append(z.shape), decode(self, z))[1]
    )
    monkeypatch.setattr("flowray.sample.generate.DECODED", 2 * 8 * 8 + 1)
    assert np.abs(decoded(autoencoder, latents, 16).astype(int) - whole).max() <= 1
    assert shapes == [(2, 4, 4, 4)] * 3
    shapes.clear()
    monkeypatch.setattr("flowray.sample.generate.DECODED", 1)
    decoded(autoencoder, latents, 16)
    assert shapes == [(1, 4, 4, 4)] * 5


def test_a_latent_that_is_not_finite_is_refused_by_its_prompt() -> None:
    latents = torch.zeros(3, 4, 4, 4)
    check_finite(latents, PROMPTS)
    latents[1, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="'a large blue square': the latent is not finite"):
        check_finite(latents, PROMPTS)
    latents[2, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="square' and 1 more"):
        check_finite(latents, PROMPTS)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_batch_equals_its_prompts_alone(model: FlowModel, guidance: float) -> None:
    config = SampleConfig(steps=6, guidance_scale=guidance)
    noise = source_noise(model, PROMPTS, 7, CPU)
    together = generate_latents(model, PROMPTS, config, noise)
    alone = torch.cat(
        [generate_latents(model, PROMPTS[i : i + 1], config, noise[i : i + 1]) for i in range(3)]
    )
    assert torch.allclose(together, alone, atol=1e-4)


def test_the_path_of_training_by_hand(model: FlowModel) -> None:
    """z0 from the posterior at t = 0, midpoint Euler, time code 4 - 8 t, no null."""
    noise = source_noise(model, PROMPTS, 7, CPU)
    got = generate_latents(model, PROMPTS, SampleConfig(steps=5), noise)
    with torch.no_grad():
        posterior = model.posterior(model.text(model.text.tokenize(PROMPTS)))
        x = posterior.mu + (posterior.logvar / 2).exp() * noise
        for k in range(5):
            t = torch.full((3,), (k + 0.5) / 5)
            x = x + model.velocity(x, 4 - 8 * t, torch.zeros(3, dtype=torch.bool)) / 5
    assert torch.allclose(got, x, atol=1e-5)


def test_guidance_1_is_off_and_more_moves_away_from_null(model: FlowModel) -> None:
    noise = source_noise(model, PROMPTS, 7, CPU)
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
    noise = source_noise(model, PROMPTS, 7, CPU)
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
    latents = generate_latents(model, PROMPTS, config, source_noise(model, PROMPTS, 7, CPU))
    with torch.no_grad():
        by_hand = from_pictures(autoencoder.decode(latents))
    assert np.abs(pictures.astype(int) - by_hand).max() <= 1
    assert np.array_equal(pictures, generate(model, autoencoder, PROMPTS, config, seed=7))
    assert not np.array_equal(pictures, generate(model, autoencoder, PROMPTS, config, seed=8))


def test_strip(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    save_strip(pictures, tmp_path / "step_1.png")
    read = np.asarray(Image.open(tmp_path / "step_1.png"))
    assert read.shape == (8, 24, 3)
    assert np.array_equal(read[:, 8:16], pictures[1])
    assert [path.name for path in tmp_path.iterdir()] == ["step_1.png"]
