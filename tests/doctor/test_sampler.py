"""The doctor's own integration of a run whose recipe samples in bf16."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import answering_model, tiny_recipe

from flowray.config.flow import SampleConfig
from flowray.doctor.sampler import picture_metrics
from flowray.model.autoencoder import load_autoencoder
from flowray.probes.interface import same_pictures


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_pictures_in_the_recipes_precision(tmp_path: Path, precision: str) -> None:
    """A source of large mean, which bf16 rounds by what shows."""
    recipe = tiny_recipe(tmp_path, **{"model.source.amplitude": 100.0})
    model = answering_model(recipe).eval()
    for p in model.head.parameters() if model.head else ():
        p.data += 0.1
    config = SampleConfig.model_validate({"precision": precision, "steps": 4})
    autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent)
    prompts = ["a red circle", "a blue square"]
    rows, made = picture_metrics(model, autoencoder, config, prompts, 0)
    assert made.std() > 10
    assert rows["sampler/psnr"] == same_pictures(made, made)
