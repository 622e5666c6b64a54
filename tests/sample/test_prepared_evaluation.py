"""Evaluation on pictures of all sizes sees what encoding sees: cropped and resized by the same
function, and without those that `data.prepare` leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import saved_run, tiny_recipe

from flowray.cli.eval import main
from flowray.cli.ready import check_shards
from flowray.config.errors import InputError
from flowray.config.progress import SILENT
from flowray.config.recipe import Recipe
from flowray.data.make import png
from flowray.data.prepare import Preparation
from flowray.data.shards import write_shards
from flowray.model.autoencoder import load_autoencoder
from flowray.sample.asked import prepare
from flowray.sample.evaluate_neighbours import features_of
from flowray.sample.judges import open_judge
from flowray.sample.neighbours import Choices

SIZES = [(8, 8), (30, 17), (4, 40), (9, 64), (12, 12)]  # height, width; the third is too small
SMALL = 2
AREA = {"data.prepare.resize": "area"}


def mixed(count: int, start: int, cropped: bool) -> Iterator[dict[str, Any]]:
    """Pictures of several sizes; cropped: without small ones, as encoding makes them."""
    for i in range(start, start + count):
        size = SIZES[i % len(SIZES)]
        picture = png(np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8))
        if cropped:
            if i % len(SIZES) == SMALL:
                continue
            config = tiny_config()
            picture = png(Preparation(config, (8, 8))(picture))
        row = {"captions": [f"a red thing {i % 4}"], "label": f"thing {i % 4}"}
        yield {"__key__": f"s{i:03d}", "png": picture, "json": json.dumps(row).encode()}


def tiny_config() -> Any:
    return Recipe.model_validate({"data": {"prepare": {"resize": "area"}}}).data.prepare


def recipe_of(place: Path, name: str, cropped: bool, **options: Any) -> Recipe:
    shards = {
        "data.shards": str(write_shards(place / name / "train", mixed(30, 0, cropped), meta={})),
        "data.val_shards": str(write_shards(place / name / "val", mixed(20, 30, cropped), meta={})),
    }
    return tiny_recipe(place, **{"name": name, **shards, **options})


def test_features_are_those_of_the_set_packed_so(tmp_path: Path) -> None:
    recipes = {
        "mixed": recipe_of(tmp_path, "mixed", False, **AREA),
        "packed": recipe_of(tmp_path, "packed", True),
    }
    found = {}
    for name, recipe in recipes.items():
        check_shards(recipe)
        prepared = prepare(recipe, Choices(draws=2, features="pixels"), seed=0)
        autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
        config, device = recipe.model.autoencoder, torch.device("cpu")
        judge = open_judge("pixels", autoencoder, config, device)
        found[name] = [
            features_of(each, judge, tmp_path / "cache", SILENT, prepared.prepare)
            for each in prepared.samples.values()
        ]
        assert [len(each) for each in found[name]] == [24, 16]
    for ours, theirs in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = write_shards(tmp_path / "other", mixed(20, 100, False), meta={})
    alone = prepare(recipes["mixed"], Choices(held_out=str(other)), seed=0)
    assert len(alone.lent) == 16


@pytest.mark.parametrize("features", ["pixels", "latents"])
def test_the_command_goes_through(tmp_path: Path, features: str) -> None:
    run = saved_run(recipe_of(tmp_path, "mixed", False, **AREA)).path
    assert main([str(run), "--captions", "4", "--draws", "3", "--features", features]) == 0
    told = json.loads((run / "eval.json").read_text())["neighbours"]
    assert told["samples"]["real"] == 40


def test_without_resize_several_sizes_are_refused_as_ever(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, "mixed", False)
    for look in (check_shards, lambda recipe: prepare(recipe, Choices(), seed=0)):
        with pytest.raises(InputError, match="several sizes"):
            look(recipe)
