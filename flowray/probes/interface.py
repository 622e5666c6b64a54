"""The autoencoder's interface: is its scale applied once and undone once, is its posterior sampled, are the latents really its own.

The scale is written out here once more, (raw - shift) * scale, so that a fault in the code which training uses cannot hide in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import LatentScale, Moments, over_channels
from flowray.probes.vae import psnr
from flowray.store.latents import LatentSet

POWERS = (-2, -1, 1, 2)
CLEARLY = 1.0  # dB by which another power of the scale must decode better
FLAT_SCALE = 0.05  # |ln scale| below which applying the scale twice cannot be told from once


def scaled(scale: LatentScale, raw: Tensor) -> Tensor:
    """A raw latent (B, C, H, W) as the flow should see it."""
    return (raw - over_channels(scale.shift, raw)) * over_channels(scale.scale, raw)


def scale_number(scale: LatentScale) -> float:
    """The scale as one number, the geometric mean over channels."""
    values = scale.scale if isinstance(scale.scale, tuple) else (scale.scale,)
    return math.exp(sum(math.log(value) for value in values) / len(values))


def latent_fit(cached: Tensor, fresh: Tensor, scale: float) -> dict[str, float]:
    """latent/fit_*: least squares cached ~ slope * fresh + intercept per channel, both (B, C, H, W).

    slope 1 and no residual where the cache holds what the autoencoder makes; with s the scale, s: applied twice, 1/s: never,
    1/s^2: inverted. power k is the slope as s^k. A residual: another autoencoder, or other pictures.
    """
    a, b = (x.double() - x.double().mean(dim=(0, 2, 3), keepdim=True) for x in (cached, fresh))
    slope = float((a * b).sum() / b.square().sum().clamp_min(1e-30))
    residual = float((a - slope * b).square().sum() / a.square().sum().clamp_min(1e-30))
    rows = {"latent/fit_slope": slope, "latent/fit_residual": residual}
    if slope > 0 and abs(math.log(scale)) > FLAT_SCALE:
        rows["latent/fit_power"] = math.log(slope) / math.log(scale)
    return rows


def expected_norm(moments: Moments, scale: LatentScale) -> float:
    """Root mean over samples of E ||z1||^2, posterior noise included, of moments (B, C, H, W)."""
    spread = 0.0 if scale.deterministic else moments.logvar.float().exp() * over_channels(scale.scale, moments.logvar) ** 2
    return float((scaled(scale, moments.mean.float()).square() + spread).flatten(1).sum(1).mean().sqrt())


def noise_ratio(z1: Tensor, moments: Moments, scale: LatentScale) -> float | None:
    """rms(z1 - scaled mean) / rms(scale * posterior std): 1 for a drawn latent, 0 for a bare mean; None where the posterior is a point."""
    if scale.deterministic:
        return None
    spread = torch.exp(0.5 * moments.logvar.float()) * over_channels(scale.scale, moments.logvar)
    away = z1.float() - scaled(scale, moments.mean.float())
    return float((away.square().mean() / spread.square().mean().clamp_min(1e-30)).sqrt())


def line_noise_ratio(z1: Tensor, moments: Moments, scale: LatentScale) -> float | None:
    """noise_ratio about the line that z1 follows on the scaled mean, so that a wrong scale does not hide a bare mean."""
    if scale.deterministic:
        return None
    fit = latent_fit(z1, scaled(scale, moments.mean.float()), scale_number(scale))
    spread = torch.exp(0.5 * moments.logvar.float()) * over_channels(scale.scale, moments.logvar)
    rest = fit["latent/fit_residual"] * float((z1 - z1.mean(dim=(0, 2, 3), keepdim=True)).square().mean())
    return math.sqrt(rest) / max(abs(fit["latent/fit_slope"]) * float(spread.square().mean().sqrt()), 1e-30)


@torch.no_grad()
def cache_metrics(autoencoder: Autoencoder, cached: LatentSet, pictures: Tensor, indices: np.ndarray) -> dict[str, float]:
    """Cached z1 (posterior mean, scaled as training scales it) against a fresh encoding of the same pictures (B, 3, H, W)."""
    mean, logvar = cached.moments(indices)
    z = cached.scale.sample(Moments(mean, logvar), torch.zeros_like(mean))
    fresh = scaled(autoencoder.scale, autoencoder.encode_moments(pictures).mean.float()).cpu()
    return latent_fit(z, fresh, scale_number(autoencoder.scale))


@torch.no_grad()
def round_trips(autoencoder: Autoencoder, pictures: Tensor, noise: Tensor) -> tuple[dict[str, float], dict[str, Tensor]]:
    """vae/*: PSNR of the round trip through the wrapper and of the same latent decoded with the scale mishandled.

    Returns (rows, pictures by name): recon_wrap the wrapper's, recon_direct without unscaling, recon_twice unscaled twice.
    """
    moments = autoencoder.encode_moments(pictures)
    z, factor = autoencoder.sample(moments, noise), over_channels(autoencoder.scale.scale, moments.mean)
    made = {
        "recon_wrap": autoencoder.decode(z),
        "recon_direct": autoencoder.net.decode(z).sample,
        "recon_twice": autoencoder.decode(autoencoder.scale.unscale(z)),
    }
    rows = {"vae/psnr": psnr(made["recon_wrap"], pictures), "vae/psnr_direct": psnr(made["recon_direct"], pictures)}
    rows["vae/psnr_twice"] = psnr(made["recon_twice"], pictures)
    rows["vae/psnr_raw"] = psnr(autoencoder.net.decode(moments.mean).sample, pictures)
    flat = pictures.mean(dim=(2, 3), keepdim=True).expand_as(pictures)
    rows["trivial/vae/psnr"] = psnr(flat, pictures)
    by_power = {0: rows["vae/psnr"]} | {k: psnr(autoencoder.decode(z * factor**k), pictures) for k in POWERS}
    rows |= {f"vae/psnr_sf{k}": by_power[k] for k in POWERS}
    if abs(math.log(scale_number(autoencoder.scale))) > FLAT_SCALE:
        best = max(by_power, key=lambda k: by_power[k])
        rows["vae/scale_power"] = float(best if by_power[best] > by_power[0] + CLEARLY else 0)
    return rows, made


@torch.no_grad()
def mode_metrics(autoencoder: Autoencoder, pictures: Tensor) -> dict[str, float]:
    """vae/training: a module is in train mode; vae/repeat_error: relative difference of two encodings of the same pictures."""
    first, second = (autoencoder.encode_moments(pictures).mean for _ in range(2))
    return {
        "vae/training": float(any(module.training for module in autoencoder.net.modules())),
        "vae/repeat_error": float((first - second).norm() / first.norm().clamp_min(1e-12)),
    }


def same_pictures(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of pictures uint8 of one shape, at most 99 (equal)."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return min(99.0, 10 * math.log10(255**2 / error)) if error > 0 else 99.0


def histogram(values: dict[str, Tensor], edges: Sequence[float]) -> dict[str, list[float]]:
    """Densities of the values over bins, `x` their centres; what lies outside is counted in no bin."""
    bounds = np.asarray(edges)
    rows = {"x": ((bounds[1:] + bounds[:-1]) / 2).tolist()}
    for name, tensor in values.items():
        flat = tensor.detach().float().flatten().cpu().numpy()
        rows[name] = (np.histogram(flat, bounds)[0] / (max(len(flat), 1) * np.diff(bounds))).tolist()
    return rows
