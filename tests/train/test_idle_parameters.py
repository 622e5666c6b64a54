"""Towers with parameters that their pooled feature does not depend on, on two gloo ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import on_two_ranks, tiny_recipe

from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe
from flowray.model.assemble import build_model, planned_model
from flowray.store.latents import ensure_latents
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

DIMS = {"width": 12, "depth": 1, "heads": 2, "mlp": 24, "image": 8, "patch": 2}


def recipe_of(folder: Path, kind: str, **overrides: Any) -> Recipe:
    tower = {"kind": "image", "net": {"kind": kind, "path": None, "dims": DIMS}, "hidden": 16}
    return tiny_recipe(
        folder,
        **{
            "name": kind,
            "loss.clip.weight": 0.5,
            "model.semantic": tower,
            "train.steps": 3,
            "train.log_every": 1,
            **overrides,
        },
    )


def worker(rank: int, plain: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(plain)
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    train(recipe, run, Group.current("cpu"), lambda row: None)


@pytest.mark.parametrize(
    ("kind", "idle"), [("dinov2", {"embeddings.mask_token"}), ("siglip", set()), ("clip", set())]
)
def test_what_the_pooled_feature_does_not_depend_on_is_not_trained(
    kind: str, idle: set[str], tmp_path: Path
) -> None:
    recipe = recipe_of(tmp_path, kind)
    for model in (
        build_model(recipe.model, recipe.loss, 0),
        planned_model(recipe.model, recipe.loss),
    ):
        net = model.semantic.clip.tower.encoder.net
        left_out = {name for name, p in net.named_parameters() if not p.requires_grad}
        assert left_out == idle
        assert not any("mask_token" in name for name in model.trainable())


def test_a_dinov2_tower_trains_on_two_ranks(tmp_path: Path) -> None:
    """Its mask token has no gradient, which DistributedDataParallel takes as an error at the
    second step.
    """
    alone = recipe_of(tmp_path, "dinov2")
    one = RunDirectory(Path(alone.storage_path) / alone.name)
    train(alone, one, Group(0, 1, torch.device("cpu")), lambda row: None)
    two = override_recipe(alone, {"name": "two", "resources.num_workers": 2})
    ensure_latents(two.data, two.model.autoencoder, two.model.latent)
    on_two_ranks(worker, two.model_dump(mode="json"))
    rows = read_rows(one.metrics)
    pairs = read_rows(RunDirectory(Path(two.storage_path) / "two").metrics)
    assert [row["step"] for row in pairs] == [1, 2, 3]
    for row, pair in zip(rows, pairs, strict=True):
        assert pair["loss/flow"] == pytest.approx(row["loss/flow"], rel=1e-4), row["step"]
