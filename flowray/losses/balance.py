"""Gradient balancing: multipliers of the loss weights from the Gramian of the losses' gradients.

All that the methods need to know of the gradients g_i is G_ij = <g_i, g_j>: norms, cosines and, in
PCGrad, every projection. So a method is a function from (G, losses, weights) to one multiplier per
loss, and the step's direction is sum_i m_i w_i g_i. Ranks that agree on G agree on the direction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowray.config.balance import (
    BalanceConfig,
    GradNormBalance,
    NoBalance,
    PCGradBalance,
    SharesBalance,
)
from flowray.config.errors import InputError
from flowray.flow import expect

Values = dict[str, float]

# What differs by less is equal: two processors sum the same fp32 gradients in another order and
# agree on their norms to 1e-6 or so, where a choice by the sign of a difference would not agree.
BAND = 1e-3  # GradNorm: share of the mean gradient norm within which a norm is on its target
# A gradient this small beside the largest is lost when the two are added, so it is rounding error
# for all that anyone can tell: it has neither a length to hold in a band nor a direction.
VANISHED = torch.finfo(torch.float32).eps
NO_LOSS = 1e-6  # a loss nearer to 0 is 0: fp32 rounds its terms, of order 1, by 1e-7, either way


@dataclass(frozen=True)
class Measured:
    """One step's gradients. gramian (L, L) fp64 on the CPU, of the unweighted losses, in the order
    of `losses`.

    losses: means over the global batch; weights: those of this step; full: the weights before their
    schedules; seed: what a method may draw random numbers from, the same on every rank.
    """

    gramian: Tensor
    losses: Values
    weights: Values
    full: Values
    seed: int

    def __post_init__(self) -> None:
        """ValueError where the Gramian is not (L, L) of the losses, or a loss lacks a weight."""
        _check_gramian(self.gramian, self.losses)
        for name, weights in (("weights", self.weights), ("full", self.full)):
            if lacking := sorted(self.losses.keys() - weights.keys()):
                raise ValueError(f"{name}: want one for every loss, got none for {lacking}")

    @property
    def norms(self) -> Values:
        """Norm of each loss's unweighted gradient."""
        return dict(zip(self.losses, self.gramian.diagonal().sqrt().tolist(), strict=True))

    def pulling(self) -> Values:
        """Gradient norms under the full weights, of the losses that count at this step.

        Left out are those of weight 0 and those whose gradient has vanished beside the largest.
        """
        norms = self.norms
        pull = {name: self.full[name] * norms[name] for name in self.losses}
        pull = {name: norm for name, norm in pull.items() if self.weights[name] > 0}
        least = VANISHED * max(pull.values(), default=0.0)
        return {name: norm for name, norm in pull.items() if norm > least}


def _check_gramian(gramian: Tensor, names: Collection[str]) -> None:
    expect.floating("gramian", gramian, "(losses, losses)", 2)
    if gramian.shape != (len(names), len(names)):
        got = tuple(gramian.shape)
        raise ValueError(f"gramian: want {len(names)} x {len(names)} for {list(names)}, got {got}")


@dataclass
class BalanceState:
    """What a method remembers: the multipliers, and GradNorm's losses when they first counted.
    Plain numbers, kept in JSON.
    """

    multipliers: Values = field(default_factory=dict)
    initial: Values = field(default_factory=dict)


def _shares(config: SharesBalance, state: BalanceState, measured: Measured) -> Values:
    pull, moved = measured.pulling(), dict(state.multipliers)
    for name, norm in pull.items():
        band = getattr(config.targets, name, None)
        if band is None or "flow" not in pull:
            continue
        old = moved.get(name, 1.0)
        share = old * norm / pull["flow"]
        wanted = old * min(max(share, band[0]), band[1]) / share
        new = math.exp(config.smoothing * math.log(old) + (1 - config.smoothing) * math.log(wanted))
        moved[name] = min(max(new, 1 / config.limit), config.limit)
    return moved


def _gradnorm(config: GradNormBalance, state: BalanceState, measured: Measured) -> Values:
    """One step down sum_i |m_i n_i - mean(m n) r_i^alpha|, its gradient relative to the mean; then
    the m_i sum to their number again.

    r_i: the loss relative to its first value, over the mean of that. A loss that starts at 0 or
    falls below it has no such rate; its r is 1.

    The slope of |x| jumps at 0, where losses of equal norms and rates stand from the start, so the
    sign of a rounding error would decide a full step. Within BAND of its target a loss stays; from
    there to twice the band the slope rises to its full size, so that no threshold jumps either.
    """
    pull, moved = measured.pulling(), dict(state.multipliers)
    for name in pull:
        state.initial.setdefault(name, measured.losses[name])
    started = {n: measured.losses[n] for n in pull if state.initial[n] > NO_LOSS}
    rates = {n: max(x, NO_LOSS) / state.initial[n] for n, x in started.items() if x > -NO_LOSS}
    if not pull or not rates:
        return moved
    mean_rate = sum(rates.values()) / len(rates)
    norms = {name: moved.get(name, 1.0) * norm for name, norm in pull.items()}
    mean_norm = sum(norms.values()) / len(norms)
    for name, norm in norms.items():
        target = mean_norm * (rates.get(name, mean_rate) / mean_rate) ** config.alpha
        beyond = min(max(abs(norm - target) / (BAND * mean_norm) - 1, 0.0), 1.0)
        slope = math.copysign(beyond * pull[name] / mean_norm, norm - target)
        moved[name] = max(moved.get(name, 1.0) - config.lr * slope, 1e-3)
    scale = len(pull) / sum(moved[name] for name in pull)
    return moved | {name: moved[name] * scale for name in pull}


