"""Classifier-free guidance by a null indicator: v = v_u + s (v_c - v_u); s = 1 is off.

On an interval of times alone by Kynkaanniemi et al. 2024, arXiv 2404.07724; brought back to the
plain velocity's size by Lin et al. 2023, arXiv 2305.08891.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flowray.flow import expect
from flowray.flow.path import expand, time_code
from flowray.flow.solver import Spanned, VelocityFn


class NullableVelocity(Protocol):
    """A velocity that takes a null indicator: x (B, C, H, W), t (B,), null (B,) bool -> (B, C,
    H, W).
    """

    def __call__(self, x: Tensor, t: Tensor, null: Tensor) -> Tensor: ...


def with_time_code(network: Callable[[Tensor, Tensor, Tensor], Tensor]) -> NullableVelocity:
    """velocity(x, t, null) of a network (x, time code, null)."""
    return lambda x, t, null: network(x, time_code(t), null)


def conditional(velocity: NullableVelocity) -> VelocityFn:
    """velocity_fn(x, t) with no sample null."""
    return lambda x, t: velocity(x, t, torch.zeros_like(t, dtype=torch.bool))


def is_off(scale: float) -> bool:
    """Whether a guidance scale is 1, also as a step of a range: 0.1 + 3 x 0.3."""
    return math.isclose(scale, 1.0, rel_tol=1e-6)


def guided(
    velocity: NullableVelocity,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> VelocityFn:
    """velocity_fn(x, t) with guidance scale s; both halves see the same x, in one batch of 2B.

    s = 1 costs one pass. interval: where s is not 1, both ends counted; before and after a step
    costs one pass too, but for dopri5, whose samples have times of their own. rescale: `rescaled`.
    TypeError for what is no number, ValueError for a scale below 0 or not finite and for an
    interval or rescale outside [0, 1].
    """
    expect.number("guidance scale", scale, 0.0)
    low, high = interval
    expect.number("guidance interval", low, 0.0, 1.0)
    expect.number("guidance interval", high, low, 1.0)
    expect.number("guidance rescale", rescale, 0.0, 1.0)
    if is_off(scale):
        return conditional(velocity)

    def halves(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        null = torch.zeros(2 * len(t), dtype=torch.bool, device=t.device)
        null[len(t) :] = True
        v_c, v_u = velocity(torch.cat([x, x]), torch.cat([t, t]), null).float().chunk(2)
        return v_c, rescaled(v_u + scale * (v_c - v_u), v_c, rescale)

    def inside(x: Tensor, t: Tensor) -> Tensor:
        return halves(x, t)[1]

    def each(x: Tensor, t: Tensor) -> Tensor:
        plain, v = halves(x, t)
        return torch.where(expand(spanned.holds(t), v), v, plain)

    spanned = Spanned((low, high), inside, conditional(velocity), each)
    return inside if (low, high) == (0.0, 1.0) else spanned


def rescaled(guided: Tensor, plain: Tensor, share: float) -> Tensor:
    """Guided velocities (B, C, H, W), `share` of the way from their own standard deviation over a
    sample to that of the plain ones: v (share std(plain) / std(v) + 1 - share), equations 15 and 16
    of Lin et al. 2023, arXiv 2305.08891.
    """
    if share == 0:
        return guided
    wanted, own = (v.flatten(1).std(dim=1) for v in (plain, guided))
    return guided * expand(share * wanted / own.clamp_min(1e-12) + 1 - share, guided)
