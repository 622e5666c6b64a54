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
from flowray.train.group import Group
from flowray.train.optim import Ema, build_optimizer, lr_at, resolve_schedule
from flowray.train.sharding import Shards, is_sharded, part_of, parts_of, shard, twin_of, whole


class Halted(RuntimeError):
    """Training cannot go on and would fail again from the last checkpoint, which is good; one
    line, with the step.
    """


@dataclass
class TrainState:
    """`step` steps are done. The data cursor and all randomness follow from (recipe.seed, step).

    schedule: the recipe's, with a restart at a checkpoint in numbers; restart: that checkpoint's
    step and the lr that led to it.
    backoffs: how often fp16's loss scale has been cut.
    frozen: `frozen_weights` of when they were read.
    shards: that weights, EMA and the optimiser's state are in parts on the ranks; None: each has
    all.
    """

    step: int
    model: FlowModel
    objective: Objective
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    ema: Ema
    balancer: Balancer
    scaler: torch.amp.GradScaler
    schedule: LRScheduleConfig
    restart: tuple[int, float] = (0, 0.0)
    backoffs: int = 0
    frozen: dict[str, str] = field(default_factory=dict)
    shards: Shards | None = None


def fresh_state(recipe: Recipe, device: torch.device, group: Group | None = None) -> TrainState:
    """A new model on `device` at step 0; its weights depend on the seed alone.

    group: the ranks that are to hold parts of it, where `resources.shard` says so.
    """
    model, sharded = build_model(recipe.model, recipe.loss, recipe.seed), None
    if group is None or not is_sharded(recipe.resources, group):
        model, group = model.to(device), None
    else:
        shard_text = recipe.resources.shard_text
        sharded = Shards(twin_of(model, device, shard_text=shard_text) if group.lead else None)
    if recipe.train.compile:
        model.velocity.compile_blocks()
    state = state_of(recipe, model, group)
    state.shards = sharded
    return state


def state_of(recipe: Recipe, model: FlowModel, group: Group | None = None) -> TrainState:
    """What trains a model, at step 0, on the device where it lies; in parts on the ranks of
    `group`.
    """
    objective = Objective(model, recipe.flow, recipe.loss, velocity_fp32=recipe.train.velocity_fp32)
    if group is not None:
        shard(objective, recipe, group)
    parameters = model.trainable()
    device = next(model.velocity.parameters()).device
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
    )


def optimizer_of(recipe: Recipe, model: FlowModel) -> torch.optim.AdamW:
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


def tensor_groups(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """All tensors of a state by name, as the files of a checkpoint have them: whole. {} on ranks
    but the lead where they hold parts; then every rank has to call it.
    """
    weights: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
    groups = {"model": weights, "ema": state.ema.average, "optim": _optimizer_tensors(state)}
    if moving := state.model.semantic.moving():
        groups["moving"] = moving
    if state.shards is None:
        return groups
    keep = state.shards.whole is not None
    gathered = {name: whole(tensors, keep=keep) for name, tensors in groups.items()}
    return gathered if keep else {}


def save_state(state: TrainState, recipe: Recipe, run: RunDirectory) -> Path | None:
    """Write a checkpoint of the state. Where ranks hold parts every rank has to call it, and the
    lead alone writes; the others get None.

    Halted, with the older ones untouched: weights are not finite, or it cannot be written.
    """
    groups = tensor_groups(state)
    if not groups:
        return None
    for name, weight in groups["model"].items():
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
        "backoffs": state.backoffs,
    }
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
    """Continue from the newest intact checkpoint; none leaves the state as it is.

    group: of its ranks the lead alone looks which one that is, as it reads every byte for it.
    """
    state.frozen = frozen_weights(recipe.model)
    leads = group is None or group.lead
    checkpoint = newest_checkpoint(run.checkpoints) if leads else None
    checkpoint = group.share(checkpoint) if group else checkpoint
    if checkpoint is None:
        return
    kept = load_state(checkpoint)
    if kept["seed"] != recipe.seed:
        raise InputError(
            f"seed: got {recipe.seed}, but {checkpoint} was trained with {kept['seed']}; a resume"
            " keeps the seed"
        )
    refuse_other_weights(checkpoint, kept, recipe.model)
    for group_name, into in (("model", state.parameters), ("ema", state.ema.average)):
        tensors = parts_of(load_tensors(checkpoint, group_name), state.parameters)
        copy_into(into, tensors, checkpoint)
    if moving := state.model.semantic.moving():
        copy_into(moving, load_tensors(checkpoint, "moving"), checkpoint)
    for name, slots in load_slots(checkpoint).items():
        parameter = state.parameters[name]
        for slot, value in slots.items():  # fused: `step` too lies on the device
            own = part_of(value.to(parameter.device), parameter)
            state.optimizer.state[parameter][slot] = own
    state.step = kept["step"]
    state.restart = restart_of(kept)
    state.schedule = resolve_schedule(recipe.optim.schedule, *state.restart)
    state.balancer.restore(kept.get("balance", {}))
    state.backoffs = kept.get("backoffs", 0)
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
