"""Training times: each sampler is the quantile function of its distribution, so that a draw is a
function of a uniform number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowray.config.flow import (
    AlphaTime,
    FlowConfig,
    LogitNormalTime,
    LogSNRTime,
    TimeConfig,
    UniformTime,
)
from flowray.flow import expect


def _uniform(config: UniformTime, u: Tensor) -> Tensor:
    return u


def _logit_normal(config: LogitNormalTime, u: Tensor) -> Tensor:
    normal = torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))
    return torch.sigmoid(config.mean + config.std * normal)


def _log_snr(config: LogSNRTime, u: Tensor) -> Tensor:
    return torch.sigmoid((config.low + (config.high - config.low) * u) / 2)


def _alpha(config: AlphaTime, u: Tensor) -> Tensor:
    return config.low + (config.high - config.low) * u


_QUANTILES: dict[type, Callable[[Any, Tensor], Tensor]] = {
    UniformTime: _uniform,
    LogitNormalTime: _logit_normal,
    LogSNRTime: _log_snr,
    AlphaTime: _alpha,
}


def time_config(config: FlowConfig, step: int, total: int) -> TimeConfig:
    """The sampler in force at `step` (0-based) of a run of `total` steps: that of the first
    stage which has not ended, else `time`.
    """
    if not isinstance(config, FlowConfig):
        raise TypeError(f"flow: want a FlowConfig, got {expect.described(config)}")
    expect.count("step", step, 0)
    for stage in config.curriculum:
        end = stage.steps if stage.steps is not None else (stage.fraction or 0) * total
        if step < end - 1e-6:  # 0.07 of 100 steps is 7, and 7.000000000000001
            return stage.time
    return config.time


def training_times(config: TimeConfig, u: Tensor) -> Tensor:
    """Times t (B,) in [0, 1] from uniform numbers u (B,) in [0, 1).

    The first `uniform_floor` of the unit interval is spent on t ~ U[0, 1], so that no part of [0,
    1] that sampling passes through stays untrained; the rest goes through the quantile function.
    """
    quantile = expect.member("time", config, _QUANTILES)
    expect.floating("u", u, "(B,)", 1)
    floor = config.uniform_floor
    inside = quantile(config, ((u - floor) / max(1 - floor, 1e-12)).clamp(0, 1))
    return torch.where(u < floor, u / max(floor, 1e-12), inside).clamp(0, 1)
