"""Everything that changes while a run trains, and how it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.config.train import LRScheduleConfig, WarmRestarts
from flowray.losses.balance import Balancer
from flowray.losses.total import Objective
from flowray.model.assemble import FlowModel, build_model
from flowray.store.checkpoint import (
    copy_into,
    load_state,
    load_tensors,
    newest_checkpoint,
    save_checkpoint,
)
from flowray.store.frozen import WEIGHTS, frozen_weights, refuse_other_weights
from flowray.store.run import RunDirectory
from flowray.train.begin import begin_from
from flowray.train.group import Group
from flowray.train.optim import Ema, build_optimizer, lr_at, resolve_schedule
from flowray.train.tally import Tally


class Halted(RuntimeError):
    """Training cannot go on and would fail again from the last checkpoint, which is good; one
    line, with the step.
    """


@dataclass
class TrainState:
    """`step` steps are done. The data cursor and all randomness follow from (recipe.seed, step).

    schedule: the recipe's, with a restart at a checkpoint in numbers; restart: that checkpoint's
    step and the lr that led to it.
    backoffs: () int64, how often fp16's loss scale has been cut; tally: what became of each step.
    frozen: `frozen_weights` of when they were read.
    """

    step: int
    model: FlowModel
    objective: Objective
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: Ema
    balancer: Balancer
    scaler: torch.amp.GradScaler
    schedule: LRScheduleConfig
    restart: tuple[int, float] = (0, 0.0)
    backoffs: Tensor = field(default_factory=lambda: torch.tensor(0))
    tally: Tally = field(default_factory=Tally)
    frozen: dict[str, str] = field(default_factory=dict)


def fresh_state(recipe: Recipe, device: torch.device) -> TrainState:
    """A new model on `device` at step 0; its weights depend on the seed alone."""
    model = build_model(recipe.model, recipe.loss, recipe.seed).to(device)
    if recipe.train.compile:
        model.velocity.compile_blocks()
    return state_of(recipe, model)


def state_of(recipe: Recipe, model: FlowModel) -> TrainState:
    """What trains a model, at step 0, on the device where it lies."""
    device = next(model.velocity.parameters()).device
    parameters = model.trainable()
    objective = Objective(model, recipe.flow, recipe.loss, velocity_fp32=recipe.train.velocity_fp32)
    return TrainState(
        step=0,
        model=model,
        objective=objective,
        parameters=parameters,
        optimizer=optimizer_of(recipe, model),
        ema=Ema(parameters, recipe.train.ema),
        balancer=Balancer(recipe.loss.balance),
        scaler=torch.amp.GradScaler(
            device.type,
            init_scale=recipe.train.loss_scale,
            enabled=recipe.train.precision == "fp16",
        ),
        schedule=resolve_schedule(recipe.optim.schedule, 0, 0.0),
        backoffs=torch.tensor(0, device=device),
    )


def optimizer_of(recipe: Recipe, model: FlowModel) -> torch.optim.Optimizer:
    """The optimiser that training a model starts with."""
    return build_optimizer(model.trainable(), recipe.optim, model.velocity.last_layers)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    slots = {name: state.optimizer.state[p] for name, p in state.parameters.items()}
    return {f"{name}/{slot}": value for name, kept in slots.items() for slot, value in kept.items()}


def load_slots(checkpoint: Path) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state in a checkpoint, by parameter."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in load_tensors(checkpoint, "optim").items():
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, {})[slot] = value
    return slots


def save_state(state: TrainState, recipe: Recipe, run: RunDirectory) -> Path:
    """Write a checkpoint of the state.

    Halted, with the older ones untouched: weights are not finite, or it cannot be written.
    """
    weights: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise Halted(
                f"step {state.step}: {name} is not finite, so no checkpoint was written; try a"
                " lower optim.lr"
            )
    kept = {
        WEIGHTS: {**frozen_weights(recipe.model), **state.frozen},
        "seed": recipe.seed,
        "lr": lr_at(state.schedule, recipe.optim.lr, state.step - 1, recipe.train.steps),
        "restart": state.restart if _restarts_here(recipe) else None,
        "balance": state.balancer.kept(),
        "scaler": state.scaler.state_dict(),
        "backoffs": int(state.backoffs),
        "tally": state.tally.kept(),
    }
    groups = {"model": weights, "ema": state.ema.average, "optim": _optimizer_tensors(state)}
    if moving := state.model.semantic.moving():
        groups["moving"] = moving
    try:
        return save_checkpoint(
            run.checkpoints, state.step, groups, kept, recipe.train.keep_checkpoints
        )
    except OSError as error:
        why = error.strerror or error
        raise Halted(
            f"step {state.step}: the checkpoint cannot be written: {why}; the ones before it are"
            " kept"
        ) from error


def restore_state(
    state: TrainState, recipe: Recipe, run: RunDirectory, group: Group | None = None
) -> None:
    """Continue from the newest intact checkpoint; without one `train.init_from` is begun from.

    group: of its ranks the lead alone looks which one that is, as it reads every byte for it.
    """
    state.frozen = frozen_weights(recipe.model)
    leads = group is None or group.lead
    checkpoint = newest_checkpoint(run.checkpoints) if leads else None
    checkpoint = group.share(checkpoint) if group else checkpoint
    if checkpoint is None:
        begin_from(state, recipe)
        return
    kept = load_state(checkpoint)
    if kept["seed"] != recipe.seed:
        raise InputError(
            f"seed: got {recipe.seed}, but {checkpoint} was trained with {kept['seed']}; a resume"
            " keeps the seed"
        )
    refuse_other_weights(checkpoint, kept, recipe.model)
    copy_into(state.parameters, load_tensors(checkpoint, "model"), checkpoint)
    copy_into(state.ema.average, load_tensors(checkpoint, "ema"), checkpoint)
    if moving := state.model.semantic.moving():
        copy_into(moving, load_tensors(checkpoint, "moving"), checkpoint)
    for name, slots in load_slots(checkpoint).items():
        parameter = state.parameters[name]
        for slot, value in slots.items():  # fused: `step` too lies on the device
            state.optimizer.state[parameter][slot] = value.to(parameter.device)
    state.step = kept["step"]
    state.restart = restart_of(kept)
    state.schedule = resolve_schedule(recipe.optim.schedule, *state.restart)
    state.balancer.restore(kept.get("balance", {}))
    state.backoffs.fill_(kept.get("backoffs", 0))
    state.tally.restore(kept.get("tally", {}))
    if kept.get("scaler"):
        state.scaler.load_state_dict(kept["scaler"])


def restart_of(kept: Mapping[str, Any]) -> tuple[int, float]:
    """Where a schedule that starts at a resume started, by a checkpoint's state, or would now."""
    step, lr = kept.get("restart") or (kept["step"], kept.get("lr", 0.0))
    return step, lr


def _restarts_here(recipe: Recipe) -> bool:
    return (
        isinstance(recipe.optim.schedule, WarmRestarts) and recipe.optim.schedule.start == "resume"
    )
