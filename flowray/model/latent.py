"""Moments of a picture's posterior and the one place where latents are scaled; quick to import, no diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Raw, unscaled posterior of a picture: mean and log-variance, each (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class LatentScale:
    """z = (raw - shift) * scale, applied once in `sample` and undone once in `unscale`; nothing else multiplies by it."""

    scale: float
    shift: float
    deterministic: bool

    def sample(self, moments: Moments, noise: Tensor) -> Tensor:
        """Scaled latent z1 (B, C, H, W), fp32, from moments and standard normal noise of the same shape.

        Takes moments, never a latent: an integrated latent goes straight to `decode`.
        """
        if not isinstance(moments, Moments):
            raise TypeError("sample takes Moments (from encode_moments); an integrated latent is decoded as it is")
        mean = moments.mean.float()
        raw = mean if self.deterministic else mean + torch.exp(0.5 * moments.logvar.float()) * noise
        return (raw - self.shift) * self.scale

    def unscale(self, z: Tensor) -> Tensor:
        """The raw latent of a scaled one."""
        return z / self.scale + self.shift
