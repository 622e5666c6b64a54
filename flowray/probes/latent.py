"""Statistics of the latents and of the text posterior."""

from __future__ import annotations

import torch
from torch import Tensor

from flowray.flow.path import PathSample
from flowray.model.posterior import Posterior


def start_metrics(z0: Tensor) -> dict[str, float]:
    """z_init/* of drawn sources (B, C, H, W)."""
    return {
        "z_init/mean": float(z0.mean()),
        "z_init/var": float(z0.var(unbiased=False)),
        "z_init/std_per_dim_mean": float(z0.flatten(1).std(dim=0, unbiased=False).mean()),
    }


def posterior_metrics(posterior: Posterior) -> dict[str, float]:
    """mu/*, logvar/*, std/* of a text source's posterior."""
    mu, std = posterior.mu, posterior.std
    return {
        "mu/abs_mean": float(mu.abs().mean()),
        "mu/rms": float(mu.square().mean().sqrt()),
        "logvar/mean": float(posterior.logvar.mean()),
        "std/mean": float(std.mean()),
        "std/min": float(std.min()),
        "std/max": float(std.max()),
    }


def scale_metrics(path: PathSample) -> dict[str, float]:
    """Mean norms of z0, z1, x_t and v*; healthy is ||z1|| / ||z0|| within 3x."""
    latents = {"z0": path.x0, "z1": path.x1, "xt": path.xt, "v": path.v_target}
    norms = {name: float(x.flatten(1).norm(dim=1).mean()) for name, x in latents.items()}
    return {f"scale/{name}_norm": norm for name, norm in norms.items()} | {
        "scale/ratio": norms["z1"] / max(norms["z0"], 1e-12)
    }


def pairwise_cosine(x: Tensor) -> float:
    """Mean cosine over all pairs of different rows of x (B, ...)."""
    unit = torch.nn.functional.normalize(x.flatten(1), dim=1)
    count = len(unit)
    return float((unit.sum(0).square().sum() - count) / (count * (count - 1)))


def text_metrics(posterior: Posterior, noise: Tensor, other_noise: Tensor) -> dict[str, float]:
    """text/* over the rows of a posterior of different prompts.

    cos_mu on mu (near 1: the text does not arrive); cos on drawn z0 (low by noise alone
    where mu ~ 0); cos_same the same prompt with other noise; snr = variance of mu over prompts /
    mean sigma^2.
    """
    a, b = posterior.sample(noise), posterior.sample(other_noise)
    return {
        "text/cos_mu": pairwise_cosine(posterior.mu),
        "text/cos": pairwise_cosine(a),
        "text/cos_same": float(
            torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1).mean()
        ),
        "text/snr": float(
            posterior.mean.var(dim=0, unbiased=False).mean() / posterior.std.square().mean()
        ),
    }
