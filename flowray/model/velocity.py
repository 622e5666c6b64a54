"""Velocity networks u(x_t, time code, null): (B, C, H, W), (B,), (B,) bool -> (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flowray.config.base import LatentSpec
from flowray.config.model import DiMRVelocity, DiTVelocity, VelocityConfig
from flowray.model.dimr import DiMR
from flowray.model.dit import DiT
from flowray.model.levels import VelocityNet

_VELOCITIES: dict[type, Callable[[Any, LatentSpec], VelocityNet]] = {
    DiTVelocity: DiT,
    DiMRVelocity: DiMR,
}


def build_velocity(config: VelocityConfig, latent: LatentSpec) -> VelocityNet:
    """The velocity network of a config."""
    return _VELOCITIES[type(config)](config, latent)
