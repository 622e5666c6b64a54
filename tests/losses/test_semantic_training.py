"""The semantic losses in the real loop: what is built, what is decoded, where gradients go, what
a checkpoint keeps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import SPEC, answering_model, tiny_recipe
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

from flowray.config.load import override_recipe
from flowray.config.losses import ClipLossConfig, LossConfig
from flowray.config.recipe import Recipe
from flowray.config.towers import TowerConfig
from flowray.losses.total import Batch, Objective
from flowray.model.assemble import build_model
from flowray.model.autoencoder import load_autoencoder
from flowray.model.images import load_image_encoder
from flowray.model.semantic import Semantics, SemanticTower
from flowray.model.velocity import build_velocity
from flowray.sample.restore import open_run
from flowray.store.checkpoint import newest_checkpoint
from flowray.store.found import find_checkpoint
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
SHORT = {
    "train.steps": 3,
    "train.log_every": 1,
    "train.probe_every": 100,
    "train.sample_every": 100,
    "train.checkpoint_every": 100,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights that the losses name: DINOv2, SigLIP, VGG16, tiny and random."""
    path = tmp_path_factory.mktemp("semantic")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**VISION, mlp_ratio=2)).save_pretrained(path / "dinov2")
    SiglipVisionModel(SiglipVisionConfig(**VISION, intermediate_size=24)).save_pretrained(
        path / "siglip"
    )
    inputs, weights = 3, {}
    for width, stage in zip(
        (4, 4, 6, 6, 8), ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)), strict=True
    ):
        for index in stage:
            weights[f"features.{index}.weight"] = (
                torch.randn(width, inputs, 3, 3) * (2 / (9 * inputs)) ** 0.5
            )
            weights[f"features.{index}.bias"] = torch.zeros(width)
            inputs = width
    save_file(weights, path / "vgg16.safetensors")
    return path


def losses(folder: Path) -> dict[str, dict[str, Any]]:
    """Overrides that switch one kind of loss on, by its name."""
    return {
        "dino": {"loss.dino.weight": 0.5, "loss.dino.prototypes": 16},
        "dino_frozen": {
            "loss.dino": {
                "weight": 0.5,
                "prototypes": 16,
                "teacher": {"kind": "dinov2", "path": str(folder / "dinov2")},
            }
        },
        "repa": {
            "loss.repa": {
                "weight": 0.5,
                "hidden": 16,
                "depth": 1,
                "teacher": {"kind": "dinov2", "path": str(folder / "dinov2")},
            }
        },
        "lpips": {
            "loss.lpips": {
                "weight": 0.1,
                "vgg": str(folder / "vgg16.safetensors"),
                "size": 16,
                "schedule": {"kind": "constant"},
            }
        },
        "tv": {"loss.tv.weight": 1e-2},
        "norm": {"loss.norm.weight": 1e-2},
        "anchor": {"loss.anchor.weight": 1.0},
        "clip": {"loss.clip.weight": 0.5},
        "clip_siglip": {
            "loss.clip.weight": 0.5,
            "model.semantic": {"kind": "image", "net": siglip(folder), "hidden": 16},
        },
        "clip_frozen": {
            "loss.clip.weight": 0.5,
            "model.semantic": {
                "kind": "image",
                "net": siglip(folder),
                "hidden": 16,
                "frozen": True,
            },
        },
    }


def siglip(folder: Path) -> dict[str, str]:
    return {"kind": "siglip", "path": str(folder / "siglip")}


KINDS = tuple(losses(Path()))
# pictures, so the autoencoder must be there
SEES = {"dino_frozen", "repa", "lpips", "clip_siglip", "clip_frozen"}


def recipe_of(folder: Path, *kinds: str, **overrides: Any) -> Recipe:
    options = losses(folder)
    chosen: dict[str, Any] = {}
    for kind in kinds:
        chosen |= options[kind]
    return tiny_recipe(folder, **{**SHORT, **chosen, **overrides})


def batch_of(recipe: Recipe, count: int = 3) -> Batch:
    draw = torch.Generator().manual_seed(0)
    z1, noise = torch.randn(2, count, *SPEC.shape, generator=draw)
    null = torch.tensor([False, True, False])
    return Batch(
        ["a red circle", "a blue square", "cross"],
        z1,
        z1[[0, 2, 2]],
        noise,
        torch.tensor([0.1, 0.5, 0.8]),
        null,
    )


def name_of(kind: str) -> str:
    return kind.partition("_")[0]


