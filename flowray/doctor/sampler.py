"""The sampler held against the probes' own integration: same source, same weights, same
settings, so the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowray.config.flow import SampleConfig
from flowray.data.pixels import from_pictures
from flowray.doctor.subject import Subject
from flowray.flow.guidance import guided, with_time_code
from flowray.flow.path import psi, velocity_target
from flowray.flow.solver import integrate, time_grid
from flowray.model.assemble import FlowModel, Source
from flowray.model.autoencoder import Autoencoder
from flowray.model.posterior import standard_normal
from flowray.probes.battery import ProbeBatch
from flowray.probes.interface import same_pictures
from flowray.probes.rollout import TEACHER_STEPS, mse
from flowray.probes.shots import significant_bits, teacher_rows
from flowray.sample.generate import NOISE, generate, generate_latents, in_precision, source_noise

BUILT_AGAIN = 200_000_000  # numbers of a model that is built once more, as sampling does
FEW = 8  # captions that are drawn with twice the steps too


@dataclass
class TrueField:
    """Stands where the sampler expects a model: its source is z0 and its velocity v, whatever it
    is asked; counts the bits of the state.
    """

    z0: Tensor
    v: Tensor
    bits: int = 24

    def source(self, captions: Sequence[str], noise: Tensor) -> Source:
        return Source(standard_normal(len(noise), noise.shape[1:], noise.device), self.z0, None)

    def field(self, source: Source) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self.velocity

    def velocity(self, x: Tensor, time_code: Tensor, null: Tensor) -> Tensor:
        self.bits = min(self.bits, significant_bits(x))
        return self.v.repeat(len(x) // len(self.v), 1, 1, 1)


def native_teacher(
    z0: Tensor, z1: Tensor, captions: Sequence[str], noise: Tensor, config: SampleConfig, rho: float
) -> dict[str, float]:
    """teacher_native/mse@N: the true field through `generate_latents` itself; sampler/bits of
    the state that it integrates.
    """
    true = TrueField(z0, velocity_target(z0, z1, rho))
    end = psi(torch.ones(len(z0), device=z0.device), z0, z1, rho)

    def end_of(steps: int) -> Tensor:
        return generate_latents(
            cast(FlowModel, true), captions, config.model_copy(update={"steps": steps}), noise
        )

    rows = teacher_rows(end_of, end, TEACHER_STEPS, "teacher_native")
    return rows | {"sampler/bits": float(true.bits)}


def own_latents(model: FlowModel, source: Source, config: SampleConfig, guidance: float) -> Tensor:
    """z_end of the recipe's solver and grid, called here as the probes call the network."""
    grid = time_grid(config.grid, config.steps)
    how = config.guidance_interval, config.guidance_rescale
    velocity_fn = guided(with_time_code(model.field(source)), guidance, *how)
    with in_precision(config, source.z0.device):
        return integrate(config.solver, velocity_fn, source.z0, grid)


def _few(source: Source) -> Source:
    """The first FEW captions: twice the steps are dear."""
    first = torch.arange(min(FEW, len(source.z0)), device=source.z0.device)
    return source.rows(first)


@torch.no_grad()
def opened_metrics(subject: Subject) -> dict[str, float]:
    """seam/weights: those that sampling opens against those that its recipe names; nothing of a
    live state, nor of a model that is dear to build again.
    """
    kept: Mapping[str, Tensor] = (
        subject.ema if subject.recipe.sample.weights == "ema" else subject.parameters
    )
    numbers = sum(p.numel() for p in subject.model.parameters())  # the frozen ones too
    if subject.opened is None or numbers > BUILT_AGAIN:
        return {}
    gaps = [
        float(
            (p.float() - kept[name].cpu().float()).norm()
            / kept[name].float().norm().clamp_min(1e-12)
        )
        for name, p in subject.opened().items()
        if name in kept
    ]
    return {"seam/weights": max(gaps, default=0.0)}


@torch.no_grad()
def latent_metrics(
    model: FlowModel, config: SampleConfig, batch: ProbeBatch, source: Source
) -> tuple[dict[str, float], Tensor]:
    """sampler/{nmse,nmse_plain,gap,coarse} on the probe batch; also the sampler's z_end."""
    z_end = generate_latents(model, batch.captions, config, batch.noise)
    own = own_latents(model, source, config, config.guidance_scale)
    few = _few(source)
    finer = config.model_copy(update={"steps": 2 * config.steps})
    coarse, fine = (
        own_latents(model, few, settings, config.guidance_scale) for settings in (config, finer)
    )
    plain = own if config.guidance_scale == 1.0 else own_latents(model, source, config, 1.0)

    def over_variance(a: Tensor, b: Tensor) -> float:
        return mse(a, b) / batch.variance

    return {
        "sampler/nmse": over_variance(z_end, batch.z1),
        "sampler/nmse_plain": over_variance(plain, batch.z1),
        "sampler/gap": over_variance(z_end, own),
        "sampler/coarse": over_variance(coarse, fine),
    }, z_end


@torch.no_grad()
def picture_metrics(
    model: FlowModel,
    autoencoder: Autoencoder,
    config: SampleConfig,
    prompts: Sequence[str],
    seed: int,
) -> tuple[dict[str, float], np.ndarray]:
    """sampler/psnr of `generate` against own integration and decoding; also the sampler's
    pictures, uint8 (B, H, W, 3).
    """
    device = next(model.velocity.parameters()).device
    made = generate(model, autoencoder, prompts, config, seed)
    with in_precision(config, device):
        source = model.source(prompts, source_noise(model, prompts, seed, device))
    own = autoencoder.decode(own_latents(model, source, config, config.guidance_scale))
    return {"sampler/psnr": same_pictures(made, from_pictures(own))}, made


def strip_psnr(strip: Path, pictures: np.ndarray) -> float | None:
    """How close pictures (B, H, W, 3) are to the sample strip that training wrote; None where
    the strip shows others, or is of a version that drew their noise in another way.
    """
    image = Image.open(strip)
    if not NOISE.items() <= image.info.items():
        return None
    written = np.asarray(image.convert("RGB"))
    side_by_side = np.concatenate(list(pictures), axis=1)
    return same_pictures(written, side_by_side) if written.shape == side_by_side.shape else None
