"""Which sample stands at which place of the training stream: a pure function of (seed, position).

A position counts samples from the start of training over all ranks: step s of batch B takes
positions s * B to (s + 1) * B - 1 and each rank a slice of them. So the order does not know the
number of ranks, and resuming needs nothing but the step, and where a resume has changed the batch
at which steps it has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LISTED = 2**17  # samples up to which an epoch's permutation is an array: 1 MiB, drawn in 4 ms
_ROUNDS = 8  # with 4, samples that stand a row of the grid apart are correlated; with 5 not seen


@dataclass(frozen=True)
class BatchSizes:
    """How many samples the steps of a run take. changes: (step, size), the first at step 0 and each
    later than the one before; from its step on a step takes `size` samples.
    """

    changes: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        steps = [step for step, _ in self.changes]
        if steps[:1] != [0] or sorted(set(steps)) != steps:
            raise ValueError(f"changes {self.changes} must begin at step 0 and rise")
        if min(size for _, size in self.changes) < 1:
            raise ValueError(f"batch sizes must be positive, got {self.changes}")

    @classmethod
    def of(cls, size: int) -> BatchSizes:
        """Of a run that has changed nothing."""
        return cls(((0, size),))

    def changed(self, step: int, size: int) -> BatchSizes:
        """These up to `step`, and `size` from there on."""
        kept = tuple(change for change in self.changes if change[0] < step)
        return BatchSizes(kept if kept and kept[-1][1] == size else (*kept, (step, size)))

    def at(self, step: int) -> int:
        """How many samples a step >= 0, counted from 0, takes."""
        return [size for start, size in self.changes if start <= step][-1]

    def seen(self, step: int) -> int:
        """How many samples all steps before `step` take: the position of its first one."""
        ends = [*(start for start, _ in self.changes[1:]), step]
        return sum(
            size * max(min(end, step) - start, 0)
            for (start, size), end in zip(self.changes, ends, strict=True)
        )


class CipherPermutation:
    """A permutation of `size` numbers that is computed where it is asked for: of 10^7 it takes
    0.2 MB, not 80 MB, and no time ahead.

    A number stands in a grid of a x b >= size, a and b near the root of size; rounds of a
    generalised Feistel network move its row by a random function of its column and its column by
    one of its row, and what lands beyond `size` goes through again until it lands within (Black &
    Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). The round functions are drawn
    from PCG64(key): tables of a or b numbers.
    """

    def __init__(self, size: int, key: list[int]):
        self.size = size
        self._rows = math.isqrt(size - 1) + 1
        self._columns = -(-size // self._rows)
        sides = (self._rows, self._columns)
        draws = np.random.Generator(np.random.PCG64(key))
        self._moves = [draws.integers(sides[i % 2], size=sides[1 - i % 2]) for i in range(_ROUNDS)]

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        """What stands at int64 places (any shape) in [0, size)."""
        found = self._once(places)
        while (beyond := found >= self.size).any():
            found[beyond] = self._once(found[beyond])
        return found

    def _once(self, numbers: np.ndarray) -> np.ndarray:
        row, column = np.divmod(numbers, self._columns)
        for i, moves in enumerate(self._moves):
            if i % 2:
                column = (column + moves[row]) % self._columns
            else:
                row = (row + moves[column]) % self._rows
        return row * self._columns + column


class EpochOrder:
    """Maps global positions to sample indices; every epoch is its own permutation of `size`
    samples, drawn from [seed, epoch]: an array up to LISTED samples, a CipherPermutation above.
    """

    KEPT = 2  # permutations held: a batch may straddle two epochs

    def __init__(self, size: int, seed: int):
        if size < 1 or seed < 0:
            raise ValueError(f"size {size} must be positive and seed {seed} not negative")
        self.size, self.seed = size, seed
        self._kept: dict[int, np.ndarray | CipherPermutation] = {}

    def epoch(self, epoch: int) -> np.ndarray | CipherPermutation:
        """The permutation of one epoch, to be indexed with places in it; do not write to it."""
        if epoch not in self._kept:
            while len(self._kept) >= self.KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[epoch] = self._drawn([self.seed, epoch])
        return self._kept[epoch]

    def _drawn(self, key: list[int]) -> np.ndarray | CipherPermutation:
        if self.size > LISTED:
            return CipherPermutation(self.size, key)
        return np.random.Generator(np.random.PCG64(key)).permutation(self.size)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 sample indices of int positions (any shape), each position >= 0."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError("positions count from 0")
        epochs, places = np.divmod(positions, self.size)
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self.epoch(int(epoch))[places[here]]
        return indices


def evenly(count: int, most: int) -> np.ndarray:
    """At most `most` of the samples 0 to count - 1, evenly spread, rising, int64: a set may be
    sorted by what it shows.
    """
    return np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)
