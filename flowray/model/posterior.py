"""The text latent's posterior q(z0 | caption) = N(mu, diag(exp(logvar))), unscaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowray.config.model import PosteriorConfig


@dataclass(frozen=True)
class Posterior:
    """mu and clamped logvar, each (B, C, H, W) fp32."""

    mu: Tensor
    logvar: Tensor

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def sample(self, noise: Tensor) -> Tensor:
        """z0 = mu + std * noise; the only randomness of a picture, in training and in sampling."""
        return self.mu + self.std * noise


def standard_normal(count: int, shape: tuple[int, ...], device: torch.device) -> Posterior:
    """N(0, I) for each of `count` captions: where a noise source draws from."""
    zeros = torch.zeros(count, *shape, device=device)
    return Posterior(zeros, zeros)


def make_posterior(config: PosteriorConfig, mu: Tensor, logvar: Tensor) -> Posterior:
    """Clamp the log-variance to the configured range."""
    return Posterior(mu.float(), logvar.float().clamp(config.logvar_min, config.logvar_max))
