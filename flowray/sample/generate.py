"""Pictures from prompts, exactly the way training defined the path: z0 ~ posterior, integrate
from t = 0 to 1, decode x.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowray.config.flow import SampleConfig
from flowray.config.progress import Advance
from flowray.config.writing import write_whole
from flowray.data.pixels import from_pictures
from flowray.flow.draws import Draws
from flowray.flow.guidance import guided, with_time_code
from flowray.flow.solver import integrate, time_grid
from flowray.model.assemble import FlowModel
from flowray.model.autoencoder import Autoencoder

BATCH = 64


def source_noise(
    model: FlowModel,
    count: int,
    seed: int,
    device: torch.device,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Noise of `count` prompts (count, C, H, W); the noise of a prompt depends on the seed and
    its place alone. size: (height, width) of another bucket than the model's own.
    """
    shape = model.config.latent.channels, *(size or model.config.latent.shape[1:])
    return torch.cat(
        [
            Draws(seed, place, 1, slice(None), device).normal("sample", shape)
            for place in range(count)
        ]
    )


def integrated(
    config: SampleConfig, field: Callable[[Tensor, Tensor, Tensor], Tensor], z0: Tensor
) -> Tensor:
    """Latents (B, C, H, W) where z0 ends in a field (x, time code, null), with guidance."""
    velocity_fn = guided(with_time_code(field), config.guidance_scale)
    return integrate(config.solver, velocity_fn, z0, time_grid(config.grid, config.steps))


@torch.no_grad()
def generate_latents(
    model: FlowModel, prompts: Sequence[str], config: SampleConfig, noise: Tensor
) -> Tensor:
    """Integrated latents (B, C, H, W) of the prompts; the model should be in eval mode."""
    source = model.source(prompts, noise)
    return integrated(config, model.field(source), source.z0)


@torch.no_grad()
def latent_batches(
    model: FlowModel,
    prompts: Sequence[str],
    config: SampleConfig,
    seed: int,
    size: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """`generate_latents` of many prompts, BATCH at a time, with the weights the model holds now."""
    was_training = model.training
    model.eval()
    noise = source_noise(model, len(prompts), seed, next(model.velocity.parameters()).device, size)
    try:
        for start in range(0, len(prompts), BATCH):
            part = slice(start, start + BATCH)
            yield generate_latents(model, prompts[part], config, noise[part])
    finally:
        model.train(was_training)


@torch.no_grad()
def source_latents(model: FlowModel, prompts: Sequence[str], seed: int) -> tuple[Tensor, Tensor]:
    """mu and the drawn z0 that `latent_batches` sets out from, each (B, C, H, W); the model should
    be in eval mode.
    """
    noise = source_noise(model, len(prompts), seed, next(model.velocity.parameters()).device)
    mus, drawn = [], []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        made = model.source(prompts[part], noise[part])
        mus.append(made.posterior.mu)
        drawn.append(made.z0)
    return torch.cat(mus), torch.cat(drawn)


def generate(
    model: FlowModel,
    autoencoder: Autoencoder,
    prompts: Sequence[str],
    config: SampleConfig,
    seed: int,
    advance: Advance | None = None,
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Pictures uint8 (B, H, W, 3) of the prompts, with the weights the model holds now.

    advance: hears of every batch of pictures. size: as for `source_noise`.
    """
    pictures = []
    for latents in latent_batches(model, prompts, config, seed, size):
        pictures.append(from_pictures(autoencoder.decode(latents)))
        if advance:
            advance(len(latents))
    return np.concatenate(pictures)


def save_strip(pictures: np.ndarray, path: Path) -> None:
    """Pictures (B, H, W, 3) side by side in one PNG, written whole."""
    png = io.BytesIO()
    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(png, format="png")
    write_whole(path, png.getvalue())
