"""Starting a new run from weights that another one trained, `train.init_from`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowray.config.errors import InputError, Notice
from flowray.config.recipe import Recipe
from flowray.model.files import content_of
from flowray.store.checkpoint import list_checkpoints
from flowray.store.run import RunDirectory
from flowray.store.weights import KEY, find_weights, lacking
from flowray.train.sharding import part_of

if TYPE_CHECKING:
    from flowray.train.state import TrainState


@torch.no_grad()
def begin_from(state: TrainState, recipe: Recipe) -> None:
    """Give a state at step 0 the weights that `train.init_from` names, in its average too.

    A Notice says which weights of losses are new. InputError where they do not fit, or are not
    finite.
    """
    if recipe.train.init_from is None or state.step:
        return
    found = find_weights(recipe.train.init_from)
    tensors = found.tensors()
    anew = lacking(found.where, _shapes(tensors), _shapes(state.parameters))
    for name, parameter in state.parameters.items():
        if name not in anew:
            if not bool(tensors[name].isfinite().all()):
                raise InputError(f"{KEY}: {found.where}: {name} is not finite")
            own = part_of(tensors[name].to(parameter.device), parameter)
            parameter.copy_(own)
            state.ema.average[name].copy_(own)
    state.model.semantic.begin()
    state.begun_from = content_of(*found.files)
    if anew:
        warnings.warn(f"{KEY}: {found.where} {_new(anew)}", Notice, stacklevel=2)


@torch.no_grad()
def begin_again(parameters: Mapping[str, Tensor], recipe: Recipe, begun_from: str | None) -> bool:
    """Give new weights, as the seed makes them, those that a run's step 1 started from. False where
    these cannot be had any more.

    begun_from: of the run, see TrainState; None of one before that was kept.
    """
    if begun_from == "" or (begun_from is None and recipe.train.init_from is None):
        return True
    if begun_from is None or recipe.train.init_from is None:
        return False
    try:
        found = find_weights(recipe.train.init_from)
        if content_of(*found.files) != begun_from:  # a run trains on
            return False
        tensors = found.tensors()
    except (InputError, OSError):
        return False
    for name in parameters.keys() & tensors.keys():
        parameters[name].copy_(tensors[name])
    return True


def check_start(recipe: Recipe) -> None:
    """InputError where the weights that a new run would start from are not there or do not fit;
    only their shapes are read. A run with a checkpoint goes on from that.
    """
    if recipe.train.init_from is None:
        return
    run = RunDirectory(Path(recipe.storage_path) / recipe.name)
    if list_checkpoints(run.checkpoints):
        return
    from flowray.model.assemble import planned_model

    found = find_weights(recipe.train.init_from)
    lacking(
        found.where, found.shapes(), _shapes(planned_model(recipe.model, recipe.loss).trainable())
    )


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _new(anew: list[str]) -> str:
    parts = sorted({".".join(name.split(".")[:2]) for name in anew})
    return f"lacks {', '.join(parts)}, which a loss reads: {len(anew)} weights are initialised anew"
