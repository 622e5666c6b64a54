"""One wrapper around diffusers' autoencoders that owns the latent scale.

The scale is applied once, in `sample`, and undone once, in `decode`; nothing outside multiplies by it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn

from flowray.config.base import LatentSpec
from flowray.config.errors import InputError
from flowray.config.model import AutoencoderConfig, DCAutoencoder
from flowray.model.assets import asset_path
from flowray.model.latent import LatentScale, Moments

DETERMINISTIC_LOGVAR = -30.0  # exp(0.5 * -30) = 3e-7: a point, in the form of a gaussian


class Autoencoder(nn.Module):
    """A frozen autoencoder with the scale inside. Pictures are float (B, 3, H, W) in [-1, 1].

    It stays in eval mode and without gradients on its parameters, whatever module holds it; gradients may still flow through
    `decode` into z.
    """

    def __init__(self, net: Any, latent: LatentSpec, scale: LatentScale):
        super().__init__()
        self.net: Any = net.eval().requires_grad_(False)
        self.latent, self.scale = latent, scale

    def train(self, mode: bool = True) -> Autoencoder:
        """Stay in eval mode: a frozen autoencoder has no other."""
        return super().train(False)

    @torch.no_grad()
    def encode_moments(self, pictures: Tensor) -> Moments:
        """Raw moments of pictures (B, 3, H, W) in [-1, 1]; neither sampled nor scaled."""
        encoded = self.net.encode(pictures)
        if self.scale.deterministic:
            moments = Moments(encoded.latent, torch.full_like(encoded.latent, DETERMINISTIC_LOGVAR))
        else:
            mean, logvar = encoded.latent_dist.parameters.chunk(2, dim=1)
            moments = Moments(mean, logvar.clamp(-30.0, 20.0))
        if moments.mean.shape[1:] != self.latent.shape:
            raise ValueError(
                f"the autoencoder made latents of shape {tuple(moments.mean.shape[1:])} from pictures of "
                f"{tuple(pictures.shape[1:])}, but model.latent says {self.latent.shape}"
            )
        return moments

    def sample(self, moments: Moments, noise: Tensor) -> Tensor:
        """Scaled latent z1; see LatentScale.sample."""
        return self.scale.sample(moments, noise)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1], from scaled latents (B, C, H, W)."""
        return self.net.decode(self.scale.unscale(z)).sample


def load_autoencoder(config: AutoencoderConfig, latent: LatentSpec) -> Autoencoder:
    """Load the weights and settle the scale: the recipe's, else the one in the model's own config."""
    path: str | Path = asset_path("autoencoder") if config.path == "embedded" else config.path
    try:
        if isinstance(config, DCAutoencoder):
            dc = AutoencoderDC.from_pretrained(path, low_cpu_mem_usage=False)  # False: without accelerate it warns at length
            scale = config.scaling_factor or float(dc.config.scaling_factor)
            return Autoencoder(dc, latent, LatentScale(scale, 0.0, deterministic=True))
        kl = AutoencoderKL.from_pretrained(path, low_cpu_mem_usage=False)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the weights of another kind of autoencoder
        raise InputError(f"model.autoencoder.path: cannot load {str(path)!r}: {str(error).partition(chr(10))[0]}") from error
    scale = config.scaling_factor or float(kl.config.scaling_factor)
    shift = config.shift_factor if config.shift_factor is not None else float(kl.config.shift_factor or 0.0)
    return Autoencoder(kl, latent, LatentScale(scale, shift, deterministic=False))
