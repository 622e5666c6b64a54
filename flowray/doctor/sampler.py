"""The sampler held against the probes' own integration: same source, same weights, same
settings, so the same pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowray.config.flow import Dopri5Solver, SampleConfig
from flowray.data.pixels import from_pictures
from flowray.flow.guidance import guided
from flowray.flow.path import psi, velocity_target
from flowray.flow.solver import integrate, time_grid
from flowray.model.assemble import FlowModel
from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import Moments
from flowray.probes.battery import ProbeBatch
from flowray.probes.calibrate import code_gap
from flowray.probes.interface import same_pictures
from flowray.probes.rollout import TEACHER_STEPS, per_sample_mse
from flowray.probes.shots import significant_bits, teacher_rows
from flowray.probes.untouched import hearing_codes
from flowray.sample.generate import generate, generate_latents, source_noise


@dataclass
class TrueField:
    """Stands where the sampler expects a model: its source is z0 and its velocity v, whatever it
    is asked; counts the bits of the state.
    """

    z0: Tensor
    v: Tensor
    bits: int = 24

    def source(self, captions: Sequence[str], noise: Tensor) -> tuple[None, Tensor]:
        return None, self.z0

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


def own_latents(
    model: FlowModel, z0: Tensor, config: SampleConfig, guidance: float
) -> tuple[Tensor, list[Tensor]]:
    """(z_end, times of every network call) of the recipe's solver and grid on the time code as
    it is defined, 4 - 8t.
    """
    times: list[Tensor] = []

    def velocity(x: Tensor, t: Tensor, null: Tensor) -> Tensor:
        times.append(t)
        return model.velocity(x, 4.0 - 8.0 * t, null)

    return integrate(
        config.solver, guided(velocity, guidance), z0, time_grid(config.grid, config.steps)
    ), times


@torch.no_grad()
def latent_metrics(
    model: FlowModel, config: SampleConfig, batch: ProbeBatch, z0: Tensor
) -> tuple[dict[str, float], Tensor]:
    """sampler/{nmse,nmse_plain,gap} and time/sample_gap on the probe batch; also the sampler's
    z_end.
    """
    with hearing_codes(model) as heard:
        z_end = generate_latents(model, batch.captions, config, batch.noise)
    own, times = own_latents(model, z0, config, config.guidance_scale)
    plain = own if config.guidance_scale == 1.0 else own_latents(model, z0, config, 1.0)[0]
    rows = {
        "sampler/nmse": float(per_sample_mse(z_end, batch.z1).mean()) / batch.variance,
        "sampler/nmse_plain": float(per_sample_mse(plain, batch.z1).mean()) / batch.variance,
        "sampler/gap": float(per_sample_mse(z_end, own).mean()) / batch.variance,
    }
    if not isinstance(config.solver, Dopri5Solver):  # its own steps depend on the field
        rows["time/sample_gap"] = code_gap(heard, times)
    return rows, z_end


@torch.no_grad()
def picture_metrics(
    model: FlowModel,
    autoencoder: Autoencoder,
    config: SampleConfig,
    prompts: Sequence[str],
    seed: int,
) -> tuple[dict[str, float], np.ndarray]:
    """sampler/psnr of `generate` against own integration and decoding, and against decoding a
    latent put through `sample` again.

    Also the sampler's pictures, uint8 (B, H, W, 3).
    """
    device = next(model.velocity.parameters()).device
    made = generate(model, autoencoder, prompts, config, seed)
    _, z0 = model.source(prompts, source_noise(model, len(prompts), seed, device))
    z_end, _ = own_latents(model, z0, config, config.guidance_scale)
    again = autoencoder.sample(
        Moments(z_end, torch.full_like(z_end, -30.0)), torch.zeros_like(z_end)
    )
    own = from_pictures(autoencoder.decode(z_end))
    resampled = from_pictures(autoencoder.decode(again))
    return {
        "sampler/psnr": same_pictures(made, own),
        "sampler/psnr_resampled": same_pictures(made, resampled),
    }, made


def strip_psnr(strip: Path, pictures: np.ndarray) -> float | None:
    """How close pictures (B, H, W, 3) are to the sample strip that training wrote; None where
    the strip shows others.
    """
    written = np.asarray(Image.open(strip).convert("RGB"))
    side_by_side = np.concatenate(list(pictures), axis=1)
    return same_pictures(written, side_by_side) if written.shape == side_by_side.shape else None