def test_nothing_is_built_for_weight_0(folder: Path) -> None:
    model = build_model(recipe_of(folder).model, LossConfig(), 0)
    assert [name for name, _ in model.semantic.named_parameters()] == []
    assert [name for name, _ in model.semantic.named_modules() if name] == []
    assert model.semantic.moving() == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_builds_what_it_needs_and_reaches_what_it_should(kind: str, folder: Path) -> None:
    """z0's maker from every loss (lpips and repa through x_t); the velocity from those on it;
    own networks; nothing frozen.
    """
    recipe = recipe_of(folder, kind)
    model = answering_model(recipe)
    assert (model.semantic.autoencoder is not None) == (kind in SEES)
    values, _ = Objective(model, recipe.flow, recipe.loss).train()(batch_of(recipe))
    name = name_of(kind)
    assert list(values) == ["flow", "kl", name]
    values[name].backward()
    reached = {
        key.split(".")[0]
        for key, p in model.named_parameters()
        if p.grad is not None and bool(p.grad.any())
    }
    own = {"semantic"} if name in ("clip", "dino", "repa") else set()
    assert (
        reached
        == {"head", "text"} | ({"velocity"} if name in ("repa", "lpips", "norm") else set()) | own
    )
    still = [
        key
        for key, p in model.trainable().items()
        if key.startswith("semantic.") and (p.grad is None or not p.grad.any())
    ]
    assert still == []
    frozen = {key: p for key, p in model.semantic.named_parameters() if not p.requires_grad}
    assert all(p.grad is None for p in frozen.values())
    assert bool(frozen) == (kind not in ("clip", "tv", "norm", "anchor"))
    for part in (
        "autoencoder",
        "lpips",
        "clip.tower.encoder",
        "dino.teacher.encoder",
        "repa.encoder",
    ):
        if any(key.startswith(f"{part}.") for key in frozen) and kind != "clip_siglip":
            assert not model.semantic.get_submodule(part).training or part == "lpips"


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_training(kind: str, folder: Path) -> None:
    recipe = recipe_of(folder, kind, name=f"three_{kind}")
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    rows = read_rows(run.metrics)
    assert [row["step"] for row in rows] == [1, 2, 3]
    name = name_of(kind)
    assert all({f"loss/{name}", f"weight/{name}", "loss/kl_raw"} <= row.keys() for row in rows)
    for row in rows:
        assert row["loss/kl_raw"] == pytest.approx(row["loss/kl"] * SPEC.dims, rel=1e-4)
        assert row["loss/total"] == pytest.approx(
            sum(row[f"weight/{k}"] * row[f"loss/{k}"] for k in ("flow", "kl", name)), rel=1e-4
        )
        assert ("ent/teacher" in row) == (name == "dino")
    kept = load_file(newest_checkpoint(run.checkpoints) / "model.safetensors")
    assert not [
        key
        for key in kept
        if "autoencoder" in key or "lpips" in key or "dino.teacher" in key or "repa.encoder" in key
    ]
    assert any("clip.tower.encoder" in key for key in kept) == (kind == "clip_siglip")


def test_all_together_resume_bit_for_bit_with_the_centre_and_the_teacher(folder: Path) -> None:
    kinds = ("dino", "repa", "lpips", "tv", "norm", "anchor", "clip_frozen")
    base = recipe_of(
        folder,
        *kinds,
        **{"loss.lpips.schedule": {"kind": "until", "steps": 3}, "train.checkpoint_every": 2},
    )

    def go(name: str, *stops: int) -> RunDirectory:
        run = RunDirectory(Path(base.storage_path) / name)
        for stop in stops:
            train(
                override_recipe(base, {"name": name, "train.steps": stop}),
                run,
                Group(0, 1, torch.device("cpu")),
                lambda row: None,
            )
        return run

    fixed = {"loss.kl.schedule": {"kind": "constant"}, "optim.schedule": {"kind": "constant"}}
    # what depends on the length of the run would tell the two apart
    base = override_recipe(base, fixed)
    whole, halves = go("whole", 4), go("halves", 2, 4)
    told = [
        [
            {k: v for k, v in row.items() if not k.startswith("perf/")}
            for row in read_rows(run.metrics)
        ]
        for run in (whole, halves)
    ]
    assert told[0] == told[1]
    # not computed once its schedule is over
    assert ["loss/lpips" in row for row in told[0]] == [True, True, True, False]
    assert [row["weight/lpips"] for row in told[0]] == pytest.approx([0.1, 0.1, 0.1, 0.0])
    for group in ("model", "ema", "optim", "moving"):
        a, b = (
            load_file(newest_checkpoint(run.checkpoints) / f"{group}.safetensors")
            for run in (whole, halves)
        )
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    moving = load_file(newest_checkpoint(whole.checkpoints) / "moving.safetensors")
    assert bool(moving["dino.centre"].any())
    student = load_file(newest_checkpoint(whole.checkpoints) / "model.safetensors")[
        "semantic.dino.student.prototypes"
    ]
    assert not torch.equal(moving["dino.teacher.prototypes"], student)
    teacher = newest_checkpoint(whole.checkpoints) / "state.json"
    assert "moving.safetensors" in json.loads(teacher.read_text())["files"]