def _pcgrad(config: PCGradBalance, state: BalanceState, measured: Measured) -> Values:
    """torchjd's weighting of the weighted gradients, summed as in the paper; its random order is
    drawn from `measured.seed`.

    A vanished gradient takes no part: its direction is rounding error, which must not be projected
    out of the others.
    """
    weighting, pull = _torchjd_pcgrad(), measured.pulling()
    present = [measured.weights[name] if name in pull else 0.0 for name in measured.losses]
    weights = torch.tensor(present, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(measured.seed)
        multipliers = weighting(weights[:, None] * measured.gramian * weights)
    return dict(zip(measured.losses, multipliers.tolist(), strict=True))


def _torchjd_pcgrad() -> Callable[[Tensor], Tensor]:
    try:
        from torchjd.aggregation import PCGradWeighting
    except ImportError:
        raise InputError(
            "loss.balance.kind: got pcgrad, which needs torchjd; type pip install 'flowray[pcgrad]'"
        ) from None
    return PCGradWeighting()


_METHODS: dict[type, Callable[[Any, BalanceState, Measured], Values]] = {
    NoBalance: lambda config, state, measured: {},
    SharesBalance: _shares,
    GradNormBalance: _gradnorm,
    PCGradBalance: _pcgrad,
}


class Balancer:
    """The multipliers of a run, and when they move.

    `over` says which parameters' gradients the method sees.
    """

    def __init__(self, config: BalanceConfig):
        expect.member("balance", config, _METHODS)
        self.config = config
        self.state = BalanceState()
        self.over = "all" if isinstance(config, NoBalance) else config.over
        if isinstance(config, PCGradBalance):
            _torchjd_pcgrad()  # an install that lacks it says so before the first step

    @property
    def active(self) -> bool:
        """Whether there is anything to balance."""
        return not isinstance(self.config, NoBalance)

    def due(self, step: int) -> bool:
        """Whether the gradients are to be measured at `step` (0-based)."""
        if isinstance(self.config, NoBalance):
            return False
        return isinstance(self.config, PCGradBalance) or step % self.config.every == 0

    def multiplier(self, name: str) -> float:
        """A loss's present multiplier; 1 until it has been measured."""
        return self.state.multipliers.get(name, 1.0)

    def update(self, measured: Measured) -> None:
        """Move the multipliers. Gradients or losses that are not finite leave them as they were."""
        finite = all(map(math.isfinite, measured.losses.values()))
        if finite and bool(measured.gramian.isfinite().all()):
            self.state.multipliers = _METHODS[type(self.config)](self.config, self.state, measured)

    def kept(self) -> dict[str, Values]:
        """The state as JSON takes it."""
        return {"multipliers": dict(self.state.multipliers), "initial": dict(self.state.initial)}

    def restore(self, kept: Mapping[str, Values]) -> None:
        """Take over what `kept` gave."""
        self.state = BalanceState(dict(kept.get("multipliers", {})), dict(kept.get("initial", {})))


def gradient_metrics(gramian: Tensor, factors: Values) -> Values:
    """grad/<loss>, grad/<loss>_weighted and grad/cos_<a>_<b> of a Gramian (L, L) of unweighted
    gradients.

    factors: by loss, in the Gramian's order, its weight at this step times its multiplier. A cosine
    with a vanished gradient is 0.
    """
    _check_gramian(gramian, factors)
    names, norms = list(factors), gramian.diagonal().sqrt().tolist()
    least = VANISHED * max(norms, default=0.0)
    row = {f"grad/{name}": norm for name, norm in zip(names, norms, strict=True)}
    row |= {
        f"grad/{name}_weighted": factors[name] * norm
        for name, norm in zip(names, norms, strict=True)
    }
    for i, a in enumerate(names):
        for j in range(i + 1, len(names)):
            apart = min(norms[i], norms[j]) > least
            cosine = float(gramian[i, j]) / (norms[i] * norms[j]) if apart else 0.0
            row[f"grad/cos_{a}_{names[j]}"] = cosine
    return row
