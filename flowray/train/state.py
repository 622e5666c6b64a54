"""Everything that changes while a run trains, and how it is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.losses.total import Objective
from flowray.model.assemble import FlowModel, build_model
from flowray.store.checkpoint import copy_into, load_state, load_tensors, newest_checkpoint, save_checkpoint
from flowray.store.run import RunDirectory
from flowray.train.optim import Ema, build_optimizer


class Halted(RuntimeError):
    """Training cannot go on and would fail again from the last checkpoint, which is good; one line, with the step."""


@dataclass
class TrainState:
    """`step` steps are done. The data cursor and all randomness follow from (recipe.seed, step)."""

    step: int
    model: FlowModel
    objective: Objective
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    ema: Ema


def fresh_state(recipe: Recipe, device: torch.device) -> TrainState:
    """A new model on `device` at step 0; its weights depend on the seed alone."""
    model = build_model(recipe.model, recipe.loss, recipe.seed).to(device)
    parameters = model.trainable()
    objective = Objective(model, recipe.flow, recipe.loss)
    return TrainState(0, model, objective, parameters, build_optimizer(parameters, recipe.optim), Ema(parameters, recipe.train.ema))


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    slots = {name: state.optimizer.state[p] for name, p in state.parameters.items()}
    return {f"{name}/{slot}": value for name, kept in slots.items() for slot, value in kept.items()}


def save_state(state: TrainState, recipe: Recipe, run: RunDirectory) -> Path:
    """Write a checkpoint of the state. Halted, with the older ones untouched: weights are not finite, or it cannot be written."""
    weights: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise Halted(f"step {state.step}: {name} is not finite, so no checkpoint was written; try a lower optim.lr")
    groups = {"model": weights, "ema": state.ema.average, "optim": _optimizer_tensors(state)}
    try:
        return save_checkpoint(run.checkpoints, state.step, groups, {"seed": recipe.seed}, recipe.train.keep_checkpoints)
    except OSError as error:
        why = error.strerror or error
        raise Halted(f"step {state.step}: the checkpoint cannot be written: {why}; the ones before it are kept") from error


def restore_state(state: TrainState, recipe: Recipe, run: RunDirectory) -> None:
    """Continue from the newest valid checkpoint; none leaves the state as it is."""
    checkpoint = newest_checkpoint(run.checkpoints)
    if checkpoint is None:
        return
    kept = load_state(checkpoint)
    if kept["seed"] != recipe.seed:
        raise InputError(f"seed: got {recipe.seed}, but {checkpoint} was trained with {kept['seed']}; a resume keeps the seed")
    copy_into(state.parameters, load_tensors(checkpoint, "model"), checkpoint)
    copy_into(state.ema.average, load_tensors(checkpoint, "ema"), checkpoint)
    for key, value in load_tensors(checkpoint, "optim").items():
        name, slot = key.rsplit("/", 1)
        state.optimizer.state[state.parameters[name]][slot] = value.to(state.parameters[name].device)  # fused: `step` too
    state.step = kept["step"]
