"""Everything that changes while a run trains, and how it is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowray.config.errors import InputError
from flowray.config.recipe import Recipe
from flowray.config.train import LRScheduleConfig, WarmRestarts
from flowray.data.order import BatchSizes
from flowray.losses.balance import Balancer
from flowray.losses.total import Objective
from flowray.model.assemble import FlowModel, build_model
from flowray.store.checkpoint import (
    copy_into,
    group_files,
    load_state,
    load_tensors,
    newest_checkpoint,
    save_checkpoint,
    warn,
)
from flowray.store.frozen import WEIGHTS, frozen_weights, refuse_other_weights
from flowray.store.remote_run import RemoteRun
from flowray.store.run import RunDirectory
from flowray.store.tensorfile import Stored, Take
from flowray.store.tensorfile import whole as all_of
from flowray.train.begin import begin_from
from flowray.train.group import Group
from flowray.train.optim import Ema, build_optimizer, lr_at, resolve_schedule
from flowray.train.sharding import Shards, is_sharded, part_of, shard, share_of, twin_of
from flowray.train.tally import Tally

ALONE = Group(0, 1, torch.device("cpu"))


class Halted(RuntimeError):
    """Training cannot go on and would fail again from the last checkpoint, which is good; one
    line, with the step.

    errno: of the system's error behind it, which other ranks hear of too.
    """

    errno: int | None = None


@dataclass
class TrainState:
    """`step` steps are done. All randomness follows from (recipe.seed, step).

    schedule: the recipe's, with a restart at a checkpoint in numbers; restart: that checkpoint's
    step and the lr that led to it.
    backoffs: () int64, how often fp16's loss scale has been cut; tally: what became of each step.
    frozen: `frozen_weights` of when they were read.
    data: `LatentSet.told` of the samples that it is trained on; empty where nobody asks.
    batch_sizes: of all its steps; with the step they are the data cursor.
    begun_from: `content_of` the weights that `train.init_from` named at step 0; empty where it
    named none, None where that is not known.
    before_update: called before a step changes weights, optimiser and average.
    shards: that weights, EMA and the optimiser's state are in parts on the ranks; None: each has
    all.
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
    batch_sizes: BatchSizes
    restart: tuple[int, float] = (0, 0.0)
    backoffs: Tensor = field(default_factory=lambda: torch.tensor(0))
    tally: Tally = field(default_factory=Tally)
    begun_from: str | None = ""
    frozen: dict[str, str] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    before_update: Callable[[], None] = lambda: None
    shards: Shards | None = None


def fresh_state(recipe: Recipe, device: torch.device, group: Group | None = None) -> TrainState:
    """A new model on `device` at step 0; its weights depend on the seed alone.

    group: the ranks that are to hold parts of it, where `resources.shard` says so.
    """
    model, sharded = build_model(recipe.model, recipe.loss, recipe.seed), None
    if group is None or not is_sharded(recipe.resources, group):
        model, group = model.to(device), None
    else:
        twin = twin_of(model, device, shard_text=recipe.resources.shard_text)
        sharded = Shards(twin, group.lead)
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
        batch_sizes=BatchSizes.of(recipe.train.batch_size),
        backoffs=torch.tensor(0, device=device),
    )


def optimizer_of(recipe: Recipe, model: FlowModel) -> torch.optim.Optimizer:
    """The optimiser that training a model starts with."""
    return build_optimizer(model.trainable(), recipe.optim, model.velocity.last_layers)


def _optimizer_tensors(state: TrainState) -> dict[str, Tensor]:
    slots = {name: state.optimizer.state[p] for name, p in state.parameters.items()}
    return {f"{name}/{slot}": value for name, kept in slots.items() for slot, value in kept.items()}


def load_slots(checkpoint: Path, take: Take = all_of) -> dict[str, dict[str, Tensor]]:
    """The optimiser's state in a checkpoint, by parameter; take: as `load_tensors` has it."""
    slots: dict[str, dict[str, Tensor]] = {}
    for key, value in load_tensors(checkpoint, "optim", take).items():
        name, slot = key.rsplit("/", 1)
        slots.setdefault(name, {})[slot] = value
    return slots


