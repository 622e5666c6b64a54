"""Parameter groups, the learning rate as a function of the step, and the EMA."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from flowray.config.train import (
    ConstantLR,
    CosineLR,
    LRScheduleConfig,
    MuonMatrices,
    OptimConfig,
    WarmRestarts,
)
from flowray.model.ranks import gathered
from flowray.probes.untouched import holding
from flowray.train.muon import AdamWAndMuon, in_block, stacked
from flowray.train.sharding import local

MUON = "trunk_muon"
GROUPS = ("trunk", MUON, "trunk_plain", "flow_head", "z_head", "text")


def parameter_groups(
    parameters: dict[str, nn.Parameter], config: OptimConfig, last_layers: str
) -> list[dict[str, Any]]:
    """Up to six groups: `trunk` (matrices of the velocity network, decayed), `trunk_plain` (its
    norms and biases), `flow_head` (its last layers, which `last_layers` names), `z_head` (the head)
    and `text` (queries, connector, semantic tower and all else); and `trunk_muon`, those matrices
    of the trunk that Muon moves, decayed too, with `pieces`: how many matrices each one stacks.

    Only the trunk decays. Each has its lr relative to `lr` as `scale`, and the most it may be as
    `lr_max`.
    """
    last = re.compile(rf"velocity\.({last_layers})\.")
    by_muon = isinstance(config.matrices, MuonMatrices)

    def group_of(name: str) -> str:
        if last.match(name):
            return "flow_head"
        if name.startswith("velocity."):
            if by_muon and parameters[name].ndim == 2 and in_block(name):
                return MUON
            return "trunk" if parameters[name].ndim >= 2 else "trunk_plain"
        return "z_head" if name.startswith("head.") else "text"

    def rule(group: str) -> dict[str, Any]:
        decay = config.weight_decay if group in ("trunk", MUON) else 0.0
        scale, most = _scale_and_most(config, group)
        pieces = {"pieces": [stacked(n) for n in named[group]]} if group == MUON else {}
        return {"weight_decay": decay, "scale": scale, "lr_max": most, **pieces}

    named: dict[str, list[str]] = {group: [] for group in GROUPS}
    for name in parameters:
        named[group_of(name)].append(name)
    return [
        {"name": group, "params": [parameters[name] for name in names], **rule(group)}
        for group, names in named.items()
        if names
    ]


def _scale_and_most(config: OptimConfig, group: str) -> tuple[float, float]:
    """Of a group its lr relative to the base rate, and the most that it may be."""
    part = "trunk" if group in ("trunk_plain", MUON) else group
    scale, most = getattr(config.lr_scale, part), getattr(config.lr_max, part) or math.inf
    if group == MUON and isinstance(config.matrices, MuonMatrices):
        scale *= config.matrices.lr_scale
    return scale, most


def group_lr(config: OptimConfig, group: str, base: float) -> float:
    """The group's learning rate where the base rate is `base`."""
    scale, most = _scale_and_most(config, group)
    return min(base * scale, most)


def base_lr(optimizer: torch.optim.Optimizer, config: OptimConfig) -> float:
    """The base rate that the groups were last set to, where none of them is capped."""
    rates = [float(group["lr"]) / float(group["scale"]) for group in optimizer.param_groups]
    return max(rates, default=config.lr)


def build_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimConfig, last_layers: str
) -> torch.optim.Optimizer:
    """AdamW over the groups, with Muon beside it where the recipe says so; their lr is set at every
    step by `set_lr`.
    """
    groups = parameter_groups(parameters, config, last_layers)
    if isinstance(config.matrices, MuonMatrices):
        return AdamWAndMuon(groups, config.lr, config.betas, config.matrices)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def _cosine(config: CosineLR, step: int, total: int, lr: float) -> float:
    progress = min(step / max(total, 1), 1.0)
    return config.floor + (1 - config.floor) * (1 + math.cos(math.pi * progress)) / 2


def _restarts(config: WarmRestarts, step: int, total: int, lr: float) -> float:
    start, eta_min = config.start, config.eta_min
    if isinstance(start, str) or isinstance(eta_min, str):
        raise ValueError(
            "a schedule that starts at a resume has no learning rate until `resolve_schedule` has"
            " told it the checkpoint"
        )
    step, period = max(step - start, 0), config.t0
    while step >= period:
        step, period = step - period, period * config.t_mult
    floor = min(eta_min / lr, 1.0)
    return floor + (1 - floor) * (1 + math.cos(math.pi * step / period)) / 2


_FACTORS: dict[type, Callable[[Any, int, int, float], float]] = {
    ConstantLR: lambda config, step, total, lr: 1.0,
    CosineLR: _cosine,
    WarmRestarts: _restarts,
}


def resolve_schedule(config: LRScheduleConfig, step: int, lr: float) -> LRScheduleConfig:
    """The schedule with `resume` and `current` replaced by a checkpoint's step and the lr with
    which it was reached.
    """
    if not isinstance(config, WarmRestarts) or config.start != "resume":
        return config
    return config.model_copy(
        update={"start": step, "eta_min": lr if config.eta_min == "current" else config.eta_min}
    )


def lr_at(config: LRScheduleConfig, lr: float, step: int, total: int) -> float:
    """The base learning rate of `step` (0-based) in a run of `total` steps: a function, so that
    a resume has nothing to restore.
    """
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return lr * warm * _FACTORS[type(config)](config, step, total, lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> dict[str, float]:
    """Set every group's lr to its share of `lr`, at most its `lr_max`; returns them by group
    name.
    """
    for group in optimizer.param_groups:
        group["lr"] = min(lr * group["scale"], group["lr_max"])
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def step_unless(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """One step; where `skip`, () bool, is true, weights, moments and step counts stay as they are.

    The fused kernel reads the flag on the device, as GradScaler has it do: the host does not wait.
    """
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


class Ema:
    """Exponential moving average of the trainable parameters, fp32, in parts where these are; the
    decay warms up as (1 + step) / (10 + step).
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.decay = decay
        self._parameters = parameters
        self.average: dict[str, Tensor] = {
            name: p.detach().clone().float() for name, p in parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the weights after step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        live = [local(self._parameters[name].detach()).float() for name in self.average]
        get_ema_multi_avg_fn(decay)([local(x) for x in self.average.values()], live, None)

    def applied(self) -> AbstractContextManager[None]:
        """Within the block the parameters hold the average; after it, exactly what they held
        before.
        """
        return holding(self._parameters, self.average)


def delta_rms(average: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> float:
    """Root mean square of average minus weights, over all parameters. Every rank has to call it
    where they hold parts.
    """
    squares = sum(
        float(gathered((average[name] - weight).square().sum())) for name, weight in weights.items()
    )
    return math.sqrt(squares / sum(weight.numel() for weight in weights.values()))


def clip_gradients(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients down to a norm of at most `most`; returns the norm before, over the parts
    of all ranks where they are in parts.
    """
    norm = nn.utils.clip_grad_norm_(parameters, most).detach()
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
