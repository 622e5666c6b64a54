"""Captions added and taken away: a + b - c."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowray.config.flow import SampleConfig
from flowray.model.assemble import FlowModel
from flowray.model.posterior import Posterior
from flowray.sample.between import mixed_latents, weighted
from flowray.sample.generate import source_of


@torch.no_grad()
def sum_latents(
    model: FlowModel,
    caption: str,
    plus: Sequence[str],
    minus: Sequence[str],
    config: SampleConfig,
    noise: Tensor,
) -> Tensor:
    """Integrated latents (2 + plus + minus, C, H, W): of the caption, of each of `plus` and `minus`
    and last of caption + plus - minus, all of one noise (1, C, H, W). The model should be in eval
    mode.

    The source's means are added and taken away, and so are the velocities that a conditioned
    network has for the captions (Liu et al., arXiv 2206.01714); log-variance is the caption's own.
    """
    captions = [caption, *plus, *minus]
    signs = torch.tensor([1.0] * (1 + len(plus)) + [-1.0] * len(minus), device=noise.device)
    weights = torch.cat([torch.eye(len(captions), device=noise.device), signs[:, None]], dim=1)
    source = source_of(model, captions, config, noise.expand(len(captions), -1, -1, -1))
    columns = weights.shape[1]
    parts = [
        source.rows(torch.full((columns,), k, device=noise.device)) for k in range(len(captions))
    ]
    posteriors = [part.posterior for part in parts]
    own = torch.arange(columns, device=noise.device) % len(captions)  # of the sum the caption's
    logvar, amplitude = source.posterior.logvar[own], source.posterior.amplitude
    mixed = Posterior(weighted([each.mu for each in posteriors], weights), logvar, amplitude)
    return mixed_latents(model, parts, weights, mixed, mixed.sample(noise), config)