@dataclass(frozen=True)
class Kept:
    """What a checkpoint holds: groups of named tensors, which training goes on to change, and the
    rest as JSON.
    """

    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def tensor_groups(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """All tensors of a state by name, in the groups of a checkpoint; in parts where ranks hold
    parts.
    """
    weights: dict[str, Tensor] = {name: p.detach() for name, p in state.parameters.items()}
    groups = {"model": weights, "ema": state.ema.average, "optim": _optimizer_tensors(state)}
    if moving := state.model.semantic.moving():
        groups["moving"] = moving
    return groups


def kept_of(state: TrainState, recipe: Recipe, group: Group = ALONE) -> Kept:
    """What this rank of `group` writes into a checkpoint of the state as it is now; its tensors are
    the state's own.
    """
    kept = {
        WEIGHTS: {**frozen_weights(recipe.model), **state.frozen},
        "seed": recipe.seed,
        "batch_sizes": state.batch_sizes.changes,
        "begun_from": state.begun_from,
        "data": state.data,
        "lr": lr_at(state.schedule, recipe.optim.lr, state.step - 1, recipe.train.steps),
        "restart": state.restart if _restarts_here(recipe) else None,
        "balance": state.balancer.kept(),
        "scaler": state.scaler.state_dict(),
        "backoffs": int(state.backoffs),
        "tally": state.tally.kept(),
    }
    return Kept(state.step, share_of(tensor_groups(state), group), kept)


def write_kept(
    run: RunDirectory, kept: Kept, keep: int, spare: Collection[int] = (), group: Group = ALONE
) -> Path:
    """Write a checkpoint, of which the newest `keep` stay, and those of the steps `spare`. Every
    rank of `group` calls it, with its share.

    Halted, on every rank and with the older ones untouched: weights are not finite, or it cannot be
    written.
    """
    weights = kept.groups["model"].items()
    broken = next((name for name, weight in weights if not bool(weight.isfinite().all())), None)
    for name in filter(None, group.gathered(broken)):
        raise Halted(
            f"step {kept.step}: {name} is not finite, so no checkpoint was written; try a lower"
            " optim.lr"
        )
    try:
        return save_checkpoint(
            run.checkpoints, kept.step, kept.groups, kept.state, keep, spare, group
        )
    except OSError as error:
        why = error.strerror or error
        halted = Halted(
            f"step {kept.step}: the checkpoint cannot be written: {why}; the ones before it are"
            " kept"
        )
        halted.errno = error.errno
        raise halted from error


def save_state(state: TrainState, recipe: Recipe, run: RunDirectory, group: Group = ALONE) -> Path:
    """Write a checkpoint of the state, and wait for it; raises as `write_kept` does. Every rank of
    `group` calls it.
    """
    keep = recipe.train.keep_checkpoints
    return write_kept(run, kept_of(state, recipe, group), keep, group=group)


def restore_state(
    state: TrainState,
    recipe: Recipe,
    run: RunDirectory,
    group: Group = ALONE,
    say: Callable[[str], None] = warn,
    remote: RemoteRun | None = None,
) -> None:
    """Continue from the newest intact checkpoint; without one `train.init_from` is begun from.

    group: its lead, which holds the run's lock, names the checkpoint, reading every byte for it,
    and all ranks load that one. say: hears of damaged ones. remote: the lead's, where it is to look
    too. InputError on every rank where they do not see the same one.
    """
    state.frozen = frozen_weights(recipe.model)
    found = None
    if group.lead:
        found = (
            remote.newest(say)
            if remote
            else newest_checkpoint(run.checkpoints, say, set_aside=True)
        )
    named = group.share(found)
    if named is None:
        _require_shared(run, group)
        begin_from(state, recipe)
        return
    checkpoint = run.checkpoints / named.name
    kept = _read_alike(checkpoint, named, group)
    if kept["seed"] != recipe.seed:
        raise InputError(
            f"seed: got {recipe.seed}, but {checkpoint} was trained with {kept['seed']}; a resume"
            " keeps the seed"
        )
    sizes = _continued(checkpoint, kept, state.data, recipe)
    refuse_other_weights(checkpoint, kept, recipe.model)

    def part(key: str, stored: Stored) -> Tensor:
        """Of what belongs to a parameter this rank reads the rows of its own part."""
        name = key if key in state.parameters else key.rpartition("/")[0]
        like = state.parameters.get(name)
        return stored.whole() if like is None else part_of(stored, like)

    for group_name, into in (("model", state.parameters), ("ema", state.ema.average)):
        copy_into(into, load_tensors(checkpoint, group_name, part), checkpoint)
    if moving := state.model.semantic.moving():
        copy_into(moving, load_tensors(checkpoint, "moving"), checkpoint)
    for name, slots in load_slots(checkpoint, part).items():
        parameter = state.parameters[name]
        for slot, value in slots.items():  # fused: `step` too lies on the device
            state.optimizer.state[parameter][slot] = value.to(parameter.device)
    state.step, state.batch_sizes = kept["step"], sizes
    state.begun_from = kept.get("begun_from")
    state.restart = restart_of(kept)
    state.schedule = resolve_schedule(recipe.optim.schedule, *state.restart)
    state.balancer.restore(kept.get("balance", {}))
    state.backoffs.fill_(kept.get("backoffs", 0))
    state.tally.restore(kept.get("tally", {}))
    if kept.get("scaler"):
        state.scaler.load_state_dict(kept["scaler"])


def _continued(
    checkpoint: Path, kept: dict[str, Any], data: dict[str, Any], recipe: Recipe
) -> BatchSizes:
    """The batch sizes of a run that goes on from a checkpoint. InputError where it would silently
    do so in another order: which samples a step takes follows from the samples there are and from
    those that steps took before. Checkpoints of before do not say what there was.
    """
    size, step = recipe.train.batch_size, kept["step"]
    sizes = batch_sizes_of(kept, size)
    if recipe.train.on_changed_data == "continue":
        return sizes.changed(step, size)
    if (old := sizes.at(step)) != size:
        raise InputError(
            f"train.batch_size: got {size}, but {checkpoint} was trained with {old}; type"
            f" train.batch_size={old}, or train.on_changed_data=continue to go on with {size} at"
            " the sample where it stopped, or name=OTHER for a new run"
        )
    before = kept.get("data")
    if not before or not data or before == data:
        return sizes
    was, now = (f"{of['samples']} samples ({of['fingerprint'][:8]})" for of in (before, data))
    raise InputError(
        f"data.shards: {checkpoint} was trained on {was}, and they are {now} now; put the data"
        " back, or type train.on_changed_data=continue to go on with these by samples seen, or"
        " name=OTHER for a new run"
    )


def batch_sizes_of(kept: Mapping[str, Any], size: int) -> BatchSizes:
    """By a checkpoint's state; those of before have one size, or do not say: then it is `size`."""
    changes = kept.get("batch_sizes") or [(0, kept.get("batch_size", size))]
    return BatchSizes(tuple((int(step), int(taken)) for step, taken in changes))


_SHARED = "storage_path must be one and the same folder on every node"


def _require_shared(run: RunDirectory, group: Group) -> None:
    """InputError on every rank where one lacks the folder that the lead has made: each is to write
    its share of the checkpoints there.
    """
    there = group.gathered(run.checkpoints.is_dir())
    if there[0] and not all(there):
        rank = there.index(False)
        raise InputError(f"{run.checkpoints}: rank {rank} has no such folder: {_SHARED}")


_NOTHING = "nothing"  # that a rank can read


def _read_alike(checkpoint: Path, named: Path, group: Group) -> dict[str, Any]:
    """`load_state` of the checkpoint that the lead has named; InputError, one line and the same on
    every rank, where one of them sees another one there, or none.
    """
    kept: dict[str, Any] = {}
    try:
        kept = load_state(checkpoint)
        crc = kept["files"][group_files(checkpoint, "model")[0].name]["crc32"]
        seen = f"step {kept['step']}, weights {crc:08x}"
    except (OSError, ValueError, LookupError, InputError) as error:
        seen = f"{_NOTHING} ({getattr(error, 'strerror', None) or error})"
    of_ranks = group.gathered(seen)
    for rank, theirs in enumerate(of_ranks):
        if theirs != of_ranks[0] or theirs.startswith(_NOTHING):
            raise InputError(
                f"{named}: rank 0 reads {of_ranks[0]} there, rank {rank} reads {theirs}: {_SHARED}"
            )
    return kept


def restart_of(kept: Mapping[str, Any]) -> tuple[int, float]:
    """Where a schedule that starts at a resume started, by a checkpoint's state, or would now."""
    step, lr = kept.get("restart") or (kept["step"], kept.get("lr", 0.0))
    return step, lr


def _restarts_here(recipe: Recipe) -> bool:
    return (
        isinstance(recipe.optim.schedule, WarmRestarts) and recipe.optim.schedule.start == "resume"
    )
