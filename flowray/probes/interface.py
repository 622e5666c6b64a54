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

STALE = 0.01  # a half-precision cache is within 1e-7


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
    return latent_fit(_cached(cached, indices), _means(autoencoder, fresh))


def _cached(cached: LatentSet, indices: np.ndarray) -> Tensor:
    moments = cached.moments(indices)
    return cached.scale.sample(moments, torch.zeros_like(moments.mean))


def _means(autoencoder: Autoencoder, fresh: Moments) -> Tensor:
    return autoencoder.sample(fresh, torch.zeros_like(fresh.mean)).cpu()


def stale_share(
    autoencoder: Autoencoder, cached: LatentSet, fresh: Moments, indices: np.ndarray, key: str
) -> dict[str, float]:
    """key: share of samples whose cached latent is not what encoding the picture gives, by more
    than STALE of the latents' variance.
    """
    z = _means(autoencoder, fresh)
    off = (_cached(cached, indices) - z).square().flatten(1).mean(1)
    return {key: float((~(off < STALE * z.var())).float().mean())}


def batch_slope(z1: Tensor, autoencoder: Autoencoder, fresh: Moments) -> float:
    """latent/batch_slope: of a training batch's drawn z1 on the fresh means of its pictures."""
    return latent_fit(z1, _means(autoencoder, fresh))["latent/fit_slope"]


def unusual(z: Tensor) -> Tensor:
    """Statistics of latents (N, C, H, W) that broken ones have otherwise, (N, features): mean and
    size of every channel, and how rough it is.
    """
    size = z.std((2, 3)).clamp_min(1e-6)
    steps = z.diff(dim=3).square().mean((2, 3)) + z.diff(dim=2).square().mean((2, 3))
    return torch.cat([z.mean((2, 3)), size.log(), (steps.sqrt() / size).clamp_min(1e-6).log()], 1)


def oddest(features: Tensor, z: Tensor, count: int) -> Tensor:
    """Half of `count` rows by their oddest of features (N, features), in median deviations; the
    others by what the others' principal components leave of latents z (N, dims).
    """
    off = (features - features.nanmedian(0).values).abs()
    odd = (off / (off.nanmedian(0).values + 1e-6)).nan_to_num(torch.inf).amax(1)
    whole = torch.where(z.isfinite(), z, 0.0)
    centred = whole - whole.mean(0)
    with torch.random.fork_rng(devices=[]):  # it draws, and training draws on behind it
        torch.default_generator.manual_seed(0)
        _, _, components = torch.svd_lowrank(centred, q=min(64, max(len(z) // 8, 1)), niter=2)
    rest = (centred - centred @ components @ components.T).norm(dim=1)
    half = min(max(count // 2, 1), len(z))
    return torch.cat([odd.topk(half).indices, rest.topk(half).indices]).unique()


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
