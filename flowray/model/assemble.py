"""The trainable whole: captions -> posterior of z0 -> velocity, with the autoencoder beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flowray.config.losses import LossConfig
from flowray.config.model import ModelConfig
from flowray.model.heads import build_head
from flowray.model.posterior import Posterior, make_posterior
from flowray.model.semantic import SemanticTower
from flowray.model.text import Prompts, TextModel, load_text
from flowray.model.velocity import build_velocity


class FlowModel(nn.Module):
    """Text side, head, velocity network and, where the contrastive loss is on, its tower.

    The autoencoder is not in here: it is frozen, has no part in a training step on cached latents, and is loaded where pictures
    are made.
    """

    def __init__(self, config: ModelConfig, loss: LossConfig, text: TextModel):
        super().__init__()
        self.config = config
        self.text = text
        self.head = build_head(config.head, text.width, config.latent)
        self.velocity = build_velocity(config.velocity, config.latent)
        self.semantic = SemanticTower(config.semantic, loss.clip, config.latent) if loss.clip.weight > 0 else None

    def posterior(self, prompts: Prompts) -> Posterior:
        """q(z0 | caption) in fp32."""
        mu, logvar = self.head(self.text(prompts))
        expected = (len(prompts.ids), *self.config.latent.shape)
        if mu.shape != expected:
            raise ValueError(f"the head made a text latent of shape {tuple(mu.shape)}, model.latent wants {expected}")
        return make_posterior(self.config.posterior, mu, logvar)

    def source(self, captions: Sequence[str], noise: Tensor) -> tuple[Posterior, Tensor]:
        """Posterior and a drawn z0 of captions; noise (B, C, H, W)."""
        posterior = self.posterior(self.text.tokenize(captions))
        return posterior, posterior.sample(noise)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Named parameters that train, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def build_model(config: ModelConfig, loss: LossConfig, seed: int) -> FlowModel:
    """A fresh model whose initial weights depend on the seed alone; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        text = load_text(config.text)
        torch.manual_seed(seed)
        text.reset()
        return FlowModel(config, loss, text)


def part_sizes(model: FlowModel) -> dict[str, int]:
    """Parameters of every part, disjoint, no totals."""
    parts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = "velocity." + name.split(".")[1] if name.startswith("velocity.") else name.split(".")[0]
        part = "text.queries" if name == "text.queries" else part
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts
