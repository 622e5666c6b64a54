"""The advice after a run that was out of memory fits what is largest in its plan."""

from __future__ import annotations

from support import tiny_recipe

from flowray.cli.memory import advice
from flowray.config.load import override_recipe
from flowray.config.recipe import Recipe


def typed(recipe: Recipe) -> list[str]:
    """The overrides that are advised."""
    return [word.split("=")[0] for word in advice(recipe).replace(",", " ").split() if "=" in word]


def test_of_a_large_batch(tmp_path):
    keys = {"train.batch_size": 4096, "train.accumulate": 2, "resources.num_workers": 2}
    recipe = tiny_recipe(tmp_path, **keys)
    assert typed(recipe)[0] == "train.accumulate"
    assert "train.accumulate=4 (now 2)" in advice(recipe)
    on_gpu = override_recipe(recipe, {"resources.gpus_per_worker": 1})
    assert typed(on_gpu)[:2] == ["train.precision", "train.accumulate"]
    half = override_recipe(on_gpu, {"train.precision": "bf16"})
    assert "train.precision" not in typed(half)


def test_of_a_large_model(tmp_path):
    recipe = tiny_recipe(tmp_path, **{"train.batch_size": 2, "resources.num_workers": 2})
    assert typed(recipe)[0] == "resources.shard"
    assert "train.accumulate" not in typed(recipe)  # a sample each
    parted = override_recipe(recipe, {"resources.shard": "full"})
    assert "resources.shard" not in typed(parted)
