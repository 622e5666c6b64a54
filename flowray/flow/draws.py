"""Random numbers as a function of (seed, step, stream, global sample position).

Each call draws for the whole global batch and keeps this rank's rows: the numbers do not depend on
the world size, the number of workers or a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from flowray.flow import expect


def stream_seed(seed: int, step: int, stream: str) -> int:
    """A generator's seed, below 2^63, for one named stream of one step."""
    digest = hashlib.sha256(f"{seed}/{step}/{stream}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@dataclass(frozen=True)
class Draws:
    """The draws of one step. rows: this rank's slice of the global batch of `batch` samples."""

    seed: int
    step: int
    batch: int
    rows: slice
    device: torch.device

    def __post_init__(self) -> None:
        for name, low in (("seed", 0), ("step", 0), ("batch", 1)):
            expect.count(name, getattr(self, name), low)
        if not isinstance(self.rows, slice) or not len(range(*self.rows.indices(self.batch))):
            got = expect.described(self.rows)
            raise ValueError(f"rows: want a slice of the {self.batch} samples, got {got}")

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers (rows, *shape), fp32, on the device."""
        seed = stream_seed(self.seed, self.step, stream)
        generator = torch.Generator(self.device).manual_seed(seed)
        whole = torch.randn((self.batch, *shape), generator=generator, device=self.device)
        return whole[self.rows]

    def uniform_batch(self, stream: str) -> Tensor:
        """Uniform numbers in [0, 1) for the whole global batch, (batch,), on the CPU: the host
        chooses samples and captions by them, and would wait for a GPU to draw them.
        """
        generator = torch.Generator().manual_seed(stream_seed(self.seed, self.step, stream))
        return torch.rand((self.batch,), generator=generator)

    def uniform(self, stream: str) -> Tensor:
        """This rank's uniform numbers in [0, 1), (rows,), on the CPU."""
        return self.uniform_batch(stream)[self.rows]


def null_partners(u: Tensor, probability: float, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Null samples of a global batch and whose target each sample gets.

    u: uniform numbers (B,); samples: which data set sample stands at each place. Returns (null,
    partner): null (B,) bool; partner (B,) int64, the place itself where it is not null, the next
    null place (cyclically) where it is. A lone null place borrows from the next place. A batch that
    straddles two epochs may hold a sample twice: a partner that is the same sample is passed over
    for the next null place with another one, or the next place of any kind; only where the whole
    batch is one sample does a null place keep its own target.

    ValueError where u is not 1-D, probability not in [0, 1] or samples are not as many as u.
    """
    expect.floating("u", u, "(B,)", 1)
    expect.number("probability", probability, 0.0, 1.0)
    if len(samples) != len(u):
        raise ValueError(f"samples: want one for each of the {len(u)} places, got {len(samples)}")
    null = u < probability
    places = range(len(u))
    partner = list(places)
    chosen = null.nonzero().flatten().tolist()
    for rank, place in enumerate(chosen):
        candidates = chain(chosen[rank + 1 :], chosen[:rank], places[place + 1 :], places[:place])
        partner[place] = next(
            (other for other in candidates if samples[other] != samples[place]), place
        )
    return null, torch.tensor(partner, device=u.device)
