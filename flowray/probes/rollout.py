"""Integrating the field: shooting at the real image latent, and the teacher field that checks
the solver itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowray.config.flow import EulerSolver
from flowray.flow.path import psi, velocity_target
from flowray.flow.solver import VelocityFn, integrate, time_grid

TEACHER_STEPS = (5, 10, 20, 50, 100)
ENDPOINT_STEPS = (8, 16, 32, 64)


def per_sample_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per sample, (B,)."""
    return (a - b).flatten(1).square().mean(1)


def mse(a: Tensor, b: Tensor) -> float:
    """Mean squared difference over all."""
    return float(per_sample_mse(a, b).mean())


def shoot(velocity_fn: VelocityFn, z0: Tensor, steps: int) -> Tensor:
    """z_end after `steps` midpoint-evaluated Euler steps from z0."""
    return integrate(EulerSolver(), velocity_fn, z0, time_grid("uniform", steps))


def shoot_metrics(
    z_end: Tensor, z0: Tensor, z1: Tensor, others: Tensor, variance: float
) -> dict[str, float]:
    """shoot/*: z_end of z0, the real z1, `others` a derangement (B,) int64, Var(z1) per dim about
    the data's mean latent.

    nmse 1 is predicting that mean; skill 0 is doing nothing. The field sees no caption but through
    z0, so the swapped shot of a sample is the shot of the sample whose z0 it borrows.
    """
    own = mse(z_end, z1)
    swapped = mse(z_end[others], z1)
    nothing = mse(z0, z1)
    return {
        "shoot/mse": own,
        "shoot/nmse": own / variance,
        "shoot/skill": 1 - own / nothing,
        "shoot/cond_gain": (swapped - own) / variance,
    }


def ends_of(velocity_fn: VelocityFn, z0: Tensor) -> list[Tensor]:
    """Where z0 (B, C, H, W) ends after each of ENDPOINT_STEPS Euler steps."""
    return [shoot(velocity_fn, z0, k) for k in ENDPOINT_STEPS]


def endpoint_metrics(ends: Sequence[Tensor], z1: Tensor) -> dict[str, float]:
    """flow/endpt_rmse@K, the distance of `ends_of` to z1; it should fall with K and settle."""
    return {
        f"flow/endpt_rmse@{k}": float(per_sample_mse(end, z1).mean().sqrt())
        for k, end in zip(ENDPOINT_STEPS, ends, strict=True)
    }


def teacher_metrics(z0: Tensor, z1: Tensor, rho: float) -> dict[str, float]:
    """teacher/mse@N: MSE to psi(1) when the true field is integrated; about 0 in fp32, whatever
    N.
    """
    v = velocity_target(z0, z1, rho)
    end = psi(torch.ones(len(z0), device=z0.device), z0, z1, rho)
    return {f"teacher/mse@{n}": mse(shoot(lambda x, t: v, z0, n), end) for n in TEACHER_STEPS}
