"""Pictures on the way from one caption to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from flowray.config.flow import SampleConfig
from flowray.config.progress import Advance
from flowray.flow.path import expand
from flowray.model.assemble import FlowModel, Source
from flowray.model.autoencoder import Autoencoder
from flowray.model.posterior import Posterior
from flowray.sample.generate import (
    check_finite,
    decoded,
    in_precision,
    integrated,
    source_noise,
    source_of,
)

# linear: one noise held, the source's mean and log-variance mixed. spherical: from each caption's
# own z0 to the next one's on the arc between them
Mix = Literal["linear", "spherical"]


@torch.no_grad()
def between_latents(
    model: FlowModel,
    first: Source,
    second: Source,
    shares: Tensor,
    config: SampleConfig,
    noise: Tensor | None,
) -> Tensor:
    """Integrated latents (B, C, H, W), a share (B,) in [0, 1] of the way from a caption to another
    one: at 0 those of `generate_latents` for the first, at 1 for the second. The model should be in
    eval mode.

    first, second: the captions of each picture as the model has them. noise (B, C, H, W): held on
    the way, linearly; their z0 are not used then. None: spherically, from the one z0 to the other.

    The velocities that a conditioned network has for the two captions are mixed linearly either way
    (Liu et al., arXiv 2206.01714), not their tokens: an encoder makes more of them of a longer
    caption, and none of one belongs to one of the other.
    """
    a, b, shares = first.posterior, second.posterior, shares.to(first.z0)
    linear = torch.stack([1 - shares, shares])
    weights = linear if noise is not None else arc_weights(first.z0, second.z0, shares)
    logvar = torch.lerp(a.logvar, b.logvar, expand(shares, a.logvar))
    mixed = Posterior(weighted([a.mu, b.mu], weights), logvar, a.amplitude)
    z0 = weighted([first.z0, second.z0], weights) if noise is None else mixed.sample(noise)
    return mixed_latents(model, [first, second], linear, mixed, z0, config)


def arc_weights(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """Weights (2, B) of a and b (B, C, H, W) for a share (B,) of the arc between their directions:
    slerp (Shoemake 1985; for latents White, arXiv 1609.04468). 1 - share and share where they have
    one direction.

    Halfway between two independent draws of N(0, I), straight mixing has half of their variance;
    this keeps it.
    """
    flat_a, flat_b = a.double().flatten(1), b.double().flatten(1)
    cosine = torch.cosine_similarity(flat_a, flat_b).clamp(-1, 1)
    angle, share = cosine.acos(), shares.double()
    arc = torch.stack([((1 - share) * angle).sin(), (share * angle).sin()]) / angle.sin()
    straight = torch.stack([1 - share, share])
    return torch.where(angle.sin() > 1e-4, arc, straight).to(a.dtype)


def weighted(tensors: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of K tensors (B, C, H, W), each by its weights, a row of (K, B)."""
    each = zip(weights, tensors, strict=True)
    return torch.stack([expand(weight, x) * x for weight, x in each]).sum(0)


@torch.no_grad()
def mixed_latents(
    model: FlowModel,
    parts: Sequence[Source],
    weights: Tensor,
    mixed: Posterior,
    z0: Tensor,
    config: SampleConfig,
) -> Tensor:
    """Where z0 (B, C, H, W) ends in the velocities of K captions, each by its weights, a row of
    (K, B): one pass of a conditioned network for each.

    mixed: whose mean guidance leaves out where the model drops it.
    """
    # of the same x each
    fields = [model.field(Source(mixed, z0, part.text)) for part in parts]

    def field(x: Tensor, time_code: Tensor, null: Tensor) -> Tensor:
        velocities = [each(x, time_code, null).float() for each in fields]
        return weighted(velocities, weights.repeat(1, len(x) // len(z0)))

    with in_precision(config, z0.device):
        return integrated(config, field if model.velocity.conditioned else fields[0], z0)


def suiting(model: FlowModel) -> Mix:
    """spherical where the source is noise, of which a caption has a draw of its own; linear where
    the caption's mean is in it: on the arc that would come out longer than any caption's.
    """
    return "spherical" if model.config.source.kind == "noise" else "linear"


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
    mix: Mix | None = None,
) -> np.ndarray:
    """Pictures uint8 (rows x columns, H, W, 3), row by row, from each caption to the next in their
    order: `pictures` of even shares, both ends counted, a caption between two others drawn once.

    mix: `suiting` unless given. linear: row i holds the noise that picture i of the first caption
    has. spherical: row i goes through picture i of each caption. The model should be in eval mode.
    InputError for a latent that is not finite. advance: hears of every batch. size: as for
    `source_noise`.
    """
    legs, steps = len(captions) - 1, pictures - 1
    ways = [(leg, step) for leg in range(legs) for step in range(steps)] + [(legs - 1, steps)]
    stops = [(row, leg, step) for row in range(rows) for leg, step in ways]
    device, mix = next(model.velocity.parameters()).device, mix or suiting(model)
    numbers = [row for row in range(rows) for _ in captions]
    whose = list(captions) if mix == "spherical" else [captions[0]] * len(captions)
    noise = source_noise(model, whose * rows, seed, device, size, numbers)
    noise = noise.unflatten(0, (rows, len(captions)))
    ends = source_of(model, captions, config, noise[0])
    made = []
    for start in range(0, len(stops), config.batch_size):
        part = stops[start : start + config.batch_size]
        row, leg, step = torch.tensor(part, device=device).unbind(1)
        first, second = (_drawn(ends.rows(at), noise[row, at]) for at in (leg, leg + 1))
        held = None if mix == "spherical" else noise[row, leg]
        latents = between_latents(model, first, second, step / max(1, steps), config, held)
        check_finite(latents, [captions[leg] for _, leg, _ in part])
        made.append(decoded(autoencoder, latents, config.batch_size))
        if advance:
            advance(len(part))
    return np.concatenate(made)


def _drawn(source: Source, noise: Tensor) -> Source:
    """The same captions with z0 of other noise."""
    return Source(source.posterior, source.posterior.sample(noise), source.text)
