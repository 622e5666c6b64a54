"""What the field predicts and what a correction at sampling would gain: gains, other precisions,
other time codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flowray.flow.path import path_log_snr, sample_path
from flowray.flow.solver import VelocityFn
from flowray.probes.field import BINS, best_gain, cosines, nmse, speed_ratios, time_bins

Code = Callable[[Tensor], Tensor]
# Time codes that a training and a sampling might take for each other; the field agrees best with
# the one it was trained on.
OTHER_CODES: dict[str, Code] = {
    "reversed": lambda t: 8 * t - 4,
    "plain": lambda t: t,
    "log_snr": lambda t: path_log_snr(t).clamp(-8, 8),
}


@dataclass(frozen=True)
class FieldView:
    """A field on the true path: x0, x1, eps (source noise), xt, v_pred, v_target (N, C, H, W), t
    (N,).
    """

    x0: Tensor
    x1: Tensor
    eps: Tensor
    t: Tensor
    xt: Tensor
    v_target: Tensor
    v_pred: Tensor


def view_field(
    velocity_fn: VelocityFn, z0: Tensor, z1: Tensor, noise: Tensor, times: Tensor, rho: float
) -> FieldView:
    """The field at times (K, B) of the pairs (B, C, H, W): N = K * B points, K calls."""
    paths = [sample_path(t, z0, z1, rho) for t in times]
    predicted = torch.cat([velocity_fn(p.xt, p.t).float() for p in paths])
    again = len(times)
    return FieldView(
        x0=z0.float().repeat(again, 1, 1, 1),
        x1=z1.float().repeat(again, 1, 1, 1),
        eps=noise.float().repeat(again, 1, 1, 1),
        t=times.flatten(),
        xt=torch.cat([p.xt for p in paths]),
        v_target=torch.cat([p.v_target for p in paths]),
        v_pred=predicted,
    )


def fit_metrics(view: FieldView) -> dict[str, float]:
    """field/*: the least-squares a, b of u ~ a x1 + b x0, the share of u^2 they explain, and
    cosines with x1, x0 and eps.

    The target x1 - x0 gives (1, -1); a field that regresses to the mean gives less of both. Signs
    and zeros betray the target that was really learnt: flipped (-, +), x1 (1, 0), x0 or its noise
    (0, +-1).
    """
    u, x1, x0 = (x.flatten().double() for x in (view.v_pred, view.x1, view.x0))
    one, both, zero, to_one, to_zero = (
        float(x) for x in (x1 @ x1, x1 @ x0, x0 @ x0, x1 @ u, x0 @ u)
    )
    # solved by hand: a field that is not finite gives nan, not an error
    determinant = max(one * zero - both * both, 1e-30)
    a, b = (
        (to_one * zero - to_zero * both) / determinant,
        (to_zero * one - to_one * both) / determinant,
    )
    residual = float((u - a * x1 - b * x0).square().sum() / u.square().sum().clamp_min(1e-30))
    targets = {"x1": view.x1, "x0": view.x0, "eps": view.eps}
    return {
        "field/fit_x1": a,
        "field/fit_x0": b,
        "field/fit_share": 1 - residual,
        "field/std": float(view.v_pred.square().mean().sqrt()),
        **{
            f"field/cos_{name}": float(cosines(view.v_pred, x).mean())
            for name, x in targets.items()
        },
    }


def median_gain(v_pred: Tensor, v_target: Tensor) -> float:
    """The median over samples of ||v*|| / ||u||: it mends the speed, whatever the direction."""
    return float((1 / speed_ratios(v_pred, v_target).clamp_min(1e-12)).median())


def gain_metrics(view: FieldView) -> dict[str, float]:
    """gain/*: the least-squares gain and the median one, over all t and per tenth, and the
    nmse with each of them.
    """
    bins, median = time_bins(view.t), median_gain(view.v_pred, view.v_target)
    rows, per_bin = {"gain/median": median}, torch.ones_like(view.t)
    for b in torch.unique(bins).tolist():
        here = bins == b
        least = best_gain(view.v_pred[here], view.v_target[here])
        rows |= {
            f"gain/ls_t{b}": float(least),
            f"gain/median_t{b}": median_gain(view.v_pred[here], view.v_target[here]),
        }
        per_bin = torch.where(here, least, per_bin)
    gains: dict[str, float | Tensor] = {
        "none": 1.0,
        "ls": best_gain(view.v_pred, view.v_target),
        "ls_t": per_bin[:, None, None, None],
        "median": median,
    }
    return rows | {
        f"gain/nmse_{name}": float(nmse(gain * view.v_pred, view.v_target))
        for name, gain in gains.items()
    }


def code_metrics(velocity: Callable[[Tensor, Tensor], Tensor], view: FieldView) -> dict[str, float]:
    """time/cos_*: flow/cos where the network is told another time code than 4 - 8t.

    velocity(x, code) -> u.
    """
    rows = {}
    for name, code in OTHER_CODES.items():
        parts = [
            velocity(x, code(t)).float()
            for x, t in zip(view.xt.chunk(BINS), view.t.chunk(BINS), strict=True)
        ]
        rows[f"time/cos_{name}"] = float(cosines(torch.cat(parts), view.v_target).mean())
    return rows


def in_precision(velocity_fn: VelocityFn, dtype: torch.dtype | None) -> VelocityFn:
    """The field under autocast to `dtype`, or without any for None; the state stays as it is."""

    def called(x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return velocity_fn(x, t).float()

    return called


def aligned(velocity_fn: VelocityFn, z0: Tensor, z1: Tensor, rho: float) -> VelocityFn:
    """The field read at x scaled, sample by sample, to the standard deviation that the true path
    has at that time.
    """

    def called(x: Tensor, t: Tensor) -> Tensor:
        wanted = sample_path(t[:1].expand(len(z0)), z0, z1, rho).xt.std()
        own = x.flatten(1).std(dim=1).clamp_min(1e-6).view(-1, *[1] * (x.ndim - 1))
        return velocity_fn(x * wanted / own, t)

    return called


def variant_metrics(
    velocity_fn: VelocityFn, view: FieldView, z0: Tensor, z1: Tensor, rho: float
) -> dict[str, float]:
    """variant/{fp32,bf16,aligned}_{cos,speed_ratio}: single steps with the
    velocity call made in three ways.
    """
    calls = {
        "fp32": in_precision(velocity_fn, None),
        "bf16": in_precision(velocity_fn, torch.bfloat16),
        "aligned": aligned(velocity_fn, z0, z1, rho),
    }
    rows = {}
    for name, call in calls.items():
        v = torch.cat(
            [call(x, t) for x, t in zip(view.xt.split(len(z0)), view.t.split(len(z0)), strict=True)]
        )
        rows[f"variant/{name}_cos"] = float(cosines(v, view.v_target).mean())
        rows[f"variant/{name}_speed_ratio"] = float(speed_ratios(v, view.v_target).mean())
    return rows


def null_metrics(conditional: Tensor, unconditional: Tensor, v_target: Tensor) -> dict[str, float]:
    """guidance/*: how far the null velocity is from the conditional one, relative to it, and its
    cosine with v*.
    """
    gap = (conditional - unconditional).flatten(1).norm(dim=1) / conditional.flatten(1).norm(
        dim=1
    ).clamp_min(1e-12)
    return {
        "guidance/gap": float(gap.mean()),
        "guidance/null_cos": float(
            F.cosine_similarity(unconditional.flatten(1), v_target.flatten(1)).mean()
        ),
    }