def test_a_run_is_sampled_without_the_files_of_its_losses(folder: Path) -> None:
    recipe = recipe_of(folder, "lpips", "dino", "clip", name="sampled")
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group(0, 1, torch.device("cpu")), lambda row: None)
    opened = open_run(
        find_checkpoint(run.path, ["loss.lpips.vgg=/nowhere/vgg16.safetensors"]),
        torch.device("cpu"),
    )
    kept = load_file(newest_checkpoint(run.checkpoints) / "ema.safetensors")
    assert any(key.startswith("semantic.") for key in kept)
    assert all(torch.equal(p, kept[key]) for key, p in opened.model.trainable().items())
    assert not any(key.startswith("semantic.") for key in opened.model.state_dict())


def test_the_scale_is_learnt_exponentiated_and_capped() -> None:
    tower = SemanticTower(
        TowerConfig(hidden=4, dim=8),
        ClipLossConfig(weight=1.0, temperature=0.1, max_scale=20.0),
        SPEC,
    )
    assert float(tower.scale.detach()) == pytest.approx(10)
    tower.log_scale.data.fill_(5.0)  # e^5 = 148
    scale = tower.scale
    assert float(scale.detach()) == pytest.approx(20)
    scale.backward()
    assert float(tower.log_scale.grad) == pytest.approx(20)  # at the cap it can still come down


def test_what_the_teachers_see(folder: Path) -> None:
    """DINO's teacher sees the caption's own picture; REPA and LPIPS the one the velocity leads
    to, another's where null.
    """
    recipe = recipe_of(folder, "dino_frozen", "repa", "lpips")
    model, batch = answering_model(recipe), batch_of(recipe)
    heard: list[Tensor] = []
    block = model.velocity.token_blocks().blocks[0]
    hook = block.register_forward_hook(lambda module, inputs, output: heard.append(output))
    _, forward = Objective(model, recipe.flow, recipe.loss)(batch)
    hook.remove()
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    encoder = load_image_encoder(recipe.loss.repa.teacher, "loss.repa.teacher", frozen=True)
    own, target = (encoder(autoencoder.decode(z)) for z in (batch.z1, batch.target))
    unit = torch.nn.functional.normalize
    directions = model.semantic.dino.teacher.directions
    views = forward.views
    torch.testing.assert_close(views.dino[1], unit(own.pooled, dim=-1) @ unit(directions, dim=-1).T)
    torch.testing.assert_close(views.repa[1], target.patches.flatten(1, 2))
    torch.testing.assert_close(views.repa[0], model.semantic.repa.projector(heard[0]))
    estimate = forward.path.xt + (1 - batch.t).view(-1, 1, 1, 1) * forward.v_pred
    expected = model.semantic.lpips(autoencoder.decode(estimate), autoencoder.decode(batch.target))
    torch.testing.assert_close(views.lpips, expected)
    torch.testing.assert_close(forward.path.v_target.detach() * 0 + forward.path.x1, batch.target)


@pytest.mark.parametrize("size", [(5, 3), (3, 5), (2, 8)])
def test_what_the_losses_see_of_latents_of_another_size(
    folder: Path, size: tuple[int, int]
) -> None:
    """Of a bucket: REPA's features lie where the tokens do; CLIP's small tower and DINO's heads
    average to their own size.
    """
    recipe = recipe_of(folder, "clip", "dino", "repa", **{"model.velocity.patch": 1})
    model = build_model(recipe.model, recipe.loss, 0).eval()
    z0, z1, target = torch.randn(3, 2, 4, *size, generator=torch.Generator().manual_seed(0))
    tokens = torch.randn(2, 1 + size[0] * size[1], model.semantic.repa.projector[0].in_features)
    with torch.no_grad():
        views = model.semantic(z0, z1, target, z0, [tokens], frozenset())
        encoder, autoencoder = model.semantic.repa.encoder, model.semantic.autoencoder
        patches = encoder(autoencoder.decode(target)).patches.permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(patches, size, mode="bilinear", antialias=True)
        torch.testing.assert_close(views.repa[1][:, 1], expected[:, :, 0, 1])
        torch.testing.assert_close(views.repa[1][:, size[1]], expected[:, :, 1, 0])
        torch.testing.assert_close(views.repa[0], model.semantic.repa.projector(tokens[:, 1:]))
        first, second = model.semantic.clip.tower.text[:4], model.semantic.clip.tower.text[5:]
        features = torch.nn.functional.interpolate(first(z0), (2, 2), mode="area").flatten(1)
        text = torch.nn.functional.normalize(second(features), dim=-1)
        torch.testing.assert_close(views.clip[0], text)
    assert views.dino[0].shape == views.dino[1].shape == (2, 16)


