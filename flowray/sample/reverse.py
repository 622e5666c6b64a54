"""The flow run backwards: from a picture's latent to where its path began, and forth again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowray.config.flow import SampleConfig
from flowray.flow.guidance import guided, with_time_code
from flowray.flow.solver import integrate, time_grid
from flowray.model.assemble import FlowModel
from flowray.sample.generate import filled, in_precision, integrated


class RoundTrip(NamedTuple):
    """z0: where the paths of latents begin; again: where they end from there; both (B, C, H, W).
    error (B,): mean square of again - latents over the latents' variance; 0 is there and back.
    """

    z0: Tensor
    again: Tensor
    error: Tensor


@torch.no_grad()
def round_trip(
    model: FlowModel, prompts: Sequence[str], latents: Tensor, config: SampleConfig
) -> RoundTrip:
    """Latents (B, C, H, W) of pictures by the flow of their prompts from t = 1 to 0 and back, at
    most `sample.batch_size` at a time; one's are the same to the last bit whatever is beside it.
    The model should be in eval mode.

    The error is the solver's alone: it falls with `sample.steps`, whatever the model has learnt. z0
    is off by more: paths that the flow brings together begin far apart.
    With `model.source.drop_null` the source's mean is the caption's, as in sampling.
    """
    size, made = config.batch_size, []
    for start in range(0, len(prompts), size):
        texts, own = list(prompts[start : start + size]), latents[start : start + size]
        part = _trip(model, texts + texts[-1:] * (size - len(texts)), filled(own, size), config)
        made.append([tensor[: len(texts)] for tensor in part])
    return RoundTrip(*map(torch.cat, zip(*made, strict=True)))


def _trip(
    model: FlowModel, prompts: Sequence[str], latents: Tensor, config: SampleConfig
) -> RoundTrip:
    """`round_trip` in one batch as they are."""
    with model.text.whole_length(), in_precision(config, latents.device):
        source = model.source(prompts, torch.zeros_like(latents))
        field, times = model.field(source), time_grid(config.grid, config.steps)
        how = config.guidance_scale, config.guidance_interval, config.guidance_rescale
        forth = guided(with_time_code(field), *how)
        z0 = integrate(config.solver, lambda x, t: -forth(x, 1 - t), latents, times)
        again = integrated(config, field, z0)
    off = (again - latents).flatten(1).square().mean(1)
    return RoundTrip(z0, again, off / latents.flatten(1).var(dim=1).clamp_min(1e-12))
