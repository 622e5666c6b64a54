"""Random numbers as a function of (seed, step, stream, global sample position).

Each call draws for the whole global batch and keeps this rank's rows: the numbers do not depend on the world size, the number
of workers or a resume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """The draws of one step. rows: this rank's slice of the global batch of `batch` samples."""

    seed: int
    step: int
    batch: int
    rows: slice
    device: torch.device

    def _generator(self, stream: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}/{self.step}/{stream}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (rows, *shape), fp32."""
        return torch.randn((self.batch, *shape), generator=self._generator(stream), device=self.device)[self.rows]

    def uniform_batch(self, stream: str) -> Tensor:
        """Uniform numbers in [0, 1) for the whole global batch, (batch,)."""
        return torch.rand((self.batch,), generator=self._generator(stream), device=self.device)

    def uniform(self, stream: str) -> Tensor:
        """This rank's uniform numbers in [0, 1), (rows,)."""
        return self.uniform_batch(stream)[self.rows]


def null_partners(u: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Null samples of a global batch and whose target each sample gets.

    u: uniform numbers (B,). Returns (null, partner): null (B,) bool; partner (B,) int64, the sample itself where it is not
    null, the next null sample (cyclically) where it is. A lone null sample borrows the next sample's target; with B > 1 no
    null sample keeps its own.
    """
    null = u < probability
    partner = torch.arange(len(u), device=u.device)
    chosen = partner[null]
    if len(chosen) == 1:
        partner[null] = (chosen + 1) % len(u)
    elif len(chosen) > 1:
        partner[null] = chosen.roll(-1)
    return null, partner