def test_latents_of_the_own_size_are_flattened_as_they_are(folder: Path) -> None:
    """The same numbers and the same names of weights as without buckets."""
    model = build_model(recipe_of(folder, "clip", "dino").model, recipe_of(folder, "clip").loss, 0)
    trunk = model.semantic.clip.tower.text
    z0 = torch.randn(2, *SPEC.shape)
    plain = torch.nn.Sequential(*trunk[:4], torch.nn.Flatten(), *trunk[5:])
    assert torch.equal(trunk(z0), plain(z0))
    assert plain.state_dict().keys() == trunk.state_dict().keys()


def test_the_first_samples_alone_are_decoded_where_lpips_says_so(folder: Path) -> None:
    recipe = recipe_of(folder, "lpips", **{"loss.lpips.samples": 2})
    _, forward = Objective(answering_model(recipe), recipe.flow, recipe.loss)(batch_of(recipe))
    assert forward.views.lpips.shape == (2,)


@pytest.mark.parametrize(
    "velocity",
    [
        {"kind": "dit", "width": 16, "depth": 2, "heads": 2, "patch": 2, "indicator": "token"},
        {"kind": "dimr"},
    ],
)
def test_repa_listens_to_every_velocity_network(velocity: dict[str, Any], folder: Path) -> None:
    if velocity["kind"] == "dimr":
        velocity = velocity | {
            "widths": [16, 8],
            "depths": [3, 3],
            "heads": 2,
            "gradient_checkpointing": True,
        }
    recipe = recipe_of(folder, "repa", **{"model.velocity": velocity})
    model = build_model(recipe.model, recipe.loss, 0)
    values, forward = Objective(model, recipe.flow, recipe.loss)(batch_of(recipe))
    projected, features = forward.views.repa
    # 2 x 2 places: the teacher's 4 x 4 patches, resized
    assert projected.shape == features.shape == (3, 4, 12)
    values["repa"].backward()
    first = model.velocity.token_blocks().blocks[0]
    assert any(p.grad is not None and bool(p.grad.any()) for p in first.parameters())
    assert not any(module._forward_hooks for module in model.velocity.modules())


def test_a_block_that_is_not_there_is_named(folder: Path) -> None:
    recipe = recipe_of(folder, "repa")
    with pytest.raises(Exception, match=r"loss\.repa\.depth: got 9.*2 blocks"):
        build_model(recipe.model, override_recipe(recipe, {"loss.repa.depth": 9}).loss, 0)


def test_a_plan_needs_no_weights(folder: Path) -> None:
    with torch.device("meta"):
        encoder = load_image_encoder(
            recipe_of(folder, "repa").loss.repa.teacher, "loss.repa.teacher", frozen=True
        )
    assert (encoder.width, {p.device.type for p in encoder.parameters()}) == (12, {"meta"})
    dims = {"width": 8, "depth": 1, "heads": 2, "mlp": 16, "image": 8, "patch": 4}
    net = {"kind": "siglip", "path": "nowhere/siglip", "dims": dims}
    loss: dict[str, Any] = {"clip": {"weight": 1.0}, "lpips": {"weight": 1.0, "vgg": "nowhere.pth"}}
    loss |= {name: {"weight": 1.0, "teacher": net} for name in ("dino", "repa")}
    recipe = Recipe.model_validate(
        {"model": {"semantic": {"kind": "image", "net": net}}, "loss": loss}
    )
    with torch.device("meta"):
        semantic = Semantics(
            recipe.model,
            recipe.loss,
            build_velocity(recipe.model.velocity, recipe.model.latent, 128),
        )
    assert {p.device.type for p in semantic.parameters()} == {"meta"}
    assert sum(p.numel() for p in semantic.lpips.vgg.parameters()) == 14_714_688
