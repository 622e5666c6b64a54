"""Shots at the real latent with something changed: solver, step size, direction of time, gain;
and the trace of a generation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowray.config.flow import HeunSolver, SolverConfig
from flowray.flow.solver import VelocityFn, integrate, time_grid
from flowray.probes.rollout import ENDPOINT_STEPS, mse, per_sample_mse, shoot

DT_SCALES = (1, 2, 3)


def heun_metrics(velocity_fn: VelocityFn, z0: Tensor, z1: Tensor) -> dict[str, float]:
    """flow/endpt_rmse_heun@K; the velocity at each step's two ends."""
    ends = {
        k: integrate(HeunSolver(), velocity_fn, z0, time_grid("uniform", k)) for k in ENDPOINT_STEPS
    }
    return {
        f"flow/endpt_rmse_heun@{k}": float(per_sample_mse(end, z1).mean().sqrt())
        for k, end in ends.items()
    }


def falling(rows: dict[str, float]) -> dict[str, float]:
    """endpoint/falls_{euler,heun}, where `rows` has it: the endpoint RMSE with most steps over
    that with fewest; above 1 it grows.
    """
    few, many = min(ENDPOINT_STEPS), max(ENDPOINT_STEPS)
    named = {"euler": "flow/endpt_rmse", "heun": "flow/endpt_rmse_heun"}
    known = {name: key for name, key in named.items() if f"{key}@{many}" in rows}
    return {
        f"endpoint/falls_{name}": rows[f"{key}@{many}"] / max(rows[f"{key}@{few}"], 1e-12)
        for name, key in known.items()
    }


def scaled_steps(velocity_fn: VelocityFn, scale: float) -> VelocityFn:
    """dt_scale: every step `scale` times as long, at the times of the plain one."""
    return lambda x, t: scale * velocity_fn(x, t)


def backwards(velocity_fn: VelocityFn) -> VelocityFn:
    """Time told backwards: the same steps from z0, with the network told 1 - t."""
    return lambda x, t: velocity_fn(x, 1 - t)


def shot_metrics(
    velocity_fn: VelocityFn, z0: Tensor, z1: Tensor, variance: float, steps: int
) -> dict[str, float]:
    """shoot/nmse_dt{1,2,3} and shoot/nmse_reversed: mean (z_end - z1)^2 / Var(z1) after `steps`
    Euler steps.
    """
    fields = {f"dt{scale}": scaled_steps(velocity_fn, float(scale)) for scale in DT_SCALES} | {
        "reversed": backwards(velocity_fn)
    }
    return {
        f"shoot/nmse_{name}": mse(shoot(field, z0, steps), z1) / variance
        for name, field in fields.items()
    }


def gain_shots(
    velocity_fn: VelocityFn,
    z0: Tensor,
    z1: Tensor,
    variance: float,
    steps: int,
    gains: dict[str, float],
) -> dict[str, float]:
    """gain/shoot_nmse_<name>: shooting with the velocity times a gain."""
    return {
        f"gain/shoot_nmse_{name}": mse(shoot(scaled_steps(velocity_fn, gain), z0, steps), z1)
        / variance
        for name, gain in gains.items()
    }


@dataclass(frozen=True)
class Trace:
    """A generation: z_init and z_end (B, C, H, W), the first step's dz, and the pictures of both
    ends (B, 3, H', W').
    """

    z_init: Tensor
    first: Tensor
    z_end: Tensor
    init_pictures: Tensor
    end_pictures: Tensor


def trace_generation(
    velocity_fn: VelocityFn,
    solver: SolverConfig,
    grid: Sequence[float],
    z0: Tensor,
    decode: Callable[[Tensor], Tensor],
    pictures: int,
) -> Trace:
    """[A] decode(z_init), [B] the first dz, [C] decode(z_end); pictures of the first few
    samples.
    """
    first: list[Tensor] = []

    def observe(k: int, t: float, x: Tensor, v: Tensor) -> None:
        if k == 0:
            first.append((grid[1] - grid[0]) * v)

    z_end = integrate(solver, velocity_fn, z0, list(grid), observe)
    return Trace(z0, first[0], z_end, decode(z0[:pictures]), decode(z_end[:pictures]))


def trace_metrics(trace: Trace) -> dict[str, float]:
    """trace/*: latent spread of both ends, rms of the first dz, contrast of the pictures (std of
    pixels in [0, 1]).
    """

    def contrast(pictures: Tensor) -> float:
        return float(((pictures.clamp(-1, 1) + 1) / 2).std())

    return {
        "trace/init_std": float(trace.z_init.std()),
        "trace/first_dz_rms": float(trace.first.square().mean().sqrt()),
        "trace/end_std": float(trace.z_end.std()),
        "trace/init_pixel_std": contrast(trace.init_pictures),
        "trace/end_pixel_std": contrast(trace.end_pictures),
    }


def significant_bits(x: Tensor) -> int:
    """How many significand bits the numbers of x use, whatever their dtype: 8 if bf16 can hold
    them all, 11 if fp16 can, else 24.
    """
    for dtype, bits in ((torch.bfloat16, 8), (torch.float16, 11)):
        if torch.equal(x.to(dtype).float(), x.float()):
            return bits
    return 24


def teacher_rows(
    end_of: Callable[[int], Tensor], end: Tensor, steps: Sequence[int], name: str
) -> dict[str, float]:
    """NAME/mse@N of the true field: end_of(N) integrates it in N steps, `end` is psi(1)."""
    return {f"{name}/mse@{n}": mse(end_of(n).float(), end) for n in steps}
