"""The autoencoder's interface: is its scale applied once and undone once, is its posterior sampled,
are the latents really its own.

The scale is written out here once more, (raw - shift) * scale, so that a fault in the code which
training uses cannot hide in it.
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
# root mean square of ln scale below which applying the scale twice cannot be told from once
FLAT_SCALE = 0.1


def scaled(scale: LatentScale, raw: Tensor) -> Tensor:
    """A raw latent (B, C, H, W) as the flow should see it."""
    return (raw - over_channels(scale.shift, raw)) * over_channels(scale.scale, raw)


def _logs(scale: LatentScale, channels: int) -> Tensor:
    """ln of every channel's scale, (C,) fp64."""
    values = scale.scale if isinstance(scale.scale, tuple) else (scale.scale,) * channels
    return torch.tensor(values, dtype=torch.float64).log()


def _tells(logs: Tensor) -> bool:
    return float(logs.square().mean().sqrt()) > FLAT_SCALE


def scale_power(factors: Tensor, scale: LatentScale) -> tuple[float, float] | None:
    """(k, away): factors (C,) come closest to each channel's own scale to the power k, and are off
    it by |ln| `away` at most.

    A scale for each channel tells a scale applied again (away 0) from any other factor. None where
    the scales are too near 1, or a factor is not above 0.
    """
    logs = _logs(scale, len(factors))
    if not (_tells(logs) and bool((factors > 0).all())):
        return None
    own = factors.double().cpu().log()
    power = float(own @ logs / logs.square().sum())
    return power, float((own - power * logs).abs().max())


def _line(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(slope of every channel (C,), what is left of the centred a) of the least-squares line a ~
    slope * b + intercept per channel.
    """
    a, b = (x.double() - x.double().mean(dim=(0, 2, 3), keepdim=True) for x in (a, b))
    slopes = (a * b).sum(dim=(0, 2, 3)) / b.square().sum(dim=(0, 2, 3)).clamp_min(1e-30)
    return slopes, a - slopes[:, None, None] * b


def latent_fit(cached: Tensor, fresh: Tensor, scale: LatentScale) -> dict[str, float]:
    """latent/fit_*: least squares cached ~ slope * fresh + intercept per channel, both (B, C, H,
    W).

    slope (mean over channels) 1 and no residual where the cache holds what the autoencoder makes.
    power, away: the slopes as powers of the channels' scales, 1 where the scale is applied twice,
    -1 never, -2 inverted. A residual: another autoencoder, or other pictures.
    """
    slopes, rest = _line(cached, fresh)
    spread = cached.double().var(dim=(0, 2, 3), unbiased=False).mean().clamp_min(1e-30)
    rows = {
        "latent/fit_slope": float(slopes.mean()),
        "latent/fit_residual": float(rest.square().mean() / spread),
    }
    if (power := scale_power(slopes, scale)) is not None:
        rows["latent/fit_power"], rows["latent/fit_away"] = power
    return rows


def expected_norm(moments: Moments, scale: LatentScale) -> float:
    """Root mean over samples of E ||z1||^2, posterior noise included, of moments (B, C, H, W)."""
    spread = (
        0.0
        if scale.deterministic
        else moments.logvar.float().exp() * over_channels(scale.scale, moments.logvar) ** 2
    )
    return float(
        (scaled(scale, moments.mean.float()).square() + spread).flatten(1).sum(1).mean().sqrt()
    )


def noise_ratio(z1: Tensor, moments: Moments, scale: LatentScale) -> float | None:
    """rms(z1 - scaled mean) / rms(scale * posterior std): 1 for a drawn latent, 0 for a bare
    mean; None where the posterior is a point.
    """
    if scale.deterministic:
        return None
    spread = torch.exp(0.5 * moments.logvar.float()) * over_channels(scale.scale, moments.logvar)
    away = z1.float() - scaled(scale, moments.mean.float())
    return float((away.square().mean() / spread.square().mean().clamp_min(1e-30)).sqrt())


def line_noise_ratio(z1: Tensor, moments: Moments, scale: LatentScale) -> float | None:
    """noise_ratio about the line that z1 follows on the scaled mean, so that a wrong scale does
    not hide a bare mean.
    """
    if scale.deterministic:
        return None
    slopes, rest = _line(z1, scaled(scale, moments.mean.float()))
    spread = (
        torch.exp(0.5 * moments.logvar.double())
        * over_channels(scale.scale, moments.logvar)
        * slopes[:, None, None]
    )
    return math.sqrt(float(rest.square().mean() / spread.square().mean().clamp_min(1e-30)))


def cache_metrics(
    scale: LatentScale, cached: LatentSet, fresh: Moments, indices: np.ndarray
) -> dict[str, float]:
    """Cached z1 (posterior mean, scaled as training scales it) against the moments of a fresh
    encoding of the same pictures.
    """
    mean, logvar = cached.moments(indices)
    z = cached.scale.sample(Moments(mean, logvar), torch.zeros_like(mean))
    return latent_fit(z, scaled(scale, fresh.mean.float()).cpu(), scale)


@torch.no_grad()
def round_trips(
    autoencoder: Autoencoder, pictures: Tensor, moments: Moments, noise: Tensor, few: int
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """vae/*: PSNR of the round trip of pictures (B, 3, H, W), and of the first `few` latents
    decoded with the scale mishandled.

    Returns (rows, `few` pictures by name): recon_wrap the wrapper's, recon_direct without
    unscaling, recon_twice unscaled twice.
    """
    z, factor = (
        autoencoder.sample(moments, noise),
        over_channels(autoencoder.scale.scale, moments.mean),
    )
    whole, flat = autoencoder.decode(z), pictures.mean(dim=(2, 3), keepdim=True).expand_as(pictures)
    rows = {"vae/psnr": psnr(whole, pictures), "trivial/vae/psnr": psnr(flat, pictures)}
    pictures, z, raw = pictures[:few], z[:few], moments.mean[:few]
    made = {
        "recon_wrap": whole[:few],
        "recon_direct": autoencoder.net.decode(z).sample,
        "recon_twice": autoencoder.decode(autoencoder.scale.unscale(z)),
    }
    rows |= {
        f"vae/psnr_{name}": psnr(made[f"recon_{name}"], pictures) for name in ("direct", "twice")
    }
    rows["vae/psnr_raw"] = psnr(autoencoder.net.decode(raw).sample, pictures)
    by_power = {0: psnr(made["recon_wrap"], pictures)} | {
        k: psnr(autoencoder.decode(z * factor**k), pictures) for k in POWERS
    }
    rows |= {f"vae/psnr_sf{k}": by_power[k] for k in POWERS}
    if _tells(_logs(autoencoder.scale, z.shape[1])):
        best = max(by_power, key=lambda k: by_power[k])
        rows["vae/scale_power"] = float(best if by_power[best] > by_power[0] + CLEARLY else 0)
    return rows, made


@torch.no_grad()
def mode_metrics(autoencoder: Autoencoder, pictures: Tensor) -> dict[str, float]:
    """vae/training: a module is in train mode; vae/repeat_error: relative difference of two
    encodings of the same pictures.
    """
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
