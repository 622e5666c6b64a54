"""Statistics of z1 over a set of latents, and the variance that squared errors are told in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowray.data.order import evenly
from flowray.store.encode import ENCODE_BATCH, posterior_variance

if TYPE_CHECKING:
    from flowray.store.latents import LatentSet

STATISTICS = 4096  # samples that statistics are taken over, at most
LEAST = 1e-12


def squares(latents: LatentSet) -> Iterator[tuple[Tensor, Tensor]]:
    """z1 without its noise and the expected square of a drawn z1, (B, C, H, W) fp64 each, for at
    most STATISTICS samples, spread evenly over the set; those of one pair are of one size.
    """
    chosen = evenly(len(latents), STATISTICS)
    parts = np.array_split(chosen, -(-len(chosen) // ENCODE_BATCH))
    for indices in (alike for part in parts for alike in latents.of_one_size(part)):
        moments = latents.moments(indices)
        z = latents.scale.sample(moments, torch.zeros_like(moments.mean)).double()
        yield z, z.square() + posterior_variance(moments, latents.scale)


def variance_per_dim(latents: LatentSet) -> float:
    """Mean squared distance per dim of z1, posterior noise included, from the set's mean latent,
    which has a value for each channel and place. Latents of each size have a mean of their own;
    samples that are not finite are left out.
    """
    sums: dict[torch.Size, tuple[int, Tensor, Tensor]] = {}
    for z, square in squares(latents):
        finite = (z + square).isfinite().flatten(1).all(1)
        none = torch.zeros_like(z[0])
        count, total, whole = sums.get(none.shape, (0, none, none))
        added = total + z[finite].sum(0), whole + square[finite].sum(0)
        sums[none.shape] = count + int(finite.sum()), *added
    known = [each for each in sums.values() if each[0]]
    left = sum(float((whole - total.square() / count).sum()) for count, total, whole in known)
    return max(left / max(sum(count * total.numel() for count, total, _ in known), 1), LEAST)
