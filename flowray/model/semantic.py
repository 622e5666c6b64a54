"""The small trainable image tower of the contrastive loss, and the projection of z0 it is compared with."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowray.config.base import LatentSpec
from flowray.config.losses import ClipLossConfig
from flowray.config.model import TowerConfig


class SemanticTower(nn.Module):
    """Embeds image latents z1 and text latents z0 (B, C, H, W) into one space (B, dim), L2-normalised."""

    def __init__(self, config: TowerConfig, loss: ClipLossConfig, latent: LatentSpec):
        super().__init__()
        self.image = _trunk(latent, config)
        self.text = _trunk(latent, config)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / loss.temperature)))
        self.max_scale = loss.max_scale

    @property
    def scale(self) -> Tensor:
        """Logit scale: exponentiated, capped. The cap moves the parameter itself, so that its gradient never vanishes there."""
        with torch.no_grad():
            self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.log_scale.exp()

    def forward(self, z0: Tensor, z1: Tensor) -> tuple[Tensor, Tensor]:
        """(text, image) embeddings."""
        return F.normalize(self.text(z0), dim=-1), F.normalize(self.image(z1), dim=-1)


def _trunk(latent: LatentSpec, config: TowerConfig) -> nn.Sequential:
    flat = config.hidden * math.ceil(latent.height / 2) * math.ceil(latent.width / 2)
    return nn.Sequential(
        nn.Conv2d(latent.channels, config.hidden, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(config.hidden, config.hidden, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.LayerNorm(flat),
        nn.Linear(flat, config.dim),
    )
