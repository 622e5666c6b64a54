"""A step's gradient in pieces: micro-batches under the recipe's precision, and how far the
update moved z_head and flow_head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowray.config.recipe import Recipe
from flowray.losses.gradients import autocast, blocks
from flowray.losses.terms import Forward
from flowray.losses.total import Batch
from flowray.probes.grads import mean_ratio
from flowray.train.group import Group
from flowray.train.sharding import average_whole


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` equal parts, in order; every field that has a row per sample is cut."""
    if count == 1:
        return [batch]
    size = len(batch.captions) // count
    rows = [slice(i * size, (i + 1) * size) for i in range(count)]

    def cut(value: Any, part: slice) -> Any:
        return None if value is None else value[part]

    return [
        replace(
            batch, **{field.name: cut(getattr(batch, field.name), part) for field in fields(batch)}
        )
        for part in rows
    ]


def forward_passes(
    objective: nn.Module,
    batch: Batch,
    idle: frozenset[str],
    recipe: Recipe,
    group: Group,
    *,
    alone: bool,
) -> Iterator[tuple[dict[str, Tensor], Forward]]:
    """(losses, forward pass) of each micro-batch; run its backward pass before asking for the next.

    idle: the losses of weight 0 at this step. The losses come divided by the number of
    micro-batches. The ranks' gradients are averaged by the last backward pass, or, with `alone`,
    not at all.
    """
    parts = micro_batches(batch, recipe.train.accumulate)
    for i, part in enumerate(parts):
        with group.syncing(objective, on=not alone and i + 1 == len(parts)):
            with autocast(recipe, group.device):
                losses, forward = objective(part, idle)
            shares = {name: loss / len(parts) for name, loss in losses.items()}
            del losses
            yield shares, forward
            del shares, forward  # who asks for the next has let go of them too
    average_whole(objective, group)


def assign_gradients(gradient: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    """Write a flat gradient into every parameter's `grad`."""
    for name, piece in blocks(gradient, parameters).items():
        parameters[name].grad = piece.view_as(parameters[name])


def head_weights(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Copies of the weights of z_head and flow_head, for `update_ratios`."""
    groups = {group["name"]: group["params"] for group in optimizer.param_groups}
    names = [name for name in ("z_head", "flow_head") if name in groups]
    return {name: [p.detach().clone() for p in groups[name]] for name in names}


def update_ratios(
    optimizer: torch.optim.Optimizer, before: dict[str, list[Tensor]]
) -> dict[str, Tensor]:
    """step/{z_head,flow_head}_update_ratio of the step that has just been made."""
    row = {}
    for group in optimizer.param_groups:
        pairs = zip(group["params"], before.get(group["name"], []), strict=False)
        if (ratio := mean_ratio([(p.detach() - old, old) for p, old in pairs])) is not None:
            row[f"step/{group['name']}_update_ratio"] = ratio
    return row
