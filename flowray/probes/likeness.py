"""Pictures that are nearly the same: within a set, and between held-out and training pictures.

How near is near is asked of the set itself: two latents that lie closer than two draws from one
picture's posterior are one picture for training.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIMS = 1024  # of a latent at most, evenly spread
FAR = 0.03  # of the distance of any two pictures, where a posterior is (almost) a point
ROWS = 512  # compared at once


def spread_dims(z: Tensor) -> Tensor:
    """Latents (N, ...) as (N, dims) of at most DIMS dims."""
    flat = z.float().flatten(1)
    places = torch.linspace(0, flat.shape[1] - 1, min(flat.shape[1], DIMS))
    return flat[:, places.round().long()]


def near_metrics(z: Tensor, sigma: Tensor, held_out: Tensor | None = None) -> dict[str, float]:
    """data/near_*, data/seen_share of training means z and their posterior's standard deviations
    (N, dims), and of held-out means.

    near_share: samples that are nearly an earlier one. near_typical: median distance to the nearest
    other over that of any two. seen_share: held-out samples that are nearly a training one.
    """
    whole = z.isfinite().all(1)
    flat, sigma = z[whole], sigma[whole]
    if len(flat) < 2:
        return {}
    # at random: copies may come at any regular distance
    other = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    typical = (flat - flat[other]).norm(dim=1).median()
    near = (2 * sigma.square().sum(1)).sqrt().clamp_min(FAR * float(typical))
    if held_out is not None:
        closest = torch.cdist(held_out, flat).amin(1)
        return {"data/seen_share": float((closest < near.median()).float().mean())}
    copies, nearest = [], []
    for start in range(0, len(flat), ROWS):
        rows = torch.arange(start, min(start + ROWS, len(flat)))
        apart = torch.cdist(flat[rows], flat)
        apart[torch.arange(len(rows)), rows] = torch.inf
        nearest.append(apart.amin(1))
        earlier = apart.masked_fill(torch.arange(len(flat)) > rows[:, None], torch.inf)
        copies.append(earlier.amin(1) < near[rows])
    return {
        "data/near_share": float(torch.cat(copies).float().mean()),
        "data/near_typical": float(torch.cat(nearest).median() / typical.clamp_min(1e-12)),
    }
