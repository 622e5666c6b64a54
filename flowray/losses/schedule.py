"""A loss weight as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from flowray.config.losses import Constant, Cosine, Linear, ScheduleConfig, Until
from flowray.flow import expect


def _linear(config: Linear, step: int, total: int) -> float:
    length = config.steps if config.steps is not None else (config.fraction or 0) * total
    return min(1.0, step / max(length, 1))


_FACTORS: dict[type, Callable[[Any, int, int], float]] = {
    Constant: lambda config, step, total: 1.0,
    Linear: _linear,
    Until: lambda config, step, total: float(step < config.steps),
    Cosine: lambda config, step, total: (
        config.floor + (1 - config.floor) * (1 + math.cos(math.pi * min(step / total, 1))) / 2
    ),
}


def weight_at(weight: float, schedule: ScheduleConfig, step: int, total: int) -> float:
    """The weight at `step` (0-based) of a run of `total` steps."""
    factor = expect.member("schedule", schedule, _FACTORS)
    expect.number("weight", weight, 0.0)
    expect.count("step", step, 0)
    expect.count("total", total, 1)
    return weight * float(factor(schedule, step, total))
