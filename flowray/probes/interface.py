"""The autoencoder's interface: are the cached latents really its own, and what becomes of a picture
that goes through it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flowray.model.autoencoder import Autoencoder
from flowray.model.latent import Moments
from flowray.probes.vae import psnr, round_trip
from flowray.store.latents import LatentSet


def latent_fit(cached: Tensor, fresh: Tensor) -> dict[str, float]:
    """latent/fit_*: least squares cached ~ slope * fresh + intercept per channel, both (B, C, H,
    W).

    slope (mean over channels) 1 and no residual where the cache holds what the autoencoder makes. A
    residual: another autoencoder, or other pictures.
    """
    a, b = (x.double() - x.double().mean(dim=(0, 2, 3), keepdim=True) for x in (cached, fresh))
    slopes = (a * b).sum(dim=(0, 2, 3)) / b.square().sum(dim=(0, 2, 3)).clamp_min(1e-30)
    rest, spread = a - slopes[:, None, None] * b, a.square().mean().clamp_min(1e-30)
    return {
        "latent/fit_slope": float(slopes.mean()),
        "latent/fit_residual": float(rest.square().mean() / spread),
    }


def cache_metrics(
    autoencoder: Autoencoder, cached: LatentSet, fresh: Moments, indices: np.ndarray
) -> dict[str, float]:
    """Cached z1 (posterior mean, scaled as training scales it) against the moments of a fresh
    encoding of the same pictures.
    """
    mean, logvar = cached.moments(indices)
    z = cached.scale.sample(Moments(mean, logvar), torch.zeros_like(mean))
    return latent_fit(z, autoencoder.sample(fresh, torch.zeros_like(fresh.mean)).cpu())


@torch.no_grad()
def round_trips(
    autoencoder: Autoencoder, pictures: Tensor, moments: Moments, noise: Tensor, few: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """vae/*: PSNR of the round trip of pictures (B, 3, H, W), and of the first `few` latents
    decoded with the scale mishandled.

    Returns (rows, `few` pictures by name): recon_wrap the wrapper's, recon_direct without
    unscaling, recon_twice unscaled twice.
    """
    rows, whole = round_trip(autoencoder, pictures, moments, noise)
    pictures, z = pictures[:few], autoencoder.sample(moments, noise)[:few]
    made = {
        "recon_wrap": whole[:few],
        "recon_direct": autoencoder.net.decode(z).sample,
        "recon_twice": autoencoder.decode(autoencoder.scale.unscale(z)),
    }
    rows |= {
        f"vae/psnr_{name}": psnr(made[f"recon_{name}"], pictures) for name in ("direct", "twice")
    }
    return rows, made


def same_pictures(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR in dB of pictures uint8 of one shape, at most 99 (equal)."""
    error = float(np.square(a.astype(np.float64) - b.astype(np.float64)).mean())
    return min(99.0, 10 * math.log10(255**2 / error)) if error > 0 else 99.0


def histogram(values: dict[str, Tensor], edges: Sequence[float]) -> dict[str, list[float]]:
    """Densities of the values over bins, `x` their centres; what lies outside is counted in no
    bin.
    """
    bounds = np.asarray(edges)
    rows = {"x": ((bounds[1:] + bounds[:-1]) / 2).tolist()}
    for name, tensor in values.items():
        flat = tensor.detach().float().flatten().cpu().numpy()
        rows[name] = (
            np.histogram(flat, bounds)[0] / (max(len(flat), 1) * np.diff(bounds))
        ).tolist()
    return rows
