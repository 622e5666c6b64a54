"""Which sample stands at which place of the training stream: a pure function of (seed, position).

A position counts samples from the start of training over all ranks: step s of batch B takes
positions s * B to (s + 1) * B - 1 and each rank a slice of them. So the order does not know the
number of ranks, and resuming needs nothing but the step.
"""

from __future__ import annotations

import numpy as np


class EpochOrder:
    """Maps global positions to sample indices; every epoch is its own permutation of `size`
    samples, drawn from [seed, epoch].
    """

    KEPT = 2  # permutations held: a batch may straddle two epochs

    def __init__(self, size: int, seed: int):
        if size < 1 or seed < 0:
            raise ValueError(f"size {size} must be positive and seed {seed} not negative")
        self.size, self.seed = size, seed
        self._kept: dict[int, np.ndarray] = {}

    def epoch(self, epoch: int) -> np.ndarray:
        """The permutation (size,) int64 of one epoch; do not write to it."""
        if epoch not in self._kept:
            while len(self._kept) >= self.KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[epoch] = np.random.Generator(
                np.random.PCG64([self.seed, epoch])
            ).permutation(self.size)
        return self._kept[epoch]

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
