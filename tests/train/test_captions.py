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
from flowray.model.prompts import load_tokenizer
from flowray.store.latents import ensure_latents, load_latents, some_captions
from flowray.store.rows import read_rows
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


def test_the_share_of_captions_that_are_cut_is_in_the_first_probe(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, **{"train.steps": 2, "train.probe_every": 1})
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent)
    captions = some_captions(load_latents(folders["train"]))
    longest = max(map(len, load_tokenizer(recipe.model.text).rows(captions)))
    for most, expected in ((longest - 1, 1.0), (longest, 0.0)):
        run = RunDirectory(tmp_path / f"cut-{most}")
        own = override_recipe(recipe, {"model.text.max_tokens": most})
        train(own, run, CPU, lambda row: None)
        assert [row.get("text/cut") for row in read_rows(run.probes)] == [expected, None]
        text = load_tokenizer(own.model.text)
        assert text.cut_share([*captions[:3], "circle"]) == 0.75 * expected
