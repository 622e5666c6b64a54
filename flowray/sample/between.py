"""Pictures on the way from one caption to the next."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowray.config.flow import SampleConfig
from flowray.config.progress import Advance
from flowray.flow.path import expand
from flowray.model.assemble import FlowModel, Source
from flowray.model.autoencoder import Autoencoder
from flowray.model.posterior import Posterior
from flowray.sample.generate import decoded, in_precision, integrated, source_noise


@torch.no_grad()
def between_latents(
    model: FlowModel,
    first: Source,
    second: Source,
    shares: Tensor,
    config: SampleConfig,
    noise: Tensor,
) -> Tensor:
    """Integrated latents (B, C, H, W), a share (B,) in [0, 1] of the way from a caption to another
    one: those of `generate_latents` for the first at 0, for the second at 1. The model should be in
    eval mode.

    first, second: the captions of each picture as the model has them; their z0 is not used.

    The source's mean and log-variance are mixed, and so are the velocities that a conditioned
    network has for the two captions (Liu et al., arXiv 2206.01714), not their tokens: an encoder
    makes more of them of a longer caption, and none of one belongs to one of the other.
    """
    a, b, share = first.posterior, second.posterior, expand(shares.to(noise), noise)
    mixed = Posterior(
        torch.lerp(a.mu, b.mu, share), torch.lerp(a.logvar, b.logvar, share), a.amplitude
    )
    z0 = mixed.sample(noise)
    # of the same x each, and both with the mixed source's mean where guidance drops the caption
    here, there = (model.field(Source(mixed, z0, each.text)) for each in (first, second))

    def field(x: Tensor, time_code: Tensor, null: Tensor) -> Tensor:
        v_here, v_there = (each(x, time_code, null).float() for each in (here, there))
        return torch.lerp(v_here, v_there, share.repeat(len(x) // len(share), 1, 1, 1))

    with in_precision(config, noise.device):
        return integrated(config, field if model.velocity.conditioned else here, z0)


@torch.no_grad()
def between(
    model: FlowModel,
    autoencoder: Autoencoder,
    captions: Sequence[str],
    pictures: int,
    rows: int,
    config: SampleConfig,
    seed: int,
    advance: Advance | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Pictures uint8 (rows x columns, H, W, 3), row by row, from each caption to the next in their
    order: `pictures` of even shares, both ends counted, a caption between two others drawn once.

    Row i holds the noise that picture i of the first caption has. The model should be in eval mode.
    advance: hears of every batch. size: as for `source_noise`.
    """
    legs, steps = len(captions) - 1, pictures - 1
    stops = [(leg, step) for leg in range(legs) for step in range(steps)] + [(legs - 1, steps)]
    device = next(model.velocity.parameters()).device
    noise = source_noise(model, [captions[0]] * rows, seed, device, size)
    with in_precision(config, device):
        ends = model.source(captions, noise[:1])
    noise, stops, made = noise.repeat_interleave(len(stops), dim=0), stops * rows, []
    for start in range(0, len(stops), config.batch_size):
        part = stops[start : start + config.batch_size]
        leg, step = torch.tensor(part, device=noise.device).unbind(1)
        first, second = ends.rows(leg), ends.rows(leg + 1)
        own = noise[start : start + config.batch_size]
        latents = between_latents(model, first, second, step / steps, config, own)
        made.append(decoded(autoencoder, latents, config.batch_size))
        if advance:
            advance(len(part))
    return np.concatenate(made)
