"""What the doctor looks at: a checkpoint or a live training state, with its data and its
autoencoder, in one form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from flowray.config.errors import InputError
from flowray.config.progress import SILENT, Progress
from flowray.config.recipe import Recipe
from flowray.config.rows import Row
from flowray.config.train import GroupScales
from flowray.data.order import BatchSizes
from flowray.losses.total import Batch, Objective
from flowray.model.assemble import FlowModel, build_model
from flowray.model.autoencoder import Autoencoder, load_autoencoder
from flowray.probes.untouched import holding
from flowray.sample.restore import open_run
from flowray.store.checkpoint import load_state, load_tensors
from flowray.store.found import Found, copy_found
from flowray.store.latents import LatentSet, ensure_latents, load_latents, load_training
from flowray.store.rows import read_rows
from flowray.store.run import RunDirectory
from flowray.train.begin import begin_again
from flowray.train.optim import base_lr, group_lr
from flowray.train.state import TrainState, batch_sizes_of, load_slots, restart_of
from flowray.train.step import whole_batches

Tensors = dict[str, Tensor]
BatchOf = Callable[[int], Batch]  # the global batch of a step
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Subject:
    """step steps are done. slots: the optimiser's state by parameter. lr: base rate of the last
    step. restart: see TrainState. initial: weights at step 0. sizes: of the batches.

    multipliers: what gradient balancing multiplies the loss weights by. strip: the samples written
    at this step, if any. opened: the weights that sampling finds in the checkpoint; None of a live
    state.
    """

    where: str
    recipe: Recipe
    step: int
    model: FlowModel
    objective: Objective
    parameters: dict[str, nn.Parameter]
    ema: Tensors
    slots: Mapping[str, Mapping[str, Tensor]]
    lr: float
    restart: tuple[int, float]
    multipliers: Mapping[str, float]
    initial: Tensors | None
    latents: LatentSet
    held_out: LatentSet
    autoencoder: Autoencoder
    sizes: BatchSizes
    batches: BatchOf
    history: list[Row]
    strip: Path | None
    opened: Callable[[], Mapping[str, Tensor]] | None = None

    @property
    def device(self) -> torch.device:
        """Where the velocity network lies."""
        return next(self.model.velocity.parameters()).device

    @contextmanager
    def weights(self, kind: str) -> Iterator[None]:
        """Within the block the model holds the `ema` or the `raw` weights."""
        if kind != "ema":
            yield
            return
        with holding(self.parameters, self.ema):
            yield

    def rates(self, base: float) -> dict[str, float]:
        """Every group's rate where the base rate is `base`."""
        optim = self.recipe.optim
        return {group: group_lr(optim, group, base) for group in GroupScales.model_fields}


def merged_history(run: RunDirectory) -> list[Row]:
    """Rows of metrics.jsonl and probes.jsonl, one per step, in order; what is not finite is
    None.
    """
    rows: dict[int, Row] = {}
    for row in (*read_rows(run.metrics), *read_rows(run.probes)):
        rows.setdefault(int(row["step"]), {}).update(row)
    return [rows[step] for step in sorted(rows)]


def written_strip(run: RunDirectory, step: int) -> Path | None:
    """The sample strip that training wrote at this step, if any."""
    strip = run.strip(step)
    return strip if strip.is_file() else None


def untrained(recipe: Recipe, begun_from: str | None) -> tuple[FlowModel, Tensors | None]:
    """The recipe's model as it is before step 1, and a copy of its trainable weights; None where
    these came from elsewhere and cannot be had any more. begun_from: see TrainState.
    """
    model = build_model(recipe.model, recipe.loss, recipe.seed)
    weights = model.trainable()
    if not begin_again(weights, recipe, begun_from):
        return model, None
    return model, {name: p.detach().clone() for name, p in weights.items()}


def examined(latents: LatentSet) -> LatentSet:
    """Of training latents those that are looked at: of buckets the one of the model's own size,
    whose batches can be compared with held-out latents and with each other. InputError where it is
    empty.
    """
    own = latents.of_own_size()
    if own is None:
        raise InputError(
            "data.aspect_ratios: no training picture is in the bucket of model.latent's own size,"
            " which the doctor looks at"
        )
    return own


def open_subject(
    found: Found, *, device: torch.device = CPU, progress: Progress = SILENT
) -> Subject:
    """A run at a checkpoint, with all that training kept."""
    checkpoint, run, recipe = found.checkpoint, found.run, found.recipe
    folders = ensure_latents(recipe.data, recipe.model.autoencoder, recipe.model.latent, progress)
    latents = examined(load_training(folders["train"], recipe))
    held_out = load_latents(folders["val"])
    with progress.task("loading the models"):
        model, initial = untrained(recipe, load_state(checkpoint).get("begun_from"))
        autoencoder = load_autoencoder(recipe.model.autoencoder, recipe.model.latent).to(device)
    parameters = model.trainable()
    copy_found(found, parameters, load_tensors(checkpoint, "model"))
    if moving := model.semantic.moving():
        copy_found(found, moving, load_tensors(checkpoint, "moving"))
    kept, step = load_state(checkpoint), load_state(checkpoint)["step"]
    sizes = batch_sizes_of(kept, recipe.train.batch_size)
    model = model.to(device).eval()
    return Subject(
        where=found.where,
        recipe=recipe,
        step=step,
        model=model,
        objective=Objective(
            model, recipe.flow, recipe.loss, velocity_fp32=recipe.train.velocity_fp32
        ),
        parameters=model.trainable(),
        ema=load_tensors(checkpoint, "ema"),
        slots=load_slots(checkpoint),
        lr=float(recipe.optim.lr if kept.get("lr") is None else kept["lr"]),  # it may be 0
        restart=restart_of(kept),
        multipliers=(kept.get("balance") or {}).get("multipliers", {}),
        initial=initial,
        latents=latents,
        held_out=held_out,
        autoencoder=autoencoder,
        sizes=sizes,
        batches=whole_batches(recipe, latents, device, sizes),
        history=[row for row in merged_history(run) if row["step"] <= step],
        strip=written_strip(run, step),
        opened=lambda: open_run(found, CPU).model.trainable(),
    )


def live_subject(
    live: TrainState,
    recipe: Recipe,
    *,
    latents: LatentSet,
    held_out: LatentSet,
    autoencoder: Autoencoder,
    history: list[Row],
    initial: Tensors | None = None,
    strip: Path | None = None,
) -> Subject:
    """A training state as it is, between two steps.

    initial, strip: see Subject; without them what needs them is not measured.
    """
    names = {id(p): name for name, p in live.parameters.items()}
    device = next(live.model.velocity.parameters()).device
    return Subject(
        where=f"{recipe.name}, step {live.step}",
        recipe=recipe,
        step=live.step,
        model=live.model,
        objective=live.objective,
        parameters=live.parameters,
        ema=live.ema.average,
        slots={names[id(p)]: state for p, state in live.optimizer.state.items()},
        lr=base_lr(live.optimizer, recipe.optim),
        restart=live.restart,
        multipliers=live.balancer.state.multipliers,
        initial=initial,
        latents=latents,
        held_out=held_out,
        autoencoder=autoencoder,
        sizes=live.batch_sizes,
        batches=whole_batches(recipe, latents, device, live.batch_sizes),
        history=history,
        strip=strip,
    )
