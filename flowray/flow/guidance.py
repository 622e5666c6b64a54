"""Classifier-free guidance by a null indicator: v = v_u + s (v_c - v_u); s = 1 is off."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flowray.flow import expect
from flowray.flow.path import time_code
from flowray.flow.solver import VelocityFn


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


def guided(velocity: NullableVelocity, scale: float) -> VelocityFn:
    """velocity_fn(x, t) with guidance scale s; both halves see the same x, in one batch of 2B.

    s = 1 costs one pass. TypeError for a scale that is no number, ValueError for one below 0 or
    not finite.
    """
    expect.number("guidance scale", scale, 0.0)
    if math.isclose(scale, 1.0, rel_tol=1e-6):  # also a step of a range: 0.1 + 3 x 0.3
        return conditional(velocity)

    def velocity_fn(x: Tensor, t: Tensor) -> Tensor:
        null = torch.zeros(2 * len(t), dtype=torch.bool, device=t.device)
        null[len(t) :] = True
        v_c, v_u = velocity(torch.cat([x, x]), torch.cat([t, t]), null).float().chunk(2)
        return v_u + scale * (v_c - v_u)

    return velocity_fn
