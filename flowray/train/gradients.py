"""A step's gradient in pieces: micro-batches, mixed precision, and each loss's own gradient where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowray.config.recipe import Recipe
from flowray.losses.terms import Forward
from flowray.losses.total import Batch
from flowray.train.group import Group

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SOURCE = ("text.", "head.")  # what every loss reaches, by the start of a parameter's name


def autocast(recipe: Recipe, device: torch.device) -> AbstractContextManager[object]:
    """bf16 or fp16 autocast where the recipe asks for it; the weights, the path, the losses and the solver state stay fp32."""
    dtype = _DTYPES.get(recipe.train.precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """The batch in `count` equal parts, in order; every field that has a row per sample is cut."""
    if count == 1:
        return [batch]
    size = len(batch.captions) // count
    rows = [slice(i * size, (i + 1) * size) for i in range(count)]

    def cut(value: Any, part: slice) -> Any:
        return None if value is None else value[part]

    return [replace(batch, **{field.name: cut(getattr(batch, field.name), part) for field in fields(batch)}) for part in rows]


def forward_passes(
    objective: nn.Module, batch: Batch, idle: frozenset[str], recipe: Recipe, group: Group, *, alone: bool
) -> Iterator[tuple[dict[str, Tensor], Forward]]:
    """(losses, forward pass) of each micro-batch; run its backward pass before asking for the next.

    idle: the losses of weight 0 at this step. The losses come divided by the number of micro-batches. The ranks' gradients are
    averaged by the last backward pass, or, with `alone`, not at all.
    """
    parts = micro_batches(batch, recipe.train.accumulate)
    for i, part in enumerate(parts):
        with group.unsynced(objective) if alone or i + 1 < len(parts) else nullcontext():
            with autocast(recipe, group.device):
                losses, forward = objective(part, idle)
            yield {name: loss / len(parts) for name, loss in losses.items()}, forward


def loss_gradients(losses: Sequence[Tensor], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Each loss's gradient as a row, (losses, parameters) fp32; a parameter that a loss does not reach has zeros.

    It takes that many times the memory of the gradient itself.
    """
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True) for loss in losses]
    return torch.stack([torch.cat([piece.flatten() for piece in row]) for row in rows])


def gramian(gradients: Tensor, parameters: dict[str, nn.Parameter], over: str) -> Tensor:
    """Inner products of the rows of `gradients`, (L, L) fp64 on the CPU, over all parameters or those of the `source` side."""
    total = gradients.new_zeros(len(gradients), len(gradients), dtype=torch.float64)
    for name, block in zip(parameters, gradients.split([p.numel() for p in parameters.values()], dim=1), strict=True):
        if over == "all" or name.startswith(SOURCE):
            total += (block @ block.T).double()
    return total.cpu()


def assign_gradients(gradient: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Write a flat gradient into every parameter's `grad`."""
    for parameter, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = piece.view_as(parameter)


def head_weights(optimizer: torch.optim.Optimizer) -> dict[str, list[Tensor]]:
    """Copies of the weights of the two heads, for `update_ratios`."""
    heads = {g["name"]: g["params"] for g in optimizer.param_groups if g["name"] in ("z_head", "flow_head")}
    return {name: [p.detach().clone() for p in parameters] for name, parameters in heads.items()}


def update_ratios(optimizer: torch.optim.Optimizer, before: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    """step/{z_head,flow_head}_update_ratio: mean over tensors of ||update|| / ||tensor before||; tensors at zero are left out."""
    row = {}
    for group in optimizer.param_groups:
        pairs = zip(group["params"], before.get(group["name"], []), strict=False)
        ratios = [(p.detach() - old).norm() / old.norm() for p, old in pairs if bool(old.any())]
        if ratios:
            row[f"step/{group['name']}_update_ratio"] = torch.stack(ratios).mean()
    return row
