"""Gradients of the single losses, and the update that AdamW would make of them; nothing is written anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowray.losses.balance import gradient_metrics

Gradients = dict[str, dict[str, Tensor]]  # loss -> parameter -> gradient
SOURCE = ("text.", "head.")  # what lies before z0, by the start of a parameter's name


def gradients_of(losses: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> Gradients:
    """Each loss's own gradient by parameter name, zeros where it does not reach; `.grad` is not touched.

    It takes as many times the memory of the parameters as there are losses.
    """
    names, tensors = list(parameters), list(parameters.values())
    found: Gradients = {}
    for name, loss in losses.items():
        rows = torch.autograd.grad(loss, tensors, retain_graph=True, materialize_grads=True)
        found[name] = dict(zip(names, rows, strict=True))
    return found


def inner_products(gradients: Gradients, prefixes: tuple[str, ...] = ("",)) -> Tensor:
    """Gramian (L, L) fp64 on the CPU of the losses' gradients, over the parameters whose names start with one of `prefixes`."""
    rows = list(gradients.values())
    names = [name for name in rows[0] if name.startswith(prefixes)] if rows else []
    products = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for name in names:
        block = torch.stack([row[name].float().flatten() for row in rows])
        products += (block @ block.T).double().cpu()
    return products


def gradient_rows(gradients: Gradients, factors: Mapping[str, float]) -> dict[str, float]:
    """grad/* and share/*: norms unweighted and weighted, cosines of pairs, shares of flow's and of the total.

    factors: by loss, its weight at this step times its balance multiplier.
    """
    weights = {name: factors[name] for name in gradients}
    everything, source = inner_products(gradients), inner_products(gradients, SOURCE)
    rows = gradient_metrics(everything, weights)
    vector = torch.tensor(list(weights.values()), dtype=torch.float64)
    rows["grad/total"] = float((vector @ everything @ vector).clamp_min(0).sqrt())
    reach = source.diagonal().sqrt().tolist()
    for name, norm in zip(weights, reach, strict=True):
        weighted = rows[f"grad/{name}_weighted"]
        rows[f"grad/{name}_head"] = weights[name] * norm
        rows[f"grad/{name}_of_total"] = weighted / max(rows["grad/total"], 1e-30)
        rows[f"share/{name}"] = weighted / max(rows.get("grad/flow_weighted", 0.0), 1e-30)
    return rows


def weighted_sum(gradients: Gradients, factors: Mapping[str, float], clip: float) -> dict[str, Tensor]:
    """The step's gradient by parameter name: the weighted sum, its norm clipped at `clip` as training does."""
    names = next(iter(gradients.values())).keys()
    total = {name: torch.stack([factors[loss] * row[name] for loss, row in gradients.items()]).sum(0) for name in names}
    norm = torch.stack([g.float().norm() for g in total.values()]).norm()
    return {name: g * (clip / (norm + 1e-6)).clamp(max=1.0) for name, g in total.items()}


def adamw_update(
    weight: Tensor,
    gradient: Tensor,
    slots: Mapping[str, Tensor],
    *,
    lr: float,
    betas: Sequence[float],
    decay: float = 0.0,
    eps: float = 1e-8,
) -> Tensor:
    """What the next AdamW step would add to `weight` (decoupled decay, Loshchilov and Hutter 2019).

    slots: `exp_avg`, `exp_avg_sq`, `step` as torch keeps them; empty before the first step.
    """
    first, second = betas
    zero = torch.zeros_like(gradient)
    step = float(slots["step"]) + 1 if "step" in slots else 1.0
    mean = first * slots.get("exp_avg", zero).to(gradient.device) + (1 - first) * gradient
    square = second * slots.get("exp_avg_sq", zero).to(gradient.device) + (1 - second) * gradient.square()
    direction = mean / (1 - first**step) / ((square / (1 - second**step)).sqrt() + eps)
    return -lr * (direction + decay * weight.detach())


def update_ratio(
    weights: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    slots: Mapping[str, Mapping[str, Tensor]],
    *,
    lr: float,
    betas: Sequence[float],
) -> float | None:
    """Mean over tensors of ||update|| / ||tensor||, the logs' head update ratio, without decay; tensors at zero are left out."""
    ratios = [
        float(adamw_update(w, gradient[name], slots.get(name, {}), lr=lr, betas=betas).norm() / w.detach().norm())
        for name, w in weights.items()
        if bool(w.detach().any())
    ]
    return sum(ratios) / len(ratios) if ratios else None
