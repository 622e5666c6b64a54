"""The noise-free linear path from a text latent z0 (t = 0) to an image latent z1 (t = 1), CrossFlow
(arXiv 2412.15213).

psi(t)    = (1 + t (rho - 1)) x0 + t x1        rho = sigma_min / sigma_max
Dt_psi(t) = (rho - 1) x0 + x1                   constant in t
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowray.flow import expect

LATENT = "(B, C, H, W)"
SOURCE_GRADS = ("full", "path", "none")


@dataclass(frozen=True)
class PathSample:
    """A batch on the path: x0, x1, xt, v_target are (B, C, H, W) fp32, t is (B,) fp32."""

    x0: Tensor
    x1: Tensor
    t: Tensor
    xt: Tensor
    v_target: Tensor


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1) to broadcast against a latent."""
    return t.view(-1, *[1] * (like.ndim - 1))


def psi(t: Tensor, x0: Tensor, x1: Tensor, rho: float) -> Tensor:
    """Point of the path at times t (B,), in fp32. TypeError or ValueError as `sample_path` has."""
    expect.alike(LATENT, x0=x0, x1=x1)
    expect.times(t, len(x0))
    s = expand(t.float(), x0)
    return (1 + s * (rho - 1)) * x0.float() + s * x1.float()


def velocity_target(x0: Tensor, x1: Tensor, rho: float) -> Tensor:
    """d psi / dt, the same at every t. ValueError for latents of different shapes."""
    expect.alike(LATENT, x0=x0, x1=x1)
    return (rho - 1) * x0.float() + x1.float()


def sample_path(
    t: Tensor, x0: Tensor, x1: Tensor, rho: float, source_grad: str = "full"
) -> PathSample:
    """Points and targets at times t (B,) in [0, 1].

    source_grad says how a loss on the sample reaches x0: `full` through x_t and the target, `path`
    through x_t only, `none` not at all.

    Times outside [0, 1] or not 1-D, latents of different shapes (they might broadcast) and an
    unknown source_grad raise ValueError, other types TypeError.
    """
    expect.one_of("source_grad", source_grad, SOURCE_GRADS)
    expect.alike(LATENT, x0=x0, x1=x1)
    x0, x1 = x0.float(), x1.float()
    if source_grad == "none":
        x0 = x0.detach()
    target_x0 = x0.detach() if source_grad == "path" else x0
    return PathSample(x0, x1, t, psi(t, x0, x1, rho), velocity_target(target_x0, x1, rho))


def time_code(t: Tensor) -> Tensor:
    """What conditions the network: 4 - 8 t, (B,) in [-4, 4], of times (B,) in [0, 1].

    Some code calls it `log_snr`; it is not the path's, and it falls towards the image.
    """
    expect.times(t)
    return 4.0 - 8.0 * t.float()


def path_log_snr(t: Tensor) -> Tensor:
    """The path's own log-SNR, lambda = 2 ln(t / (1 - t)), of times (B,) in [0, 1]."""
    expect.times(t)
    return 2 * torch.logit(t.float())
