"""Moments of a picture's posterior and the one place where latents are scaled; quick to import,
no diffusers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.errors import Notice
from flowray.model.layers import to_device


class Moments(NamedTuple):
    """Raw, unscaled posterior of a picture: mean and log-variance, each (B, C, H, W)."""

    mean: Tensor
    logvar: Tensor


PerChannel = float | tuple[float, ...]


@dataclass(frozen=True)
class LatentScale:
    """z = (raw - shift) * scale, applied once in `sample` and undone once in `unscale`; nothing
    else multiplies by it.

    scale, shift: one number, or one for each channel.
    """

    scale: PerChannel
    shift: PerChannel
    deterministic: bool

    def sample(self, moments: Moments, noise: Tensor) -> Tensor:
        """Scaled latent z1 (B, C, H, W), fp32, from moments and standard normal noise of the same
        shape.

        Takes moments, never a latent: an integrated latent goes straight to `decode`.
        """
        if not isinstance(moments, Moments):
            raise TypeError(
                "sample takes Moments (from encode_moments); an integrated latent is decoded as"
                " it is"
            )
        mean = moments.mean.float()
        raw = mean if self.deterministic else mean + torch.exp(0.5 * moments.logvar.float()) * noise
        return (raw - over_channels(self.shift, raw)) * over_channels(self.scale, raw)

    def unscale(self, z: Tensor) -> Tensor:
        """The raw latent of a scaled one."""
        return z / over_channels(self.scale, z) + over_channels(self.shift, z)


def over_channels(value: PerChannel, like: Tensor) -> float | Tensor:
    """A number as it is, numbers per channel as (C, 1, 1) beside a latent."""
    if isinstance(value, int | float):
        return value
    return to_device(torch.tensor(value), like.device)[:, None, None]


class LatentMap(nn.Module):
    """(mu, logvar) of one shape to the latent's: by reshape where the sizes agree, else by a learnt
    linear map each.

    The linear map is what `linear_map` opts in to; it warns, because the source it makes is another
    than the head's.
    """

    def __init__(self, made: LatentSpec, latent: LatentSpec):
        super().__init__()
        self.latent = latent
        self.maps = nn.ModuleList()
        if made.dims != latent.dims:
            warnings.warn(
                f"model.head.linear_map: {made.shape} to {latent.shape} by a learnt linear map: the"
                " text latent's distribution drifts from the head's own; watch std/mean and"
                " mu/rms",
                Notice,
                stacklevel=2,
            )
            self.maps.extend(nn.Linear(made.dims, latent.dims) for _ in range(2))

    def forward(self, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """Each (B, made) -> (B, C, H, W)."""
        flat = [mu.flatten(1), logvar.flatten(1)]
        mapped = [layer(x) for layer, x in zip(self.maps, flat, strict=True)] if self.maps else flat
        return mapped[0].unflatten(1, self.latent.shape), mapped[1].unflatten(1, self.latent.shape)
