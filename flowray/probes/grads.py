"""Gradients of the single losses, and the update that AdamW would make of them; nothing is
written anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flowray.losses.balance import gradient_metrics
from flowray.losses.gradients import Parameters, blocks, gramian


def gradient_rows(
    gradients: Tensor, parameters: Parameters, factors: Mapping[str, float]
) -> dict[str, float]:
    """grad/* and share/* of gradients (L, numbers): norms unweighted and weighted, cosines of
    pairs, shares of flow's and of the total.

    factors: by loss, in the order of the rows, its weight at this step times its balance
    multiplier.
    """
    everything, source = (
        gramian(gradients, parameters, "all"),
        gramian(gradients, parameters, "source"),
    )
    rows = gradient_metrics(everything, dict(factors))
    vector = torch.tensor(list(factors.values()), dtype=torch.float64)
    rows["grad/total"] = float((vector @ everything @ vector).clamp_min(0).sqrt())
    for (name, factor), norm in zip(
        factors.items(), source.diagonal().sqrt().tolist(), strict=True
    ):
        weighted = rows[f"grad/{name}_weighted"]
        rows[f"grad/{name}_head"] = factor * norm
        rows[f"grad/{name}_of_total"] = weighted / max(rows["grad/total"], 1e-30)
        rows[f"share/{name}"] = weighted / max(rows.get("grad/flow_weighted", 0.0), 1e-30)
    return rows


def step_gradient(
    gradients: Tensor, parameters: Parameters, factors: Mapping[str, float], clip: float
) -> dict[str, Tensor]:
    """The step's gradient by parameter name: the weighted sum of the rows, its norm clipped at
    `clip` as training does.
    """
    total = torch.tensor(list(factors.values()), device=gradients.device) @ gradients
    total = total * (clip / (total.norm() + 1e-6)).clamp(max=1.0)
    return {
        name: piece.view_as(parameters[name]) for name, piece in blocks(total, parameters).items()
    }


def next_adamw_update(
    gradient: Tensor,
    slots: Mapping[str, Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> Tensor:
    """What the next AdamW step adds to a weight, but for its decay, by torch's own optimiser.

    slots: `exp_avg`, `exp_avg_sq`, `step` as torch keeps them; empty before the first step.
    """
    added = nn.Parameter(torch.zeros_like(gradient))  # from 0 the sum is exact
    optimizer = torch.optim.AdamW([added], lr=lr, betas=betas, eps=eps, weight_decay=0.0)
    for name, value in slots.items():
        device = "cpu" if name == "step" else gradient.device
        optimizer.state[added][name] = value.detach().to(device, copy=True)
    added.grad = gradient.detach().clone()
    optimizer.step()
    return added.detach()


def mean_ratio(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The update ratio of (update, tensor before it): mean of ||update|| / ||tensor||;
    tensors at zero are left out.
    """
    ratios = [update.norm() / before.norm() for update, before in pairs if bool(before.any())]
    return torch.stack(ratios).mean() if ratios else None


def next_update_ratio(
    weights: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    slots: Mapping[str, Mapping[str, Tensor]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float = 1e-8,
) -> float | None:
    """`mean_ratio` of the AdamW step that comes next, without decay."""
    updates = [
        (
            next_adamw_update(gradient[name], slots.get(name, {}), lr=lr, betas=betas, eps=eps),
            w.detach(),
        )
        for name, w in weights.items()
    ]
    ratio = mean_ratio(updates)
    return None if ratio is None else float(ratio)
