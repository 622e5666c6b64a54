"""Solvers of dx/dt = v(x, t) from t = 0 to t = 1: pure functions of (velocity_fn, x, time grid),
state in fp32.

Fixed-step solvers walk `grid`, a list of increasing times from 0 to 1. A read-only
`observe(k, t, x, v)` sees every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowray.config.flow import Dopri5Solver, EulerSolver, HeunSolver, MidpointSolver, SolverConfig
from flowray.flow import expect
from flowray.flow.path import LATENT, expand

VelocityFn = Callable[[Tensor, Tensor], Tensor]
Grid = list[float]
Observer = Callable[[int, float, Tensor, Tensor], None]


def time_grid(kind: str, steps: int) -> list[float]:
    """steps + 1 edges from 0 to 1. uniform: k / steps. logit_normal: sigmoid of equally spaced
    normal quantiles.

    The outermost quantiles are infinite, so the edges end exactly at 0 and 1 and the steps sum to
    1.
    """
    expect.count("steps", steps, 1)
    expect.one_of("time grid", kind, ("uniform", "logit_normal"))
    quantiles = torch.arange(steps + 1, dtype=torch.float64) / steps
    edges = quantiles if kind == "uniform" else torch.sigmoid(torch.special.ndtri(quantiles))
    return edges.tolist()


@dataclass(frozen=True)
class Spanned:
    """A velocity_fn that is `inside` from one time to another, both counted, and `outside` before
    and after, which may be the cheaper one.

    each: for samples at times (B,) of their own, which the host does not know.
    """

    span: tuple[float, float]
    inside: VelocityFn
    outside: VelocityFn
    each: VelocityFn

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.each(x, t)

    def at(self, t: float) -> VelocityFn:
        """That of a time which all samples share."""
        low, here, high = np.array([self.span[0], t, self.span[1]], np.float32).tolist()
        return self.inside if low <= here <= high else self.outside

    def holds(self, t: Tensor) -> Tensor:
        """Whether fp32 times (B,) lie in the span."""
        low, high = self.span
        return (low <= t) & (t <= high)


def _at(velocity_fn: VelocityFn, x: Tensor, t: float) -> Tensor:
    call = velocity_fn.at(t) if isinstance(velocity_fn, Spanned) else velocity_fn
    v = call(x, torch.full((len(x),), t, dtype=torch.float32, device=x.device))
    expect.alike(LATENT, x=x, velocity=v)
    return v.float()


def _euler(
    config: EulerSolver, velocity_fn: VelocityFn, x: Tensor, grid: Grid, observe: Observer | None
) -> Tensor:
    steps = len(grid) - 1
    for k, (t, after) in enumerate(pairwise(grid)):
        if config.nodes == "midpoint":
            node = (t + after) / 2
        elif config.nodes == "left":
            node = t
        else:  # CrossFlow: from the first interval's start to the last one's end, which on a
            # uniform grid is linspace(0, 1, N)
            share = k / max(steps - 1, 1)
            node = (1 - share) * t + share * after
        v = _at(velocity_fn, x, node)
        if observe:
            observe(k, node, x, v)
        x = x + (after - t) * v
    return x


def _heun(
    config: HeunSolver, velocity_fn: VelocityFn, x: Tensor, grid: Grid, observe: Observer | None
) -> Tensor:
    for k, (t, after) in enumerate(pairwise(grid)):
        v = _at(velocity_fn, x, t)
        if observe:
            observe(k, t, x, v)
        ahead = _at(velocity_fn, x + (after - t) * v, after)
        x = x + (after - t) * (v + ahead) / 2
    return x


def _midpoint(
    config: MidpointSolver, velocity_fn: VelocityFn, x: Tensor, grid: Grid, observe: Observer | None
) -> Tensor:
    for k, (t, after) in enumerate(pairwise(grid)):
        half = (after - t) / 2
        v = _at(velocity_fn, x, t)
        if observe:
            observe(k, t, x, v)
        x = x + (after - t) * _at(velocity_fn, x + half * v, t + half)
    return x


# Dormand and Prince 1980: nodes, stages, and the difference of the 5th and 4th order weights. The
# last stage's row is the 5th order solution itself, so its velocity serves the next step (first
# same as last).
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def _dopri5(
    config: Dopri5Solver, velocity_fn: VelocityFn, x: Tensor, grid: Grid, observe: Observer | None
) -> Tensor:
    """Every sample has its own time and step; a finished one stands still with a step of 0."""
    t = torch.zeros(len(x), device=x.device)
    h = torch.full_like(t, 1 / max(len(grid) - 1, 1))
    first = _at(velocity_fn, x, 0.0)
    for k in range(config.max_steps):
        h = torch.minimum(h, 1 - t)
        if observe:
            observe(k, float(t.min()), x, first)
        stages = [first]
        for node, row in zip(_NODES[1:], _STAGES[1:], strict=True):
            increment = torch.stack([a * v for a, v in zip(row, stages, strict=True)]).sum(0)
            new = x + expand(h, x) * increment
            stages.append(velocity_fn(new, t + node * h).float())
        error = expand(h, x) * torch.stack(
            [e * v for e, v in zip(_ERROR, stages, strict=True)]
        ).sum(0)
        tolerance = config.atol + config.rtol * torch.maximum(x.abs(), new.abs())
        norm = (error / tolerance).flatten(1).square().mean(1).sqrt().nan_to_num(nan=torch.inf)
        accept = norm <= 1
        x = torch.where(expand(accept, x), new, x)
        first = torch.where(expand(accept, x), stages[-1], first)
        # Land on 1 exactly: t + h may round just below it and leave a step too small to advance t.
        t = torch.where(accept, torch.where(h >= 1 - t, torch.ones_like(t), t + h), t)
        if bool((t >= 1).all()):
            return x
        h = h * (0.9 * norm.clamp_min(1e-10).pow(-0.2)).clamp(0.2, 5.0)
        if bool(((h < 1e-7) & (t < 1)).any()):  # too small to advance t in fp32
            break
    raise RuntimeError(
        f"dopri5 did not reach t = 1 in {k + 1} steps (t = {float(t.min()):.3f}): stiff or"
        " non-finite field"
    )


_SOLVERS: dict[type, Callable[[Any, VelocityFn, Tensor, Grid, Observer | None], Tensor]] = {
    EulerSolver: _euler,
    HeunSolver: _heun,
    MidpointSolver: _midpoint,
    Dopri5Solver: _dopri5,
}


def integrate(
    config: SolverConfig,
    velocity_fn: VelocityFn,
    x: Tensor,
    grid: Grid,
    observe: Observer | None = None,
) -> Tensor:
    """The state at t = 1, (B, C, H, W) fp32, from x (B, C, H, W) at t = 0.

    TypeError where config is no solver's, x no latent, velocity_fn no function; ValueError for a
    grid that does not rise from 0 to 1, and for velocities of another shape than x.
    """
    solve = expect.member("solver", config, _SOLVERS)
    expect.floating("x", x, LATENT)
    if not callable(velocity_fn):
        got = expect.described(velocity_fn)
        raise TypeError(f"velocity_fn: want a function (x, t), got {got}")
    _check_grid(grid)
    return solve(config, velocity_fn, x.float(), grid, observe)


def _check_grid(grid: Any) -> None:
    try:
        edges = [float(t) for t in grid]
    except (TypeError, ValueError):
        raise TypeError(f"grid: want times as time_grid makes them, got {grid!r}") from None
    rises = all(a < b for a, b in pairwise(edges))
    if len(edges) < 2 or not rises or edges[0] != 0 or edges[-1] != 1:
        shown = ", ".join(f"{t:g}" for t in edges[:5]) + (", ..." if len(edges) > 5 else "")
        raise ValueError(f"grid: want times that rise from 0 to 1, got {shown or 'none'}")
