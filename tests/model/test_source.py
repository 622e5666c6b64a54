"""Where paths begin, and what the velocity network is told of the caption: independent choices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import perturbed, tiny_recipe

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.flow.guidance import guided, with_time_code
from flowray.losses.terms import box_sum
from flowray.losses.total import Batch, Objective
from flowray.model.assemble import FlowModel, build_model
from flowray.probes.battery import make_probe_batch, run_probes
from flowray.sample.generate import generate_latents
from flowray.store.latents import ensure_latents, load_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

CPU = torch.device("cpu")
NOISE = {"model.source.kind": "noise", "loss.kl.weight": 0}
SOURCES: dict[str, dict[str, Any]] = {
    "text alone": {},
    "text and adaln": {"model.velocity.condition.kind": "adaln"},
    "text and cross-attention": {"model.velocity.condition.kind": "cross_attention"},
    "text alone, dropped where null": {"model.source.drop_null": True},
    "text and adaln, dropped where null": {
        "model.source.drop_null": True,
        "model.velocity.condition.kind": "adaln",
        "model.source.amplitude": 2.0,
    },
    "noise and adaln": NOISE | {"model.velocity.condition.kind": "adaln"},
    "noise and cross-attention": NOISE | {"model.velocity.condition.kind": "cross_attention"},
}
CAPTIONS = ["a red circle", "a blue square on the left", "cross"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return tiny_recipe(tmp_path_factory.mktemp("source"))


def model_of(recipe: Recipe) -> FlowModel:
    model = build_model(recipe.model, recipe.loss, 0).eval()
    perturbed(model.velocity)
    return model


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_tells_what_is_asked_for(recipe: Recipe, name: str) -> None:
    made = override_recipe(recipe, SOURCES[name])
    model = model_of(made)
    noise = torch.randn(3, *made.model.latent.shape, generator=torch.Generator().manual_seed(0))
    source = model.source(CAPTIONS, noise)
    assert (source.text is None) == (made.model.velocity.condition.kind == "none")
    if made.model.source.kind == "noise":
        assert torch.equal(source.z0, noise)
        assert not any(key.startswith("head.") for key in model.trainable())
    else:
        assert torch.equal(source.z0, source.posterior.mean + source.posterior.std * noise)
    # every trainable parameter has a part in the flow loss
    t, null = torch.tensor([0.2, 0.5, 0.8]), torch.tensor([False, True, False])
    field = with_time_code(model.field(source))
    (field(source.z0, t, null) - source.z0).square().sum().backward()
    idle = [key for key, p in model.trainable().items() if p.grad is None]
    assert [key for key in idle if not key.startswith("semantic.")] == []


@pytest.mark.parametrize("name", SOURCES)
def test_guidance_keeps_each_caption_with_its_sample(recipe: Recipe, name: str) -> None:
    """Both halves of a guided batch against one call a sample, by hand."""
    made = override_recipe(recipe, SOURCES[name])
    model = model_of(made)
    noise = torch.randn(3, *made.model.latent.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        source = model.source(CAPTIONS, noise)
        t = torch.full((3,), 0.4)
        together = guided(with_time_code(model.field(source)), 3.0)(source.z0, t)
        for i in range(3):
            alone = model.source(CAPTIONS[i : i + 1], noise[i : i + 1])
            field = with_time_code(model.field(alone))
            own, null = (field(alone.z0, t[:1], torch.tensor([flag])) for flag in (False, True))
            assert torch.allclose(together[i : i + 1], null + 3 * (own - null), atol=1e-4)


def test_a_condition_alone_decides_what_noise_becomes(recipe: Recipe) -> None:
    """Under one noise, two captions end apart; with the caption dropped they end alike."""
    made = override_recipe(recipe, SOURCES["noise and adaln"])
    model = model_of(made)
    noise = torch.randn(1, *made.model.latent.shape).expand(3, -1, -1, -1)
    ends = generate_latents(model, CAPTIONS, made.sample, noise)
    dropped = generate_latents(
        model, CAPTIONS, made.sample.model_copy(update={"guidance_scale": 0.0}), noise
    )
    assert float((ends[0] - ends[1]).abs().max()) > 1e-3
    assert torch.allclose(dropped[0], dropped[1], atol=1e-5)


VELOCITIES: dict[str, dict[str, Any]] = {
    "dit": {},
    "dimr": {"model.velocity": {"kind": "dimr", "widths": (16, 8), "depths": (3, 3), "heads": 2}},
}


@pytest.mark.parametrize("velocity", VELOCITIES)
def test_a_dropped_caption_is_gone_from_every_level_and_gradient(
    recipe: Recipe, velocity: str
) -> None:
    """Null samples of two captions, from the same noise: the loss is the same and teaches the
    source nothing, as it is that of a model whose source is the noise alone.
    """
    wide = {"model.source.amplitude": 3.0, "model.source.drop_null": True, "loss.kl.weight": 0}
    wide |= {"model.posterior.logvar_min": -1e-6, "model.posterior.logvar_max": 1e-6}
    made = override_recipe(recipe, VELOCITIES[velocity] | wide)
    model = model_of(made)
    for p in model.head.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(1))
    noise, z1 = torch.randn(
        2, 1, *made.model.latent.shape, generator=torch.Generator().manual_seed(2)
    )
    found = []
    for caption in CAPTIONS[:2]:
        t, null = torch.tensor([0.3]), torch.tensor([True])
        batch = Batch([caption], z1, z1, noise, t, null)
        losses, forward = Objective(model, made.flow, made.loss)(batch)
        found.append(losses["flow"])
        assert float(forward.posterior.mean.detach().abs().mean()) > 0.1
        loss = losses["flow"]
        parts = torch.autograd.grad(loss, list(model.head.parameters()), allow_unused=True)
        assert all(part is None or not part.any() for part in parts)
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-4)
    x = 0.7 * noise + 0.3 * z1
    *lower, v = model.velocity.levels(x, torch.tensor([1.6]), torch.tensor([True]))
    want = (v - (z1 - noise)).square().mean()
    for weight, level in zip(model.velocity.level_weights, lower, strict=False):
        want = want + weight * (level - box_sum(z1 - noise, level)).square().mean()
    assert found[0].item() == pytest.approx(want.item(), rel=1e-3)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({"model.source.kind": "noise", "loss.kl.weight": 0}, "velocity.condition"),
        (SOURCES["noise and adaln"] | {"loss.kl.weight": 1.0}, "loss.kl.weight"),
        (SOURCES["noise and adaln"] | {"loss.anchor.weight": 1.0}, "loss.anchor.weight"),
        (SOURCES["noise and adaln"] | {"loss.clip.weight": 1.0}, "loss.clip.weight"),
    ],
)
def test_a_choice_that_trains_nothing_is_refused(
    recipe: Recipe, overrides: dict[str, Any], key: str
) -> None:
    with pytest.raises(InputError, match=key):
        override_recipe(recipe, overrides)


def test_probes_of_noise_say_nothing_of_a_posterior(recipe: Recipe) -> None:
    made = override_recipe(recipe, SOURCES["noise and cross-attention"])
    folders = ensure_latents(made.data, made.model.autoencoder, made.model.latent)
    held_out = load_latents(folders["val"])
    rows = run_probes(model_of(made), made, make_probe_batch(made, held_out, CPU), endpoints=False)
    assert {
        "flow/cos",
        "shoot/nmse",
        "shoot/energy",
        "z_init/var",
        "flow/cond_gain_cos",
    } <= rows.keys()
    assert not [
        key for key in rows if key.startswith(("mu/", "logvar/", "std/", "text/", "source/"))
    ]
    assert rows["flow/cond_gain_cos"] != 0


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "text alone"])
def test_it_trains_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    def losses(folder: str, *stops: int) -> list[float]:
        made = tiny_recipe(tmp_path, **SOURCES[name], **{"name": folder, "train.log_every": 1})
        run = RunDirectory(Path(made.storage_path) / folder)

        def interrupt(row: dict[str, Any]) -> None:
            if row["step"] in stops and row["start"] < row["step"]:
                run.stop_request.touch()

        while train(made, run, Group(0, 1, CPU), interrupt) == "stopped":
            run.stop_request.unlink()
        return [row["loss/flow"] for row in read_rows(run.metrics)]

    whole = losses("whole")
    assert len(whole) == 12
    assert losses("parts", 4) == whole
