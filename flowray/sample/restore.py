"""Opening a finished or running run: its recipe and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowray.config.losses import LossConfig
from flowray.config.recipe import Recipe
from flowray.model.assemble import FlowModel, build_model
from flowray.store.checkpoint import load_state, load_tensors
from flowray.store.found import Found, copy_found


@dataclass(frozen=True)
class OpenedRun:
    """A run with the weights of one checkpoint in its model, in eval mode."""

    path: Path
    recipe: Recipe
    model: FlowModel
    step: int


def open_run(found: Found, device: torch.device) -> OpenedRun:
    """The weights are those that `sample.weights` names."""
    recipe = found.recipe
    # pictures need none of the semantic networks, nor their files
    model = build_model(recipe.model, LossConfig(), recipe.seed)
    parameters: dict[str, Any] = model.trainable()
    tensors = load_tensors(found.checkpoint, "ema" if recipe.sample.weights == "ema" else "model")
    copy_found(
        found,
        parameters,
        {name: x for name, x in tensors.items() if not name.startswith("semantic.")},
    )
    step = load_state(found.checkpoint)["step"]
    return OpenedRun(found.run.path, recipe, model.to(device).eval(), step)
