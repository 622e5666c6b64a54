"""Whether shots are copies of training pictures: nearer to one than new pictures are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NUMBERS = 2**22  # of the training latents at most: 16 MiB
NEW = 512  # held-out latents that say how near new pictures lie


@dataclass(frozen=True)
class Seen:
    """What training has seen: latents (M, dims), and the distance to the nearest of them below
    which lies 1 % of the held-out ones.
    """

    latents: Tensor
    near: Tensor

    def copies(self, z: Tensor) -> float:
        """Share of latents (B, C, H, W) that are nearer; 0.01 as in the data."""
        return float((nearest(z, self.latents) < self.near).float().mean())


def nearest(z: Tensor, among: Tensor) -> Tensor:
    """Distance of each latent (B, C, H, W) to the nearest among others (M, dims), (B,)."""
    return torch.cdist(z.float().flatten(1), among).amin(1)


def make_seen(training: Tensor, new: Tensor) -> Seen:
    """Of training latents and held-out ones, both (N, C, H, W)."""
    latents = training.float().flatten(1)
    return Seen(latents, torch.quantile(nearest(new, latents), 0.01))
