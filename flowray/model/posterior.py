"""The text latent's posterior q(z0 | caption) = N(mu, diag(exp(logvar))), unscaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowray.config.model import PosteriorConfig
from flowray.model.layers import resized


@dataclass(frozen=True)
class Posterior:
    """mu and clamped logvar, each (B, C, H, W) fp32; z0 has the mean amplitude mu."""

    mu: Tensor
    logvar: Tensor
    amplitude: float = 1.0

    @property
    def std(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    def rows(self, indices: Tensor | slice) -> Posterior:
        """Of the captions at `indices`."""
        return Posterior(self.mu[indices], self.logvar[indices], self.amplitude)

    def of_size(self, size: tuple[int, int]) -> Posterior:
        """For latents of another (height, width), mu and logvar interpolated, as a head makes one
        size alone.

        z0 is drawn after: noise that were resized would no longer be white. Between two widths
        comes their geometric mean, and the clamp's range is kept.
        """
        mu, logvar = (resized(x, size, "bilinear") for x in (self.mu, self.logvar))
        return Posterior(mu, logvar, self.amplitude)

    @property
    def mean(self) -> Tensor:
        """Of z0."""
        return self.amplitude * self.mu

    def sample(self, noise: Tensor) -> Tensor:
        """z0 = mean + std * noise: the only randomness of a picture, trained or sampled."""
        return self.mean + self.std * noise


def standard_normal(count: int, shape: tuple[int, ...], device: torch.device) -> Posterior:
    """N(0, I) for each of `count` captions: where a noise source draws from."""
    zeros = torch.zeros(count, *shape, device=device)
    return Posterior(zeros, zeros)


def make_posterior(
    config: PosteriorConfig, mu: Tensor, logvar: Tensor, amplitude: float = 1.0
) -> Posterior:
    """Clamp the log-variance to the configured range."""
    clamped = logvar.float().clamp(config.logvar_min, config.logvar_max)
    return Posterior(mu.float(), clamped, amplitude)
