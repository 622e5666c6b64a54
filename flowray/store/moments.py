"""Moments of posteriors as latent shards store them, and what rounding them costs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowray.config.train import MomentsKind
from flowray.model.latent import LatentScale, Moments, over_channels

TOLERANCE = 0.01  # of a channel's std
NOT_FINITE, BEYOND, ROUNDED = "not finite", "beyond half precision", "rounded"
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Stored(NamedTuple):
    """rows: (B, 2C, H, W) as they are written, mean and log-variance stacked on channels; bf16 as
    its bits, uint16. errors: (B,) as `rounding_errors` has them. faults: (B,) cause and message of
    a sample that cannot be stored so.
    """

    rows: np.ndarray
    errors: np.ndarray
    faults: list[tuple[str, str] | None]


def stored(moments: Moments, kind: MomentsKind, scale: LatentScale) -> Stored:
    """Moments (B, C, H, W) fp32 in the kind of number that a recipe asks for."""
    both = torch.cat([moments.mean, moments.logvar], dim=1)
    rows = both.to(_DTYPES[kind])
    errors = rounding_errors(moments, rows, scale).cpu().numpy()
    whole, finite = (each.isfinite().flatten(1).all(1).tolist() for each in (both, rows))
    checks = zip(whole, finite, errors.tolist(), strict=True)
    faults = [_fault(*check, kind) for check in checks]
    here = rows.cpu()
    if kind == "bf16":
        return Stored(here.view(torch.int16).numpy().view(np.uint16), errors, faults)
    return Stored(here.numpy(), errors, faults)


def as_fp32(rows: np.ndarray) -> Tensor:
    """What `Stored.rows` holds, fp32."""
    if rows.dtype == np.uint16:  # numpy has no bf16
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(rows).float()


def rounding_errors(moments: Moments, rows: Tensor, scale: LatentScale) -> Tensor:
    """How far `rows` (B, 2C, H, W) move z1 from what these moments make, (B,): of each channel the
    RMS over its cells, mean and std of the noise together, by the channel's std; the largest.

    The std is 1, as `scale` makes it, or that of the sample's channel where it is larger. NaN where
    something is not finite.
    """
    mean, logvar = rows.float().chunk(2, dim=1)
    factor = over_channels(scale.scale, mean)
    moved = ((mean - moments.mean) * factor).square()
    spread = (moments.mean * factor).var((2, 3), correction=0)
    if not scale.deterministic:
        std = (0.5 * moments.logvar).exp()
        moved = moved + (((0.5 * logvar).exp() - std) * factor).square()
        spread = spread + (std * factor).square().mean((2, 3))
    return (moved.mean((2, 3)).sqrt() / spread.sqrt().clamp_min(1)).amax(1)


def _fault(whole: bool, finite: bool, error: float, kind: MomentsKind) -> tuple[str, str] | None:
    if not whole:
        return NOT_FINITE, "the autoencoder's latents of it are NaN or infinite"
    if not finite:
        return BEYOND, f"its latents are beyond {kind}; data.moments=bf16 holds them"
    if not error <= TOLERANCE:
        return ROUNDED, (
            f"{kind} moves its latents by {error:.2%} of a channel's std, allowed is"
            f" {TOLERANCE:.0%}; data.moments=fp32 keeps them"
        )
    return None
