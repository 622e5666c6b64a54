"""A run whose captions all become the same tokens is refused before it encodes or trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_recipe, word_tokenizer

from flowray.config.errors import InputError
from flowray.config.load import override_recipe
from flowray.config.progress import Silent
from flowray.config.recipe import Recipe
from flowray.data.shards import MANIFEST
from flowray.store.latents import ensure_latents
from flowray.store.run import RunDirectory
from flowray.train.group import Group
from flowray.train.loop import train

CPU = Group(0, 1, torch.device("cpu"))
CUT = {"model.text.max_tokens": 2}  # `a`, then the end


class Heard(Silent):
    """Progress that remembers what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def encode(recipe: Recipe) -> list[str]:
    heard = Heard()
    ensure_latents(
        recipe.data, recipe.model.autoencoder, recipe.model.latent, heard, recipe.model.text
    )
    return heard.said


def test_before_anything_is_encoded(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    with pytest.raises(InputError, match=r"^model\.text\.max_tokens"):
        encode(override_recipe(recipe, CUT))
    assert not list((tmp_path / "cache").rglob(MANIFEST))
    assert [line for line in encode(recipe) if "caption" in line] == []
    assert len(list((tmp_path / "cache").rglob(MANIFEST))) == 2
    assert encode(override_recipe(recipe, CUT)) == []  # training itself looks again


@pytest.mark.parametrize("fault", ["cut", "no words"])
def test_when_training_starts(fault: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    encode(recipe)
    if fault == "cut":
        recipe = override_recipe(recipe, CUT)
    else:
        word_tokenizer(["zebra"]).save_pretrained(recipe.model.text.path)
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(InputError, match=r"^model\.text\."):
        train(recipe, run, CPU, lambda row: None)
    assert not run.metrics.exists()
    assert not list(tmp_path.rglob("step_*"))
