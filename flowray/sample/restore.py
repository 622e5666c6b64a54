"""Opening a finished or running run: its recipe and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowray.config.errors import InputError
from flowray.config.load import load_recipe
from flowray.config.losses import LossConfig
from flowray.config.paths import exists, is_file, is_folder, no_such
from flowray.config.recipe import Recipe
from flowray.config.sources import is_run, what_it_is
from flowray.model.assemble import FlowModel, build_model
from flowray.store.checkpoint import copy_into, is_valid, load_state, load_tensors, newest_checkpoint
from flowray.store.run import RunDirectory


@dataclass(frozen=True)
class OpenedRun:
    """A run with the weights of one checkpoint in its model, in eval mode."""

    path: Path
    recipe: Recipe
    model: FlowModel
    step: int


def find_checkpoint(path: Path, overrides: list[str]) -> tuple[Path, RunDirectory, Recipe]:
    """(checkpoint, its run, its recipe) of a run directory, whose newest valid checkpoint it is, or of one `checkpoints/step_*` folder.

    Overrides apply to the recipe. InputError, one line, where there is no such thing.
    """
    given = path.absolute()
    is_checkpoint = is_file(given / "state.json")
    if is_checkpoint and not is_valid(given):
        raise InputError(f"{path}: an incomplete checkpoint; name another step or the run directory")
    checkpoint = given if is_checkpoint else newest_checkpoint(RunDirectory(given).checkpoints)
    if checkpoint is None:
        if (what := what_it_is(path)) and not is_run(given):
            raise InputError(f"{path}: want a run, this is {what}")
        what = "no valid checkpoint in it yet" if is_folder(given) else "a file" if exists(given) else no_such(path)
        raise InputError(f"{path}: {what}; give a run directory such as runs/quickstart or one of its checkpoints/step_*")
    run = RunDirectory(checkpoint.parent.parent)
    if not run.config.is_file():
        raise InputError(f"{run.path}: no config.yaml beside the checkpoints; a checkpoint is read with its recipe")
    return checkpoint, run, load_recipe(str(run.config), overrides).recipe


def open_run(path: Path, overrides: list[str], device: torch.device) -> OpenedRun:
    """Open what `find_checkpoint` finds. The weights are those that `sample.weights` names."""
    checkpoint, run, recipe = find_checkpoint(path, overrides)
    model = build_model(recipe.model, LossConfig(), recipe.seed)  # pictures need none of the semantic networks, nor their files
    parameters: dict[str, Any] = model.trainable()
    tensors = load_tensors(checkpoint, "ema" if recipe.sample.weights == "ema" else "model")
    copy_into(parameters, {name: x for name, x in tensors.items() if not name.startswith("semantic.")}, checkpoint)
    return OpenedRun(run.path, recipe, model.to(device).eval(), load_state(checkpoint)["step"])
