"""Velocity networks u(x_t, time code, null, text): (B, C, H, W), (B,), (B,) bool and, where they
are conditioned, the tokens of B captions -> (B, C, H, W).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowray.config.base import LatentSpec
from flowray.config.model import DiMRVelocity, DiTVelocity, VelocityConfig
from flowray.model.dimr import DiMR
from flowray.model.dit import DiT
from flowray.model.levels import VelocityNet

_VELOCITIES: dict[type, Callable[[Any, LatentSpec, int], VelocityNet]] = {
    DiTVelocity: DiT,
    DiMRVelocity: DiMR,
}


def build_velocity(config: VelocityConfig, latent: LatentSpec, text_width: int) -> VelocityNet:
    """The velocity network of a config, to read tokens of `text_width` if it is conditioned."""
    return _VELOCITIES[type(config)](config, latent, text_width)
